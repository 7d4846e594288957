"""C files are compiled once per machine, and anew when anything that they depend on changes."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import pytest

from fast import c_library
from fast.c_library import build_library, cache_folder

KERNEL = ("row_attention.c",)
GCC = shutil.which("gcc")
needs_kernel = pytest.mark.skipif(build_library(KERNEL, "native") is None, reason="no C compiler, or no AVX2")
needs_gcc = pytest.mark.skipif(GCC is None, reason="no gcc")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "jojo"


@pytest.fixture
def compiler(tmp_path, monkeypatch) -> Path:
    """gcc, which writes down what it compiles: a line per file that it compiles or links."""
    log, script = tmp_path / "compiled.txt", tmp_path / "logging-gcc"
    script.write_text(f'#!/bin/sh\ncase "$*" in *"-###"*) ;; *) echo "$@" >> {log} ;; esac\nexec {GCC} "$@"\n')
    script.chmod(0o755)
    log.touch()
    monkeypatch.setenv("CC", str(script))
    return log


def build() -> object:
    """What a new process would get."""
    return build_library.__wrapped__(KERNEL, "native")


@needs_kernel
@needs_gcc
def test_a_second_process_compiles_nothing(cache, compiler):
    assert build() is not None
    assert len(compiler.read_text().splitlines()) == 2, "one file, and the library"
    (kept,) = cache.iterdir()
    assert kept.suffix == ".so"
    assert build() is not None
    assert len(compiler.read_text().splitlines()) == 2


@needs_kernel
@needs_gcc
def test_a_changed_source_or_another_compiler_is_compiled_anew(cache, compiler, tmp_path):
    assert build() is not None
    copy = tmp_path / "fast"
    shutil.copytree(c_library.FOLDER, copy)
    with (copy / "lanes.h").open("a") as file:
        file.write("// changed\n")
    specification = importlib.util.spec_from_file_location("copied_c_library", copy / "c_library.py")
    copied = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(copied)
    assert copied.build_library(KERNEL, "native") is not None
    assert len(list(cache.iterdir())) == 2
    script = tmp_path / "logging-gcc"
    script.write_text(script.read_text().replace("exec", 'echo "another version" >&2; exec'))
    assert build() is not None
    assert len(list(cache.iterdir())) == 3


@needs_kernel
def test_a_damaged_file_is_replaced(cache):
    assert build() is not None
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    kept.unlink()  # and not changed in place: this process has mapped it
    kept.write_bytes(b"not a library")
    assert build() is not None
    assert kept.read_bytes() == whole


@needs_kernel
@pytest.mark.parametrize("place", ["a file", "relative"])
def test_where_nothing_can_be_kept_it_is_built_all_the_same(place, tmp_path, monkeypatch):
    (tmp_path / "a file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / place) if place == "a file" else place)
    assert build() is not None
    assert os.listdir() == ["a file"]


def test_the_cache_folder_is_in_the_home_folder(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/priya")
    assert cache_folder() == Path("/home/priya/.cache/jojo")


def test_an_unknown_processor_builds_nothing():
    assert build_library(KERNEL, "no-such-processor") is None
