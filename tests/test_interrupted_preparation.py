"""A preparation that is interrupted or killed leaves no files under their final names, and no processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.pipeline import Corpus, prepare
from tests.test_pipeline import ROOT, TEXT, files_of, options, stories

ENDLESS = """
import sys
sys.path[:0] = [{data!r}]
from data.pipeline import Corpus, Dataset, PrepareOptions, prepare

def endless():
    n = 0
    while True:
        n += 1
        if n == 2000:
            print("working", flush=True)
        yield f"Story number {{n}} about {{n * n}} cats"

if __name__ == "__main__":
    options = PrepareOptions(output_dir={out!r}, workers=2)
    prepare(Dataset("mine", "text", "a test", "MIT"), options, Corpus(endless()), batch_characters=500)
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the worker processes in /proc")
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_preparation_leaves_no_files_and_no_processes(tmp_path, signal_number):
    out = tmp_path / "out"
    prepare(TEXT, options(out), Corpus(stories(50)))
    before = files_of(out)
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS.format(data=str(ROOT), out=str(out)))
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as run:
        while "working" not in run.stdout.readline():
            assert run.poll() is None
        workers = children_of(run.pid)
        run.send_signal(signal_number)
        assert run.wait(timeout=20) != 0
    assert workers
    deadline = time.monotonic() + 10
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < deadline, "worker processes are still there"
        time.sleep(0.05)
    left = [path for path in out.iterdir() if path.name != ".mine.lock"]
    if signal_number == signal.SIGKILL:  # nothing under a final name; the next run removes the rest
        left.remove(out / ".mine.tmp")
    left = {path.name: path.read_bytes() for path in left}
    assert left == before
    prepare(TEXT, options(out), Corpus(stories(50)))
    assert files_of(out) == before, "the next run starts again without harm"


def children_of(process_id: int) -> list[int]:
    children = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == process_id:
                children.append(int(entry.name))
    return children


def is_running(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
