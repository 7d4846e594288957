"""A stand-in for serve.py on the loopback address: the chat page's files, and an API whose replies a test chooses.

    with ChatStandIn(reply=lambda messages: "Hello there.") as server:
        browser.goto(server.url)

It speaks the part of the API that the page uses, and can do on purpose what a real server rarely does: be busy, refuse
a key, cut a stream, send errors in a stream. Run it to look at the page without a model:

    python -m tests.chat_stand_in
"""

from __future__ import annotations

import json
import re
import threading
import time
import zlib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

STATIC = Path(__file__).resolve().parent.parent / "serving" / "static"
CONTENT_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)
DEFAULTS = {"temperature": 0.5, "top_k": 50, "max_tokens": 200}


def model(name: str, format: str = "chat", block_size: int = 256, digest: str | None = None) -> dict:
    """A model as GET /v1/models lists it; `digest` is that of its vocabulary, None for GPT-2's."""
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "jojo",
        "format": format,
        "block_size": block_size,
        "tokenizer": {"name": "gpt2_chatml" if digest is None else "tales", "digest": digest},
        "default": DEFAULTS,
        "parameters": 7_265_024,
        "dataset": "chitchat" if format == "chat" else "story",
    }


MODELS = [model("jojo-chat"), model("jojo-before"), model("jojo-story", "text")]
DIGEST = "0123456789abcdef" * 4
REPLY = "Hello there, my friend. How are you today?"
ALTERNATIVES = [(" quietly", -1.2), (" loudly", -2.5), ("\n", -4.0), (" <b>never</b>", -6.0), ("7", -8.0)]


def split_tokens(text: str) -> list[str]:
    """Words with the space before them, as GPT-2's tokens often are."""
    return re.findall(r" ?[^\s]+|\s", text)


def token_id(text: str) -> int:
    return zlib.crc32(text.encode()) % 50_000


class ChatStandIn:
    """`reply(messages)` or `reply(prompt)` is the text of a reply, and `continuation` what follows a given prefix.

    Each request for a reply takes one of `faults` from the list, if there is one:
    - "busy": 429; "broken": 500; "waiting": a second in the queue
    - "cut": the connection closes in the middle; "error": an event that tells an error in the middle
    - None: no fault
    `requests` are the bodies that arrived, `n_left` how many clients left before their reply was complete. With
    `keeps_feedback`, `feedback` collects the events; each takes one of `feedback_faults`, a status or None.
    """

    def __init__(
        self,
        reply: Callable = lambda messages: REPLY,
        continuation: str = " and all was well.",
        models: list[dict] = MODELS,
        faults: tuple = (),
        seconds_per_token: float = 0.0,
        key: str | None = None,
        keeps_feedback: bool = False,
        feedback_faults: tuple = (),
    ):
        self.reply, self.continuation, self.models, self.faults = reply, continuation, models, list(faults)
        self.seconds_per_token, self.key = seconds_per_token, key
        self.keeps_feedback, self.feedback_faults = keeps_feedback, list(feedback_faults)
        self.requests: list[dict] = []
        self.feedback: list[dict] = []
        self.n_left = 0
        self.words: dict[int, str] = {token_id(text): text for text, _ in ALTERNATIVES}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.stand_in = self
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    def __enter__(self) -> ChatStandIn:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def stand_in(self) -> ChatStandIn:
        return self.server.stand_in

    def log_message(self, *arguments) -> None:
        pass

    def _send(self, status: int, body: bytes, content_type: str, headers: dict | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", CONTENT_SECURITY_POLICY)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _send_json(self, status: int, content: dict, headers: dict | None = None) -> None:
        self._send(status, json.dumps(content).encode(), "application/json", headers)

    def _send_error(self, status: int, message: str, headers: dict | None = None) -> None:
        self._send_json(status, {"error": {"message": message, "type": "error", "param": None, "code": None}}, headers)

    def _is_allowed(self) -> bool:
        if self.stand_in.key is None or self.headers.get("Authorization") == f"Bearer {self.stand_in.key}":
            return True
        self._send_error(401, "The API key is missing or wrong.")
        return False

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            if self._is_allowed():
                listed = {"object": "list", "data": self.stand_in.models}
                self._send_json(200, {**listed, "keeps_feedback": self.stand_in.keeps_feedback})
            return
        file = STATIC / ("index.html" if self.path == "/" else self.path.removeprefix("/static/"))
        if file.parent == STATIC and file.is_file():
            self._send(200, file.read_bytes(), CONTENT_TYPES[file.suffix])
        else:
            self._send_error(404, "Not found.")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._is_allowed():
            return
        if self.path == "/v1/feedback":
            self._take_feedback(body)
            return
        self.stand_in.requests.append(body)
        fault = self.stand_in.faults.pop(0) if self.stand_in.faults else None
        if fault == "busy":
            self._send_error(429, "The queue is full.", {"Retry-After": "1"})
        elif fault == "broken":
            self._send_error(500, "The model <b>broke</b>.")
        else:
            try:
                self._stream(body, fault)
            except OSError:
                self.stand_in.n_left += 1
            self.close_connection = True

    def _take_feedback(self, event: dict) -> None:
        status = self.stand_in.feedback_faults.pop(0) if self.stand_in.feedback_faults else None
        if status is not None:
            self._send_error(status, "The feedback was not saved: the <b>disk</b> is full.")
            return
        self.stand_in.feedback.append(event)
        self._send_json(200, {"object": "feedback", "id": event["id"]})

    def _stream(self, body: dict, fault: str | None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        if fault == "waiting":
            self.wfile.write(b": waiting\n\n")
            time.sleep(1)
        is_chat = "messages" in body
        prefix = body.get("assistant_prefix_ids" if is_chat else "prefix_ids", [])
        if prefix or body.get("continue_final_message"):
            text = self.stand_in.continuation
        else:
            text = self.stand_in.reply(body["messages" if is_chat else "prompt"])
        tokens = split_tokens(text)
        limit = body.get("max_tokens", len(tokens))
        for i, token in enumerate(tokens[:limit]):
            if i == 3 and fault == "cut":
                return
            if i == 3 and fault == "error":
                self._send_event({"error": {"message": "Out of memory.", "type": "server_error"}})
                return
            self.stand_in.words[token_id(token)] = token
            self._send_event({"system_fingerprint": DIGEST, "choices": [_choice(token, i, is_chat)]})
            time.sleep(self.stand_in.seconds_per_token)
        reason = "length" if limit < len(tokens) else "stop"
        last = {"delta": {}} if is_chat else {"text": ""}
        self._send_event({"choices": [{"index": 0, **last, "finish_reason": reason}]})
        n_prompt = len(split_tokens(json.dumps(body.get("messages", body.get("prompt"))))) + len(prefix)
        n = min(limit, len(tokens))
        usage = {"prompt_tokens": n_prompt, "completion_tokens": n, "total_tokens": n_prompt + n}
        self._send_event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _send_event(self, event: dict) -> None:
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.flush()


def _choice(token: str, index: int, is_chat: bool) -> dict:
    """A token with probabilities that vary, its alternatives below it."""
    logprob = (-0.02, -0.4, -0.9, -1.6, -3.0, -5.0)[index % 6]
    top = [(token, logprob), *ALTERNATIVES]
    entries = [{"id": token_id(t), "token": t, "bytes": list(t.encode()), "logprob": p} for t, p in top]
    logprobs = {"content": [{**entries[0], "top_logprobs": entries}]}
    text = {"delta": {"content": token}} if is_chat else {"text": token}
    return {"index": 0, **text, "finish_reason": None, "logprobs": logprobs}


if __name__ == "__main__":
    with ChatStandIn(seconds_per_token=0.1) as server:
        print(f"{server.url} (Ctrl+C stops)")
        threading.Event().wait()
