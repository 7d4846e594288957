"""The page's files, read once into memory: nothing in a request becomes a path."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from serving.errors import ApiError

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
}
NO_PAGE = b"Jojo serves an OpenAI-compatible API at /v1; this copy has no page.\n"


def static_files(folder: Path) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint that serves the files of a folder by name, and its index.html at /."""
    files = {path.name: path.read_bytes() for path in sorted(folder.glob("*")) if path.suffix in TYPES}
    tags = {name: f'"{hashlib.sha256(content).hexdigest()[:32]}"' for name, content in files.items()}

    async def serve(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in files:
            if name == "index.html":
                return Response(NO_PAGE, media_type="text/plain")
            raise ApiError(404, "there is no such file")
        headers = {"ETag": tags[name], "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == tags[name]:
            return Response(status_code=304, headers=headers)
        return Response(files[name], headers=headers, media_type=TYPES[Path(name).suffix])

    return serve
