"""Standard output that may go to a full disk."""

from __future__ import annotations

import contextlib
import sys
from typing import IO, Any


class OutputError(Exception):
    """Standard output cannot be written; the message is one sentence for the user."""


class StandardOutput:
    """A wrapper around standard output that handles a failed write.

    If the script needs its output, a failed write raises OutputError. Otherwise the text is dropped and one warning is
    printed on standard error. A BrokenPipeError (`python gen.py | head`) is left to the caller.
    """

    def __init__(self, stream: IO[str] | None, is_needed: bool):
        self.stream, self.is_needed, self.has_failed = stream, is_needed, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def _try(self, method: str, *arguments: str) -> None:
        if self.stream is None:
            return
        try:
            getattr(self.stream, method)(*arguments)
        except BrokenPipeError:
            raise
        except OSError as error:
            is_first, self.has_failed = not self.has_failed, True
            sentence = f"standard output not written: {error.strerror}"
            if self.is_needed:
                raise OutputError(f"{sentence}; redirect it to another file") from error
            if is_first:
                with contextlib.suppress(OSError):
                    print(f"warning: {sentence}; continuing without it", file=sys.stderr)
