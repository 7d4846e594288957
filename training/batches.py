"""From prepared .bin files to batches: open and check them, order the epochs, say which tokens are targets.

A row is block_size ids and their targets. Text rows cut the stream of documents into pieces, each token being a
target exactly once an epoch; chat rows hold whole conversations, and only what the assistant says is a target.
The order depends on the seed and the epoch alone, so two numbers, epoch and row, say where a run stands.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import mmap
import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.cli import UserError
from common.files import sha256_file
from setup_tokenizer import ASSISTANT_IDS, ENDOFTEXT_ID, IM_END_ID, IM_START_ID, N_VOCAB, TOKENIZER_NAME

PIECE_TOKENS = 1 << 24  # tokens looked at together, so that memory stays flat
MOST_MAPPED_BYTES = 64 << 20  # of a split's files, so that resident memory stays flat
BYTES_MAPPED_AT_ONCE = 2 << 20  # what the system may map where one byte is read: a huge page
IGNORED = -100  # a target that does not count; model.IGNORED
PREPARE_COMMANDS = {
    "story": "python data/prepare-story.py",
    "dailydialog": "python data/prepare-dailydialog.py",
    "chat": "python data/prepare-chat.py",
    "chitchat": "python data/prepare-chitchat.py",
    "education": "python data/prepare-education.py",
}


class TokenStream:
    """The ids of one split, memory-mapped: one .bin file or several shards read as one stream."""

    def __init__(self, paths: list[Path]):
        self.paths = paths
        self._shards = [np.memmap(path, dtype="<u2", mode="r") for path in paths]
        self._ends = np.cumsum([len(shard) for shard in self._shards]).tolist()
        self._mapped_bytes = 0

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, start: int, end: int) -> np.ndarray:
        """Ids start to end as int64; places before the stream's start or behind its end read as `<|endoftext|>`."""
        ids = np.full(end - start, ENDOFTEXT_ID, dtype=np.int64)
        position = max(start, 0)
        while position < min(end, len(self)):
            index = bisect.bisect_right(self._ends, position)
            first = self._ends[index] - len(self._shards[index])
            piece = self._shards[index][position - first : end - first]
            ids[position - start : position - start + len(piece)] = piece
            position += len(piece)
        self._mapped_bytes += 2 * (end - start) + BYTES_MAPPED_AT_ONCE
        if self._mapped_bytes > MOST_MAPPED_BYTES:
            self._unmap()
        return ids

    def positions_of(self, token_id: int) -> np.ndarray:
        """Every position at which `token_id` stands, found a piece at a time."""
        found = [np.zeros(0, dtype=np.int64)]
        for shard, end in zip(self._shards, self._ends, strict=True):
            for first, piece in self._pieces(shard):
                found.append(np.flatnonzero(piece == token_id) + (end - len(shard) + first))
        return np.concatenate(found)

    def check_ids(self, remedy: str) -> None:
        """Raise UserError where an id is above the vocabulary's last."""
        for path, shard in zip(self.paths, self._shards, strict=True):
            largest = max(int(piece.max()) for _, piece in self._pieces(shard))
            if largest >= N_VOCAB:
                raise UserError(
                    f"{path} holds the id {largest}, above the vocabulary's last ({N_VOCAB - 1}); prepare it again "
                    f"with: {remedy}"
                )

    def _pieces(self, shard: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """A shard in pieces, each with its first position, one mapped at a time."""
        for first in range(0, len(shard), PIECE_TOKENS):
            yield first, shard[first : first + PIECE_TOKENS]
            self._unmap()

    def _unmap(self) -> None:
        """Let go of the files' pages: until then they count as memory of this process; the system keeps its copy."""
        self._mapped_bytes = 0
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            for shard in self._shards:
                shard.base.madvise(mmap.MADV_DONTNEED)


def open_dataset(data_dir: Path, name: str) -> tuple[dict[str, TokenStream], dict]:
    """The checked "train" and "val" streams of a prepared data set, and what its .json says.

    Raises UserError, in one sentence, where a file is missing, empty, of odd length, holds ids that the vocabulary
    lacks, or does not match the .json.
    """
    facts = _read_facts(data_dir, name)
    if facts and facts["tokenizer"] != TOKENIZER_NAME:
        raise UserError(
            f"{name} was prepared with the tokenizer {facts['tokenizer']}, not {TOKENIZER_NAME}; prepare it again "
            f"with: {prepare_command(name)}"
        )
    streams = {split: TokenStream(_bin_paths(data_dir, name, split, facts)) for split in ("train", "val")}
    for stream in streams.values():
        stream.check_ids(prepare_command(name))
    return streams, facts or _look_at(streams, name)


def _look_at(streams: dict[str, TokenStream], name: str) -> dict:
    """The facts of .bin files without a .json."""
    kind = "chat" if len(streams["val"].positions_of(IM_START_ID)) else "text"
    print(f"{name}: no {name}.json beside the .bin files; taken as {kind} in {TOKENIZER_NAME}")
    splits = {split: _described(stream) for split, stream in streams.items()}
    return {"name": name, "format": kind, "tokenizer": TOKENIZER_NAME, "n_vocab": N_VOCAB, "splits": splits}


def require_length(streams: dict[str, TokenStream], block_size: int) -> None:
    """Raise UserError where a split is too short for one row."""
    for stream in streams.values():
        if len(stream) < block_size + 1:
            raise UserError(
                f"{stream.paths[0]} holds {len(stream)} tokens and block_size {block_size} needs {block_size + 1}; "
                "use a smaller --block_size or prepare more text"
            )


def _described(stream: TokenStream) -> dict:
    files = [
        {"file": path.name, "tokens": path.stat().st_size // 2, "sha256": sha256_file(path)} for path in stream.paths
    ]
    return {"tokens": len(stream), "files": files}


def _read_facts(data_dir: Path, name: str) -> dict:
    path = data_dir / f"{name}.json"
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        entries = [facts["splits"][split]["files"] for split in ("train", "val")]
        counts = [facts["splits"][split]["tokens"] for split in ("train", "val")]
        known = {"name", "tokenizer", "n_vocab"} <= facts.keys() and facts["format"] in ("text", "chat")
        whole = all(isinstance(e["file"], str) and isinstance(e["sha256"], str) for files in entries for e in files)
        if not (known and whole and all(entries) and all(isinstance(count, int) for count in counts)):
            raise ValueError("an entry is missing")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; make it readable") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged; prepare the data again with: {prepare_command(name)}") from error
    return facts


def _bin_paths(data_dir: Path, name: str, split: str, facts: dict) -> list[Path]:
    """A split's files, each there, of even length and, where the .json tells, with the right sha256."""
    entries = facts["splits"][split]["files"] if facts else [{"file": f"{name}-{split}.bin"}]
    paths = [data_dir / entry["file"] for entry in entries]
    command = prepare_command(name)
    for path, entry in zip(paths, entries, strict=True):
        if not path.is_file():
            raise UserError(f"{path} not found; run: {command}{_prepared_instead(data_dir)}")
        size = path.stat().st_size
        if size == 0:
            raise UserError(f"{path} is empty; prepare the data again with: {command}")
        if size % 2:
            raise UserError(f"{path} has an odd number of bytes, so it is not uint16; prepare it again with: {command}")
        if "sha256" in entry and sha256_file(path) != entry["sha256"]:
            raise UserError(f"{path} does not match the sha256 in {name}.json; prepare the data again with: {command}")
    return paths


def prepare_command(name: str) -> str:
    """The command that makes a data set."""
    return PREPARE_COMMANDS.get(name, f"python prepare_with_extended_tokenizer.py --input FILE --name {name}")


def prepared_datasets(data_dir: Path) -> list[str]:
    """The names of the data sets whose training split lies in the data folder."""
    found = {path.name.split("-train")[0] for path in data_dir.glob("*-train*.bin")}
    return sorted(found)


def _prepared_instead(data_dir: Path) -> str:
    found = prepared_datasets(data_dir)
    return f" (prepared so far: {', '.join(found)})" if found else " (nothing is prepared so far)"


def assistant_targets(ids: np.ndarray) -> np.ndarray:
    """Which of a conversation's ids (N,) the assistant says: its contents and the `<|im_end|>` that ends each.

    True at position i means that id i is a target. Derived from the control ids alone; `<|im_start|>`, the role, the
    line end behind it and all that others say are False.
    """
    ids = np.asarray(ids)
    starts = np.flatnonzero(ids == IM_START_ID)
    if not len(starts):
        return np.zeros(len(ids), dtype=bool)
    padded = np.concatenate([ids, np.zeros(len(ASSISTANT_IDS), dtype=ids.dtype)])
    is_assistant = np.all([padded[starts + 1 + k] == role_id for k, role_id in enumerate(ASSISTANT_IDS)], axis=0)
    message = np.cumsum(ids == IM_START_ID) - 1  # (N,) index of the message that each id belongs to, -1 before any
    position = np.arange(len(ids)) - starts[message]
    ended = np.cumsum(ids == IM_END_ID) - (ids == IM_END_ID)  # ends before each id
    is_open = ended == ended[starts][message]
    header = 1 + len(ASSISTANT_IDS)  # positions 0 to header: <|im_start|>, the role, its line end
    return (message >= 0) & is_assistant[message] & is_open & (position > header) & (ids != ENDOFTEXT_ID)


def document_numbers(ids: np.ndarray) -> np.ndarray:
    """The number of the document that each id of the rows (B, T) belongs to, counted along its row.

    A text begins with the `<|endoftext|>` that ends the one before, and a conversation with its `<|im_start|>`: so
    both begin in gen.py and evaluate.py.

    >>> document_numbers(np.array([[7, 8, 50256, 9]]))
    array([[0, 0, 1, 1]])
    """
    begins = ids == ENDOFTEXT_ID
    begins[:, 1:] |= begins[:, :-1] & (ids[:, 1:] == IM_START_ID)
    return np.cumsum(begins, axis=1)


class TextRows:
    """Rows of a plain stream: pieces of block_size tokens in a new order and from a new offset each epoch.

    Every token but the very first is a target exactly once an epoch.
    """

    def __init__(self, stream: TokenStream, block_size: int, seed: int):
        self.stream, self.block_size, self.seed = stream, block_size, seed

    def start_epoch(self, epoch: int) -> int:
        """Order the rows of an epoch; returns how many there are."""
        rng = np.random.default_rng([self.seed, epoch])
        self._offset = int(rng.integers(self.block_size)) if epoch else 0
        n_rows = -(-(len(self.stream) - 1 + self._offset) // self.block_size)
        self._order = rng.permutation(n_rows)
        return n_rows

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and targets, (block_size,) each, of the epoch's row `index`."""
        start = int(self._order[index]) * self.block_size - self._offset
        ids = self.stream.read(start, start + self.block_size + 1)
        targets = ids[1:].copy()
        positions = np.arange(start + 1, start + self.block_size + 1)
        targets[(positions < 1) | (positions >= len(self.stream))] = IGNORED
        return ids[:-1], targets


class ChatRows:
    """Rows of whole conversations, packed best fit; a conversation longer than a row is cut at a turn.

    Targets are what the assistant says, or with `loss_on="all"` every id but the padding. With `end_pieces` an
    `<|endoftext|>` that is no target stands behind each piece of a cut conversation, so that what follows it in the row
    is another document to `document_numbers`.
    """

    def __init__(
        self, stream: TokenStream, block_size: int, seed: int, loss_on: str = "assistant", end_pieces: bool = False
    ):
        self.stream, self.block_size, self.seed, self.loss_on = stream, block_size, seed, loss_on
        ends = complete_ends = stream.positions_of(ENDOFTEXT_ID) + 1
        if not len(ends) or ends[-1] < len(stream):
            ends = np.append(ends, len(stream))
        starts = np.concatenate([[0], ends[:-1]])
        is_short = ends - starts <= block_size + 1
        pieces = [np.stack([starts, starts, ends], axis=1)[is_short]]  # (start of the message, start, end)
        for start, end in zip(starts[~is_short].tolist(), ends[~is_short].tolist(), strict=True):
            pieces.append(np.array(self._cut_at_turns(start, end, block_size + 1), dtype=np.int64))
        self._pieces = np.concatenate(pieces)
        self._lengths = self._pieces[:, 2] - self._pieces[:, 1]
        self._epoch: int | None = None  # whose rows are packed
        if end_pieces:
            is_cut = ~np.isin(self._pieces[:, 2], complete_ends)
            self._lengths = np.minimum(self._lengths + is_cut, block_size + 1)

    def _cut_at_turns(self, start: int, end: int, capacity: int) -> list[tuple[int, int, int]]:
        """The pieces of a long conversation, as few as turns allow; a turn too long itself is split.

        Each is (start of the message in which it starts, start, end).
        """
        turns = (np.flatnonzero(self.stream.read(start, end) == IM_START_ID) + start).tolist()
        turns = turns if turns[:1] == [start] else [start, *turns]  # what begins otherwise counts as a turn
        pieces, message, position = [], start, start
        for turn, turn_end in zip(turns, [*turns[1:], end], strict=True):
            if turn_end - position > capacity and turn > position:
                pieces.append((message, position, turn))
                message = position = turn
            while turn_end - position > capacity:
                pieces.append((message, position, position + capacity))
                message, position = turn, position + capacity
        return [*pieces, (message, position, end)]

    def start_epoch(self, epoch: int) -> int:
        """Pack the conversations into rows and order these; returns how many rows there are."""
        if epoch == self._epoch:
            return len(self._rows)
        rng = np.random.default_rng([self.seed, epoch])
        shuffled = rng.permutation(len(self._pieces))
        longest_first = shuffled[np.argsort(-self._lengths[shuffled], kind="stable")]
        rows = _pack_best_fit(longest_first.tolist(), self._lengths, self.block_size + 1)
        self._rows, self._epoch = [rows[index] for index in rng.permutation(len(rows))], epoch
        return len(rows)

    def real_token_share(self) -> float:
        """The share of the epoch's row places that hold a real token rather than padding."""
        return float(self._lengths.sum() / (len(self._rows) * (self.block_size + 1)))

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and targets, (block_size,) each, of the epoch's row `index`."""
        ids = np.full(self.block_size + 1, ENDOFTEXT_ID, dtype=np.int64)
        counts = np.zeros(self.block_size + 1, dtype=bool)
        place = 0
        for piece in self._rows[index]:
            message, begin, end = self._pieces[piece].tolist()
            span = slice(place, place + end - begin)
            ids[span] = self.stream.read(begin, end)
            counts[span] = self._is_target(message, end)[begin - message :]
            counts[place] &= begin == message  # the middle of a message does not follow from the row before it
            place += int(self._lengths[piece])  # `ids` holds `<|endoftext|>` wherever nothing is written
        return ids[:-1], np.where(counts, ids, IGNORED)[1:]

    def _is_target(self, start: int, end: int) -> np.ndarray:
        if self.loss_on == "all":
            return np.ones(end - start, dtype=bool)
        return assistant_targets(self.stream.read(start, end))


def _pack_best_fit(items: list[int], lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Items into rows of `capacity`: each goes where it leaves the least room (best fit; Johnson 1973)."""
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows that have exactly that much room
    rooms: list[int] = []  # the rooms that occur, sorted
    for item in items:
        length = int(lengths[item])
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[at]
            row = by_room[room].pop()
            if not by_room[room]:
                rooms.pop(at)
        rows[row].append(item)
        room -= length
        if not by_room[room]:
            bisect.insort(rooms, room)
        by_room[room].append(row)
    return rows


class Batches:
    """Endless batches of rows in epoch order, made ahead of time by a thread.

    `position` is {"epoch", "row"} of the first row that has not been handed out: start another at it and it goes on
    with the same rows.
    """

    def __init__(self, rows: TextRows | ChatRows, n_rows: int, position: dict | None = None):
        self.position = dict(position or {"epoch": 0, "row": 0})
        self._rows, self._n_rows = rows, n_rows
        self._ready: queue.Queue = queue.Queue(maxsize=2)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(dict(self.position),), daemon=True)
        self._thread.start()

    def _work(self, position: dict) -> None:
        try:
            for item in self._make(position):
                if not self._put(item):
                    return
        except BaseException as error:  # raised again where the batch is asked for
            self._put(error)

    def _put(self, item) -> bool:
        """Hand an item over when there is room for it; False when the batches are closed before."""
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._ready.put(item, timeout=0.2)
                return True
        return False

    def _make(self, position: dict) -> Iterator[tuple[np.ndarray, np.ndarray, dict]]:
        epoch, row = position["epoch"], position["row"]
        n_rows = self._rows.start_epoch(epoch)
        while True:
            made = []
            while len(made) < self._n_rows:
                if row >= n_rows:
                    epoch, row = epoch + 1, 0
                    n_rows = self._rows.start_epoch(epoch)
                made.append(self._rows.row(row))
                row += 1
            ids, targets = (np.stack(column) for column in zip(*made, strict=True))
            yield ids, targets, {"epoch": epoch, "row": row}

    def next(self) -> tuple[np.ndarray, np.ndarray]:
        """The next ids and targets, (n_rows, block_size) each in int64."""
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        ids, targets, self.position = item
        return ids, targets

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()


def fixed_batches(rows: TextRows | ChatRows, batch_size: int, most_rows: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The first `most_rows` rows of a split's epoch 0 in batches, the same ones at every call: for validation.

    The last batch is filled up with rows without a target. Raises UserError where there is no target at all.
    """
    n_rows = min(rows.start_epoch(0), most_rows)
    batches = []
    for first in range(0, n_rows, batch_size):
        made = [rows.row(index) for index in range(first, min(first + batch_size, n_rows))]
        made += [(made[0][0], np.full_like(made[0][1], IGNORED))] * (batch_size - len(made))
        batches.append(tuple(np.stack(column) for column in zip(*made, strict=True)))
    if not any((targets != IGNORED).any() for _, targets in batches):
        raise UserError(
            f"the validation rows of {rows.stream.paths[0]} hold no target; use --loss_on all, a larger --eval_iters, "
            "or prepare conversations in which the assistant speaks"
        )
    return batches
