"""common/cli.py and common/output.py: options from a dataclass, exit statuses, standard output, colours."""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from common import cli
from common.cli import check_options, given_options, option, parse_options
from common.output import OutputError, StandardOutput

ROOT = Path(cli.__file__).parent.parent


@dataclass(frozen=True)
class Options:
    checkpoint: str | None = option(None, "the checkpoint", positional=True)
    nonstop: bool = option(False, "never stop")
    compile: bool = option(True, "compile the model", group="speed")
    delay: bool | None = option(None, "wait between tokens")
    temp: float = option(0.8, "temperature", at_least=0, below=100, group="sampling")
    top_k: int | None = option(None, "keep the k likeliest tokens", at_least=1, group="sampling")
    top_p: float = option(1.0, "keep the likeliest tokens of this probability", above=0, at_most=1, group="sampling")
    dtype: str = option("auto", "precision", choices=("auto", "float32", "bfloat16"), group="speed")
    input: tuple[str, ...] = option((), "files", nargs="+", metavar="FILE")
    seed: int = option(1, "seed", at_least=0, below=2**63)
    sizes: tuple[int, ...] = option((), "sizes", nargs="+", at_least=1)
    dropout: float = option(0.0, "share of activations dropped")
    internal: int = 7  # without help: no option

    def __post_init__(self):
        check_options(self)
        if self.nonstop and self.input:
            raise ValueError("--nonstop takes no --input")


DOCSTRING = """Generate text.

    python gen.py --chat
    python gen.py --prompt "Once" \\
        --top_k 5

Standard output is

    the text alone
"""


def parse(*argv: str) -> Options:
    return parse_options(Options, DOCSTRING, argv)


def test_an_option_with_several_values_may_be_repeated():
    assert parse("--input", "a", "--sizes", "1", "--input", "b", "c").input == ("a", "b", "c")
    assert parse("--sizes", "1", "--sizes", "2").sizes == (1, 2) and parse().input == ()


def usage_error(capsys, *argv: str) -> str:
    """What a wrong command line prints on standard error; it exits with status 2 and prints nothing else."""
    with pytest.raises(SystemExit) as exit_status:
        parse(*argv)
    output = capsys.readouterr()
    assert exit_status.value.code == 2 and output.out == ""
    return output.err


def test_options_have_the_fields_defaults():
    assert parse() == Options()


def test_options_are_parsed_as_their_types():
    options = parse("a.pt", "--nonstop", "--no-compile", "--temp", "0", "--top_k", "5", "--sizes", "1", "2")
    assert options == Options("a.pt", nonstop=True, compile=False, temp=0.0, top_k=5, sizes=(1, 2))
    assert isinstance(options.temp, float) and isinstance(options.sizes, tuple)
    assert parse("--input", "b", "c").input == ("b", "c")


def test_a_bool_can_be_switched_on_and_off_unless_it_is_off_by_default(capsys):
    assert parse("--compile").compile is True
    assert parse("--delay").delay is True and parse("--no-delay").delay is False
    usage_error(capsys, "--no-nonstop")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (("--top_k", "five"), "--top_k must be a whole number, not 'five'"),
        (("--temp", "hot"), "--temp must be a number, not 'hot'"),
        (("--top_k",), "--top_k needs a value"),
        (("--input",), "--input needs at least one value"),
        (("--dtype", "float8"), "--dtype must be auto, float32 or bfloat16, not 'float8'"),
        (("--top_k", "0"), "--top_k must be at least 1, not 0"),
        (("--temp", "-1"), "--temp must be at least 0 and below 100, not -1.0"),
        (("--temp", "100"), "--temp must be at least 0 and below 100, not 100.0"),
        (("--temp", "nan"), "--temp must be at least 0 and below 100, not nan"),
        (("--top_p", "0"), "--top_p must be above 0 and at most 1, not 0.0"),
        (("--top_p", "1.5"), "--top_p must be above 0 and at most 1, not 1.5"),
        (("--seed", str(2**63)), f"--seed must be at least 0 and below 2**63, not {2**63}"),
        (("--sizes", "3", "0"), "--sizes must be at least 1, not 0"),
        (("--nonstop", "--input", "a"), "--nonstop takes no --input"),
        (("--top_kk", "3"), "unrecognized option --top_kk; did you mean --top_k?"),
        (("--top-k=3",), "unrecognized option --top-k; did you mean --top_k?"),
        (("--no_compile",), "unrecognized option --no_compile; did you mean --no-compile?"),
        (("--colour",), "unrecognized option --colour; --help lists the options"),
        (("--internal", "3"), "unrecognized option --internal; --help lists the options"),
        (("--comp",), "unrecognized option --comp; did you mean --compile?"),  # no abbreviations
        (("a.pt", "b.pt"), "unrecognized arguments: b.pt"),
        (("--temperature", "1"), "unrecognized option --temperature; did you mean --temp?"),
        (("--size", "1"), "unrecognized option --size; did you mean --sizes?"),
        (("--text", "x"), "unrecognized option --text; --help lists the options"),
        (("-top_k", "3"), "unrecognized option -top_k; did you mean --top_k?"),
        (("-top-kk=3",), "unrecognized option -top-kk; did you mean --top_k?"),
        (("a.pt", "top_k", "3"), "unrecognized arguments: top_k 3; did you mean --top_k?"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(argv, sentence, capsys):
    assert usage_error(capsys, *argv) == f"error: {sentence}\n"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"top_k": 0}, "--top_k must be at least 1, not 0"),
        ({"temp": float("inf")}, "--temp must be at least 0 and below 100 and finite, not inf"),
        ({"sizes": (1, -1)}, "--sizes must be at least 1, not -1"),
        ({"dtype": "int4"}, "--dtype must be auto, float32 or bfloat16, not 'int4'"),
    ],
)
def test_options_that_code_sets_are_checked_too(settings, sentence):
    with pytest.raises(ValueError) as error:
        Options(**settings)
    assert str(error.value) == sentence
    with pytest.raises(ValueError):
        dataclasses.replace(Options(), **settings)


def test_the_bounds_themselves_and_words_are_accepted():
    assert Options(temp=0, top_k=1, top_p=1.0, sizes=(1,)).top_p == 1.0
    check_options(Options(top_k=None))

    @dataclass
    class WithWord:
        size: int | str = option("auto", "a number or auto", at_least=1, type=str)

    check_options(WithWord("auto"))


def test_a_mistyped_option_is_named_before_what_is_missing(capsys):
    @dataclass
    class Required:
        checkpoint: str = option(None, "the checkpoint", positional=True, nargs=None)
        force: bool = option(False, "overwrite")

    for argv, sentence in (
        (["--forse"], "unrecognized option --forse; did you mean --force?"),
        (["--force"], "the following arguments are required: checkpoint"),
    ):
        with pytest.raises(SystemExit):
            parse_options(Required, "", argv)
        assert capsys.readouterr().err == f"error: {sentence}\n"


def test_a_value_may_look_like_an_option():
    @dataclass
    class Prompt:
        prompt: str = option("", "text")

    assert parse_options(Prompt, "", ["--prompt=--x"]).prompt == "--x"
    assert parse_options(Prompt, "", ["--prompt", "--once upon a time"]).prompt == "--once upon a time"


def test_help_lists_every_option_in_its_group_with_its_default_and_ends_with_the_examples(capsys):
    with pytest.raises(SystemExit) as exit_status:
        parse("--help")
    text = capsys.readouterr().out
    assert exit_status.value.code == 0
    assert text.startswith("usage: ") and "[options] [checkpoint]" in text.splitlines()[0]
    assert "Generate text." in text and "Standard output" not in text
    for word in ("checkpoint", "--nonstop", "--no-compile", "--top_k N", "--temp X", "--input FILE", "(default: 0.0)"):
        assert word in text
    assert "internal" not in text and "(default: None)" not in text
    sections = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert sections == ["positional arguments:", "options:", "speed:", "sampling:", "examples:"]
    assert text.endswith('examples:\n  python gen.py --chat\n  python gen.py --prompt "Once" \\\n      --top_k 5\n')
    assert max(map(len, text.splitlines())) <= 110


def test_a_script_that_needs_options_shows_its_help_without_them(capsys):
    with pytest.raises(SystemExit) as exit_status:
        parse_options(Options, DOCSTRING, [], needs_options=True)
    assert exit_status.value.code == 0 and capsys.readouterr().out.startswith("usage: ")
    assert parse_options(Options, DOCSTRING, ["--top_k", "5"], needs_options=True).top_k == 5


def test_given_options_are_those_on_the_command_line_even_if_equal_to_the_default(capsys):
    assert given_options(Options, []) == {}
    argv = ["a.pt", "--temp", "0.8", "--no-compile", "--nonstop", "--top_k", "5"]
    expected = {"checkpoint": "a.pt", "temp": 0.8, "compile": False, "nonstop": True, "top_k": 5}
    assert given_options(Options, argv) == expected
    with pytest.raises(SystemExit):
        given_options(Options, ["--top_k", "0"])
    assert "--top_k must be at least 1" in capsys.readouterr().err


def run_program(body: str, **settings) -> subprocess.CompletedProcess:
    imports = "import sys, os, signal\nfrom common.cli import *"
    program = f"{imports}\ndef main():\n    {body}\nrun_script(main)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **settings.pop("env", {})}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, **settings)


@pytest.mark.parametrize(
    ("body", "status", "output", "error"),
    [
        ("print('done')", 0, "done\n", ""),
        ("return 3", 3, "", ""),
        ("raise UserError('a.bin not found; run: x')", 1, "", "error: a.bin not found; run: x\n"),
        ("os.kill(os.getpid(), signal.SIGINT)", 130, "", "interrupted\n"),
        ("sys.exit(5)", 5, "", ""),
    ],
)
def test_a_script_ends_with_the_right_status(body, status, output, error):
    done = run_program(body)
    assert (done.returncode, done.stdout, done.stderr) == (status, output, error)


def test_a_bug_shows_its_traceback():
    done = run_program("return 1 // 0")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr


def test_a_reader_that_exits_early_is_not_an_error():
    program = "from common.cli import *\nrun_script(lambda: [print('x' * 1000) for _ in range(10000)] and None)"
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=20) == 141


def test_a_console_without_the_character_shows_a_question_mark():
    done = run_program("print('caf\\u00e9'); raise UserError('\\u4f60')", env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout, done.stderr) == (1, "caf?\n", "error: ?\n")


def test_colour_is_for_terminals_and_no_color_wins(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stdout.isatty", lambda: False)
    assert not cli.supports_colour()
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert cli.supports_colour()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not cli.supports_colour()
    monkeypatch.delenv("FORCE_COLOR")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert not cli.supports_colour()
    monkeypatch.delenv("NO_COLOR")
    assert cli.supports_colour()


# --- standard output that cannot be written ---


class Refusing(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


DROPPED = "warning: standard output not written: No space left on device; continuing without it"
FULL = OSError(errno.ENOSPC, "No space left on device")


def test_output_on_a_full_disk_is_dropped_with_one_warning_unless_the_script_needs_it(capsys):
    stream = StandardOutput(Refusing(FULL), is_needed=False)
    for _ in range(2):
        print("a line", file=stream, flush=True)
    assert (
        capsys.readouterr().err
        == "warning: standard output not written: No space left on device; continuing without it\n"
    )
    with pytest.raises(OutputError, match="standard output not written: No space left on device"):
        print("a line", file=StandardOutput(Refusing(FULL), is_needed=True))
    with pytest.raises(BrokenPipeError):
        print("a line", file=StandardOutput(Refusing(BrokenPipeError()), is_needed=False))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("target", "needs_output", "status", "sentence"),
    [
        (">/dev/full", True, 1, "error: standard output not written: No space left on device"),
        (
            ">/dev/full",
            False,
            3,
            "warning: standard output not written: No space left on device; continuing without it",
        ),
        (">&-", True, 3, ""),
    ],
)
def test_a_script_whose_output_cannot_be_written(target, needs_output, status, sentence, unbuffered):
    program = f"from common import cli; cli.run_script(lambda: print('text') or 3, needs_output={needs_output})"
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(program)} {target}"
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == status
    assert sentence in done.stderr and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_a_full_disk_elsewhere_is_not_blamed_on_the_output():
    def main():
        raise FULL

    with pytest.raises(OSError, match="No space left"):
        cli.run_script(main)
