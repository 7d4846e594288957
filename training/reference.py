"""The log probabilities of a run's answers by the reference model, computed once and kept in a file.

The file, <data set>-reference-<digest>.npz in the folder of the run, has an array (pairs, 2) per split. Its digest
covers the reference's weights, the data, and everything else that the numbers depend on. So runs that differ only in
beta or in the learning rate share a file, and a run with another model or other data never uses a wrong one.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from common.checkpoint import digest as digest_of
from common.cli import UserError
from common.device import autocast
from common.files import atomic_write, write_error
from model import GPT
from training.config import RunConfig
from training.datasets import TrainingData
from training.pair_rows import PairRows
from training.parallel import broadcast, on_first, own_indices, reduce
from training.preferences import answer_log_probs
from training.step import arrays_to_device

PairedRows = TypeVar("PairedRows", bound=PairRows)
REFERENCE_DIGITS = 12  # of the digest in a file's name


def open_pairs(
    config: RunConfig, data: TrainingData, model: GPT, checkpoint: Mapping[str, Any], kind: type[PairedRows]
) -> tuple[dict[str, PairedRows], str]:
    """The rows of both splits, of the class `kind`, with their reference log probabilities, and the digest of these.

    A new run computes them with `model`, which is still the reference, unless a file has them. A resumed run, whose
    model has learned since, needs the file; raises UserError if it is gone.
    """
    (name, (streams, _)), *_ = data.parts.items()
    rows = {split: kind(stream, config.block_size, config.seed) for split, stream in streams.items()}
    for each in rows.values():
        each.length = max(other.length for other in rows.values())
    print(f"rows: {name} has {rows['train'].describe()}; validation: {rows['val'].describe()}")
    digest = checkpoint["info"]["reference"] if config.resume else reference_digest(config, data, checkpoint)
    path = Path(config.out_dir) / f"{name}-reference-{digest[:REFERENCE_DIGITS]}.npz"
    found = broadcast(on_first(lambda: _load(path, digest, rows)))
    is_saved = found is not None
    if found is None and config.resume:  # perhaps the checkpoint is in another folder than the run
        beside = Path(config.resume).parent / path.name
        found = broadcast(on_first(lambda: _load(beside, digest, rows)))
    if found is None and config.resume:
        raise UserError(
            f"{path} not found or damaged, and without it {config.resume} cannot be resumed; put the file back, or "
            f"start a new run from the weights with --init_from {config.resume}"
        )
    if found is None:
        print(f"reference: computing the log probabilities of {2 * sum(map(len, rows.values())):,} answers")
        found = {split: log_probs_of(model, each, config) for split, each in rows.items()}
    else:
        print(f"reference: log probabilities from {path}")
    if not is_saved:
        on_first(lambda: _save(path, digest, found))
    for split, each in rows.items():
        each.reference = found[split]
    return rows, digest


def reference_digest(config: RunConfig, data: TrainingData, checkpoint: Mapping[str, Any]) -> str:
    """The digest of everything that decides the reference log probabilities.

    With an adapter, `checkpoint` no longer has the weights of the base, but their digest is known.
    """
    weights = config.lora_base_digest or checkpoint["model"]
    files = [file["sha256"] for split in ("train", "val") for file in data.facts["splits"][split]["files"]]
    return digest_of({"model": weights, "data": files, "block_size": config.block_size, "dtype": config.dtype})


@torch.no_grad()
def log_probs_of(model: GPT, rows: PairRows, config: RunConfig) -> np.ndarray:
    """The log probabilities (pairs, 2) of all answers, in the run's precision; the processes share the work."""
    size = config.batch_size // 2
    values = np.zeros((len(rows), 2))
    model.eval()
    for number, is_own in own_indices(math.ceil(len(rows) / size)):
        first = number * size
        pairs = np.arange(first, first + size) % len(rows)  # the last batch is filled with the first pairs
        columns = [np.stack(column) for column in zip(*(rows.pair(int(pair)) for pair in pairs), strict=True)]
        ids, targets = (tensor.flatten(0, 1) for tensor in arrays_to_device(config, columns))
        with autocast(config.device, config.dtype):
            logits, _ = model(ids)
        if is_own:
            found = answer_log_probs(logits, targets).view(-1, 2).double().cpu().numpy()
            values[first : first + size] = found[: len(rows) - first]
    model.train()
    return np.array(reduce("sum", *values.ravel().tolist()), dtype=np.float32).reshape(-1, 2)


def _load(path: Path, digest: str, rows: Mapping[str, PairRows]) -> dict[str, np.ndarray] | None:
    """The arrays in a file; None if it is missing, damaged, or not what the digest and the rows need."""
    try:
        with np.load(path, allow_pickle=False) as file:
            content = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None
    if content.get("digest", np.array("")).tolist() != digest:
        return None
    arrays = {split: content.get(split, np.zeros(0)) for split in rows}
    return arrays if all(arrays[split].shape == (len(each), 2) for split, each in rows.items()) else None


def _save(path: Path, digest: str, arrays: Mapping[str, np.ndarray]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path.parent, error) from error
    with atomic_write(path) as file:
        np.savez(file, allow_pickle=False, digest=np.array(digest), **arrays)
