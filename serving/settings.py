"""The settings of the server, and the limits that keep single clients from using it up."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ServerSettings:
    """Settings of the HTTP part; serve.py makes them from its options."""

    host: str = "127.0.0.1"
    api_key: str | None = dataclasses.field(default=None, repr=False)
    allow_origin: tuple[str, ...] = ()  # origins of other sites whose pages may use the API
    max_rows: int = 16  # texts generated at a time
    max_waiting: int = 64  # texts that wait for a row; with more, requests are answered with 429
    max_models: int = 1  # models in memory
    exact: bool = False  # compute each text on its own
    grace_s: float = 20.0  # for running requests after SIGTERM
    max_body_bytes: int = 1 << 20
    body_s: float = 20.0  # a request's body must arrive within this time
    headers_s: float = 10.0  # a request's headers must arrive within this time
    feedback: str | None = None  # file that people's opinions of replies are appended to
    stalled_s: float = 60.0  # a client that reads nothing of its answer for this long is disconnected
    comment_s: float = 5.0  # between the comments on a stream while there is nothing to send
    max_header_bytes: int = 32 << 10
    max_connections: int = 512
