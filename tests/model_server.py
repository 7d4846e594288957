"""A stand-in for a server with the OpenAI API on the loopback address.

    with ModelServer() as server:
        subprocess.run([..., "--api_url", server.api_url, "--model", "writer"])

Its answers depend on the request alone: English sentences of random words, a conversation if the prompt asks for turns.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WORDS = re.findall(
    r"\w+",
    "river mountain engine garden planet colour energy village number letter window market doctor stone forest animal "
    "weather ocean circle bridge teacher paper island metal season cloud signal recipe muscle tunnel glacier lantern",
)


@dataclass
class Reply:
    """What the server sends: a status, headers and a body, after `delay_s`; `cut` closes the connection halfway."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    cut: bool = False

    def payload(self) -> bytes:
        return self.body.encode() if isinstance(self.body, str) else json.dumps(self.body).encode()


Behaviour = Callable[[dict, int], Reply]  # from a request's body and the number of times that it was asked before


def sentences(seed: str, n: int = 8) -> str:
    """English of `n` sentences that no other seed gives."""
    draw = random.Random(seed)
    return " ".join(
        f"The {draw.choice(WORDS)} is with the {draw.choice(WORDS)} and it has a {draw.choice(WORDS)} that we can see "
        f"when the {draw.choice(WORDS)} of {draw.choice(WORDS)} {draw.randrange(1000)} is there."
        for _ in range(n)
    )


def prompt_of(body: dict) -> str:
    return body["messages"][-1]["content"]


def good_text(body: dict) -> str:
    """A usable answer to a request."""
    prompt = prompt_of(body)
    if "Student:" in prompt:
        return "\n".join(f"{name}: {sentences(prompt + name, 3)}" for name in ("Student", "Teacher") * 2)
    return sentences(prompt)


def completion(content: str | None, finish_reason: str = "stop", **message: Any) -> dict:
    return {
        "id": "x",
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "finish_reason": finish_reason,
                "message": {"role": "assistant", "content": content, **message},
            }
        ],
        "usage": {"prompt_tokens": 100, "completion_tokens": 200, "total_tokens": 300},
    }


def well_behaved(body: dict, n_before: int) -> Reply:
    return Reply(completion(good_text(body)))


class ModelServer:
    """Serves chat completions as `behave` says. `asked` lists the prompts, `answered` those that got a whole reply."""

    def __init__(self, behave: Behaviour = well_behaved, models: tuple[str, ...] = ("writer",)):
        self.behave, self.models = behave, models
        self.asked: list[str] = []
        self.answered: list[str] = []
        self.bodies: list[dict] = []
        self.keys: set[str | None] = set()
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.model_server = self
        self.api_url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> ModelServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        models = [{"id": name, "object": "model"} for name in self.server.model_server.models]
        self._send(Reply({"object": "list", "data": models} if self.path == "/v1/models" else {}))

    def do_POST(self) -> None:
        server = self.server.model_server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = prompt_of(body)
        with server.lock:
            n_before = server.asked.count(prompt)
            server.asked.append(prompt)
            server.bodies.append(body)
            server.keys.add(self.headers.get("Authorization"))
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            if self.path == "/v1/chat/completions":
                reply = server.behave(body, n_before)
            else:
                reply = Reply({"error": {"message": "no such path"}}, 404)
            time.sleep(reply.delay_s)
            self._send(reply)
            if reply.status == 200 and not reply.cut:
                with server.lock:
                    server.answered.append(prompt)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with server.lock:
                server.at_once -= 1

    def _send(self, reply: Reply) -> None:
        payload = reply.payload()
        self.send_response(reply.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(payload[: len(payload) // 2] if reply.cut else payload)
        self.close_connection = self.close_connection or reply.cut


def digest(text: str) -> int:
    """A number that depends on the text alone, for servers whose faults do."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)
