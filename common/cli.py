"""What every script needs to run: user errors, exit statuses, options from a dataclass, and terminals.

Importing this module does not import torch, so `--help` and data preparation start at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import math
import os
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Sequence
from typing import IO, Any, NoReturn, TypeVar

from common.output import OutputError, StandardOutput

HELP_WIDTH = 110
HELP_COLUMN = 32
T = TypeVar("T")


class UserError(Exception):
    """An error that the user can fix: one sentence with what failed, then the command or option that fixes it."""


def first_cause(error: BaseException) -> str:
    """The root cause of an exception in one short line; for a failed download, the server's answer."""
    while error.__cause__ is not None and getattr(error, "response", None) is None:
        error = error.__cause__
    response = getattr(error, "response", None)
    if response is None:
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}{': ' if lines else ''}{lines[0].strip()[:200] if lines else ''}"
    if response.status_code in (401, 403):
        return f"HTTP {response.status_code}: accept the data set's terms on the hub and set HF_TOKEN"
    return f"HTTP {response.status_code}: {response.reason_phrase or type(error).__name__}"


# --- running a script ---


def run_script(main: Callable[[], int | None], needs_output: bool = True) -> None:
    """Run a script's `main` and exit with its status. No other function prints a UserError.

    The exit status is what `main` returns (None counts as 0), 1 after a UserError and 130 after Ctrl-C. Any other
    exception is a bug and shows its traceback. With `needs_output=False` the script continues when its standard output
    cannot be written, for example because the disk is full.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # print "?" where the console cannot show a character
    output = StandardOutput(sys.stdout, needs_output)
    redirection: contextlib.AbstractContextManager = contextlib.nullcontext()
    if sys.stdout is not None:  # None if the caller closed it
        redirection = contextlib.redirect_stdout(typing.cast(IO[str], output))
    status: int | None
    try:
        with redirection:
            status = main()
            output.flush()
    except (UserError, OutputError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # `python gen.py | head`: the reader has exited
        output.has_failed = True
        status = 141
    if output.has_failed:  # otherwise Python fails again at exit, when it flushes what is still buffered
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


# --- options from a dataclass ---


@dataclasses.dataclass(frozen=True)
class Option:
    """The settings of one option; `option` explains them."""

    help: str
    group: str | None
    positional: bool
    choices: tuple[Any, ...]
    metavar: str | None
    bounds: dict[str, float]
    argparse_settings: dict[str, Any]


def option(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: Sequence[Any] = (),
    group: str | None = None,
    metavar: str | None = None,
    positional: bool = False,
    **argparse_settings: Any,
) -> Any:
    """A dataclass field that `parse_options` turns into a command-line option.

    `at_least`, `above`, `at_most` and `below` bound a number, or each number of a tuple; None and words such as "auto"
    are not checked. `choices` are the accepted values. `group` is the heading under which `--help` lists the option.
    `positional=True` makes it an argument without dashes, optional unless `nargs` says otherwise (`nargs=None`:
    required). Other settings (action, const, nargs, type) go to argparse's `add_argument`.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    stated = {name: bound for name, bound in bounds.items() if bound is not None}
    spec = Option(help, group, positional, tuple(choices), metavar, stated, argparse_settings)
    return dataclasses.field(default=default, metadata={"option": spec})


def options_of(cls: type) -> dict[str, tuple[dataclasses.Field, Option]]:
    """The fields of a dataclass that are options, with what `option` says about them, by name."""
    return {f.name: (f, f.metadata["option"]) for f in dataclasses.fields(cls) if "option" in f.metadata}


def check_options(options: Any) -> None:
    """Raise ValueError if an option of this dataclass instance is out of its range; call it in `__post_init__`.

    >>> @dataclasses.dataclass
    ... class Options:
    ...     top_k: int | None = option(None, "keep the k likeliest tokens", at_least=1)
    >>> check_options(Options(top_k=0))
    Traceback (most recent call last):
    ValueError: --top_k must be at least 1, not 0
    """
    _check_values(type(options), {name: getattr(options, name) for name in options_of(type(options))})


def parse_options(
    cls: type[T],
    description: str,
    argv: Sequence[str] | None = None,
    examples: Sequence[str] | None = None,
    needs_options: bool = False,
) -> T:
    """Parse command-line options into an instance of the dataclass `cls`.

    A `bool` that is False by default becomes `--name`, any other `bool` `--name/--no-name`; `X | None` parses as X.
    `description` is the script's docstring: `--help` shows its first line and, at the end, its indented command lines
    as examples, unless `examples` lists others. With `needs_options`, an empty command line also shows the help. A
    value out of range and a ValueError of `__post_init__` are usage errors: one line, exit status 2.

    >>> @dataclasses.dataclass
    ... class Options:
    ...     top_k: int | None = option(None, "keep the k likeliest tokens")
    >>> parse_options(Options, "", ["--top_k", "5"])
    Options(top_k=5)
    """
    parser = option_parser(cls, description, examples)
    argv = sys.argv[1:] if argv is None else argv
    values = _parse(parser, cls, argv or (["--help"] if needs_options else []))
    try:
        return cls(**values)
    except ValueError as error:
        parser.error(str(error))


def given_options(cls: type, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Only the options on the command line, without the defaults; a resumed run changes only these."""
    return _parse(option_parser(cls, "", argument_default=argparse.SUPPRESS), cls, argv)


def option_parser(
    cls: type, description: str, examples: Sequence[str] | None = None, **parser_settings: Any
) -> argparse.ArgumentParser:
    """The argparse parser that `parse_options` uses."""
    if examples is None:
        examples = example_commands(description)
    parser = _Parser(
        usage=" ".join(["%(prog)s [options]", *_positional_words(cls)]),
        description=textwrap.fill(next(iter(description.strip().splitlines()), ""), HELP_WIDTH),
        epilog="\n".join(["examples:", *(f"  {line}" for line in examples)]) if examples else None,
        allow_abbrev=False,  # a new option must not change what an old command means
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=HELP_COLUMN, width=HELP_WIDTH
        ),
        **parser_settings,
    )
    hints = typing.get_type_hints(cls)
    groups: dict[str, Any] = {}
    for name, (field, spec) in options_of(cls).items():
        if spec.group is not None and spec.group not in groups:
            groups[spec.group] = parser.add_argument_group(spec.group)
        target = parser if spec.group is None else groups[spec.group]
        settings = _argparse_settings(field, spec, option_type(hints[name]))
        default = parser_settings.get("argument_default", field.default)
        if not spec.positional:
            settings["dest"] = name
        target.add_argument(shown_name(name, spec), default=default, **settings)
    return parser


def shown_name(name: str, spec: Option) -> str:
    """An option as it is typed; a field such as `as_`, which Python's keywords force, becomes `--as`."""
    return name if spec.positional else f"--{name.rstrip('_')}"


def _positional_words(cls: type) -> list[str]:
    """The arguments without dashes, as the usage line shows them."""
    patterns = {None: "{0}", "?": "[{0}]", "+": "{0} [{0} ...]", "*": "[{0} ...]"}
    specs = {name: spec for name, (_, spec) in options_of(cls).items() if spec.positional}
    return [patterns[spec.argparse_settings.get("nargs", "?")].format(name) for name, spec in specs.items()]


def example_commands(docstring: str) -> list[str]:
    """The indented lines of a script's docstring that run Python, together with their continuation lines."""
    commands: list[str] = []
    for line in docstring.splitlines():
        continues = bool(commands) and commands[-1].endswith("\\")
        if continues or (line.startswith("    ") and "python " in line):
            commands.append(f"    {line.strip()}" if continues else line.strip())
    return commands


def option_type(hint: Any) -> Any:
    """The type that one command-line word is parsed as: `int | None` is int, `tuple[str, ...]` is str."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        hint = typing.get_args(hint)[0]
    return hint


class _Parser(argparse.ArgumentParser):
    """An argparse parser with one-line errors and a suggestion for a mistyped option."""

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (\S+?)(/\S+)?: ", r"\1 ", message)
        message = message.replace(" expected one argument", " needs a value")
        message = message.replace(" expected at least one argument", " needs at least one value")
        if found := re.match(r"unrecognized arguments: (\S+)", message):  # such as: train.py dataset story
            known = self._known_names().get(_bare_name(found[1]))
            message += f"; did you mean {known}?" if known else ""
        self.exit(2, f"error: {message}\n")

    def check_names(self, argv: Sequence[str]) -> None:
        """Report the first unknown option, before argparse reports that something else is missing."""
        if {"-h", "--help"} & set(argv):
            return
        for word in argv:
            if word == "--":
                return
            name = word.partition("=")[0]
            is_option = re.match(r"--|-[A-Za-z]", name) and " " not in name  # -1 is a number, - a file
            if is_option and name not in self._option_string_actions:
                self.error(f"unrecognized option {name}; {self._suggestion(name)}")

    def _known_names(self) -> dict[str, str]:
        """The options with two dashes, by their bare names."""
        return {_bare_name(option): option for option in self._option_string_actions if option.startswith("--")}

    def _suggestion(self, name: str) -> str:
        known, bare = self._known_names(), _bare_name(name)
        closest = difflib.get_close_matches(bare, known, n=1, cutoff=0.65)
        closest += [other for other in known if len(other) > 2 and bare.startswith(other)]  # --temperature: --temp
        return f"did you mean {known[closest[0]]}?" if closest else "--help lists the options"


def _bare_name(name: str) -> str:
    return name.strip("-").replace("-", "_").lower()


def _parse(parser: argparse.ArgumentParser, cls: type, argv: Sequence[str] | None) -> dict[str, Any]:
    argv = sys.argv[1:] if argv is None else argv
    typing.cast(_Parser, parser).check_names(argv)
    values = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(parser.parse_args(argv)).items()
    }
    try:
        _check_values(cls, values)
    except ValueError as error:
        parser.error(str(error))
    return values


def _argparse_settings(field: dataclasses.Field, spec: Option, kind: Any) -> dict[str, Any]:
    """The keyword arguments of `add_argument` for one option."""
    settings = {"help": spec.help, "metavar": spec.metavar, **spec.argparse_settings}
    is_shown = field.default not in (None, ()) and field.default is not False  # 0 is shown
    if is_shown and "default" not in spec.help:
        settings["help"] += f" (default: {field.default})"
    if spec.positional:
        settings.setdefault("nargs", "?")
    if kind is bool:
        settings["action"] = "store_true" if field.default is False else argparse.BooleanOptionalAction
        del settings["metavar"]
        return settings
    if settings.get("nargs") == "+" and not spec.positional:
        settings.setdefault("action", _Collect)
    settings.setdefault("type", _word_parser(kind))
    if spec.choices and spec.positional:  # choices are checked by `_check_values`, as values from code are
        settings["help"] += f": {alternatives(spec.choices)}"
    elif settings["metavar"] is None and spec.choices:
        settings["metavar"] = f"{{{','.join(map(str, spec.choices))}}}"
    elif settings["metavar"] is None and not spec.positional:
        settings["metavar"] = {int: "N", float: "X"}.get(kind, field.name.rpartition("_")[2].upper())
    return settings


class _Collect(argparse.Action):
    """Collects the values of an option that is given several times; argparse would keep only the last ones."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        earlier = getattr(namespace, self.dest, None)
        setattr(namespace, self.dest, [*(earlier if isinstance(earlier, list) else []), *values])


def _word_parser(kind: Any) -> Callable[[str], Any]:
    """`kind` itself for text; for numbers a parser whose error says what was expected."""
    if kind not in (int, float):
        return kind

    def parse_number(word: str) -> Any:
        try:
            return kind(word)
        except ValueError as error:
            expected = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {expected}, not {word!r}") from error

    return parse_number


def _check_values(cls: type, values: dict[str, Any]) -> None:
    for name, (_, spec) in options_of(cls).items():
        value = values.get(name)
        shown = shown_name(name, spec)
        for item in value if isinstance(value, tuple) else (value,):
            if spec.choices and item is not None and item not in spec.choices:
                raise ValueError(f"{shown} must be {alternatives(spec.choices)}, not {item!r}")
            if spec.bounds and _is_number(item) and not _is_within(item, spec.bounds):
                raise ValueError(f"{shown} must be {range_in_words(spec.bounds, item)}, not {item}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_within(value: float, bounds: dict[str, float]) -> bool:
    tests = {
        "at_least": value >= bounds.get("at_least", value),
        "above": value > bounds.get("above", -math.inf),
        "at_most": value <= bounds.get("at_most", value),
        "below": value < bounds.get("below", math.inf),
    }
    return all(tests.values()) and math.isfinite(value)  # NaN fails every comparison


def range_in_words(bounds: dict[str, float], value: float = 0) -> str:
    """The bounds of an option in words; for an infinite `value` also that it must be finite."""
    words = [f"{name.replace('_', ' ')} {_bound_in_words(bound)}" for name, bound in bounds.items()]
    return " and ".join([*words, *(["finite"] if math.isinf(value) else [])])


def _bound_in_words(bound: float) -> str:
    is_power = isinstance(bound, int) and bound >= 2**31 and bound.bit_count() == 1
    return f"2**{int(bound).bit_length() - 1}" if is_power else str(bound)


def alternatives(choices: Sequence[Any]) -> str:
    """The choices as part of a sentence.

    >>> alternatives(["ddp", "fsdp"])
    'ddp or fsdp'
    """
    *first, last = map(str, choices)
    return f"{', '.join(first)} or {last}" if first else last


# --- terminals ---


def is_terminal() -> bool:
    """Whether the program can ask the user: standard input and output are terminals, and torchrun did not start it."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty() and "RANK" not in os.environ


def supports_colour() -> bool:
    """Whether to print in colour: on a terminal without NO_COLOR, or wherever FORCE_COLOR is set."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (sys.stdout.isatty() and os.environ.get("TERM") != "dumb")
