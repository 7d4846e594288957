"""The HTTP application: its paths and the functions that answer them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from generation.stream import Output
from serving.answers import Answer, ChatAnswer, TextAnswer
from serving.errors import ApiError, failure
from serving.event_stream import EventStream
from serving.feedback import FeedbackFields, FeedbackFile
from serving.generation_run import ClientLeft, GenerationRun, until_disconnect
from serving.metrics import Metrics
from serving.models import ModelPool
from serving.openai_api import ChatFields, Fields, GenerationFields, TextFields, parse_body
from serving.prompts import chat_requests, prefix_text, text_requests
from serving.security import Guard
from serving.settings import ServerSettings
from serving.static_files import static_files

log = logging.getLogger("jojo")
STATIC = Path(__file__).resolve().parent / "static"
CLIENT_LEFT = 499  # nginx's status for a client that closed the connection; HTTP has none


class Service:
    """The endpoints of one server, and the requests that are generating."""

    def __init__(self, pool: ModelPool, settings: ServerSettings):
        self.pool, self.settings = pool, settings
        self.metrics = Metrics()
        self.runs: set[GenerationRun] = set()
        self.ending = ""  # the reason why new requests are rejected, once the running ones have been aborted
        self.feedback_file = None if settings.feedback is None else FeedbackFile(settings.feedback)
        self.metrics.watch("jojo_waiting_texts", "Texts that wait for a row", lambda: pool.n_waiting)
        self.metrics.watch("jojo_rows_in_use", "Rows that generate a text", lambda: pool.rows_in_use)
        self.metrics.watch("jojo_rows", "Rows per model", lambda: settings.max_rows)
        self.metrics.watch("jojo_loaded_models", "Models in memory", lambda: len(pool.loaded))

    # --- facts ---

    async def health(self, request: Request) -> Response:
        is_ready = self.pool.is_ready
        return json_response({"status": "ok" if is_ready else "loading"}, 200 if is_ready else 503)

    async def metrics_text(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        cards = [card.as_dict() for card in self.pool.cards.values()]
        return json_response({"object": "list", "data": cards, "keeps_feedback": self.feedback_file is not None})

    async def model(self, request: Request) -> Response:
        return json_response(self.pool.card(request.path_params["id"]).as_dict())

    # --- feedback ---

    async def feedback(self, request: Request) -> Response:
        if self.feedback_file is None:
            raise ApiError(404, "this server keeps no feedback; start serve.py with --feedback FILE")
        fields = parse_body(FeedbackFields, await read_body(request, self.settings))
        fields.check()
        await self.feedback_file.keep(fields)
        return json_response({"id": fields.id, "object": "feedback"})

    # --- generation ---

    async def chat(self, request: Request) -> ASGIApp:
        fields = await self._fields(request, ChatFields)
        fields.check()
        card = self.pool.card(fields.model)
        requests, n_dropped = await asyncio.to_thread(chat_requests, fields, card, self.settings.max_rows)
        run = self._run(GenerationRun(self.pool, self.metrics, card, requests))
        return await self._answer(request, run, fields, ChatAnswer(card.id, requests, n_dropped))

    async def completion(self, request: Request) -> ASGIApp:
        fields = await self._fields(request, TextFields)
        fields.check()
        card = self.pool.card(fields.model)
        requests = await asyncio.to_thread(text_requests, fields, card, self.settings.max_rows)
        n = len(requests) // len(fields.prompts)
        rest = prefix_text(fields.prefix_ids or [], card.tokenizer)
        echoed = [prompt + rest for prompt in fields.prompts for _ in range(n)] if fields.echo else None
        run = self._run(GenerationRun(self.pool, self.metrics, card, requests))
        return await self._answer(request, run, fields, TextAnswer(card.id, requests, echoed))

    async def _fields(self, request: Request, kind: type[Fields]) -> Fields:
        body = await read_body(request, self.settings)
        if self.ending:
            raise ApiError(503, self.ending)
        return parse_body(kind, body)

    def _run(self, run: GenerationRun) -> GenerationRun:
        self.runs.add(run)
        run.on_close = lambda: self.runs.discard(run)
        return run

    async def _answer(self, request: Request, run: GenerationRun, fields: GenerationFields, answer: Answer) -> ASGIApp:
        headers = {"X-Dropped-Messages": str(answer.n_dropped)} if answer.n_dropped else {}
        if fields.stream:
            return EventStream(run, answer, self.settings.comment_s, fields.includes_usage, headers)
        try:
            outputs = await until_disconnect(request.receive, self._collect(run, answer))
            return json_response(answer.whole(outputs), headers=headers)
        except ClientLeft as error:
            return await self.client_left(request, error)
        finally:
            run.close()

    async def client_left(self, request: Request, error: Exception) -> Response:
        """The answer to a client that has closed the connection. Nobody reads it; the status is for the log."""
        self.metrics.cancelled.inc()
        return Response(status_code=CLIENT_LEFT)

    async def _collect(self, run: GenerationRun, answer: Answer) -> list[list[Output]]:
        outputs: list[list[Output]] = [[] for _ in answer.requests]
        async with contextlib.aclosing(run.outputs(self.settings.comment_s)) as found:
            async for arrived in found:
                answer.digest = run.digest
                for index, output in arrived:
                    answer.take(index, output)
                    outputs[index].append(output)
        return outputs

    def abort_all(self, message: str) -> None:
        """End with an error every request that is generating, and every request whose body is still arriving."""
        self.ending = message
        for run in list(self.runs):
            run.abort(message)


def create_app(service: Service) -> ASGIApp:
    """The whole application: `RequestLog` (log, unexpected errors) around `Guard` (security) around the endpoints."""
    files = static_files(STATIC)
    routes = [
        Route("/v1/models", service.models, methods=["GET"]),
        Route("/v1/models/{id:path}", service.model, methods=["GET"]),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/completions", service.completion, methods=["POST"]),
        Route("/v1/feedback", service.feedback, methods=["POST"]),
        Route("/health", service.health, methods=["GET"]),
        Route("/metrics", service.metrics_text, methods=["GET"]),
        Route("/", files, methods=["GET"]),
        Route("/static/{name}", files, methods=["GET"]),
    ]
    handlers = {ApiError: error_response, HTTPException: http_error_response, Exception: failure_response}
    app = Starlette(routes=routes, exception_handlers={**handlers, ClientDisconnect: service.client_left})
    app.router.redirect_slashes = False
    return RequestLog(Guard(app, service.settings), service.metrics)


class RequestLog:
    """The outermost ASGI application: answers errors, counts requests, and logs one line for each."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        started, status = time.perf_counter(), 0

        async def send_and_note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_and_note_status)
        except Exception:
            log.exception("a request failed; this is a bug")
            if not status:
                await failure().response()(scope, receive, send_and_note_status)
        finally:
            status = status or CLIENT_LEFT
            self.metrics.requests.labels(endpoint_label(scope), str(status)).inc()
            spent_ms = 1000 * (time.perf_counter() - started)
            path = json.dumps(scope["path"][:200])  # escapes everything that could forge or hide a line
            log.info("%s %s %d %.0f ms", scope["method"][:16], path, status, spent_ms)


def endpoint_label(scope: Scope) -> str:
    """The path for the metrics; all unknown paths share one label, so that clients cannot add labels."""
    path = scope["path"]
    known = ("/", "/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/feedback")
    return path if path in known else "other"


async def read_body(request: Request, settings: ServerSettings) -> bytes:
    """The body of a request. Raises ApiError 413 for one that is too large and 408 for one that arrives too slowly."""
    closing = {"Connection": "close"}  # the rest of the body is not read
    too_large = ApiError(413, f"the body has more than {settings.max_body_bytes} bytes", headers=closing)
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > settings.max_body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_s):
            async for piece in request.stream():
                body += piece
                if len(body) > settings.max_body_bytes:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body took more than {settings.body_s:g} s", headers=closing) from None
    return bytes(body)


def json_response(content: Mapping, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    body = json.dumps(content, ensure_ascii=False).encode()
    return Response(body, status, headers=dict(headers or {}), media_type="application/json")


async def failure_response(request: Request, error: Exception) -> Response:
    """The answer after a bug, which `RequestLog` logs, because Starlette raises the exception again."""
    return failure().response()


async def error_response(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def http_error_response(request: Request, error: Exception) -> Response:
    """Starlette's own errors, for unknown paths and methods, in OpenAI's layout."""
    assert isinstance(error, HTTPException)
    messages = {404: "there is no such path; docs/serving.md lists them", 405: "this path does not accept this method"}
    message = messages.get(error.status_code, error.detail)
    return ApiError(error.status_code, message, headers=error.headers).response()
