"""uvicorn with our limits: an address that is printed, SIGTERM that waits for running requests, exit status 0."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn

from common.cli import UserError
from serving.app import Service, create_app
from serving.models import ModelPool
from serving.protocol import LimitedProtocol
from serving.settings import ServerSettings

SHUTDOWN_MARGIN_S = 2.0  # for the last bytes after the grace period


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UserError if the address is not available."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        reason = error.strerror or "not available"
        raise UserError(f"{host} port {port}: {reason}; choose another with --host and --port") from error
    return listener


class JojoServer(uvicorn.Server):
    """Serves models until SIGTERM or Ctrl-C. `on_start` is called with the address once requests are accepted."""

    def __init__(self, pool: ModelPool, settings: ServerSettings, on_start: Callable[[str], None]):
        self.service, self.settings, self.on_start = Service(pool, settings), settings, on_start
        protocol = type("Protocol", (LimitedProtocol,), {"settings": settings})
        config = uvicorn.Config(
            create_app(self.service),
            http=protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=settings.max_header_bytes,
            timeout_keep_alive=int(settings.headers_s),
            timeout_graceful_shutdown=int(settings.grace_s + SHUTDOWN_MARGIN_S),
        )
        super().__init__(config)
        self.failure: Exception | None = None  # why the first model could not be loaded
        self._loading: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.service.pool.worker.start()
        self._loading = asyncio.create_task(self._load_first())
        address = (sockets or [])[0].getsockname()
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        self.on_start(f"http://{host}:{address[1]}")

    async def _load_first(self) -> None:
        """Load the first model, so that the first request need not wait; end the server if that fails."""
        pool = self.service.pool
        try:
            pool.release(await pool.acquire(pool.card(None)))
        except Exception as error:
            self.failure = error
            self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        ending = loop.call_later(self.settings.grace_s, self.service.abort_all, "the server is shutting down")
        await super().shutdown(sockets)
        ending.cancel()
        await asyncio.to_thread(self.service.pool.worker.stop)
        if self._loading is not None:
            await self._loading

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Like uvicorn's, but does not raise the signal again at the end, which would change the exit status."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def serve(pool: ModelPool, settings: ServerSettings, port: int, on_start: Callable[[str], None]) -> None:
    """Serve until a signal. Raises UserError if the address is in use, and any error in loading the first model."""
    listener = listen(settings.host, port)
    server = JojoServer(pool, settings, on_start)
    server.run(sockets=[listener])
    if server.failure is not None:
        raise pool.failure or server.failure
