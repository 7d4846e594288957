"""What every prepare script shares: options, cleaning, splitting, deduplication, parallel encoding, writing.

    documents -> batches -> workers (clean, digest, encode) -> drop repeats, choose the split -> files

A document is a `str`, or a conversation: a list of {"role", "content"} messages. Documents go from their source to
the disk a batch at a time, so memory grows by the digests that find repeats alone, 21 to 43 bytes a document, and the
files do not depend on the number of workers. For a data set named `mine` the folder holds afterwards:

    mine-train.bin, mine-val.bin       ids as raw little-endian uint16, each document followed by <|endoftext|>
    mine-train.txt, mine-val.txt       the same documents as text, divided by lines `<|endoftext|>`; or
    mine-train.jsonl, mine-val.jsonl   the same conversations, one {"messages": [...]} a line
    mine.json                          what they hold: counts, source, licence, sha256, what the passes did
    mine.md, mine-lengths.png          with --report: a page about them
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.cli import UserError, option
from common.files import FileLock, atomic_files, require_free_space, sha256_file, write_error
from data.dedup import DigestSet, NearDuplicates, require_minhash
from data.prepared import Document, Encoded, SplitWriter, read_description, text_path, write_json
from data.report import write_report
from data.sources import is_text, split_suffix
from data.workers import Pass, Worker, encoded_batches
from setup_tokenizer import get_extended_tokenizer

DATA_FOLDER = Path(__file__).resolve().parent
PIPELINE_VERSION = 2  # raised when the same input would give other files, so that a finished preparation is redone
EXACT_SPLIT_DOCUMENTS = 50  # expected validation documents from which a random share is close enough to the fraction
EXACT_SPLIT_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class PrepareOptions:
    """The options that every prepare script has."""

    input: tuple[str, ...] = option((), "local files instead of the download", nargs="+", metavar="PATH")
    output_dir: str | None = option(None, "folder for the prepared files (default: the data folder)")
    val_fraction: float = option(0.05, "share of the documents kept for validation where the source has no such split")
    seed: int = option(1337, "seed of the random split")
    workers: int | None = option(None, "processes that encode (default: all cores, up to 8)")
    limit: int | None = option(None, "take only the first N documents of each split", metavar="N")
    shard_tokens: int | None = option(None, "divide each .bin into files of N tokens", metavar="N")
    max_document_tokens: int | None = option(None, "drop documents of more than N tokens", metavar="N")
    near_dedup: bool = option(False, "drop documents that nearly repeat an earlier one (MinHash)")
    report: bool = option(False, "write a page about the data set: counts, lengths, shared text, samples")
    force: bool = option(False, "prepare again even if the files are there already")

    def __post_init__(self):
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, not {self.val_fraction}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be between 0 and 2**64 - 1, not {self.seed}")
        for name in ("workers", "limit", "shard_tokens", "max_document_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What a data set is: `format` is "text" (documents are str) or "chat" (documents are lists of messages)."""

    name: str
    format: str
    source: str
    licence: str
    non_commercial: bool = False


def prepare(
    dataset: Dataset,
    options: PrepareOptions,
    train: Iterable[Document],
    val: Iterable[Document] | None = None,
    clean: Sequence[Pass] = (),
    *,
    inputs: Sequence[Path] = (),
    skipped: Mapping[str, int] | None = None,
    keep: Mapping | None = None,
    input_digest: str | None = None,
    base_encoding: str = "gpt2",
) -> dict:
    """Write the data set's files into the output folder and return what its .json holds.

    `train` and `val` are consumed once and lazily; without `val`, documents are divided by `val_fraction`, by their
    content and the seed, so that neither order nor repeats matter. `clean` are the passes, applied in order inside the
    workers: functions (importable or otherwise picklable) from document to document, or to None to drop it. `inputs`
    are the files that the documents come from: a finished preparation of the same inputs and options is recognised and
    not repeated. `skipped` is a Counter that the source fills while it is read, by reason; it joins the report. `keep`
    holds entries of an earlier description to take over. `input_digest` stands for documents that come from no files,
    such as the commit of a repository.

    Exact repeats are dropped, and train documents that also stand in val; with `near_dedup` near repeats too, of
    which the first stays, one of a given `val` before one of train. All files appear together at the end, or
    none. Raises UserError for input without documents, an empty split, a full disk, an input that an output would
    replace, or ids that uint16 cannot hold.
    """
    folder = output_folder(options)
    _require_uint16(base_encoding)
    if options.near_dedup:
        require_minhash()
    _refuse_to_replace(inputs, folder, dataset.name)
    print(f"{dataset.name}: {dataset.source}")
    print(f"licence: {dataset.licence}{' (non-commercial use only)' if dataset.non_commercial else ''}")
    description = {
        **dataclasses.asdict(dataset),
        "tokenizer": get_extended_tokenizer(base_encoding).name,
        "n_vocab": get_extended_tokenizer(base_encoding).n_vocab,
        "dtype": "uint16",
        "seed": options.seed,
        "options": _recorded_options(options),
        "input_digest": input_digest or digest_of_files(inputs),
    }
    with FileLock(folder / f".{dataset.name}.lock", f"data set {dataset.name} in {folder}"):
        earlier = read_description(folder, dataset.name) or {}
        if options.report:
            _refuse_foreign_page(folder, dataset.name, earlier)
        if not options.force and (finished := _finished(folder, description)):
            print(f"{dataset.name} is already prepared in {folder}; --force prepares it again")
            description = _with_report(folder, finished) if options.report else finished
        else:
            _require_room(folder, inputs, dataset, options)
            worker = _worker_for(dataset, options, clean, base_encoding)
            with atomic_files(folder, dataset.name) as staging:
                description |= _write_splits(staging, dataset, options, worker, train, val, inputs)
                description["report"] |= dict(sorted((skipped or {}).items()))
                description |= keep or {}
                if options.report:
                    description |= write_report(staging, staging, description)
                write_json(staging / f"{dataset.name}.json", description)
            _remove_leftovers(folder, earlier, description)
    _print_totals(description)
    return description


def _with_report(folder: Path, description: dict) -> dict:
    """The description of a finished preparation, after its page is written if it is not there."""
    if all((folder / file).is_file() for file in description.get("report_files", [""])):
        return description
    with atomic_files(folder, description["name"]) as staging:
        description = description | write_report(folder, staging, description)
        write_json(staging / f"{description['name']}.json", description)
    return description


def output_folder(options: PrepareOptions) -> Path:
    """The folder that the files go to, made if it is missing."""
    folder = Path(options.output_dir) if options.output_dir else DATA_FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error
    return folder


def _require_uint16(base_encoding: str) -> None:
    enc = get_extended_tokenizer(base_encoding)
    if enc.n_vocab > 1 << 16:
        raise UserError(
            f"{enc.name} has {enc.n_vocab:,} ids and .bin files hold uint16, that is {1 << 16:,}; use the gpt2 encoding"
        )


def _recorded_options(options: PrepareOptions) -> dict:
    """The options that decide what the files hold."""
    without = ("input", "output_dir", "workers", "report", "force", "seed")
    chosen = {name: value for name, value in dataclasses.asdict(options).items() if name not in without}
    return {**chosen, "pipeline": PIPELINE_VERSION}


def _worker_for(dataset: Dataset, options: PrepareOptions, clean: Sequence[Pass], base_encoding: str) -> Worker:
    passes = tuple(clean)
    return Worker(dataset.format, passes, options.seed, base_encoding, options.max_document_tokens, options.near_dedup)


# --- recognising a finished preparation ---


def digest_of_files(files: Sequence[Path]) -> str | None:
    """A digest of the files' names and bytes, None without files. Raises UserError for one that cannot be read."""
    digest = hashlib.sha256()
    for file in files:
        try:
            digest.update(f"{file.name} {sha256_file(file)}\n".encode())
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}); give --input a readable file") from error
    return digest.hexdigest() if files else None


def _finished(folder: Path, wanted: dict) -> dict | None:
    """The description of a preparation that has all of `wanted` and whose files are there, else None."""
    found = read_description(folder, wanted["name"])
    if wanted["input_digest"] is None or found is None or any(found.get(key) != wanted[key] for key in wanted):
        return None
    for split in ("train", "val"):
        if not text_path(folder, found, split).is_file():
            return None
        for entry in found["splits"][split]["files"]:
            path = folder / entry["file"]
            if not path.is_file() or path.stat().st_size != 2 * entry["tokens"]:
                return None
    return found


def _remove_leftovers(folder: Path, earlier: dict, description: dict) -> None:
    """Remove files of an earlier preparation of the same name that the new one did not replace."""
    current = {text_path(folder, description, split).name for split in ("train", "val")}
    current |= {entry["file"] for split in description["splits"].values() for entry in split["files"]}
    current |= set(description.get("report_files", []))
    for path in folder.iterdir():
        is_ours = _is_data_file(path.name, description["name"]) or path.name in earlier.get("report_files", [])
        if is_ours and path.name not in current:
            path.unlink()


# --- what an output must not do ---


def _is_data_file(file_name: str, name: str) -> bool:
    """Whether a file's name is one that the preparation of data set `name` gives."""
    return bool(re.fullmatch(re.escape(name) + r"-(train|val)((-\d{5})?\.bin|\.txt|\.jsonl)", file_name))


def _refuse_to_replace(files: Sequence[Path], folder: Path, name: str) -> None:
    """Raise UserError for an input that stands where an output will."""
    others = (f"{name}.json", f"{name}.md", f"{name}-lengths.png")
    for file in files:
        is_output = _is_data_file(file.name, name) or file.name in others
        if is_output and file.resolve().parent == folder.resolve():
            raise UserError(f"{file} would be replaced by what is prepared from it; choose another --output_dir")


def _refuse_foreign_page(folder: Path, name: str, earlier: dict) -> None:
    """Raise UserError where the report's page would replace a file that is no report."""
    page = folder / f"{name}.md"
    if page.exists() and page.name not in earlier.get("report_files", []):
        raise UserError(f"--report would replace {page}; move that file or choose another --output_dir")


def _require_room(folder: Path, files: Sequence[Path], dataset: Dataset, options: PrepareOptions) -> None:
    """Raise UserError early where the output surely will not fit: text's copy, and 2 bytes for about 4 of text.

    Compressed text takes at least as much; of records and archives nobody knows how much is text: a quarter counts.
    """
    if options.limit is None:
        sizes = (file.stat().st_size * (1 if is_text(file) else 0.25) for file in files)
        require_free_space(folder, int(1.5 * sum(sizes)), f"preparing {dataset.name}")


# --- the splits ---


def _worker_count(options: PrepareOptions) -> int:
    if options.workers:
        return options.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8)  # the one process that reads and writes feeds no more


def _with_split(batches: Iterator[Encoded], val_fraction: float) -> Iterator[tuple[Encoded, np.ndarray]]:
    """Each batch with a mask of its documents that belong to val: those with the smallest digests.

    The digest is keyed by the seed, so this is a random share that neither order nor repeats change. A small corpus
    is seen whole before the first document is placed, and gets exactly its share, at least one document.
    """
    threshold = int(val_fraction * 2**64)
    held, documents, held_bytes = [], 0, 0
    for batch in batches:
        held.append(batch)
        documents += len(batch.digests)
        held_bytes += int(batch.text_bytes.sum())
        if documents * val_fraction >= EXACT_SPLIT_DOCUMENTS or held_bytes >= EXACT_SPLIT_BYTES:
            break
    else:
        keys = np.unique(np.concatenate([batch.digests[:, 0] for batch in held])) if held else np.zeros(0)
        if len(keys) > 1:
            n_val = min(max(1, round(val_fraction * len(keys))), len(keys) - 1)
            threshold = int(keys[n_val])
    for batch in itertools.chain(held, batches):
        yield batch, batch.digests[:, 0] < np.uint64(threshold)


def _write_splits(
    staging: Path,
    dataset: Dataset,
    options: PrepareOptions,
    worker: Worker,
    train: Iterable[Document],
    val: Iterable[Document] | None,
    files: Sequence[Path],
) -> dict:
    """Write both splits' files into `staging` and return the description's "splits" and "report"."""
    workers = _worker_count(options)
    counts = collections.Counter()
    is_plain = all(is_text(file) and split_suffix(file)[1] is None for file in files)
    total = sum(file.stat().st_size for file in files) if files and is_plain and options.limit is None else None
    with contextlib.ExitStack() as stack:
        # disable=None: a bar on a terminal only, so that a pipe's stderr holds nothing but errors
        bar = stack.enter_context(tqdm(total=total, desc=dataset.name, unit="B", unit_scale=True, disable=None))
        paths = {split: text_path(staging, dataclasses.asdict(dataset), split) for split in ("train", "val")}
        writers = {split: stack.enter_context(SplitWriter(paths[split], options.shard_tokens)) for split in paths}
        repeats = _Repeats(NearDuplicates() if options.near_dedup else None, counts)

        def encoded(documents: Iterable[Document]) -> Iterator[Encoded]:
            stream = encoded_batches(itertools.islice(documents, options.limit), worker, workers)
            with contextlib.closing(stream):
                for batch in stream:
                    counts.update(batch.counts)
                    bar.update(batch.read_characters)
                    yield batch

        if val is None:
            for batch, in_val in _with_split(encoded(train), options.val_fraction):
                new = repeats.find_new(batch)
                writers["val"].write(batch.select(new & in_val))
                writers["train"].write(batch.select(new & ~in_val))
        else:
            for batch in encoded(val):
                writers["val"].write(batch.select(repeats.find_new(batch)))
            repeats.begin_train()
            for batch in encoded(train):
                writers["train"].write(batch.select(repeats.find_new(batch)))
    splits = {split: writer.description() for split, writer in writers.items()}
    _require_documents(dataset, options, splits, counts, files, given_val=val is not None)
    return {"splits": splits, "report": dict(sorted(counts.items()))}


class _Repeats:
    """Finds the documents that were not there before, and counts the others by reason."""

    def __init__(self, near: NearDuplicates | None, counts: collections.Counter):
        self._near, self._counts = near, counts
        self._seen, self._in_val = DigestSet(), None

    def begin_train(self) -> None:
        """What was seen so far is the validation split; what follows is train."""
        self._seen, self._in_val = DigestSet(), self._seen

    def find_new(self, batch: Encoded) -> np.ndarray:
        """Which of the batch's documents are new: (documents,) bool."""
        new = self._seen.add(batch.digests)
        self._counts["duplicates"] += int((~new).sum())
        if self._in_val is not None:
            shared = new & self._in_val.contains(batch.digests)
            self._counts["train documents also in validation"] += int(shared.sum())
            new &= ~shared
        if self._near is not None:
            is_near = self._near.find(batch.band_keys, new)
            self._counts["near duplicates"] += int(is_near.sum())
            new &= ~is_near
        return new


def _require_documents(
    dataset: Dataset, options: PrepareOptions, splits: dict, counts: Mapping, files: Sequence[Path], given_val: bool
) -> None:
    """Raise UserError, saying what to do, where a split has no document."""
    where = ", ".join(map(str, files)) or dataset.source
    n_train, n_val = (splits[split]["documents"] for split in ("train", "val"))
    if not counts["read"]:
        raise UserError(f"no document found in {where}; give --input a file that holds some")
    if not n_train and not n_val:
        raise UserError(
            f"all {counts['read']:,} documents of {where} are empty or too long; give --input a file that holds text"
        )
    if given_val and not n_train:
        raise UserError(f"no train document is left of {where}: each one is empty or also in the validation file")
    if given_val and not n_val:
        raise UserError("the validation file has no document; leave it out and the train file is divided")
    if not n_train or not n_val:
        raise UserError(
            f"{where} has {n_train + n_val:,} distinct documents, too few to divide into train and validation at "
            f"--val_fraction {options.val_fraction}; add documents or change --val_fraction"
        )


def _print_totals(description: dict) -> None:
    for note, count in description["report"].items():
        if count and note != "read":
            print(f"  {note}: {count:,}")
    for split in ("train", "val"):
        totals = description["splits"][split]
        files = [entry["file"] for entry in totals["files"]]
        names = files[0] if len(files) == 1 else f"{files[0]} to {files[-1]}"
        print(f"{split}: {totals['documents']:,} documents, {totals['tokens']:,} tokens in {names}")
