"""Clean, check, digest and encode documents in batches, in several processes, with the results in order."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, cast

import numpy as np

from common.cli import UserError
from data.cleaning import replace_surrogates
from data.dedup import band_keys
from data.documents import Document, document_line, is_untrained
from data.encoding import encode_documents
from data.writing import Encoded
from setup_tokenizer import GPT2, Tokenizer, check_messages

BATCH_CHARACTERS = 1 << 18  # of the documents that a worker gets at once
MIN_BATCHES_FOR_PROCESSES = 16  # with fewer batches, starting processes takes longer than the work

Pass = Callable[[Any], Any]  # from a document to a document, or to None to drop it


@dataclasses.dataclass(frozen=True)
class Worker:
    """Turns a batch of raw documents into an `Encoded`. It is pickled once for each worker process."""

    format: str
    passes: tuple[Pass, ...]
    seed: int
    max_document_tokens: int | None
    near_dedup: bool
    tokenizer: Tokenizer = GPT2

    def encode_batch(self, batch: list[Document], first_index: int) -> Encoded:
        """The batch's documents, cleaned and encoded. Raises UserError for a malformed conversation."""
        counts = Counter(read=len(batch))
        documents = []
        for index, document in enumerate(batch, first_index):
            cleaned = self._clean(document, counts)
            if cleaned is None:
                continue
            if self.format != "text":
                try:
                    check_messages(cast(list[dict], cleaned))
                except ValueError as error:
                    raise UserError(f"conversation {index + 1}: {error}; fix or remove it") from error
            documents.append(cleaned)
        encoded = self.encode(documents, sum(map(_characters, batch)), counts)
        if self.max_document_tokens is not None:
            fits = encoded.n_tokens - 1 <= self.max_document_tokens
            counts[f"longer than {self.max_document_tokens} tokens"] += int((~fits).sum())
            encoded = encoded.select(fits)
        if self.near_dedup:
            encoded.band_keys = band_keys(encoded.ids, encoded.n_tokens, self.tokenizer)
        return encoded

    def digests(self, lines: Iterable[bytes]) -> np.ndarray:
        """The digests of documents as stored, (documents, 2) uint64; they depend on the seed."""
        key = self.seed.to_bytes(8, "little")
        digests = b"".join(hashlib.blake2b(line, digest_size=16, key=key).digest() for line in lines)
        return np.frombuffer(digests, dtype="<u8").reshape(-1, 2)

    def encode(self, documents: list[Document], read_characters: int = 0, counts: Counter | None = None) -> Encoded:
        """Encode documents that are clean already; `read_characters` and `counts` are passed on."""
        lines = [document_line(document) for document in documents]
        ids = encode_documents(documents, self.tokenizer).astype(np.uint16)
        ends = np.flatnonzero(ids == self.tokenizer.endoftext) + 1
        return Encoded(
            digests=self.digests(lines),
            ids=ids,
            n_tokens=np.diff(ends, prepend=0),
            text_bytes=np.array([text_bytes(document) for document in documents], dtype=np.int64),
            lines=b"".join(lines),
            line_bytes=np.array([len(line) for line in lines], dtype=np.int64),
            band_keys=None,
            read_characters=read_characters,
            counts=Counter() if counts is None else counts,
            untrained=_untrained(documents, ids, np.diff(ends, prepend=0), self.tokenizer),
        )

    def _clean(self, document: Document, counts: Counter) -> Document | None:
        """The document after every pass, or None if it is dropped. Counts what happened."""
        document = _without_surrogates(document, counts)
        for clean in self.passes:
            cleaned = clean(document)
            if cleaned is None:
                counts[f"dropped by {clean.__name__}"] += 1
                return None
            if cleaned is not document and cleaned != document:
                counts[f"changed by {clean.__name__}"] += 1
            document = cleaned
        if not (document.strip() if isinstance(document, str) else any(m.get("content") for m in document)):
            counts["empty"] += 1
            return None
        return document


def _without_surrogates(document: Document, counts: Counter) -> Document:
    """The document with unpaired surrogates replaced; counted if it has any."""
    repaired: Document
    if isinstance(document, str):
        if (repaired := replace_surrogates(document)) is document:
            return document
    else:
        texts = [message["content"] for message in document if isinstance(message.get("content"), str)]
        if all(replace_surrogates(text) is text for text in texts):
            return document
        repaired = [{**message, "content": replace_surrogates(message["content"])} for message in document]
    counts["unpaired surrogates"] += 1
    return repaired


def _untrained(documents: list[Document], ids: np.ndarray, n_tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """The answers of weight 0 in conversations whose ids these are, as in `Encoded.untrained`."""
    found = [
        (index, position)
        for index, document in enumerate(documents)
        if not isinstance(document, str)
        for position, message in enumerate(document)
        if is_untrained(message)
    ]
    if not found:
        return np.zeros((0, 3), dtype=np.int64)
    messages = tokenizer.message_spans(ids)
    document, position = np.array(found, dtype=np.int64).T
    first_message = np.cumsum([0, *map(len, documents)])[:-1]
    message = first_message[document] + position
    start = (np.cumsum(n_tokens) - n_tokens)[document]
    return np.column_stack([document, messages.content[message] - start, messages.end[message] - start])


def text_bytes(document: Document) -> int:
    """UTF-8 bytes of a text, or of a conversation's contents."""
    if isinstance(document, str):
        return len(document) if document.isascii() else len(document.encode())
    return sum(text_bytes(message["content"]) for message in document)


def _characters(document: Document) -> int:
    if isinstance(document, str):
        return len(document)
    return sum(len(message["content"]) for message in document if isinstance(message.get("content"), str))


# --- running the workers ---


def encoded_batches(
    documents: Iterable[Document], worker: Worker, n_workers: int, batch_characters: int = BATCH_CHARACTERS
) -> Generator[Encoded, None, None]:
    """Every batch of `documents`, encoded, in order. A corpus of a few batches is encoded in this process."""
    batches = _batches(documents, batch_characters)
    first = list(itertools.islice(batches, MIN_BATCHES_FOR_PROCESSES))
    if n_workers == 1 or len(first) < MIN_BATCHES_FOR_PROCESSES:
        for batch in itertools.chain(first, batches):
            yield worker.encode_batch(*batch)
        return
    yield from _encoded_in_processes(itertools.chain(first, batches), worker, n_workers)


def _batches(documents: Iterable[Document], batch_characters: int) -> Iterator[tuple[list[Document], int]]:
    """Lists of documents with about `batch_characters` in total, each with the index of its first document."""
    batch: list[Document] = []
    characters = first_index = 0
    for document in documents:
        batch.append(document)
        characters += _characters(document) + 32  # so that empty documents fill a batch, too
        if characters >= batch_characters:
            yield batch, first_index
            batch, characters, first_index = [], 0, first_index + len(batch)
    if batch:
        yield batch, first_index


def _encoded_in_processes(batches: Iterator[tuple], worker: Worker, n_workers: int) -> Iterator[Encoded]:
    import multiprocessing
    from concurrent.futures import Future, ProcessPoolExecutor

    # "spawn" on every system: the readers run threads (pyarrow, downloads), and a fork of a process with threads can
    # deadlock.
    pool = ProcessPoolExecutor(
        n_workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(worker,)
    )
    with contextlib.ExitStack() as stack:
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        pending: deque[Future[Encoded]] = deque()
        for batch in batches:
            pending.append(pool.submit(_encode_in_worker, *batch))
            if len(pending) > n_workers + 2:  # bounds the memory
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


_worker: Worker | None = None  # in a worker process only


def _start_worker(worker: Worker) -> None:
    """Initialize a worker process: it leaves Ctrl-C to its parent, and exits when the parent exits or is killed."""
    import multiprocessing
    import multiprocessing.connection

    global _worker
    _worker = worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _encode_in_worker(batch: list[Document], first_index: int) -> Encoded:
    assert _worker is not None
    return _worker.encode_batch(batch, first_index)
