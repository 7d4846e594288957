"""Who may use the server: checks of Host, Origin and API key, and the headers that protect the page."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import ApiError
from serving.settings import ServerSettings

CONTENT_SECURITY_POLICY = "; ".join(
    (
        *("default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' data:"),
        *("connect-src 'self'", "form-action 'none'", "frame-ancestors 'none'", "base-uri 'none'"),
    )
)
SECURITY_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
PREFLIGHT_HEADERS = {
    "Access-Control-Allow-Methods": "GET, POST",
    "Access-Control-Allow-Headers": "Authorization, *",  # browsers do not count Authorization among *
    "Access-Control-Max-Age": "600",
}
HOST = re.compile(r"(\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>[0-9A-Za-z._-]+))(:[0-9]*)?")
OPEN_PATHS = ("/", "/health", "/favicon.ico")  # without a key: the page asks for it


class Guard:
    """ASGI middleware in front of everything else.

    A page on another site cannot use the server: after DNS rebinding its requests have that site's name in Host, and
    otherwise they have its origin in Origin. An IP address in Host is accepted, because it cannot be rebound.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings):
        self.app = app
        self.key_digest = None if settings.api_key is None else _digest(settings.api_key.encode())
        self.origins = {origin.rstrip("/").lower() for origin in settings.allow_origin}
        names = {"localhost", settings.host.lower(), socket.gethostname().lower()}
        self.hosts = names | {name for origin in self.origins if (name := urlsplit(origin).hostname)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        is_foreign = origin is not None and origin.rstrip("/").lower() in self.origins

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                answered = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    answered.setdefault(name, value)
                if is_foreign and origin is not None:
                    answered["Access-Control-Allow-Origin"] = origin
                    answered["Access-Control-Expose-Headers"] = "X-Dropped-Messages, Retry-After"
                    answered["Cross-Origin-Resource-Policy"] = "cross-origin"
                if self.origins:
                    answered.add_vary_header("Origin")
            await send(message)

        answer = self.app
        try:
            self._check_host(headers)
            self._check_origin(scope, headers, is_foreign)
            if is_foreign and scope["method"] == "OPTIONS":
                answer = Response(status_code=204, headers=PREFLIGHT_HEADERS)
            else:
                self._check_key(scope, headers)
        except ApiError as error:
            answer = error.response()
        await answer(scope, receive, send_guarded)

    def _check_host(self, headers: Headers) -> None:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_own_name(host_name(hosts[0])):
            raise ApiError(403, "the Host header names another server; start serve.py with --allow_origin to accept it")

    def _is_own_name(self, name: str | None) -> bool:
        if name is None:
            return False
        if name in self.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _check_origin(self, scope: Scope, headers: Headers, is_foreign: bool) -> None:
        origins = headers.getlist("origin")
        if origins and not is_foreign and (len(origins) > 1 or not is_same_origin(origins[0], headers["host"])):
            raise ApiError(403, "requests from this origin are not accepted; start serve.py with --allow_origin")
        is_cross_site = headers.get("sec-fetch-site") in ("cross-site", "same-site")
        if is_cross_site and not is_foreign and not is_open(scope["path"]):
            raise ApiError(403, "requests from other sites are not accepted; start serve.py with --allow_origin")

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        if self.key_digest is None or is_open(scope["path"]):
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip().encode("latin-1"))  # of equal length, so that the comparison takes constant time
        if scheme.lower() != "bearer" or not hmac.compare_digest(given, self.key_digest):
            raise ApiError(
                401,
                "a valid API key is required; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def is_open(path: str) -> bool:
    """Whether a path is served without a key: the page, its files and the health check."""
    return path in OPEN_PATHS or path.startswith("/static/")


def host_name(host: str) -> str | None:
    """The name in a Host header, in lower case, without its port; None if it is malformed."""
    match = HOST.fullmatch(host)
    return (match["address"] or match["name"]).lower() if match else None


def is_same_origin(origin: str, host: str) -> bool:
    """Whether an Origin header names the server that the Host header names. TLS may end at a reverse proxy."""
    return origin.lower() in (f"http://{host.lower()}", f"https://{host.lower()}")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
