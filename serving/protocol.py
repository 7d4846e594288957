"""Limits on connections that uvicorn does not have: their number, slow headers, and clients that stop reading."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.settings import ServerSettings


class LimitedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, with deadlines. A subclass sets `settings`, because uvicorn creates the instances itself."""

    settings = ServerSettings()
    _deadline: asyncio.TimerHandle | None = None  # by which a request's headers must be complete
    _stalled: asyncio.TimerHandle | None = None  # by which the client must have read something
    _is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if len(self.connections) >= self.settings.max_connections:
            self._is_refused = True
            transport.abort()
            return
        super().connection_made(transport)
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._deadline, self._stalled):
            if timer is not None:
                timer.cancel()
        if not self._is_refused:
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._is_refused:
            super().data_received(data)
            self._watch_headers()

    def _watch_headers(self) -> None:
        """Start the deadline while no request is being answered; stop it once one is."""
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        elif not is_answering and self._deadline is None:
            self._deadline = self.loop.call_later(self.settings.headers_s, self._abort)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(self.settings.stalled_s, self._abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _abort(self) -> None:
        self.transport.abort()
