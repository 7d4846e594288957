"""What every script needs to run: user errors, options from a dataclass, standard output, terminals.

Importing this module imports no torch, so that `--help` and data preparation start at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import types
import typing
from collections.abc import Callable, Sequence


class UserError(Exception):
    """A fault that the user can mend: one sentence saying what failed, then the command or option that mends it."""


def first_cause(error: BaseException) -> str:
    """An exception's first cause in one short line: a server's answer where there is one."""
    while error.__cause__ is not None and getattr(error, "response", None) is None:
        error = error.__cause__
    response = getattr(error, "response", None)
    if response is None:
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}{': ' if lines else ''}{lines[0].strip()[:200] if lines else ''}"
    if response.status_code in (401, 403):
        return f"HTTP {response.status_code}: the hub wants its terms accepted and HF_TOKEN set"
    return f"HTTP {response.status_code}: {response.reason_phrase or type(error).__name__}"


def run_script(main: Callable[[], int | None], needs_output: bool = True) -> None:
    """Run a script's `main` and exit with its status; the one place where a UserError is printed.

    Exit status: what main returns (None is 0), 1 for a UserError, 130 for Ctrl-C. Any other exception is a bug and
    shows its traceback. A script that does not need its output goes on where the disk under that is full.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a console that cannot show a character shows "?"
    output = StandardOutput(sys.stdout, needs_output)
    try:
        with contextlib.nullcontext() if sys.stdout is None else contextlib.redirect_stdout(output):  # None: closed
            status = main()
            output.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # `python gen.py | head`: the reader left
        output.has_failed = True
        status = 141
    if output.has_failed:  # what it still holds would fail again when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


class StandardOutput:
    """Standard output, which may lie on a full disk: refused text is a UserError if it is needed, else left out.

    That is said once on standard error. A reader that left (BrokenPipeError) is left to `run_script`.
    """

    def __init__(self, stream, is_needed: bool):
        self.stream, self.is_needed, self.has_failed = stream, is_needed, False

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def _try(self, method: str, *arguments) -> None:
        if self.stream is None:
            return
        try:
            getattr(self.stream, method)(*arguments)
        except BrokenPipeError:
            raise
        except OSError as error:
            is_first, self.has_failed = not self.has_failed, True
            if self.is_needed:
                raise UserError(f"standard output not written: {error.strerror}; send it somewhere else") from error
            if is_first:
                with contextlib.suppress(OSError):
                    print(f"warning: standard output not written: {error.strerror}; going on", file=sys.stderr)


def option(default, help: str, **argparse_settings):
    """A dataclass field that `parse_options` turns into a command-line option.

    `argparse_settings` go to `add_argument` (choices, nargs, metavar); `positional=True` makes it an argument
    without dashes.
    """
    return dataclasses.field(default=default, metadata={"help": help, **argparse_settings})


def parse_options(cls, description: str, argv: Sequence[str] | None = None):
    """Command-line options from the fields of dataclass `cls`, as an instance of it.

    A `bool` that is False by default becomes `--name`, any other `bool` `--name/--no-name`; `X | None` parses as X.
    A ValueError of `__post_init__` is a usage error (exit status 2), as argparse's own are.

    >>> @dataclasses.dataclass
    ... class Options:
    ...     top_k: int | None = option(None, "keep the k likeliest tokens")
    >>> parse_options(Options, "", ["--top_k", "5"])
    Options(top_k=5)
    """
    parser = _option_parser(cls, description)
    values = vars(parser.parse_args(argv))
    try:
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    except ValueError as error:
        parser.error(str(error))


def given_options(cls, argv: Sequence[str] | None = None) -> dict:
    """The options that the command line really gives, without the defaults; for a run that continues another."""
    return vars(_option_parser(cls, "", argument_default=argparse.SUPPRESS).parse_args(argv))


def _option_parser(cls, description: str, **parser_settings) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=next(iter(description.strip().splitlines()), ""),
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110),
        **parser_settings,
    )
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        settings = dict(field.metadata)
        if "help" not in settings:
            continue
        positional = settings.pop("positional", False)
        kind = _option_type(hints[field.name])
        default = parser_settings.get("argument_default", field.default)
        is_shown = field.default not in (None, ()) and field.default is not False  # 0 is shown
        if is_shown and "default" not in settings["help"]:
            settings["help"] += f" (default: {field.default})"
        if kind is bool:
            settings["action"] = "store_true" if field.default is False else argparse.BooleanOptionalAction
        else:
            settings.setdefault("type", kind)
        if positional:
            settings.setdefault("nargs", "?")
        parser.add_argument(field.name if positional else f"--{field.name}", default=default, **settings)
    return parser


def _option_type(hint) -> type:
    """The type that one command-line word is parsed as: `int | None` is int, `tuple[str, ...]` is str."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        hint = typing.get_args(hint)[0]
    return hint


def is_terminal() -> bool:
    """Whether a person can be asked: standard input and output are both a terminal, and no launcher runs us."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty() and "RANK" not in os.environ


def shows_colour() -> bool:
    """Whether standard output shows ANSI colours: a terminal without NO_COLOR, or anything with FORCE_COLOR."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (sys.stdout.isatty() and os.environ.get("TERM") != "dumb")
