"""A stand-in for the hub on the loopback address: enough of its protocol for huggingface_hub and datasets.

    with HubServer({"owner/name": {"data/train-00000-of-00001.parquet": payload}}) as hub:
        subprocess.run(command, env=os.environ | hub.environment(cache_folder))

The clients' real code runs against it (HF_ENDPOINT); nothing in them is replaced.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

WRONG_BYTES = 1000
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Serves repositories of data sets, and files of models: {repository: {path: bytes}}.

    `faults` maps a path to what goes wrong when its bytes are asked for:
    - "missing": 404, though the listing names it; "gated": 401
    - "cut": half the bytes, then the connection closes; later requests close at once
    - "cut once": as "cut", but the rest is served when the client asks for it
    - "wrong length": the listing and the headers promise more bytes than the file has
    `requests` lists what was asked for, as "METHOD path"; `commit` is where every branch
    stands; `gone_revisions` do not exist.
    """

    def __init__(self, repositories: dict[str, dict[str, bytes]], faults: dict[str, str] | None = None):
        self.repositories = repositories
        self.faults = dict(faults or {})
        self.requests: list[str] = []
        self.commit = COMMIT
        self.ranges: list[str] = []
        self.gone_revisions: set[str] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, cache_folder: Path) -> dict[str, str]:
        """What a client's process needs in its environment to talk to this server and to nothing else."""
        return hub_environment(self.endpoint, cache_folder)


def hub_environment(endpoint: str, cache_folder: Path) -> dict[str, str]:
    """Environment of a client of `endpoint`: a cache of its own, short time limits, no telemetry, no Xet."""
    return {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache_folder),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_ETAG_TIMEOUT": "2",
        "HF_HUB_DOWNLOAD_TIMEOUT": "2",
        "NO_PROXY": "*",
    }


def closed_endpoint() -> str:
    """An address on which nothing listens: what a machine without a network sees."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, *arguments) -> None:
        pass

    def _answer(self) -> None:
        hub = self.server.hub
        self.commit = self.server.hub.commit
        path = urlsplit(self.path).path  # a revision may contain quoted slashes: refs%2Fconvert%2Fparquet
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        hub.requests.append(f"{self.command} {unquote(path)}")
        if found := re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if self._has_revision(found[2]):
                self._send_file(found[1], unquote(found[3]))
        elif found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            if self._has_revision(found[2]):
                self._send_repository(found[1])
        elif found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
            if self._has_revision(found[2]):
                self._send_tree(found[1], unquote(found[3] or ""), "recursive=true" in self.path.lower())
        elif found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/paths-info/([^/]+)", path):
            if self._has_revision(found[2]):
                self._send_paths(found[1], body)
        else:
            self._send_error(404, "EntryNotFound")

    def _has_revision(self, revision: str | None) -> bool:
        """Whether the revision is there; answers 404 if it is not."""
        revision = unquote(revision or "main")
        self.commit = revision if re.fullmatch("[0-9a-f]{40}", revision) else self.server.hub.commit
        is_there = revision not in self.server.hub.gone_revisions
        if not is_there:
            self._send_error(404, "RevisionNotFound")
        return is_there

    def _send_repository(self, name: str) -> None:
        if files := self._files(name):
            siblings = [{"rfilename": path} for path in files]
            self._send_json({"id": name, "sha": self.commit, "private": False, "gated": False, "siblings": siblings})

    def _send_tree(self, name: str, folder: str, recursive: bool) -> None:
        if files := self._files(name):
            prefix = f"{folder}/" if folder else ""
            below = [path for path in sorted(files) if path.startswith(prefix)]
            if not below:
                self._send_error(404, "EntryNotFound")
                return
            entries = [self._entry(path, files) for path in _with_folders(below) if path.startswith(prefix)]
            self._send_json([e for e in entries if recursive or "/" not in e["path"].removeprefix(prefix)])

    def _send_paths(self, name: str, body: str) -> None:
        if files := self._files(name):
            wanted = json.loads(body)["paths"] if body.startswith("{") else _form_paths(body)
            known = _with_folders(files)
            self._send_json([self._entry(path, files) for path in wanted if path in known])

    def _send_file(self, name: str, path: str) -> None:
        files, fault = self._files(name), self.server.hub.faults.get(path)
        if not files:
            return
        if path not in files or fault == "missing":
            self._send_error(404, "EntryNotFound")
        elif fault == "gated":
            self._send_error(401, "GatedRepo")
        else:
            self._send_bytes(path, files[path], fault)

    def _send_bytes(self, path: str, payload: bytes, fault: str | None) -> None:
        start, end = 0, len(payload)
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(wanted[1]), min(int(wanted[2]) + 1, end) if wanted[2] else end
            if self.command == "GET":
                self.server.hub.ranges.append(f"{path} {start}")
        part = payload[start:end]
        promised = len(part) + (WRONG_BYTES if fault == "wrong length" and self.command == "HEAD" else 0)
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(promised))
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(payload)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hashlib.sha1(payload).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault in ("cut", "cut once"):
            self.server.hub.faults[path] = "cut off" if fault == "cut" else ""
            part = part[: len(part) // 2]
        self.wfile.write(b"" if fault == "cut off" else part)
        self.close_connection = fault in ("cut", "cut once", "cut off") or self.close_connection

    def _entry(self, path: str, files: dict[str, bytes]) -> dict:
        if path not in files:
            return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()}
        size = len(files[path]) + (WRONG_BYTES if self.server.hub.faults.get(path) == "wrong length" else 0)
        return {"type": "file", "path": path, "size": size, "oid": hashlib.sha1(files[path]).hexdigest()}

    def _files(self, name: str) -> dict[str, bytes] | None:
        """The repository's files; answers 404 and returns None where there is no such repository."""
        files = self.server.hub.repositories.get(name)
        if files is None:
            self._send_error(404, "RepoNotFound")
        return files

    def _send_error(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send_json(self, value) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _form_paths(body: str) -> list[str]:
    return parse_qs(body).get("paths", [])


def _with_folders(paths) -> list[str]:
    """The paths and every folder that they lie in."""
    folders = {str(parent) for path in paths for parent in list(Path(path).parents)[:-1]}
    return sorted(folders | set(paths))
