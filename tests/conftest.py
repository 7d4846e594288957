"""Fixtures that several test files share. A file that defines one of the same name uses its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from common.checkpoint import save_checkpoint
from fast import document_attention, gelu, keep_freed_memory, row_kernels
from fast.c_library import build_library
from fast.tile_kernels import tile_kernels
from tests.browser import browser, visit
from tests.forked_python import forked_python
from tests.tiny import prepare, run
from tests.tiny_gpt import text_gpt

__all__ = ["browser", "visit"]  # fixtures that tests/browser.py defines


LONGEST = ("test_tutorial", "test_parallel", "test_train_stopping", "test_chitchat", "test_plain", "test_own_data")


def pytest_configure() -> None:
    """Keep freed memory, as the scripts do: page faults would take a third of the time of many tests."""
    keep_freed_memory()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first, so that with several processes none of them is the last."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(scope="session")
def python(tmp_path_factory) -> Iterator[str]:
    """A `python` command that starts at once (see tests/forked_python.py)."""
    with forked_python(tmp_path_factory.mktemp("python")) as python:
        yield python


@pytest.fixture
def one_thread():
    """One thread: faster for tiny models, and sums in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_compiler(monkeypatch):
    """A machine without a C compiler, on which no kernel has been built."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    caches = (build_library, row_kernels._build, document_attention._library, gelu._library, tile_kernels)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def quick_disk(monkeypatch):
    """No waiting for the disk; the crash test does wait."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A folder with the prepared data sets "text" and "chat", of random ids."""
    folder = prepare(tmp_path_factory.mktemp("data"))
    return prepare(folder, "chat")


@pytest.fixture(scope="session")
def straight(data, tmp_path_factory) -> Path:
    """The folder of a run of ten iterations that nothing disturbed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("straight") / "text10"
    assert run(data, folder) == 0
    torch.set_num_threads(threads)
    folder.with_suffix(".txt").touch()  # it printed no samples
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A folder to run gen.py in, with models/chitchat600.pt (chat) and, newer, models/story5000.pt (text)."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "models").mkdir()
    for name, kind, block_size in (("chitchat600", "chat", 1024), ("story5000", "text", 64)):
        info = {"dataset": name.rstrip("0123456789"), "format": kind, "iter_num": 1, "config": {}, "data": {}}
        info |= {"tokens_seen": 2, "train_loss": 3.0, "val_loss": 3.5}
        save_checkpoint(folder / "models" / f"{name}.pt", text_gpt(block_size), info)
    os.utime(folder / "models" / "chitchat600.pt", (0, 0))
    return folder


@pytest.fixture
def half(data, tmp_path, one_thread, quick_disk) -> Path:
    """The folder of a run stopped at iteration 5 of 10."""
    folder = tmp_path / "text10"
    assert run(data, folder, stop_after=5) == 130
    return folder
