"""Rows of preference pairs: each answer with its prompt in a row of its own, padded on the right.

A prepared pair is one conversation that ends with the chosen and the rejected answer. It becomes two rows, the prompt
with either answer. Attention is causal and positions count from the start of a row, so the padding after an answer
changes nothing. Nothing is packed or cut: a pair is left out if either row would not fit into block_size.
"""

from __future__ import annotations

import numpy as np

from common.cli import UserError
from data.token_stream import TokenStream
from model import IGNORED

SCANNED_TOKENS = 1 << 20  # in memory at a time while the answers are located
ROW_UNIT = 64  # rows are as long as the longest pair, rounded up to a multiple of this


class PairRows:
    """Pairs in a new order each epoch, as rows (2, length): the chosen answer's, then the rejected answer's.

    `length` may be set before the first row is made: all splits of a run need rows of one length. `reference` holds the
    log probabilities (pairs, 2) of the answers by the reference model, which `row` returns with each pair. Raises
    UserError if no pair fits into block_size.
    """

    noun = "pair"

    def __init__(self, stream: TokenStream, block_size: int, seed: int):
        self.stream, self.seed = stream, seed
        located = self._locate()
        # Without the last id, which is only a target.
        lengths = (located[:, 1] - located[:, 0])[:, None] + located[:, 4::3] - located[:, 2::3] - 1
        fits = lengths.max(axis=1, initial=0) <= block_size
        self.n_too_long = int((~fits).sum())
        self._located = located[fits]
        if not len(self._located):
            raise UserError(
                f"none of the {len(located):,} {self.noun}s of {stream.paths[0]} fits into {block_size} tokens; use a "
                f"model with a larger --block_size, or prepare shorter {self.noun}s"
            )
        longest = int(lengths[fits].max())
        self.length = min(block_size, -(-longest // ROW_UNIT) * ROW_UNIT)
        self.reference = np.zeros((len(self), 2), dtype=np.float32)

    def __len__(self) -> int:
        return len(self._located)

    def _locate(self) -> np.ndarray:
        """Where the prompts and answers are, as `locate_pairs` returns them."""
        return locate_pairs(self.stream)

    def describe(self) -> str:
        """How many pairs there are and how many are left out, in words."""
        too_long = f"; {self.n_too_long:,} {self.noun}s are too long and left out" if self.n_too_long else ""
        return f"{len(self):,} {self.noun}s, two rows of {self.length} tokens each{too_long}"

    def start_epoch(self, epoch: int) -> int:
        """Shuffle the pairs; returns their number."""
        self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self))
        return len(self)

    def row(self, index: int) -> tuple[np.ndarray, ...]:
        """Ids and targets, (2, length) each, and reference log probabilities (2,) of the epoch's pair `index`."""
        pair = int(self._order[index])
        return *self.pair(pair), self.reference[pair]

    def pair(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and targets, (2, length) each, of a pair in the order of the data.

        Only the answers are targets: their contents and the `<|im_end|>` after each.
        """
        start, prompt_end, *answers = self._located[number].tolist()
        prompt = self.stream.read(start, prompt_end)
        ids = np.full((2, self.length + 1), self.stream.tokenizer.endoftext, dtype=np.int64)
        targets = np.full((2, self.length + 1), IGNORED, dtype=np.int64)
        for row, (begin, content, end) in enumerate((answers[:3], answers[3:])):
            row_end = len(prompt) + end - begin
            ids[row, :row_end] = np.concatenate([prompt, self.stream.read(begin, end)])
            said = slice(row_end - (end - content), row_end)
            targets[row, said] = ids[row, said]
        return ids[:, :-1], targets[:, 1:]


def locate_pairs(stream: TokenStream) -> np.ndarray:
    """Where a stream's pairs are: (pairs, 8) positions in int64.

    Where a pair's prompt begins and ends, then where the chosen answer's message begins, where its content begins and
    where it ends, and the same of the rejected answer. Documents are read in groups of about SCANNED_TOKENS.
    """
    ends = stream.positions_of(stream.tokenizer.endoftext) + 1
    found = [np.zeros((0, 8), dtype=np.int64)]
    first = 0
    while first < len(ends):
        start = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, start + SCANNED_TOKENS, side="right")))
        messages = stream.tokenizer.message_spans(stream.read(start, int(ends[last - 1])))
        rejected = np.searchsorted(messages.start, ends[first:last] - start) - 1  # each document's last message
        chosen = rejected - 1
        columns = [np.concatenate([[start], ends[first : last - 1]]), messages.start[chosen] + start]
        for answer in (chosen, rejected):
            columns += [messages.start[answer] + start, messages.content[answer] + start, messages.end[answer] + start]
        found.append(np.stack(columns, axis=1))
        first = last
    return np.concatenate(found)
