"""Server-sent events, stopped as soon as the client disconnects."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Mapping

from starlette.types import Receive, Scope, Send

from serving.answers import Answer
from serving.errors import ApiError, failure
from serving.generation_run import ClientLeft, GenerationRun, until_disconnect

log = logging.getLogger("jojo")
HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # json.dumps makes an encoder each time


def event(content: Mapping) -> bytes:
    """One server-sent event. JSON has no line breaks, so it needs no escaping."""
    return b"data: " + encode(content).encode() + b"\n\n"


class EventStream:
    """An ASGI response: the chunks of an answer as events, comments while there are none, and [DONE].

    An error after the stream has begun is sent as an event, too.
    """

    def __init__(
        self,
        run: GenerationRun,
        answer: Answer,
        comment_s: float,
        includes_usage: bool,
        headers: Mapping[str, str],
    ):
        self.run, self.answer, self.comment_s, self.includes_usage = run, answer, comment_s, includes_usage
        self.headers = {**HEADERS, **headers}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._send_all(send))
        except ClientLeft:
            self.run.metrics.cancelled.inc()
        finally:
            self.run.close()

    async def _send_all(self, send: Send) -> None:
        headers = [(name.lower().encode(), value.encode()) for name, value in self.headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async with contextlib.aclosing(self._events()) as events:
            async for piece in events:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncGenerator[bytes, None]:
        answer = self.answer
        more: dict = {"usage": None} if self.includes_usage else {}
        for index in range(len(answer.requests)):
            if opening := answer.opening(index):
                yield event(answer.envelope(answer.chunk_name, [opening], **more))
        try:
            async with contextlib.aclosing(self.run.outputs(self.comment_s)) as outputs:
                async for found in outputs:
                    answer.digest = self.run.digest
                    events = []
                    for index, output in found:
                        answer.take(index, output)
                        events += [
                            event(answer.envelope(answer.chunk_name, [choice], **more))
                            for choice in answer.chunk(index, output)
                        ]
                    if events or not found:
                        yield b"".join(events) or b": waiting\n\n"
            if self.includes_usage:
                yield event(answer.usage_chunk())
        except ApiError as error:
            yield b"data: " + error.body() + b"\n\n"
        except Exception:  # a bug; without an event the answer would look complete
            log.exception("a stream failed; this is a bug")
            yield b"data: " + failure().body() + b"\n\n"
        yield b"data: [DONE]\n\n"
