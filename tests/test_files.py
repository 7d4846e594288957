"""files: whole or not there, whatever happens while they are written."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from common import files
from common.cli import UserError
from common.files import FileLock, atomic_write, remove_stale_temporaries, require_free_space, sha256_file

ROOT = Path(files.__file__).parent
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX permissions, signals and device files")


def spawn(program: str, *arguments: object, **settings) -> subprocess.Popen:
    """A Python process that can import the project."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, **settings)


def dead_process_id() -> int:
    process = spawn("pass")
    process.communicate()
    return process.pid


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "a.bin"
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a.bin"]


def test_text_is_written_with_the_given_encoding(tmp_path):
    with atomic_write(tmp_path / "a.txt", "w", encoding="utf-8", newline="\n") as file:
        file.write("caf\u00e9\n")
    assert (tmp_path / "a.txt").read_bytes() == b"caf\xc3\xa9\n"


@pytest.mark.parametrize("fault", [ValueError("no"), KeyboardInterrupt(), SystemExit(3), OSError(errno.ENOENT, "gone")])
def test_any_exception_leaves_the_old_file(tmp_path, fault):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(fault)), atomic_write(path) as file:
        file.write(b"half")
        raise fault
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


@posix
def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    program = (
        "import os, signal, sys\nfrom files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as file:\n"
        "    file.write(b'half' * 100000); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    process = spawn(program, path)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert len(names(tmp_path)) == 2
    assert [removed.name for removed in remove_stale_temporaries(path)] == [f"a.bin.{process.pid}.tmp"]
    assert names(tmp_path) == ["a.bin"]


class FullDisk:
    """A file on a disk without room: one of its methods raises ENOSPC."""

    def __init__(self, file, full_method: str):
        self._file, self._full_method = file, full_method

    def __getattr__(self, name):
        if name == self._full_method:
            raise OSError(errno.ENOSPC, "No space left on device")
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()


@pytest.mark.parametrize("step", ["open", "write", "flush", "fsync", "replace"])
def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def full(*arguments, **settings):
        raise OSError(errno.ENOSPC, "No space left on device")

    if step == "open":
        monkeypatch.setattr("builtins.open", full)
    elif step in ("write", "flush"):
        real_open = open
        monkeypatch.setattr("builtins.open", lambda *a, **s: FullDisk(real_open(*a, **s), step))
    else:
        monkeypatch.setattr(os, step, full)
    with pytest.raises(UserError, match=r"a\.bin not written: the disk is full"), atomic_write(path) as file:
        file.write(b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_really_full_device_is_one_sentence(tmp_path, monkeypatch):
    real_open = open
    monkeypatch.setattr("builtins.open", lambda path, mode: real_open("/dev/full", mode))
    with pytest.raises(UserError, match="the disk is full"), atomic_write(tmp_path / "a.bin") as file:
        file.write(b"x" * 100_000)


def test_the_bytes_are_on_the_disk_before_the_name_changes(tmp_path, monkeypatch):
    steps = []
    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (steps.append("fsync"), real_fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (steps.append("replace"), real_replace(a, b)))
    with atomic_write(tmp_path / "a.bin") as file:
        file.write(b"new")
    assert steps == ["fsync", "replace"] + ([] if os.name == "nt" else ["fsync"])


@posix
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_those_of_any_new_file(tmp_path, umask, mode):
    previous = os.umask(umask)
    try:
        with atomic_write(tmp_path / "a.bin") as file:
            file.write(b"x")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "a.bin").stat().st_mode) == mode


def test_a_missing_folder_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="not written"), atomic_write(tmp_path / "missing" / "a.bin"):
        raise AssertionError("the block must not run")


def test_a_folder_of_that_name_is_one_sentence(tmp_path):
    (tmp_path / "a.bin").mkdir()
    with pytest.raises(UserError, match="not a regular file"), atomic_write(tmp_path / "a.bin"):
        raise AssertionError("the block must not run")
    assert names(tmp_path) == ["a.bin"]


@posix
def test_a_special_file_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # stands for /dev/null, which root could rename over
    with pytest.raises(UserError, match="not a regular file"), atomic_write(tmp_path / "pipe"):
        raise AssertionError("the block must not run")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_fault_of_another_file_keeps_its_own_name(tmp_path):
    fault = PermissionError(errno.EACCES, "Permission denied", "input.txt")
    with pytest.raises(PermissionError, match=r"input\.txt"), atomic_write(tmp_path / "a.bin"):
        raise fault
    assert names(tmp_path) == []


def test_only_what_dead_writers_left_is_removed(tmp_path):
    path = tmp_path / "a[1].bin"
    living = spawn("import sys; sys.stdin.read()", stdin=subprocess.PIPE)
    try:
        dead = tmp_path / f"a[1].bin.{dead_process_id()}.tmp"
        no_process = tmp_path / f"a[1].bin.{10**30}.tmp"
        kept = [f"a[1].bin.{living.pid}.tmp", "a[1].bin.notes.tmp", "a[1].bin.\u00b2.tmp", "b.bin.1.tmp", "a[1].bin"]
        for name in (dead.name, no_process.name, *kept):
            (tmp_path / name).write_bytes(b"x")
        assert sorted(remove_stale_temporaries(path)) == sorted([dead, no_process])
        assert names(tmp_path) == sorted(kept)
    finally:
        living.communicate()


HOLDER = (
    "import sys\nfrom files import FileLock\n"
    "lock = FileLock(sys.argv[1], 'the run')\nprint('held', flush=True)\nsys.stdin.read()"
)


def test_a_second_process_is_refused_and_told_who_holds_the_lock(tmp_path):
    path = tmp_path / "run.lock"
    holder = spawn(HOLDER, path, stdin=subprocess.PIPE)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"the run is in use by another run .process {holder.pid}."):
        FileLock(path, "the run")
    holder.communicate()
    with FileLock(path, "the run"):
        assert path.read_text() == str(os.getpid())


@posix
def test_a_killed_holder_leaves_no_lock(tmp_path):
    path = tmp_path / "run.lock"
    holder = spawn(HOLDER, path, stdin=subprocess.PIPE)
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.communicate()
    FileLock(path, "the run").release()


def test_one_process_cannot_hold_a_lock_twice(tmp_path):
    with FileLock(tmp_path / "run.lock", "the run"), pytest.raises(UserError, match=str(os.getpid())):
        FileLock(tmp_path / "run.lock", "the run")
    FileLock(tmp_path / "run.lock", "the run").release()


def test_a_lock_that_cannot_be_made_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="not written"):
        FileLock(tmp_path / "missing" / "run.lock", "the run")


def test_a_file_system_without_locks_is_not_taken_for_another_run(tmp_path, monkeypatch):
    def no_locks(file):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files, "lock_file", no_locks)
    with pytest.raises(UserError, match="No locks available"):
        FileLock(tmp_path / "run.lock", "the run")


def test_the_digest_is_that_of_the_whole_file(tmp_path):
    content = os.urandom((1 << 22) + 17)
    (tmp_path / "a.bin").write_bytes(content)
    assert sha256_file(tmp_path / "a.bin") == hashlib.sha256(content).hexdigest()


def test_free_space_is_asked_for_in_advance(tmp_path):
    require_free_space(tmp_path, 1, "the corpus")
    with pytest.raises(UserError, match="the corpus needs"):
        require_free_space(tmp_path, 1 << 60, "the corpus")


def test_a_group_of_files_appears_together_the_last_written_last(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("old")
    renamed = []
    real_replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (renamed.append(Path(b).name), real_replace(a, b)))
    with files.atomic_files(tmp_path, "a") as staging:
        for number, name in enumerate(("b.bin", "a.json")):
            (staging / name).write_text("new")
            os.utime(staging / name, ns=(number, number))
        assert names(tmp_path) == [staging.name, "a.json"] and (tmp_path / "a.json").read_text() == "old"
    assert renamed == ["b.bin", "a.json"]
    assert names(tmp_path) == ["a.json", "b.bin"] and (tmp_path / "a.json").read_text() == "new"


def test_a_group_that_fails_leaves_the_folder_and_the_next_one_starts_clean(tmp_path):
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(ValueError, match="stop"), files.atomic_files(tmp_path, "a") as staging:
        (staging / "a.json").write_text("new")
        raise ValueError("stop")
    assert names(tmp_path) == ["a.json"] and (tmp_path / "a.json").read_text() == "old"
    staging.mkdir()  # what a killed writer leaves
    (staging / "stale.bin").write_text("stale")
    with files.atomic_files(tmp_path, "a") as staging:
        (staging / "a.json").write_text("new")
    assert names(tmp_path) == ["a.json"]
