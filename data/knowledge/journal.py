"""The journal: every answer of the model, written to the disk as it arrives, so that nothing is asked twice.

One JSON object per line. A process that is killed can leave at most a half-written last line, which the next run
removes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import FileLock, write_error


@dataclass(frozen=True)
class Answer:
    """What the server answered to the request `key`; `finish_reason` is "length" if the answer is cut off.

    `max_tokens` is the limit that the answer was written under. The token counts are None if the server gave none.
    """

    key: str
    model: str
    content: str
    finish_reason: str
    max_tokens: int
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    refusal: str = ""


class Journal:
    """The answers in a file, by the key of their request. Only the positions of the lines are in memory.

    Opening locks the file, and raises UserError if another run uses it. If a key occurs twice, the later answer counts.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = FileLock(path.with_name(f".{path.stem}.lock"), f"journal {path}")
        self._positions: dict[str, int] = {}
        self._cut_off: dict[str, int] = {}  # key -> max_tokens of an answer that is cut off
        try:
            self._file = open(path, "a+b")  # noqa: SIM115, PTH123
        except OSError as error:
            self._lock.release()
            raise write_error(path, error) from error
        self._read()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self._lock.release()

    def __len__(self) -> int:
        return len(self._positions)

    def has(self, key: str, max_tokens: int) -> bool:
        """Whether the request need not be sent: it is answered, and not cut off by a limit lower than `max_tokens`."""
        return key in self._positions and self._cut_off.get(key, max_tokens) >= max_tokens

    def answer(self, key: str) -> Answer | None:
        """The answer to a request, or None before it arrives."""
        if key not in self._positions:
            return None
        self._file.seek(self._positions[key])
        answer = parsed_answer(self._file.readline())
        assert answer is not None and answer.key == key, f"{self.path} was changed by another program"
        return answer

    def append(self, answer: Answer, **about: str) -> None:
        """Write an answer, with what the request was `about` for a person to read, and wait until it is on the disk."""
        line = json.dumps(about | dataclasses.asdict(answer), ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        position = self._file.seek(0, os.SEEK_END)
        try:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise write_error(self.path, error) from error
        self._remember(answer, position)

    def _remember(self, answer: Answer, position: int) -> None:
        self._positions[answer.key] = position
        self._cut_off.pop(answer.key, None)
        if answer.finish_reason == "length":
            self._cut_off[answer.key] = answer.max_tokens

    def _read(self) -> None:
        """Find the answers; a half-written last line is removed, and other unreadable lines are counted."""
        self._file.seek(0)
        position, n_broken = 0, 0
        for line in self._file:
            answer = parsed_answer(line)
            if answer is not None and line.endswith(b"\n"):
                self._remember(answer, position)
            elif not line.endswith(b"\n"):
                self._file.truncate(position)
                break
            elif line.strip():
                n_broken += 1
            position += len(line)
        if n_broken:
            print(f"warning: {self.path}: {n_broken:,} lines are not answers; ignored", file=sys.stderr)


def parsed_answer(line: bytes) -> Answer | None:
    """The answer in a line of the journal, or None if the line contains none."""
    try:
        fields: dict[str, Any] = json.loads(line)
        return Answer(**{field.name: fields[field.name] for field in dataclasses.fields(Answer)})
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
