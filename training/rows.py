"""Rows of block_size ids with their targets, in a new order each epoch.

Text rows cut the stream of documents into pieces, so that every token is a target exactly once per epoch. Chat rows
pack whole conversations, and by default only what the assistant says is a target. The order depends only on the seed
and the epoch, so a resumed run needs nothing but an epoch and a row index to continue.
"""

from __future__ import annotations

import bisect

import numpy as np

from common.cli import UserError
from data.token_stream import TokenStream
from model import IGNORED
from setup_tokenizer import GPT2, ROLES, Tokenizer
from training.targets import assistant_targets

SCANNED_TOKENS = 1 << 20  # in memory at a time while answers are looked for


class TextRows:
    """Rows of plain text: pieces of block_size tokens, shuffled and cut at a new offset each epoch.

    Every token except the first is a target exactly once per epoch. With random offsets, as in nanoGPT, some tokens
    would be seen several times before others are seen at all.
    """

    def __init__(self, stream: TokenStream, block_size: int, seed: int):
        self.stream, self.block_size, self.seed = stream, block_size, seed

    def start_epoch(self, epoch: int) -> int:
        """Shuffle the rows of an epoch; returns their number."""
        rng = np.random.default_rng([self.seed, epoch])
        # A new offset, so that a token that was early in its row, with little context, gets more in another epoch.
        self._offset = int(rng.integers(self.block_size)) if epoch else 0
        n_rows = -(-(len(self.stream) - 1 + self._offset) // self.block_size)
        self._order = rng.permutation(n_rows)
        return n_rows

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and targets, (block_size,) each, of the epoch's row `index`."""
        start = int(self._order[index]) * self.block_size - self._offset
        ids = self.stream.read(start, start + self.block_size + 1)
        targets = ids[1:].copy()
        # The first and the last row of an epoch extend beyond the stream; what is there is padding.
        positions = np.arange(start + 1, start + self.block_size + 1)
        targets[(positions < 1) | (positions >= len(self.stream))] = IGNORED
        return ids[:-1], targets


class ChatRows:
    """Rows of whole conversations, packed best fit; a conversation longer than a row is cut between messages.

    Rows without a target, such as a piece of a long system message, are left out. The targets are what the assistant
    says or, with `loss_on="all"`, every id except the padding; answers of weight 0 never are. With `end_pieces`
    each piece of a cut conversation is followed by an `<|endoftext|>` that is not a target, so that `document_numbers`
    separates it from the next piece in the row.
    """

    def __init__(
        self, stream: TokenStream, block_size: int, seed: int, loss_on: str = "assistant", end_pieces: bool = False
    ):
        self.stream, self.block_size, self.seed, self.loss_on = stream, block_size, seed, loss_on
        self.tokenizer = stream.tokenizer
        ends = complete_ends = stream.positions_of(self.tokenizer.endoftext) + 1
        if not len(ends) or ends[-1] < len(stream):
            ends = np.append(ends, len(stream))
        starts = np.concatenate([[0], ends[:-1]])
        is_short = ends - starts <= block_size + 1  # a row's ids, and one more that is only a target
        pieces = [np.stack([starts, starts, ends], axis=1)[is_short]]  # (start of the message, start, end)
        for start, end in zip(starts[~is_short].tolist(), ends[~is_short].tolist(), strict=True):
            pieces.append(np.array(self._cut_at_messages(start, end, block_size + 1), dtype=np.int64))
        self._pieces = np.concatenate(pieces)
        self._lengths = self._pieces[:, 2] - self._pieces[:, 1]
        self._has_target = self._find_targets(n_whole=int(is_short.sum()))
        self._epoch: int | None = None  # the epoch whose rows are packed
        self._rows: list[list[int]] = []
        self.n_without_target = 0  # the epoch's rows that are left out
        if end_pieces:
            is_cut = ~np.isin(self._pieces[:, 2], complete_ends)
            self._lengths = np.minimum(self._lengths + is_cut, block_size + 1)

    def _cut_at_messages(self, start: int, end: int, capacity: int) -> list[tuple[int, int, int]]:
        """The pieces of a long conversation, as few as possible; a message that is too long itself is split.

        Each is (start of the message in which it starts, start, end).
        """
        starts = (np.flatnonzero(self.stream.read(start, end) == self.tokenizer.im_start) + start).tolist()
        if starts[:1] != [start]:  # whatever comes before the first message is cut like a message
            starts = [start, *starts]
        pieces, message, position = [], start, start
        for next_start, next_end in zip(starts, [*starts[1:], end], strict=True):
            if next_end - position > capacity and next_start > position:
                pieces.append((message, position, next_start))
                message = position = next_start
            while next_end - position > capacity:
                pieces.append((message, position, position + capacity))
                message, position = next_start, position + capacity
        return [*pieces, (message, position, end)]

    def _find_targets(self, n_whole: int) -> np.ndarray:
        """Which pieces contain a target; the first `n_whole` pieces are whole conversations, in order."""
        if len(self.stream.untrained):  # rare: answers of weight 0
            n_whole = 0
        elif self.loss_on == "all":
            return self._lengths > 1  # the first id of a row is not a target
        has_target = np.zeros(len(self._pieces), dtype=bool)
        ends = self._pieces[:n_whole, 2]
        for first in range(0, len(self.stream) if n_whole else 0, SCANNED_TOKENS):
            last = first + SCANNED_TOKENS + header_length(self.tokenizer)
            spoken = first_spoken_ids(self.stream.read(first, last), self.tokenizer)
            spoken = first + spoken[self.stream.is_trained(first, last)[spoken]]
            piece = np.minimum(np.searchsorted(ends, spoken, side="right"), n_whole - 1)
            has_target[piece[self._pieces[piece, 1] <= spoken]] = True
        for piece in range(n_whole, len(self._pieces)):
            message, begin, end = self._pieces[piece].tolist()
            has_target[piece] = self._is_target(message, end)[begin - message + 1 :].any()
        return has_target

    def start_epoch(self, epoch: int) -> int:
        """Pack the conversations into rows and shuffle the rows; returns the number of rows with a target.

        Raises UserError if no row has a target.
        """
        if epoch == self._epoch:
            return len(self._rows)
        rng = np.random.default_rng([self.seed, epoch])
        # Longest first packs tightest. Among equal lengths the order is random, so rows differ from epoch to epoch.
        shuffled = rng.permutation(len(self._pieces))
        longest_first = shuffled[np.argsort(-self._lengths[shuffled], kind="stable")]
        rows = pack_best_fit(longest_first.tolist(), self._lengths, self.block_size + 1)
        # The order within a row is random, too: with few conversations the rows are nearly the same in every epoch, and
        # each answer would be learned at only one position.
        rank = np.argsort(shuffled).tolist()
        shuffled_rows = [sorted(rows[index], key=rank.__getitem__) for index in rng.permutation(len(rows))]
        if not self._has_target.all():
            shuffled_rows = [row for row in shuffled_rows if self._has_target[row].any()]
        if not shuffled_rows:
            raise UserError(
                f"the rows of {self.stream.paths[0]} contain no target; use --loss_on all, a larger --block_size, or "
                "prepare conversations in which the assistant speaks"
            )
        self._rows, self._epoch, self.n_without_target = shuffled_rows, epoch, len(rows) - len(shuffled_rows)
        return len(shuffled_rows)

    def real_token_fraction(self) -> float:
        """The fraction of the tokens in the epoch's rows, with those that are left out, that are not padding."""
        n_rows = len(self._rows) + self.n_without_target
        return float(self._lengths.sum() / (n_rows * (self.block_size + 1)))

    def describe(self) -> str:
        """How many rows the current epoch has, how full they are, and how many are left out, in words."""
        n_rows = len(self._rows) + self.n_without_target
        text = f"{n_rows:,} rows; {self.real_token_fraction():.1%} of the tokens are not padding"
        if self.n_without_target:
            share = self.n_without_target / n_rows
            text += f"; {self.n_without_target:,} rows ({share:.1%}) contain no target and are left out"
        return text

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and targets, (block_size,) each, of the epoch's row `index`."""
        ids = np.full(self.block_size + 1, self.tokenizer.endoftext, dtype=np.int64)
        counts = np.zeros(self.block_size + 1, dtype=bool)
        position = 0
        for piece in self._rows[index]:
            message, begin, end = self._pieces[piece].tolist()
            span = slice(position, position + end - begin)
            ids[span] = self.stream.read(begin, end)
            counts[span] = self._is_target(message, end)[begin - message :]
            # The first id of a piece that starts in the middle of a message cannot be predicted from the ids before it.
            counts[position] &= begin == message
            position += int(self._lengths[piece])  # with `end_pieces` the next id stays `<|endoftext|>`
        return ids[:-1], np.where(counts, ids, IGNORED)[1:]

    def _is_target(self, start: int, end: int) -> np.ndarray:
        is_trained = self.stream.is_trained(start, end)
        return (
            is_trained
            if self.loss_on == "all"
            else is_trained & assistant_targets(self.stream.read(start, end), self.tokenizer)
        )


def header_length(tokenizer: Tokenizer) -> int:
    """The ids before an answer: `<|im_start|>`, those of the role "assistant", and the newline."""
    return len(tokenizer.role_ids[ROLES.index("assistant")]) + 2


def first_spoken_ids(ids: np.ndarray, tokenizer: Tokenizer = GPT2) -> np.ndarray:
    """The positions of the first target of each message of the assistant in ids (N,), without the last few ids.

    The same as the first True of each message in `assistant_targets`, but much faster. A message without any id after
    its header has none. The last `header_length` ids are not searched.
    """
    header = header_length(tokenizer)
    starts = np.flatnonzero(ids[:-header] == tokenizer.im_start)
    is_assistant = ids[starts + header - 1] < tokenizer.endoftext  # the id with the newline
    for offset, role_id in enumerate(tokenizer.role_ids[ROLES.index("assistant")], 1):
        is_assistant &= ids[starts + offset] == role_id
    spoken = starts[is_assistant] + header
    return spoken[(ids[spoken] != tokenizer.endoftext) & (ids[spoken] != tokenizer.im_start)]


def pack_best_fit(items: list[int], lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Pack items into rows of `capacity`, each where it leaves the least space (best fit; Johnson 1973)."""
    rows: list[list[int]] = []
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows with exactly that much space left
    spaces: list[int] = []  # the amounts of space that occur, sorted
    for item in items:
        length = int(lengths[item])
        at = bisect.bisect_left(spaces, length)
        if at == len(spaces):
            row, space = len(rows), capacity
            rows.append([])
        else:
            space = spaces[at]
            row = by_space[space].pop()
            if not by_space[space]:
                spaces.pop(at)
        rows[row].append(item)
        space -= length
        if not by_space[space]:
            bisect.insort(spaces, space)
        by_space[space].append(row)
    return rows
