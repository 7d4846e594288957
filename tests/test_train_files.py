"""A run's files: complete or not there, never another run's, and a full disk costs as little as possible."""

from __future__ import annotations

import errno
import io
import os
import re
import subprocess
import sys
from collections import namedtuple

import pytest
import torch

from common.cli import UserError
from tests.tiny import fail, in_step, load_checkpoint, losses, run, same_as

pytestmark = pytest.mark.usefixtures("one_thread", "quick_disk")


def test_going_back_to_the_best_keeps_the_later_state(data, tmp_path, capsys):
    run(data, tmp_path, stop_after=6)
    best = load_checkpoint(tmp_path / "text10-best.pt")["info"]["iter_num"]
    assert best < 6
    assert run(data, tmp_path, resume=tmp_path / "text10-best.pt", stop_after=1) == 130
    assert "kept as" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "text10-previous.pt")["info"]["iter_num"] == 6
    assert [row[0] for row in losses(tmp_path / "text10.jsonl")] == list(range(best + 2))
    assert [row[0] for row in losses(tmp_path / "text10-previous.jsonl")] == list(range(7))
    assert load_checkpoint(tmp_path / "text10-best.pt")["info"]["iter_num"] == best


def test_a_new_run_keeps_the_files_of_an_older_one(data, half):
    older = {path.name: path.read_bytes() for path in half.iterdir() if path.suffix in (".pt", ".jsonl")}
    for _ in range(2):
        run(data, half, stop_after=2, seed=2)
    for name, content in older.items():
        assert (half / name.replace("text10", "text10-previous")).read_bytes() == content
    assert load_checkpoint(half / "text10-previous2.pt")["info"]["iter_num"] == 2
    assert run(data, half, resume=half / "text10-previous.pt") == 0
    assert [row[0] for row in losses(half / "text10.jsonl")] == list(range(11))


def test_a_new_run_keeps_the_kept_checkpoints_of_an_older_one(data, tmp_path):
    run(data, tmp_path, keep=9, eval_interval=3)
    older = {path.name: path.read_bytes() for path in tmp_path.glob("text10-iter*.pt")}
    assert len(older) == 5
    run(data, tmp_path, seed=2, keep=1)
    for name, content in older.items():
        assert (tmp_path / name.replace("text10", "text10-previous")).read_bytes() == content
    assert [path.name for path in tmp_path.glob("text10-iter*.pt")] == ["text10-iter00000010.pt"]


def test_the_best_and_the_last_checkpoints_are_kept(data, tmp_path):
    run(data, tmp_path, keep=2, eval_interval=2)
    kept = sorted(path.name for path in tmp_path.glob("*-iter*.pt"))
    assert kept == ["text10-iter00000008.pt", "text10-iter00000010.pt"]
    values = {row[0]: row[2] for row in losses(tmp_path / "text10.jsonl") if row[2] is not None}
    best = load_checkpoint(tmp_path / "text10-best.pt")["info"]
    assert best["val_loss"] == best["best_val_loss"] == min(values.values()) == values[best["iter_num"]]
    assert load_checkpoint(tmp_path / kept[0])["info"]["iter_num"] == 8
    run(data, tmp_path, keep=2, eval_interval=5)  # a new run of that name: the older copies are not its own
    assert [path.name for path in sorted(tmp_path.glob("*-iter*.pt"))] == [
        "text10-iter00000005.pt",
        "text10-iter00000010.pt",
        "text10-previous-iter00000008.pt",
        "text10-previous-iter00000010.pt",
    ]


def test_stale_temporaries_of_dead_runs_are_removed(data, tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stale = ["text10.pt", "text10-best.pt", "text10-iter00000004.pt", "text10.jsonl", "text10.png"]
    for name in stale:
        (tmp_path / f"{name}.{dead.pid}.tmp").write_bytes(b"half")
    others = [f"text10.pt.{os.getppid()}.tmp", f"text100.pt.{dead.pid}.tmp", "text10.notes.tmp"]
    for name in others:
        (tmp_path / name).write_bytes(b"not ours")
    run(data, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.tmp")) == sorted(others)


# Before the first step


@pytest.mark.parametrize("fault", ["a file in its place", "read-only"])
def test_a_folder_that_cannot_be_written_is_one_sentence_before_any_step(data, tmp_path, monkeypatch, fault):
    folder = tmp_path / "models"
    if fault == "read-only":
        if os.geteuid() == 0:
            real = io.open

            def refusing(path, mode="r", *arguments, **settings):
                if str(path).startswith(str(folder)) and mode != "r":
                    raise OSError(errno.EROFS, "Read-only file system", str(path))
                return real(path, mode, *arguments, **settings)

            monkeypatch.setattr("builtins.open", refusing)
        folder.mkdir(mode=0o555)
    else:
        folder.write_text("a file")
    no_step = in_step(1, fail(AssertionError("a step before the folder is known to be good")))
    with no_step, pytest.raises(UserError, match=r"models.* not written: .*; choose a writable folder"):
        run(data, folder)


def test_room_on_the_disk_is_checked_at_the_start(data, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: namedtuple("usage", "free")(10**6))
    no_step = in_step(1, fail(AssertionError("a step before the room is known")))
    with no_step, pytest.raises(UserError, match=r"the run text10 needs 0.02 GiB in .*, but only 0.00 GiB are free"):
        run(data, tmp_path)


def test_bad_data_is_one_sentence_before_the_folder_is_made(data, tmp_path):
    """tests/test_batches.py has each case."""
    sentence = r"nowhere-train.bin not found; run: python prepare_with_extended_tokenizer.py"
    with pytest.raises(UserError, match=sentence):
        run(data, tmp_path / "models", dataset="nowhere")
    assert not (tmp_path / "models").exists()


# A full disk


class FullDisk:
    """Stands for a disk that is full during some of the calls of torch.save, counted from here."""

    def __init__(self, monkeypatch, full_at: set[int]):
        self.calls, self.full_at, self.save = 0, full_at, torch.save
        monkeypatch.setattr(torch, "save", self)

    def __call__(self, content, file) -> None:
        self.calls += 1
        if self.calls in self.full_at:
            file._file.write(b"half a checkpoint")
            raise OSError(errno.ENOSPC, "No space left on device")
        self.save(content, file)


def test_a_full_disk_at_a_periodic_save_lets_training_continue(data, tmp_path, straight, capsys):
    resource = pytest.importorskip("resource", reason="POSIX limits")
    folder, limits = tmp_path / "text10", resource.getrlimit(resource.RLIMIT_FSIZE)
    before = {}

    def full(gpt, output):  # from step 4 on, whose evaluation saves
        before.update({file.name: file.read_bytes() for file in folder.glob("*.pt")})
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))

    def free_again(gpt, output):
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert {file.name: file.read_bytes() for file in folder.glob("*.pt")} == before
        assert not list(folder.glob("*.tmp"))

    try:
        with in_step(4, full), in_step(5, free_again):
            assert run(data, folder) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    output = capsys.readouterr().out
    assert re.search(r"warning: .*text10-best.pt not written: File too large; .*training continues", output)
    assert same_as(folder, straight) == []


def test_no_room_for_the_best_file_keeps_the_older_best(data, tmp_path, monkeypatch):
    FullDisk(monkeypatch, {4, 5})  # the evaluation of iteration 10, and the end
    with pytest.raises(UserError, match="the disk is full"):  # at the end there is nothing to continue with
        run(data, tmp_path)
    saved, best = (load_checkpoint(tmp_path / name)["info"] for name in ("text10.pt", "text10-best.pt"))
    assert saved["iter_num"] == best["iter_num"] == 8
    assert saved["best_val_loss"] == best["val_loss"]


def test_metrics_wait_for_room_on_a_full_disk(data, tmp_path, straight, capsys):
    class FullFor:
        """The log's file, on a disk that refuses the given writes."""

        def __init__(self, file, writes):
            self.file, self.writes, self.calls = file, writes, 0

        def write(self, content):
            self.calls += 1
            if self.calls in self.writes:
                raise OSError(errno.ENOSPC, "no space")
            return self.file.write(content)

        def __getattr__(self, name):
            return getattr(self.file, name)

    def fill(gpt, output):
        log = built[0].run.files.log
        log._file = FullFor(log._file, {2, 3, 4})

    folder, built = tmp_path / "text10", []
    with in_step(1, fill):
        assert run(data, folder, adjust=built.append) == 0
    assert "jsonl not written: the disk is full" in capsys.readouterr().out
    assert same_as(folder, straight) == []


def test_a_best_checkpoint_that_cannot_be_written_does_not_end_the_run(data, tmp_path, capsys):
    (tmp_path / "text10-best.pt").mkdir()
    assert run(data, tmp_path) == 0
    assert "done: " in (printed := capsys.readouterr().out) and "no best checkpoint" in printed


def test_curves_that_cannot_be_written_do_not_end_the_run(data, tmp_path, capsys):
    def full(*arguments):
        raise UserError("text10.png not written: the disk is full")

    assert run(data, tmp_path, draw=full) == 0
    assert "warning: text10.png not written" in capsys.readouterr().out
