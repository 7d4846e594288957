"""Reads messages and shows replies: on a terminal with line editing and colours, from a pipe one message per line."""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
import time
from collections.abc import Iterable, Iterator

from common.cli import UserError, is_terminal, supports_colour
from generation.chat import PromptSession, Quit
from generation.word_wrap import WordWrap

QUOTES = '"""'
DELAY_S = 0.01  # between the pieces of a reply, on a terminal
COMMAND_WORDS = {"exit": "/quit", "quit": "/quit", "bye": "/quit", "help": "/help"}  # words that may mean a command


class Console:
    """Where messages come from and replies go. Standard output receives only replies; notices go to standard error."""

    def __init__(self, name: str, delay: bool = True):
        self.name = name
        self.is_terminal = is_terminal()
        self.has_colour = self.is_terminal and supports_colour()
        self.delay_s = DELAY_S if delay and self.is_terminal else 0.0
        self.wraps = sys.stdout is not None and sys.stdout.isatty()  # lines are broken between words
        self.shown: list[str] = []  # every reply, for --output
        if self.is_terminal:
            with contextlib.suppress(ImportError):  # not on Windows
                import readline  # noqa: F401  gives input() line editing and history
        elif isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="replace")  # -sig: skips a byte order mark

    def messages(self) -> Iterator[str]:
        """The user's messages, one by one, until the end of input."""
        while True:
            try:
                line = self._read(f"{self.name}> ")
                if self.is_terminal:
                    line = self._read_rest(line)
            except EOFError:
                if self.is_terminal:
                    print()
                return
            except KeyboardInterrupt:
                if not self.is_terminal:
                    raise
                self.notice("\n/quit or Ctrl-D exits")
                continue
            if line.strip():
                yield line

    def _read(self, prompt: str) -> str:
        if self.is_terminal:
            # \1 and \2 tell readline which characters take up no space on the line.
            return input(f"\1\33[1;36m\2{prompt}\1\33[0m\2" if self.has_colour else prompt)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        if "\0" in line:
            raise UserError(
                "standard input contains NUL bytes, so it is not UTF-8 text; if it is UTF-16, convert it with: "
                "iconv -f UTF-16 -t UTF-8 FILE > NEW"
            )
        return line.removesuffix("\n").removesuffix("\r")

    def _read_rest(self, line: str) -> str:
        """The whole message that starts with `line`: lines ending in a backslash, or between lines of three quotes."""
        lines = []
        if line.strip() == QUOTES:
            while (line := self._read("... ")).strip() != QUOTES:
                lines.append(line)
            message = "\n".join(lines)
            return f"/{message}" if message.startswith("/") else message  # a message, not a command
        while line.endswith("\\"):
            lines.append(line[:-1])
            line = self._read("... ")
        return "\n".join([*lines, line])

    def confirm_command(self, message: str) -> str:
        """The message, or a command if the message is a word such as "exit" and the user confirms; "" after Ctrl-C.

        Without a terminal, the message is returned unchanged, and a notice says so.
        """
        command = COMMAND_WORDS.get(message.strip().casefold())
        if command is None:
            return message
        if not self.is_terminal:
            self.notice(f"note: {message.strip()} is sent as a message; the command is {command}")
            return message
        question = f"Did you mean {command}? Enter for yes, n to send it as a message: "
        try:
            while (answer := self._read(question).strip().casefold()) not in ("", "y", "yes", "n", "no"):
                pass
        except (EOFError, KeyboardInterrupt) as interruption:
            print()
            return "/quit" if isinstance(interruption, EOFError) else ""
        return message if answer in ("n", "no") else command

    def show(self, pieces: Iterable[str]) -> None:
        """Print a reply as it is generated, and a line break."""
        wrap = WordWrap(terminal_columns)
        ended = ""
        try:
            for piece in pieces:
                self.shown.append(piece)
                ended = piece[-1:]
                print(wrap.feed(piece) if self.wraps else piece, end="", flush=True)
                if self.delay_s:  # even sleep(0) gives up the processor
                    time.sleep(self.delay_s)
        finally:  # also when interrupted
            if self.wraps:
                print(wrap.finish(), end="", flush=True)
        if ended != "\n":
            self.end_line()

    def end_line(self) -> None:
        """End the line after an interrupted reply."""
        self.shown.append("\n")
        print(flush=True)

    def notice(self, text: str) -> None:
        """Print something that is not a reply."""
        text = wrapped(text)
        print(f"\33[2m{text}\33[0m" if self.has_colour else text, file=sys.stderr, flush=True)


def wrapped(text: str) -> str:
    """A notice with its lines broken between words, if standard error is a terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        return text
    wrap = WordWrap(terminal_columns)
    return wrap.feed(text) + wrap.finish()


def terminal_columns() -> int:
    """The width of the terminal now."""
    return shutil.get_terminal_size().columns


def talk(session: PromptSession, messages: Iterable[str], console: Console) -> None:
    """Answer messages and run commands until the messages end or the user quits."""
    for typed in messages:
        try:
            message = console.confirm_command(typed)
            if not message:
                continue
            if message.startswith("/") and not message.startswith("//"):
                answer = session.command(message)
            else:
                answer = session.reply(message.removeprefix("/") if message.startswith("//") else message)
            if isinstance(answer, str):
                console.notice(answer)
            else:
                with contextlib.closing(answer):
                    console.show(answer)
        except UserError as error:
            console.notice(f"error: {error}")
        except KeyboardInterrupt:
            if not console.is_terminal:
                raise
            console.end_line()
        except Quit:
            return
