"""Prepared data sets of random ids, for tools and tests that do not need meaningful text.

write_dataset(Path("data"), "random", "text", n_tokens=10_000, seed=1)
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent.parent))

import setup_tokenizer


def write_dataset(folder: Path, name: str, kind: str, n_tokens: int, seed: int, n_shards: int = 1) -> None:
    """Write a prepared data set of random ids; `kind` is text or chat, and the val split has n_tokens / 4 ids."""
    rng = np.random.default_rng(seed)
    splits: dict[str, dict[str, Any]] = {}
    for split, size in (("train", n_tokens), ("val", n_tokens // 4)):
        ids = np.concatenate(list(_random_documents(rng, kind, size)))[:size].astype("<u2")
        shards = np.array_split(ids, n_shards)
        paths = [folder / f"{name}-{split}{f'-{n:05d}' if n_shards > 1 else ''}.bin" for n in range(n_shards)]
        files: list[dict[str, Any]] = []
        for path, shard in zip(paths, shards, strict=True):
            path.write_bytes(shard.tobytes())
            sha256 = hashlib.sha256(shard.tobytes()).hexdigest()
            files.append({"file": path.name, "tokens": len(shard), "sha256": sha256})
        splits[split] = {"documents": 1, "tokens": len(ids), "text_bytes": len(ids), "files": files}
    facts: dict[str, Any] = {"name": name, "format": kind, "splits": splits}
    facts |= {"tokenizer": setup_tokenizer.TOKENIZER_NAME, "n_vocab": setup_tokenizer.N_VOCAB, "dtype": "uint16"}
    facts |= {"source": "random", "licence": "none"}
    (folder / f"{name}.json").write_text(json.dumps(facts), encoding="utf-8")


def _random_documents(rng: np.random.Generator, kind: str, n_tokens: int) -> Iterator[np.ndarray]:
    """Documents of random ids, short and long ones, until there are enough tokens."""
    made = 0
    while made < n_tokens:
        if kind == "text":
            document = [*rng.integers(0, 500, rng.integers(1, 40)), setup_tokenizer.ENDOFTEXT_ID]
        else:
            document = _random_conversation(rng)
        made += len(document)
        yield np.array(document)


def _random_conversation(rng: np.random.Generator) -> list[int]:
    messages = []
    for index in range(int(rng.integers(1, 7))):
        text = setup_tokenizer.get_extended_tokenizer().decode(rng.integers(1000, 9000, rng.integers(0, 6)).tolist())
        messages.append({"role": "assistant" if index % 2 else "user", "content": text})
    return setup_tokenizer.encode_chat(messages, end_of_conversation=True)
