"""A client for servers with the OpenAI API: one answer per request, with retries after temporary errors.

Ollama, llama.cpp, vLLM, hosted services and Jojo's own serve.py have this API. Errors that may be temporary (too many
requests, a failing or silent server, a broken connection, broken JSON) are retried. The wait doubles with each retry,
is randomized within a factor of two so that clients do not all return at once, and is never shorter than the server's
Retry-After. Errors that concern every request (a wrong key, an unknown model, no credit) raise UserError.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from common.cli import UserError, first_cause
from data.knowledge.journal import Answer
from data.knowledge.plan import Request

if TYPE_CHECKING:
    import httpx2

TRANSIENT = {408, 409, 425, 429}  # and every 5xx
FOR_EVERY_REQUEST = {401, 402, 403, 404, 405}
NO_CREDIT = ("insufficient_quota", "billing", "insufficient balance", "exceeded your current quota")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
MAX_RETRY_AFTER_S = 3600.0


class RequestFailed(Exception):
    """A request that failed permanently, although others may succeed; the message says why."""


class Stopped(Exception):
    """A request that was not sent, or not sent again, because the run is stopping."""


class _Transient(Exception):
    """An error that may be temporary, and how long the server asks clients to wait."""

    def __init__(self, message: str, wait_s: float = 0.0):
        super().__init__(message)
        self.wait_s = wait_s


@dataclass(frozen=True)
class Retries:
    """How often a request is tried and how long the waits are, in seconds."""

    tries: int = 7
    first_wait_s: float = 1.0
    longest_wait_s: float = 60.0

    def wait_s(self, n_failed: int, asked_s: float, draw: Callable[[], float]) -> float:
        """The wait after `n_failed` tries: between half and all of a time that doubles, but at least `asked_s`."""
        whole = min(self.longest_wait_s, self.first_wait_s * 2 ** (n_failed - 1))
        return max(asked_s, whole * (0.5 + 0.5 * draw()))


@dataclass
class Client:
    """Sends requests to `api_url`. `sleep`, `clock` and `draw` are parameters so that tests need not wait."""

    api_url: str
    api_key: str | None
    model: str
    max_tokens: int
    temperature: float | None = None
    timeout_s: float = 600.0
    retries: Retries = Retries()
    sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep
    clock: Callable[[], float] = time.monotonic
    draw: Callable[[], float] = random.random
    n_retries: int = field(default=0, init=False)
    _is_reached: bool = field(default=False, init=False)
    _not_before: float = field(default=0.0, init=False)  # of all requests: the server asked every client to wait
    _limit_name: str = field(default="max_tokens", init=False)  # newer models of OpenAI call it max_completion_tokens

    async def ask(self, http: httpx2.AsyncClient, request: Request, stop: asyncio.Event) -> Answer:
        """The server's answer. Raises RequestFailed after the last try, and UserError if no request can succeed.

        Once `stop` is set, waits end and nothing is sent any more: raises Stopped.
        """
        for n_failed in range(1, self.retries.tries + 1):
            while (remaining_s := self._not_before - self.clock()) > 0:
                await self._wait(remaining_s, stop)
            if stop.is_set():
                raise Stopped
            try:
                reply = await self._post(http, request)
                return answer_in(reply, request.key, self.model, self.max_tokens)
            except _Transient as error:
                if n_failed == self.retries.tries:
                    raise RequestFailed(f"{error}, {n_failed} times") from error
                self.n_retries += 1
                wait_s = self.retries.wait_s(n_failed, error.wait_s, self.draw)
                if error.wait_s:
                    self._not_before = max(self._not_before, self.clock() + error.wait_s)
                await self._wait(wait_s, stop)
        raise AssertionError("unreachable")

    async def _wait(self, seconds: float, stop: asyncio.Event) -> None:
        waits = [asyncio.ensure_future(self.sleep(seconds)), asyncio.ensure_future(stop.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if stop.is_set():
            raise Stopped

    async def _post(self, http: httpx2.AsyncClient, request: Request) -> dict[str, Any]:
        """The JSON object that the server replies with. Raises _Transient, RequestFailed or UserError."""
        import httpx2

        limit_name = self._limit_name
        body: dict[str, Any] = {"model": self.model, "messages": request.messages, limit_name: self.max_tokens}
        if self.temperature is not None:
            body["temperature"] = self.temperature
        try:
            async with asyncio.timeout(self.timeout_s):
                response = await http.post(f"{self.api_url}/chat/completions", json=body)
        except TimeoutError as error:
            raise _Transient(f"no answer within {self.timeout_s:g} s") from error
        except httpx2.ConnectError as error:
            if not self._is_reached:
                raise not_reached(self.api_url) from error
            raise _Transient("the server refused the connection") from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise _Transient(f"the connection failed ({type(error).__name__})") from error
        self._is_reached = True
        if response.status_code == 400 and limit_name == "max_tokens" and "max_completion_tokens" in response.text:
            self._limit_name = "max_completion_tokens"
            return await self._post(http, request)
        return self._checked(response)

    def _checked(self, response: httpx2.Response) -> dict[str, Any]:
        status = response.status_code
        if status == 200:
            try:
                reply = response.json()
            except ValueError as error:
                raise _Transient("the server sent broken JSON") from error
            if isinstance(reply, dict):
                return reply
            raise _Transient("the server sent no JSON object")
        said = f"HTTP {status}: {server_message(response.text)}"
        if status in FOR_EVERY_REQUEST or (status == 429 and any(word in said.lower() for word in NO_CREDIT)):
            raise UserError(f"{self.api_url} answered {said}; {remedy(status, self.model)}")
        if status in TRANSIENT or status >= 500:
            wait_s = retry_after_s(response.headers)
            if wait_s > MAX_RETRY_AFTER_S:
                raise UserError(
                    f"{self.api_url} asks clients to wait {wait_s / 3600:.1f} hours ({said}); "
                    "run the same command again after that to continue"
                )
            raise _Transient(said, wait_s)
        if 300 <= status < 400:
            raise UserError(
                f"{self.api_url} redirects to {response.headers.get('location')}; use that address as --api_url"
            )
        raise RequestFailed(said)


def require_http() -> None:
    """Raise UserError unless the HTTP client is installed."""
    try:
        import httpx2  # noqa: F401
    except ImportError as error:
        raise UserError(
            "prepare-knowledge.py needs the package httpx2; run: pip install -r requirements-knowledge.txt"
        ) from error


def http_client(client: Client, concurrency: int) -> httpx2.AsyncClient:
    """The connections to the server; the environment's proxies are not used for a server on this machine."""
    import httpx2

    headers = {"Authorization": f"Bearer {client.api_key}"} if client.api_key else {}
    return httpx2.AsyncClient(
        headers=headers,
        timeout=httpx2.Timeout(None, connect=min(10.0, client.timeout_s)),  # `timeout_s` limits the whole request
        limits=httpx2.Limits(max_connections=concurrency),
        trust_env=urlsplit(client.api_url).hostname not in LOOPBACK,
        verify=urlsplit(client.api_url).scheme == "https",  # reading the certificates takes time
    )


def answer_in(reply: Mapping[str, Any], key: str, model: str, max_tokens: int) -> Answer:
    """The answer in the server's JSON object. Raises _Transient if it has none, as from some overloaded proxies."""
    try:
        choice = reply["choices"][0]
        message = choice["message"]
        content, refusal = message.get("content"), message.get("refusal")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise _Transient(f"no answer in the reply: {server_message(json.dumps(reply))}") from error
    usage = reply.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    return Answer(
        key,
        model,
        _text(content),
        _text(choice.get("finish_reason")) or "unknown",
        max_tokens,
        _count(counts.get("prompt_tokens")),
        _count(counts.get("completion_tokens")),
        _text(refusal),
    )


def _text(value: object) -> str:
    """A text of the reply without lone surrogates, which no file can hold; "" for anything else."""
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else ""


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def retry_after_s(headers: Mapping[str, str], now: Callable[[], float] = time.time) -> float:
    """The seconds that the server asks to wait: Retry-After in seconds or as a date; 0 if it does not ask."""
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name, "").strip()
        try:
            return max(0.0, float(value) * scale)
        except ValueError:
            pass
        if value:
            try:
                return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now())
            except ValueError:
                pass
    return 0.0


def server_message(body: str) -> str:
    """The error message in a server's reply, or the beginning of the reply, in one line."""
    try:
        found = json.loads(body)
    except ValueError:
        found = body
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(name):
            found = found[name]
    text = found if isinstance(found, str) else json.dumps(found)
    return " ".join(text.split())[:200] or "no message"


def remedy(status: int, model: str) -> str:
    """What to do about an error that concerns every request."""
    if status in (401, 403):
        return "set OPENAI_API_KEY, or give --api_key"
    if status in (402, 429):
        return "add credit there or choose another --api_url, then run the same command to continue"
    return f"check --model {model} and --api_url, which usually ends with /v1"


def not_reached(api_url: str) -> UserError:
    """The UserError for a server that cannot be reached."""
    return UserError(f"no server answers at {api_url}; start it (for Ollama: ollama serve), or correct --api_url")


def models_of(client: Client) -> list[str]:
    """The names of the models that the server offers. Raises UserError if it does not list them."""
    import httpx2

    async def listing() -> httpx2.Response:
        async with http_client(client, 1) as http:
            return await asyncio.wait_for(http.get(f"{client.api_url}/models"), min(30.0, client.timeout_s))

    try:
        response = asyncio.run(listing())
        models = client._checked(response).get("data")
    except httpx2.ConnectError as error:
        raise not_reached(client.api_url) from error
    except (httpx2.HTTPError, httpx2.InvalidURL, TimeoutError, RequestFailed, _Transient) as error:
        raise UserError(
            f"{client.api_url}/models not read ({first_cause(error)}); name the model with --model"
        ) from error
    names = [model.get("id") for model in models if isinstance(model, dict)] if isinstance(models, list) else []
    return [name for name in names if isinstance(name, str)]
