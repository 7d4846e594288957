"""The quick `python` of tests/forked_python.py does what a new Python does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.forked_python import CAN_FORK, forked_python

SCRIPT = """
import atexit, json, os, sys
import neighbour
atexit.register(print, "at exit")
found = [sys.argv, sys.path[0], os.getcwd(), os.environ["COLOUR"], sys.stdin.read(), neighbour.NAME, __name__]
print(json.dumps([*found, sys.modules["__main__"].__file__]))
print("complaint", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""
STATUSES = {"pass": 0, "raise ValueError('no')": 1, "import sys; sys.exit('no')": 1, "import os; os._exit(7)": 7}


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    with forked_python(tmp_path_factory.mktemp("python"), prelude="") as python:
        yield python


@pytest.fixture
def call(tmp_path) -> dict:
    """How a script in a folder of its own is called."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "script.py").write_text(SCRIPT)
    (scripts / "neighbour.py").write_text("NAME = 'near'")
    settings = {"cwd": tmp_path, "input": "typed", "capture_output": True, "text": True}
    return {"env": {**os.environ, "COLOUR": "red"}, **settings}


def test_a_script_sees_what_it_would_see_in_a_new_python(python, call):
    found, expected = (
        subprocess.run([each, "scripts/script.py", "3", "two words"], **call) for each in (python, sys.executable)
    )
    assert (found.stdout, found.stderr, found.returncode) == (expected.stdout, expected.stderr, expected.returncode)
    assert json.loads(found.stdout.splitlines()[0])[0] == ["scripts/script.py", "3", "two words"]


@pytest.mark.parametrize(("code", "status"), STATUSES.items())
def test_code_ends_with_the_status_of_a_new_python(python, call, code, status):
    done = [subprocess.run([each, "-c", code], **call) for each in (python, sys.executable)]
    assert [each.returncode for each in done] == [status, status]
    last = [each.stderr.strip().splitlines()[-1:] for each in done]
    assert last[0] == last[1]


def test_modules_are_found_by_pythonpath_and_each_call_imports_them_anew(python, call, tmp_path):
    call["env"]["PYTHONPATH"] = str(tmp_path / "scripts")
    for name in ("near", "changed"):
        (tmp_path / "scripts" / "neighbour.py").write_text(f"NAME = {name!r}\n")
        done = subprocess.run([python, "-c", "import neighbour; print(neighbour.NAME)"], **call)
        assert done.stdout == f"{name}\n"


@pytest.mark.skipif(not CAN_FORK, reason="needs Linux")
def test_a_script_whose_caller_is_killed_is_killed_too(python, tmp_path):
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    with subprocess.Popen([python, "-c", code], stdout=subprocess.PIPE, text=True) as caller:
        process = Path(f"/proc/{int(caller.stdout.readline())}")
        assert process.exists()
        caller.kill()
    for _ in range(100):
        if not process.exists():
            return
        time.sleep(0.1)
    raise AssertionError("the script still runs")


@pytest.mark.skipif(not CAN_FORK, reason="needs Linux")
def test_the_prelude_runs_once_with_its_own_environment(tmp_path):
    prelude = "import os, builtins; builtins.seen = os.environ['COLOUR']"
    with forked_python(tmp_path, prelude, COLOUR="green") as python:
        done = subprocess.run([python, "-c", "import os; print(seen, os.environ.get('COLOUR'))"], capture_output=True)
    assert done.stdout == b"green None\n"
