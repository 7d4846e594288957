"""What people think of replies, as one line of JSON per event in a file that data/prepare-preferences.py reads.

An event is on the disk before it is acknowledged, so nothing is lost when the server is killed. docs/data.md describes
the fields.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from common.cli import UserError
from common.files import fsync_folder, lock_file, require_target, write_error
from serving.errors import ApiError

log = logging.getLogger("jojo")
DISK_FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MAX_MESSAGES = 2000

Name = Annotated[str, Field(min_length=1, max_length=200)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 16)]], Field(max_length=1 << 16)]


class JudgedMessage(BaseModel):
    model_config = ConfigDict(strict=True)

    role: Literal["system", "user", "assistant"]
    content: str


class OtherReply(BaseModel):
    """A reply to the same messages that the judged one was preferred over."""

    model_config = ConfigDict(strict=True)

    model: Name | None = None
    digest: Digest | None = None
    token_ids: TokenIds | None = None
    content: str = Field(min_length=1)


class FeedbackFields(BaseModel):
    """The body of POST /v1/feedback: a judged reply, the last of `messages`, and what a person thinks of it."""

    model_config = ConfigDict(strict=True)

    id: Name  # of the reply; a later event with the same id replaces this one
    model: Name | None = None
    digest: Digest | None = None  # of the weights: system_fingerprint of the chat's answer
    messages: list[JudgedMessage] = Field(min_length=2, max_length=MAX_MESSAGES)
    token_ids: TokenIds | None = None  # of the reply, if they give its text
    rating: Literal["good", "bad", "none"] | None = None  # none: the person has withdrawn the feedback
    correction: str | None = None
    preferred_over: OtherReply | None = None

    def check(self) -> None:
        """Raise ApiError for an event that says nothing about a reply."""
        if self.messages[-1].role != "assistant" or all(message.role != "user" for message in self.messages):
            raise ApiError(400, "messages must contain a user's message and end with the reply", param="messages")
        if self.rating is None and self.correction is None and self.preferred_over is None:
            raise ApiError(400, "an event needs rating, correction or preferred_over", param="rating")
        if self.correction is not None and not self.correction.strip():
            raise ApiError(400, "correction is empty; send rating: none to withdraw feedback", param="correction")

    def line(self) -> bytes:
        """The event as a line of the file, with the current time."""
        said = self.model_dump(exclude_none=True)
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return json.dumps({"time": now, **said}, ensure_ascii=False).encode() + b"\n"


class FeedbackFile:
    """A file to which several processes may append events at the same time; each waits up to `wait_s` for the others.

    Raises UserError if it cannot be written. The path is opened for each event, so that the file can be moved away.
    """

    def __init__(self, path: str | os.PathLike, wait_s: float = 5.0):
        self.path, self.wait_s = Path(path), wait_s
        require_target("feedback", self.path)
        if self.path.exists() and not self.path.is_file():
            raise UserError(f"--feedback {self.path} is not a regular file; choose another name")
        try:
            self.append(b"")
        except OSError as error:
            raise write_error(self.path, error) from error
        self._write_lock = asyncio.Lock()  # so that events are written in the order in which they arrive

    async def keep(self, fields: FeedbackFields) -> None:
        """Write an event to the disk. Raises ApiError if that is not possible; the file then does not contain it."""
        try:
            async with self._write_lock:
                await asyncio.to_thread(self.append, fields.line())
        except OSError as error:
            log.error("feedback not saved: %s", error)
            if error.errno in DISK_FULL_ERRORS:
                raise ApiError(507, "the feedback was not saved: the server's disk is full") from error
            if isinstance(error, TimeoutError):
                raise ApiError(503, "the feedback was not saved: another program is using the file") from error
            raise ApiError(500, "the feedback was not saved: the server cannot write its file") from error

    def append(self, line: bytes) -> None:
        """Append a whole line, or nothing, and wait until it is on the disk. Raises OSError."""
        with open(self.path, "a+b", buffering=0, opener=_open_private) as file:
            _wait_for_lock(file, self.wait_s)
            size = file.seek(0, os.SEEK_END)
            if size and line:
                file.seek(size - 1)
                if file.read(1) != b"\n":  # another program has left half a line
                    line = b"\n" + line
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)  # nobody else has appended since: the file is locked
                raise
            if not size:
                fsync_folder(self.path.parent)


def _open_private(path: str, flags: int) -> int:
    """Open a file; a new one is readable only by its owner, because it contains conversations."""
    return os.open(path, flags, 0o600)


def _wait_for_lock(file: IO[bytes], wait_s: float) -> None:
    """Lock a file; closing it releases the lock. Raises TimeoutError if other programs hold the lock too long."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            lock_file(file)
            return
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            if time.monotonic() > deadline:
                raise TimeoutError(f"{file.name} is locked by another program") from error
        time.sleep(0.01)
