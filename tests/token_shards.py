"""Made shards of GPT-2's tokens in llm.c's layout: `<|endoftext|>` before each document, documents across shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from setup_tokenizer import ENDOFTEXT_ID, get_extended_tokenizer

HEADER = (20240520, 1)


def shard_bytes(ids: Sequence[int], header: tuple[int, ...] = HEADER, n_tokens: int | None = None) -> bytes:
    """The content of a shard."""
    fields = np.zeros(256, dtype="<i4")
    fields[: len(header)] = header
    fields[2] = len(ids) if n_tokens is None else n_tokens
    return fields.tobytes() + np.asarray(ids, dtype="<u2").tobytes()


def ids_before(documents: Sequence[str]) -> list[int]:
    """The ids of documents as the published shards order them."""
    enc = get_extended_tokenizer()
    return [token for text in documents for token in (ENDOFTEXT_ID, *enc.encode_ordinary(text))]


def write_shards(folder: Path, train: Sequence[int], val: Sequence[int], n_train: int = 3) -> list[Path]:
    """Files named as FineWeb's: the validation shard first, then train shards of equal length."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = np.array_split(np.asarray(train), n_train)
    named = {"fineweb_val_000000.bin": val}
    named |= {f"fineweb_train_{number:06d}.bin": part for number, part in enumerate(parts, 1)}
    for name, ids in named.items():
        (folder / name).write_bytes(shard_bytes(ids))
    return [folder / name for name in named]
