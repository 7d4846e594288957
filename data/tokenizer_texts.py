"""The texts that a tokenizer learns from: read from files, cleaned, and sampled if there are too many.

    found = [recognize("stories.txt")]
    for text in ChosenTexts(found, survey(found), max_bytes=10**8): ...

Texts are streamed: a few blocks or one document are in memory at a time, and a small sample to measure.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from common.cli import UserError
from data.cleaning import fix_mojibake, normalise, replace_surrogates
from data.counts import Skipped, n_dropped, reasons_in_words
from data.readers.files import is_text, split_suffix
from data.readers.recognize import Recognized, read_documents

MEASURED_BYTES = 8_000_000  # of text, on which memory and bytes per token are measured
PART_CHARACTERS = 1 << 18
# The memory that tokenizers 0.23.3 needs for each distinct piece of text while it learns: 3.1 KB for pieces of 32 bytes
# (Japanese and Chinese manual pages), 1.2 KB for pieces of 10 bytes (German and French ones). With 800 MB for them, the
# whole process stays below 1 GB.
MEMORY_PER_PIECE, MEMORY_PER_PIECE_BYTE = 300, 90
MEMORY_BYTES = 800e6


def cleaned_texts(found: Sequence[Recognized], skipped: Skipped) -> Iterator[str]:
    """The documents and the contents of messages in the files, repaired as the prepare scripts repair them."""
    for recognized in found:
        for document in read_documents(recognized, skipped):
            contents = [document] if isinstance(document, str) else [message["content"] for message in document]
            for content in contents:
                if text := normalise(fix_mojibake(content)):
                    yield replace_surrogates(text)


@dataclass(frozen=True)
class Survey:
    """How much text there is, and a sample of about MEASURED_BYTES, spread evenly over it.

    A very long text has several parts, other texts one.
    """

    n_texts: int
    n_parts: int
    n_bytes: int
    sample: tuple[str, ...]


def survey(found: Sequence[Recognized]) -> Survey:
    """Read all texts once, to know their size before some are chosen. Raises UserError for input without text."""
    sample, skipped = SpreadSample(MEASURED_BYTES), Skipped()
    n_texts = n_parts = n_bytes = 0
    total = _known_size(found)
    with tqdm(total=total, desc="measuring", unit="B", unit_scale=True, disable=None) as bar:  # on a terminal only
        for text in cleaned_texts(found, skipped):
            size = len(text.encode())
            n_texts, n_bytes = n_texts + 1, n_bytes + size
            bar.update(size)
            for part in _parts(text):
                n_parts += 1
                sample.add(part, len(part.encode()))
    dropped = f"; left out: {reasons_in_words(skipped)}" if n_dropped(skipped) else ""
    print(f"read {n_texts:,} texts, {n_bytes:,} bytes{dropped}")
    if not n_texts:
        raise UserError("--input contains no text; name files that contain some")
    return Survey(n_texts, n_parts, n_bytes, tuple(sample.texts))


class SpreadSample:
    """Every n-th text of a stream, where n doubles whenever the sample has more than `max_bytes`."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.texts = max_bytes, list[str]()
        self._stride, self._n_seen, self._n_bytes = 1, 0, 0

    def add(self, text: str, n_bytes: int) -> None:
        """Consider the next text, which has `n_bytes`."""
        if self._n_seen % self._stride == 0:
            self.texts.append(text)
            self._n_bytes += n_bytes
            while self._n_bytes > self.max_bytes and len(self.texts) > 1:
                self.texts = self.texts[::2]
                self._stride *= 2
                self._n_bytes = sum(len(kept.encode()) for kept in self.texts)
        self._n_seen += 1


def _known_size(found: Sequence[Recognized]) -> int | None:
    """The bytes of files of plain text; None if the size of the text in them is unknown."""
    is_plain = all(is_text(recognized.path) and not split_suffix(recognized.path)[1] for recognized in found)
    return sum(recognized.path.stat().st_size for recognized in found) if is_plain else None


# --- memory ---


def bytes_that_fit(sample: Sequence[str], pattern: str, memory_bytes: float = MEMORY_BYTES) -> int:
    """How many bytes of text like the sample the trainer can learn from in `memory_bytes`.

    The trainer keeps every distinct piece once. Their number grows as a power of the text (Heaps' law); the exponent is
    that between half of the sample and all of it. It falls as texts get longer, so the result is on the safe side.
    """
    whole_bytes, whole_memory = _memory_of(sample, pattern)
    half_bytes, half_memory = _memory_of(sample[::2], pattern)
    exponent = 1.0
    if half_bytes < whole_bytes:
        exponent = math.log(whole_memory / half_memory) / math.log(whole_bytes / half_bytes)
    exponent = min(max(exponent, 0.1), 1.0)
    return int(whole_bytes * min((memory_bytes / whole_memory) ** (1 / exponent), 1e9))


def _memory_of(texts: Sequence[str], pattern: str) -> tuple[int, int]:
    """(bytes of the texts, bytes that the trainer needs for their distinct pieces)."""
    import regex  # tiktoken depends on it

    pieces = {piece for text in texts for piece in regex.findall(pattern, text)}
    memory = sum(MEMORY_PER_PIECE + MEMORY_PER_PIECE_BYTE * len(piece.encode()) for piece in pieces)
    return sum(len(text.encode()) for text in texts), memory


# --- the chosen texts ---


class ChosenTexts:
    """The texts to learn from, in parts: all, or, if they have more than `max_bytes`, about that many, spread evenly.

    Iterating counts the parts that are chosen.
    """

    def __init__(self, found: Sequence[Recognized], surveyed: Survey, max_bytes: int):
        self.found, self.surveyed, self.max_bytes = found, surveyed, max_bytes
        self.n_parts = self.n_bytes = 0

    def __iter__(self) -> Iterator[str]:
        self.n_parts = self.n_bytes = n_read_bytes = 0
        for part in itertools.chain.from_iterable(map(_parts, cleaned_texts(self.found, Skipped()))):
            size = len(part.encode())
            n_read_bytes += size
            # Chosen if the chosen share of the bytes read so far does not exceed the share wanted of all of them.
            is_chosen = (self.n_bytes + size) * self.surveyed.n_bytes <= self.max_bytes * n_read_bytes
            if is_chosen or self.surveyed.n_bytes <= self.max_bytes:
                self.n_parts += 1
                self.n_bytes += size
                yield part

    @property
    def estimated_n_parts(self) -> int:
        """About how many parts will be chosen, for a progress bar."""
        return math.ceil(self.surveyed.n_parts * min(1, self.max_bytes / self.surveyed.n_bytes))

    def report(self, reason: str) -> None:
        """Print how much was chosen, unless it was everything. Raises UserError if it was nothing."""
        if not self.n_parts:
            raise UserError(f"--max_bytes {self.max_bytes} is smaller than every text; use a larger number")
        if self.n_bytes < self.surveyed.n_bytes:
            kind = "texts" if self.surveyed.n_parts == self.surveyed.n_texts else "parts of texts"
            print(
                f"learned from a sample: {self.n_parts:,} {kind} spread over all of it, {self.n_bytes:,} bytes, "
                f"{self.n_bytes / self.surveyed.n_bytes:.1%} ({reason})"
            )


def _parts(text: str) -> Iterator[str]:
    """A text; a very long one in parts that end with a line, because the trainer keeps many texts in memory."""
    start = 0
    while len(text) - start > PART_CHARACTERS:
        end = text.rfind("\n", start, start + PART_CHARACTERS) + 1 or start + PART_CHARACTERS
        yield text[start:end]
        start = end
    yield text[start:]
