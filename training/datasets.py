"""The data of a run: one prepared data set, or the parts of a mixture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from common.cli import UserError
from data.dataset import PREFERENCE_FORMATS, DatasetInfo, data_parts, encode_command, open_dataset, short_splits
from data.token_stream import TokenStream
from setup_tokenizer import GPT2, Tokenizer
from training.batches import fixed_batches
from training.config import RunConfig
from training.mixture import MixedRows, mixture_facts, parse_mixture
from training.rows import ChatRows, TextRows


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """The opened data sets of --dataset, with their shares of the rows."""

    parts: dict[str, tuple[dict[str, TokenStream], DatasetInfo]]  # as open_dataset returns them
    shares: dict[str, Fraction]
    facts: dict[str, Any]  # what a checkpoint stores about them, see mixture_facts
    tokenizer: Tokenizer = GPT2
    data_dir: str = "data"

    @property
    def formats(self) -> list[str]:
        """The formats that occur ("text", "chat", "preference", "label"), in the order of the parts."""
        return list(dict.fromkeys(part["format"] for part in data_parts(self.facts)))

    def short_splits(self, block_size: int) -> list[str]:
        """A sentence about each split that is shorter than one row. Raises UserError for a split of one token."""
        streams = [streams for streams, info in self.parts.values() if info.format not in PREFERENCE_FORMATS]
        return [sentence for each in streams for sentence in short_splits(each, block_size)]

    def require_tokenizer_of(self, info: Mapping[str, Any], path: str) -> None:
        """Raise UserError if the model in `path`, described by `info`, has a different tokenizer from the data."""
        found = Tokenizer.from_info(info, path)
        if found != self.tokenizer:
            name, (_, data_info) = next(iter(self.parts.items()))
            source = "gpt2" if found == GPT2 else path
            other = "another one of that name" if found.name == self.tokenizer.name else self.tokenizer.name
            raise UserError(
                f"{path} has the tokenizer {found.name}, but {name} was prepared with {other}; encode it with "
                f"the model's: {encode_command(name, data_info, source, self.data_dir)}"
            )

    def mean_loss(self, losses: dict[str, float]) -> float:
        """The mean of the parts' losses, weighted by their shares."""
        return sum(float(self.shares[name]) * loss for name, loss in losses.items())


def open_data(dataset: str, data_dir: str) -> TrainingData:
    """Open and check the data sets that --dataset names. Raises UserError, see `open_dataset`."""
    shares = parse_mixture(dataset)
    parts = {name: open_dataset(Path(data_dir), name) for name in shares}
    tokenizers = {name: streams["train"].tokenizer for name, (streams, _) in parts.items()}
    first, tokenizer = next(iter(tokenizers.items()))
    for name, other in tokenizers.items():
        if other != tokenizer:
            raise UserError(
                f"{first} was prepared with the tokenizer {tokenizer.name} and {name} with {other.name}; encode both "
                f"with one, for example: {encode_command(name, parts[name][1], tokenizer.option, data_dir)}"
            )
    facts = mixture_facts({name: info.to_json() for name, (_, info) in parts.items()}, shares)
    return TrainingData(parts, shares, facts, tokenizer, data_dir)


def make_rows(data: TrainingData, config: RunConfig) -> tuple[TextRows | ChatRows | MixedRows, dict[str, list]]:
    """The rows to train on, mixed if there are several parts, and each part's validation batches."""
    rows, val_batches = [], {}
    for name, (streams, info) in data.parts.items():
        train_rows, val_rows = (_rows_of(streams[split], info.format, config) for split in ("train", "val"))
        if isinstance(train_rows, ChatRows):
            train_rows.start_epoch(0)
            print(f"rows: {name}'s conversations fill {train_rows.describe()}")
        rows.append(train_rows)
        val_batches[name] = fixed_batches(val_rows, config.batch_size, config.val_rows)
    if len(rows) == 1:
        return rows[0], val_batches
    return MixedRows(rows, list(data.shares.values()), config.seed), val_batches


def _rows_of(stream: TokenStream, kind: str, config: RunConfig) -> TextRows | ChatRows:
    """A stream as rows: whole conversations for chat, pieces of block_size tokens for text."""
    if kind == "chat":
        return ChatRows(stream, config.block_size, config.seed, config.loss_on, end_pieces=config.document_mask)
    return TextRows(stream, config.block_size, config.seed)
