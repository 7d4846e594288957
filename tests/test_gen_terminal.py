"""gen.py as a process: signals, pipes, and chats on a pseudo-terminal."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def start(folder: Path, *arguments: str, **settings) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **settings.pop("environment", {})}
    return subprocess.Popen([sys.executable, ROOT / "gen.py", *arguments], cwd=folder, env=environment, **settings)


def test_help_is_printed_without_importing_torch():
    program = (
        "import sys, runpy; sys.argv = ['gen.py', '--help']\ntry: runpy.run_path(sys.argv[1 - 1], run_name='__main__')"
    )
    program += "\nexcept SystemExit as stop: sys.exit(3 if 'torch' in sys.modules else stop.code)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--top_p" in done.stdout, done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_text_is_written_as_far_as_it_was_generated(models, tmp_path, number):
    output = tmp_path / "out.txt"
    process = start(models, "--nonstop", "--prompt", "Hi", "--output", str(output), stdout=subprocess.PIPE)
    shown = process.stdout.read(200)
    process.send_signal(number)
    shown += process.stdout.read()
    assert process.wait(30) == 130
    assert output.read_bytes() == shown.removesuffix(b"\n") or output.read_bytes() == shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.txt"]


def test_a_closed_pipe_ends_the_program_quietly(models):
    process = start(models, "--nonstop", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(50)
    process.stdout.close()
    assert process.wait(30) == 141
    assert b"Traceback" not in process.stderr.read()


class Terminal:
    """gen.py on a pseudo-terminal: `type` keys, `wait` for output."""

    def __init__(self, folder: Path, *arguments: str, columns: int = 80, **environment: str):
        pty = pytest.importorskip("pty", reason="needs a system with pseudo-terminals")
        self.master, slave = pty.openpty()
        streams = {"stdin": slave, "stdout": slave, "stderr": slave}
        _set_columns(self.master, columns)
        environment = {"TERM": "xterm", "COLUMNS": "", **environment}
        # A session of its own with this terminal, so that Ctrl-C reaches it as from a keyboard.
        self.process = start(
            folder, *arguments, environment=environment, start_new_session=True, preexec_fn=_own_terminal, **streams
        )
        os.close(slave)
        self.seen, self.position = "", 0

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def wait(self, text: str, timeout_s: float = 30) -> str:
        """The output since the last wait, up to and including `text`."""
        deadline = time.monotonic() + timeout_s
        while (end := self.seen.find(text, self.position)) < 0:
            ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not appear in {self.seen[self.position :]!r}"
            assert self._read(), f"ended before {text!r}: {self.seen[self.position :]!r}"
        shown = self.seen[self.position : end + len(text)]
        self.position = end + len(text)
        return shown

    def _read(self) -> bool:
        """Add what has arrived to `seen`; False if the program has ended."""
        try:
            data = os.read(self.master, 65536)
        except OSError:  # the other side is closed
            data = b""
        self.seen += data.decode("utf-8", "replace")
        return bool(data)

    def wait_for_end(self) -> str:
        """The output since the last wait, up to the end of the program."""
        while self._read():
            pass
        return self.seen[self.position :]

    def interrupt(self, text: str) -> str:
        """Ctrl-C until `text` appears: readline misses a signal that arrives while it sets up the terminal."""
        for _ in range(8):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                return self.wait(text, timeout_s=2)
        raise AssertionError(f"{text!r} did not appear after Ctrl-C: {self.seen[self.position :]!r}")

    def close(self) -> int:
        status = self.process.wait(30)
        os.close(self.master)
        return status


def _set_columns(terminal: int, columns: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))


def _own_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_chat_on_a_terminal(models):
    chat = Terminal(models, "models/chitchat600.pt", "--chat", "--max_tokens", "600", NO_COLOR="1")
    chat.wait("Ctrl-D exits")
    chat.wait("you> ")
    chat.type("Hello\n")
    chat.wait("Hello\r\n")
    time.sleep(0.3)  # 600 pieces with the typing effect take 6 s
    chat.interrupt("you> ")  # Ctrl-C stops only the reply
    chat.type("/stats\n")
    assert "2 messages" in chat.wait("seed")
    chat.wait("you> ")
    chat.interrupt("/quit or Ctrl-D exits")  # at the prompt it prints a reminder
    chat.wait("you> ")
    chat.type("/system one\\\ntwo\n")
    assert "system: one\r\ntwo" in chat.wait("you> ")
    chat.type('"""\n/undo is\n\nnot a command here\n"""\n')
    chat.wait("here\r\n")
    chat.wait('"""\r\n')
    time.sleep(0.3)
    chat.interrupt("you> ")
    chat.type("/stats\n")
    assert "5 messages" in chat.wait("seed")
    chat.wait("you> ")
    chat.type("\x1b[A")  # the previous line, from the history
    chat.wait("/stats")
    chat.type("\n")
    chat.wait("5 messages")
    chat.wait("you> ")
    chat.type("\x04")
    assert chat.close() == 0
    assert "\33[1;36m" not in chat.seen and "Traceback" not in chat.seen


def test_colours_on_a_terminal(models):
    chat = Terminal(models, "--interactive", "--no_delay", "--max_tokens", "3")
    chat.wait("prompt> ")
    chat.type("/temp 0.25\n")
    chat.wait("\33[2mtemperature 0.25\33[0m")
    chat.wait("\33[1;36mprompt> ")
    chat.type("/quit\n")
    assert chat.close() == 0


PROMPT = "Once upon a time there was a little fox who lived in the green wood and loved berries. " * 3


def test_text_wraps_at_words_on_a_terminal_and_only_there(models, tmp_path):
    output = tmp_path / "out.txt"
    arguments = ("--prompt", PROMPT, "--max_tokens", "1", "--temp", "0", "--no_delay", "--output", str(output))
    terminal = Terminal(models, *arguments, columns=30)
    shown = terminal.wait_for_end()
    lines = shown[shown.index("Once upon a time") :].split("\r\n")
    assert max(map(len, shown.split("\r\n"))) <= 40, "notices wrap, too"
    assert terminal.close() == 0
    assert len(lines) > 8 and 20 < max(map(len, lines)) <= 30
    assert " ".join(lines).startswith(PROMPT.rstrip())
    assert output.read_text("utf-8").startswith(PROMPT)  # the file has no additional line breaks
    piped = start(models, *arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).communicate()[0]
    assert piped.decode().startswith(PROMPT)


def test_text_wraps_if_only_the_input_is_no_terminal(models):
    pty = pytest.importorskip("pty", reason="needs a system with pseudo-terminals")
    master, slave = pty.openpty()
    _set_columns(master, 30)
    arguments = ("--prompt_file", "-", "--max_tokens", "1", "--temp", "0")
    streams = {"stdin": subprocess.PIPE, "stdout": slave, "stderr": subprocess.DEVNULL}
    start(models, *arguments, environment={"COLUMNS": ""}, **streams).communicate(PROMPT.encode(), timeout=60)
    lines = os.read(master, 65536).decode().split("\r\n")
    assert len(lines) > 8 and max(map(len, lines)) <= 30 and " ".join(lines).startswith(PROMPT.rstrip())


def test_a_word_that_may_be_meant_as_a_command_is_asked_about(models):
    chat = Terminal(models, "models/chitchat600.pt", "--chat", "--max_tokens", "2", "--no_delay", NO_COLOR="1")
    chat.wait("you> ")
    chat.type("bye\n")
    chat.wait("Did you mean /quit? Enter for yes, n to send it as a message: ")
    chat.type("n\n")
    chat.wait("you> ")
    chat.type("/stats\n")
    assert "2 messages" in chat.wait("seed")
    chat.wait("you> ")
    chat.type("Help\n")
    chat.wait("Did you mean /help? ")
    chat.type("\n")
    chat.wait("/retry")
    chat.wait("you> ")
    chat.type("quit\n")
    chat.wait("Did you mean /quit? ")
    chat.interrupt("you> ")  # neither: Ctrl-C returns to the prompt
    chat.type("Please help\n")  # more than the word is a message
    chat.wait("you> ")
    chat.type("/stats\n")
    assert "4 messages" in chat.wait("seed")
    chat.wait("you> ")
    chat.type("EXIT\n")
    chat.wait("Did you mean /quit? ")
    chat.type("what?\n")
    chat.wait("Did you mean /quit? ")
    chat.type("\n")
    assert chat.close() == 0
