"""The texts that a tokenizer learns from: read from files, cleaned, and sampled if there are too many.

    texts = Texts(found := recognized_files(["stories.txt"]), size_of_texts(found, 10**8), 10**8)
    for text in texts: ...

Texts are streamed: a few blocks or one document are in memory at a time, and a small sample to measure with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from common.cli import UserError
from data.cleaning import fix_mojibake, normalise
from data.counts import Skipped, n_dropped, reasons_in_words
from data.readers.files import ALL_SUFFIXES, is_text, split_suffix
from data.readers.inputs import input_files, parse_suffixes
from data.readers.recognize import Recognized, UnknownContent, read_documents, recognize

MEASURED_BYTES = 8_000_000  # of text, on which bytes per token are measured


def recognized_files(
    paths: Sequence[str], field: str = "text", suffixes: Sequence[str] = (), encoding: str | None = None
) -> list[Recognized]:
    """What each file that --input names contains, printed; one in a folder with unknown records is left out."""
    files = input_files(paths, ALL_SUFFIXES, parse_suffixes(suffixes), encoding=encoding, takes_more=True)
    found = []
    for file in files:
        try:
            found.append(recognize(file, field))
        except UnknownContent as error:
            if str(file) in paths or len(files) == 1:
                raise
            print(f"left out: {str(error).partition(';')[0]}")
        else:
            print(found[-1])
    if not found:
        raise UserError(f"no file in {', '.join(paths)} contains text or conversations that are known; name others")
    return found


def cleaned_texts(found: Sequence[Recognized], skipped: Skipped) -> Iterator[str]:
    """The documents and the contents of messages in the files, repaired as the prepare scripts repair them."""
    for recognized in found:
        for document in read_documents(recognized, skipped):
            contents = [document] if isinstance(document, str) else [message["content"] for message in document]
            for content in contents:
                if text := normalise(fix_mojibake(content)):
                    yield _without_surrogates(text)


def _without_surrogates(text: str) -> str:
    """Text with U+FFFD for unpaired surrogates, as tiktoken encodes them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def size_of_texts(found: Sequence[Recognized], max_bytes: int) -> int | None:
    """The number of bytes of all texts; None if there are certainly not more than `max_bytes`.

    To find out, the files are read once more, unless their sizes say enough.
    """
    may_be_packed = any(not _is_as_large_as_its_text(recognized.path) for recognized in found)
    n_file_bytes = sum(recognized.path.stat().st_size for recognized in found)
    if not may_be_packed and n_file_bytes <= max_bytes:
        return None
    total = 0
    with _progress("measuring", None) as bar:
        for text in cleaned_texts(found, Skipped()):
            n_bytes = len(text.encode())
            total += n_bytes
            bar.update(n_bytes)
    return total


def _is_as_large_as_its_text(path: Path) -> bool:
    """Whether a file has at least as many bytes as the text in it; compressed files may have far fewer."""
    kind, compression = split_suffix(path)
    return compression is None and kind not in (".parquet", ".epub")


def _progress(what: str, total: int | None) -> tqdm:
    """A bar that counts bytes, on a terminal only."""
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None)


class Texts:
    """The texts to learn from: all of them, or about `max_bytes` spread evenly over all if they have more.

    `total_bytes` is the size of all texts, None if it is not more than `max_bytes`. Iterating counts what is read and
    taken, and keeps a small sample to measure with.
    """

    def __init__(self, found: Sequence[Recognized], total_bytes: int | None, max_bytes: int):
        self.found, self.total_bytes, self.max_bytes = found, total_bytes, max_bytes
        self.skipped = Skipped()
        self.n_read = self.n_read_bytes = self.n_taken = self.n_taken_bytes = 0
        self.sample = SpreadSample(MEASURED_BYTES)

    def __iter__(self) -> Iterator[str]:
        size = sum(recognized.path.stat().st_size for recognized in self.found)
        plain = all(is_text(recognized.path) and not split_suffix(recognized.path)[1] for recognized in self.found)
        with _progress("reading", self.total_bytes or (size if plain else None)) as bar:
            for text in cleaned_texts(self.found, self.skipped):
                n_bytes = len(text.encode())
                self.n_read += 1
                self.n_read_bytes += n_bytes
                bar.update(n_bytes)
                if self._is_taken(n_bytes):
                    self.n_taken += 1
                    self.n_taken_bytes += n_bytes
                    self.sample.add(text, n_bytes)
                    yield text

    def _is_taken(self, n_bytes: int) -> bool:
        """Whether a text is taken: if its size keeps the share of bytes taken so far at most what it will be."""
        if self.total_bytes is None or self.total_bytes <= self.max_bytes:
            return True
        return (self.n_taken_bytes + n_bytes) * self.total_bytes <= self.max_bytes * self.n_read_bytes

    def report(self) -> None:
        """Print how much was read and taken. Raises UserError if that is nothing."""
        dropped = f"; left out: {reasons_in_words(self.skipped)}" if n_dropped(self.skipped) else ""
        print(f"read {self.n_read:,} texts, {self.n_read_bytes:,} bytes{dropped}")
        if not self.n_read:
            raise UserError("--input contains no text; name files that contain some")
        if not self.n_taken:
            raise UserError(f"--max_bytes {self.max_bytes} is less than any text has; use a larger number")
        if self.n_taken < self.n_read:
            share = self.n_taken_bytes / self.n_read_bytes
            print(
                f"learned from a sample: {self.n_taken:,} texts spread over all of it, {self.n_taken_bytes:,} bytes, "
                f"{share:.1%} (--max_bytes {self.max_bytes})"
            )


class SpreadSample:
    """Every n-th text of a stream, where n doubles whenever the sample has more than `max_bytes`."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.texts, self._stride, self._n_seen = max_bytes, list[str](), 1, 0
        self._n_bytes = 0

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
