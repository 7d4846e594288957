"""A server with tiny random models in this process, for the tests of serve.py."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import socket
import threading
import time

import torch

from generation.row_cache import decode_rows
from model import GPT, GPTConfig
from serving.models import ModelPool, model_cards
from serving.server import JojoServer, listen
from serving.settings import ServerSettings

CONFIG = {"block_size": 128, "n_layer": 2, "n_head": 2, "n_embd": 16}
FORMATS = {"models/chatty.pt": "chat", "models/texty.pt": "text"}


@functools.cache
def tiny_model(seed: int, **changes) -> GPT:
    """A model whose logits differ enough that rounding does not change the likeliest id."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**CONFIG, **changes})).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(6)
    return model


class LiveServer:
    """A running server; `step_s` slows every decode step down, so that tests can act between two."""

    def __init__(self, formats=FORMATS, step_s: float = 0.0, load=None, **settings):
        self.step_s = step_s
        self.steps = 0
        settings = ServerSettings(**{"max_rows": 4, "max_waiting": 8, "max_models": len(formats), **settings})
        self.settings = settings
        facts = {path: {"model": CONFIG, "format": kind, "dataset": "tiny"} for path, kind in formats.items()}
        self.pool = ModelPool(model_cards(facts), load or self._load, settings, self._digest)
        self.server = JojoServer(self.pool, settings, lambda address: None)
        self.listener = listen("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(
            target=lambda: asyncio.run(self.server.serve(sockets=[self.listener])), daemon=True
        )

    def _load(self, path: str):
        return tiny_model(list(FORMATS).index(path) if path in FORMATS else 0), self._decode

    def _digest(self, path: str) -> str:
        return hashlib.sha256(path.encode()).hexdigest()

    def _decode(self, *arguments):
        self.steps += 1
        time.sleep(self.step_s)
        return decode_rows(*arguments)

    def __enter__(self) -> LiveServer:
        self.thread.start()
        wait_until(lambda: self.pool.is_ready)
        return self

    def __exit__(self, *exception) -> None:
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()

    def assert_free(self) -> None:
        """Every row is free, nothing waits, and no request is open."""
        wait_until(lambda: not self.server.service.runs)
        wait_until(lambda: self.pool.rows_in_use == 0 and self.pool.n_waiting == 0)
        assert all(model.users == 0 for model in self.pool.loaded.values())

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)


def wait_until(condition, timeout_s: float = 30.0) -> None:
    """Return as soon as `condition()` is true; fail if it does not become true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "a condition did not become true in time"
        time.sleep(0.005)


def post(path: str, body: bytes, *headers: str, host: str = "localhost") -> bytes:
    """The bytes of a POST request."""
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def read_all(connection: socket.socket) -> bytes:
    """What the server sends until it closes the connection."""
    received = b""
    while piece := connection.recv(1 << 16):
        received += piece
    return received
