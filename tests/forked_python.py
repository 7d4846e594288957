"""A `python` command that starts at once: a process that has imported torch forks for each call.

    with forked_python(folder) as python:
        subprocess.run([python, "train.py", "--dataset", "story"])

Importing torch and its compiler takes five seconds of a core, and the tests run a hundred scripts. The modules of the
project are imported by each call anew. A call gets the caller's arguments, folder, environment, input and output, but
signals that are sent to it do not reach the script; and what Python reads from the environment when it starts, apart
from PYTHONPATH, has been read already. The script is killed if its caller ends first.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import multiprocessing.process
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

PRELUDE = "import matplotlib.pyplot, numpy, tiktoken, tokenizers, torch, torch._dynamo"
COMMAND = """#!/bin/sh
exec "{executable}" -IS "{client}" "$@"
"""
CLIENT = """
import json, os, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
call = {{"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}
socket.send_fds(connection, [b" "], [0, 1, 2])
connection.sendall(json.dumps(call).encode())
connection.shutdown(socket.SHUT_WR)
status = int(connection.recv(16) or 70)
sys.exit(status if status >= 0 else 128 - status)
"""
CAN_FORK = hasattr(os, "fork") and hasattr(os, "pidfd_open")


@contextlib.contextmanager
def forked_python(folder: Path, prelude: str = PRELUDE, **environment: str) -> Iterator[str]:
    """The path of such a command, which is written to `folder`; on systems other than Linux that of this Python.

    `prelude` is code that runs once, before the first call; `environment` is set while it does.
    """
    if not CAN_FORK:
        yield sys.executable
        return
    address, client, command = folder / "socket", folder / "client.py", folder / "python"
    client.write_text(CLIENT.format(address=str(address)))
    command.write_text(COMMAND.format(executable=sys.executable, client=client))  # a path may have spaces
    command.chmod(0o755)
    with subprocess.Popen(
        [sys.executable, __file__, str(address), prelude],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **environment},
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        yield str(command)
        server.stdin.close()  # ends it


def serve(address: str, prelude: str) -> None:
    """Answer calls until stdin is closed."""
    exec(prelude, {"__name__": "prelude"})
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        if not os.fork():
            listener.close()
            supervise(connection)
        connection.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def supervise(connection: socket.socket) -> NoReturn:
    """Fork for one call, and report its exit status; kill it if the caller ends first."""
    content, descriptors, *_ = socket.recv_fds(connection, 1, 3)
    while part := connection.recv(1 << 16):
        content += part
    process_id = os.fork()
    if not process_id:
        carry_out(json.loads(content), descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    process = os.pidfd_open(process_id)
    poll = select.poll()
    poll.register(connection, 0)  # reports only that the caller has closed it
    poll.register(process, select.POLLIN)
    if process not in dict(poll.poll()):
        os.kill(process_id, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(process_id, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(str(status).encode())
    os._exit(0)


def carry_out(call: dict[str, Any], descriptors: Sequence[int]) -> NoReturn:
    """Do what a new Python would do with these arguments, and exit."""
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
        os.close(descriptor)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    os.chdir(call["folder"])
    os.environ.clear()
    os.environ.update(call["environment"])
    multiprocessing.process.ORIGINAL_DIR = call["folder"]
    sys.orig_argv = [sys.executable, *call["arguments"]]
    status = 0
    try:
        execute(call["arguments"])
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        if status and not isinstance(stop.code, int):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def execute(arguments: Sequence[str]) -> None:
    """Run `-c code` or a script as the module __main__."""
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    if arguments[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *arguments[2:]], ""
        code = compile(arguments[1], "<string>", "exec")
    else:
        main.__file__ = os.path.abspath(arguments[0])
        sys.argv, sys.path[0] = [*arguments], os.path.dirname(os.path.realpath(arguments[0]))
        code = compile(Path(arguments[0]).read_bytes(), main.__file__, "exec")
    exec(code, main.__dict__)


if __name__ == "__main__":
    serve(*sys.argv[1:])
