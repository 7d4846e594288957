"""The pipeline of every prepare script: options, cleaning, splitting, deduplication, parallel encoding, writing.

    documents -> batches -> workers (clean, digest, encode) -> drop duplicates, split -> files

A document is a `str`, or a conversation: a list of {"role", "content"} messages. Documents go from their source to the
disk in batches, so memory grows only by the digests that detect duplicates, 21 to 43 bytes per document, and the
files do not depend on the number of workers. For a data set named `mine`, the pipeline writes:

    mine-train.bin, mine-val.bin       ids as little-endian uint16, each document followed by <|endoftext|>
    mine-train.txt, mine-val.txt       the same documents as text, separated by lines `<|endoftext|>`; or
    mine-train.jsonl, mine-val.jsonl   the same conversations, one {"messages": [...]} per line
    mine.json                          the description (data/dataset.py): counts, source, licence, sha256, report
    mine.md, mine-lengths.png          with --report: a page about the data set
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.cli import UserError, check_options, option
from common.device import n_cores
from common.files import FileLock, atomic_files, make_folder, require_free_space
from data.counts import DIVIDED, n_dropped, reasons_in_words
from data.dataset import SPLITS, DatasetInfo, SplitInfo, info_bytes
from data.dedup import Deduplicator, require_minhash
from data.documents import Document, text_path
from data.earlier import (
    digest_of_files,
    earlier_info,
    finished_info,
    refuse_to_replace,
    refuse_to_replace_page,
    remove_leftovers,
)
from data.readers.files import ALL_SUFFIXES, is_text, split_suffix
from data.readers.inputs import check_encoding, input_files, parse_suffixes
from data.redividing import redivide
from data.report import write_report
from data.splitting import is_fair, with_split
from data.vocabularies import keep_tokenizer, open_tokenizer
from data.workers import BATCH_CHARACTERS, Pass, Worker, encoded_batches
from data.writing import Encoded, SplitWriter, staged_file
from setup_tokenizer import Tokenizer

DATA_FOLDER = Path(__file__).resolve().parent
PIPELINE_VERSION = 3  # increased whenever the same input gives different files, so that finished data is prepared again
MAX_DEFAULT_WORKERS = 8  # the one process that reads and writes cannot feed more


@dataclass(frozen=True)
class PrepareOptions:
    """The options that every prepare script has."""

    input: tuple[str, ...] = option((), "local files instead of the download", nargs="+", metavar="PATH", group="data")
    encoding: str | None = option(
        None,
        "encoding of the --input files, such as windows-1252 or utf-16 (default: UTF-8)",
        metavar="NAME",
        group="data",
    )
    strict: bool = option(False, "refuse folders with files of an unknown type instead of skipping them", group="data")
    output_dir: str | None = option(
        None, "folder for the prepared files (default: the data folder)", metavar="DIR", group="output"
    )
    val_fraction: float = option(
        0.05,
        "fraction of the tokens used for validation, if the source has no such split",
        above=0,
        below=1,
        metavar="F",
        group="data",
    )
    seed: int = option(1337, "seed of the random split", at_least=0, below=2**64, metavar="N", group="data")
    workers: int | None = option(
        None, "number of processes that encode (default: all cores, up to 8)", at_least=1, metavar="N", group="output"
    )
    limit: int | None = option(
        None, "use only the first N documents of each split", at_least=1, metavar="N", group="data"
    )
    shard_tokens: int | None = option(
        None, "divide each .bin into files of N tokens", at_least=1, metavar="N", group="output"
    )
    max_document_tokens: int | None = option(
        None, "drop documents of more than N tokens", at_least=1, metavar="N", group="data"
    )
    near_dedup: bool = option(False, "drop documents that nearly repeat an earlier one (MinHash)", group="data")
    report: bool = option(
        False, "write a page about the data set: counts, lengths, shared text, samples", group="output"
    )
    tokenizer: str | None = option(
        None,
        "a tokenizer: the name that train-tokenizer.py gave it, a tokenizer.json, or a checkpoint (default: gpt2)",
        metavar="NAME",
        group="data",
    )
    force: bool = option(False, "prepare again even if the files are up to date", group="output")

    def __post_init__(self) -> None:
        check_options(self)
        if self.encoding is not None:
            check_encoding(self.encoding)


@dataclass(frozen=True)
class TextOptions(PrepareOptions):
    """The options of the scripts that read text."""

    suffix: tuple[str, ...] = option(
        (), "also read files whose names end like this as text, such as .py", nargs="+", metavar="S", group="data"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_suffixes(self.suffix)


def files_of_input(options: PrepareOptions, suffixes: Sequence[str] = ALL_SUFFIXES) -> list[Path]:
    """The files that --input names, as the options say; see `input_files`."""
    has_suffix_option = isinstance(options, TextOptions)
    extra = parse_suffixes(options.suffix) if isinstance(options, TextOptions) else ()
    return input_files(options.input, suffixes, extra, options.strict, options.encoding, has_suffix_option)


@dataclass(frozen=True)
class Dataset:
    """What a prepare script prepares: `format` is "text" (documents are str), or another of FORMATS (messages)."""

    name: str
    format: str
    source: str
    licence: str
    non_commercial: bool = False


@dataclass(frozen=True)
class Corpus:
    """Documents and their origin.

    `train` and `val` are consumed once and lazily. Without `val`, documents are divided by `val_fraction`, by their
    content and the seed, so that neither order nor duplicates matter (data/splitting.py). `files` are the files that
    the documents come from; `digest` identifies an input that is not files, such as the commit of a repository.
    `skipped` is a Counter that the readers fill, by reason, while the documents are consumed.
    """

    train: Iterable[Document]
    val: Iterable[Document] | None = None
    files: Sequence[Path] = ()
    digest: str | None = None
    skipped: Mapping[str, int] = dataclasses.field(default_factory=Counter)


def prepare(
    dataset: Dataset,
    options: PrepareOptions,
    corpus: Corpus,
    passes: Sequence[Pass] = (),
    *,
    keep: Mapping[str, Any] | None = None,
    batch_characters: int = BATCH_CHARACTERS,
) -> DatasetInfo:
    """Write the data set's files into the output folder and return their description.

    `passes` are applied to each document in order, inside the workers: picklable functions from a document to a
    document, or to None to drop it. `keep` are fields of the description to take over from an earlier preparation.

    Exact duplicates are dropped, and so are train documents that are also in val; with `near_dedup` near duplicates
    too. The first of them is kept, and a given `val` comes before train. A preparation of the same inputs with the
    same options is recognized as finished and not repeated. Either all files appear together at the end, or none.
    Raises UserError for input without documents, an empty split, a full disk, or an output that would replace an input.
    """
    folder = output_folder(options)
    if options.near_dedup:
        require_minhash()
    refuse_to_replace([*corpus.files, *map(Path, options.input)], folder, dataset.name)
    print(f"{dataset.name}: {dataset.source}")
    print(f"licence: {dataset.licence}{' (non-commercial use only)' if dataset.non_commercial else ''}")
    tokenizer = open_tokenizer(options.tokenizer or "gpt2", folder)
    wanted = _describe(dataset, options, corpus, tokenizer)
    with FileLock(folder / f".{dataset.name}.lock", f"data set {dataset.name} in {folder}"):
        earlier = earlier_info(folder, dataset.name)
        if options.report:
            refuse_to_replace_page(folder, dataset.name, earlier)
        if not options.force and (finished := finished_info(folder, wanted)):
            keep_tokenizer(folder, tokenizer := dataclasses.replace(tokenizer, name=finished.tokenizer))
            print(f"{dataset.name} is already prepared in {folder}; --force prepares it again")
            info = _with_report(folder, finished, tokenizer) if options.report else finished
        else:
            _require_space(folder, dataset.name, options, corpus.files)
            keep_tokenizer(folder, tokenizer)
            with atomic_files(folder, dataset.name) as staging:
                worker = _worker(wanted, options, passes, tokenizer)
                splits, report = _write_splits(staging, wanted, options, corpus, worker, batch_characters)
                info = dataclasses.replace(wanted, **{"splits": splits, "report": report, **(keep or {})})
                if options.report:
                    info = write_report(staging, staging, info, tokenizer)
                _write_info(staging, info)
            remove_leftovers(folder, earlier, info)
    _print_totals(info)
    return info


def output_folder(options: PrepareOptions) -> Path:
    """The folder for the prepared files, created if it is missing."""
    return make_folder(Path(options.output_dir) if options.output_dir else DATA_FOLDER)


def _describe(dataset: Dataset, options: PrepareOptions, corpus: Corpus, tokenizer: Tokenizer) -> DatasetInfo:
    """The description of the data set before it is prepared, which identifies a finished preparation."""
    return DatasetInfo(
        **dataclasses.asdict(dataset),
        tokenizer=tokenizer.name,
        n_vocab=tokenizer.n_vocab,
        tokenizer_digest=tokenizer.digest,
        dtype="uint16",
        seed=options.seed,
        options=_recorded_options(options),
        input_digest=corpus.digest or digest_of_files(corpus.files),
    )


def _recorded_options(options: PrepareOptions) -> dict[str, Any]:
    """The options that decide what the files contain; seed, tokenizer and input are recorded on their own."""
    without = {"input", "encoding", "strict", "suffix", "output_dir", "workers", "report", "tokenizer", "force", "seed"}
    chosen = {name: value for name, value in dataclasses.asdict(options).items() if name not in without}
    return {**chosen, "pipeline": PIPELINE_VERSION}


def _write_info(staging: Path, info: DatasetInfo) -> None:
    with staged_file(staging / f"{info.name}.json") as file:
        file.write(info_bytes(info))


def _with_report(folder: Path, info: DatasetInfo, tokenizer: Tokenizer) -> DatasetInfo:
    """The description of a finished preparation, after writing its page if that is missing."""
    if info.report_files and all((folder / file).is_file() for file in info.report_files):
        return info
    with atomic_files(folder, info.name) as staging:
        info = write_report(folder, staging, info, tokenizer)
        _write_info(staging, info)
    return info


def _require_space(folder: Path, name: str, options: PrepareOptions, files: Sequence[Path]) -> None:
    """Raise UserError early if the output will certainly not fit.

    The output is a copy of the text, and about 2 bytes of ids per 4 bytes of text. Compressed text needs at least as
    much. It is not known how much of a file with records or an archive is text; a quarter is assumed.
    """
    if options.limit is None:
        sizes = (file.stat().st_size * (1 if is_text(file) else 0.25) for file in files)
        require_free_space(folder, int(1.5 * sum(sizes)), f"preparing {name}")


# --- the splits ---


def _worker(wanted: DatasetInfo, options: PrepareOptions, passes: Sequence[Pass], tokenizer: Tokenizer) -> Worker:
    return Worker(
        wanted.format, tuple(passes), options.seed, options.max_document_tokens, options.near_dedup, tokenizer
    )


def _write_splits(
    staging: Path,
    wanted: DatasetInfo,
    options: PrepareOptions,
    corpus: Corpus,
    worker: Worker,
    batch_characters: int,
) -> tuple[dict[str, SplitInfo], dict[str, int]]:
    """Write both splits' files into `staging`; returns their entries for the .json, and its report."""
    n_workers = options.workers or min(n_cores(), MAX_DEFAULT_WORKERS)
    counts: Counter = Counter()
    with contextlib.ExitStack() as stack:
        # disable=None: a bar on a terminal only, so that a pipe's stderr contains nothing but errors
        total = _total_bytes(options, corpus.files)
        bar = stack.enter_context(tqdm(total=total, desc=wanted.name, unit="B", unit_scale=True, disable=None))
        writers = {
            split: stack.enter_context(SplitWriter(text_path(staging, wanted, split), options.shard_tokens))
            for split in SPLITS
        }
        deduplicator = Deduplicator(counts, options.near_dedup)

        def encoded(source: Iterable[Document]) -> Iterator[Encoded]:
            limited = itertools.islice(source, options.limit)
            with contextlib.closing(encoded_batches(limited, worker, n_workers, batch_characters)) as stream:
                for batch in stream:
                    counts.update(batch.counts)
                    bar.update(batch.read_characters)
                    yield batch

        if corpus.val is None:
            for batch, in_val in with_split(encoded(corpus.train), options.val_fraction):
                new = deduplicator.find_new(batch)
                writers["val"].write(batch.select(new & in_val))
                writers["train"].write(batch.select(new & ~in_val))
        else:
            for batch in encoded(corpus.val):
                writers["val"].write(batch.select(deduplicator.find_new(batch)))
            deduplicator.begin_train()
            for batch in encoded(corpus.train):
                writers["train"].write(batch.select(deduplicator.find_new(batch)))
    splits = {split: writer.info() for split, writer in writers.items()}
    if corpus.val is None:
        splits = _divided_by_tokens(staging, dataclasses.replace(wanted, splits=splits), options, worker, counts)
    _require_documents(wanted, options, splits, counts, corpus)
    counts["read"] += n_dropped(corpus.skipped)
    return splits, dict(sorted(counts.items())) | dict(sorted(corpus.skipped.items()))


def _divided_by_tokens(
    staging: Path, info: DatasetInfo, options: PrepareOptions, worker: Worker, counts: Counter
) -> dict[str, SplitInfo]:
    """The splits of `info`, divided again if validation has too few or too many tokens; warns if it still does."""
    splits = dict(info.splits)
    n_documents = sum(split.documents or 0 for split in splits.values())
    if not n_documents or _is_fair(splits, options):
        return splits
    if again := redivide(staging, info, worker, options.val_fraction, options.shard_tokens):
        splits, is_cut = again
        counts.update({DIVIDED: 1} if is_cut else {})
    if not _is_fair(splits, options) and all(split.documents for split in splits.values()):
        share = splits["val"].tokens / sum(split.tokens for split in splits.values())
        short = {
            "text": "short texts and words",
            "chat": "conversations of fewer than 10 questions",
            "label": "labelled answers",
        }
        print(
            f"warning: validation holds {share:.1%} of the tokens, not {options.val_fraction:.1%}, because there are "
            f"only {n_documents:,} documents and {short.get(info.format, 'pairs')} are not cut; "
            "add documents, or change --val_fraction"
        )
    return splits


def _is_fair(splits: Mapping[str, SplitInfo], options: PrepareOptions) -> bool:
    return is_fair(splits["val"].tokens, sum(split.tokens for split in splits.values()), options.val_fraction)


def _total_bytes(options: PrepareOptions, files: Sequence[Path]) -> int | None:
    """The number of bytes that will be read, or None if it is unknown."""
    is_plain = all(is_text(file) and split_suffix(file)[1] is None for file in files)
    return sum(file.stat().st_size for file in files) if files and is_plain and options.limit is None else None


def _require_documents(
    wanted: DatasetInfo,
    options: PrepareOptions,
    splits: Mapping[str, SplitInfo],
    counts: Counter,
    corpus: Corpus,
) -> None:
    """Raise UserError, with the remedy, if a split has no documents."""
    where = ", ".join(map(str, corpus.files)) or wanted.source
    n_train, n_val = (splits[split].documents or 0 for split in SPLITS)
    reasons = reasons_in_words(counts + Counter(corpus.skipped))
    if not counts["read"]:
        found = f" ({reasons})" if reasons else ""
        raise UserError(f"no document found in {where}{found}; use --input with a file that contains some")
    if not n_train and not n_val:
        raise UserError(
            f"all {counts['read']:,} documents of {where} are empty or too long ({reasons}); use --input with a "
            "file that contains text"
        )
    if corpus.val is not None and not n_train:
        raise UserError(
            f"no training document of {where} is left, because all are empty or also in the validation file; use "
            "--input with a train file that contains other documents"
        )
    if corpus.val is not None and not n_val:
        raise UserError("the validation file has no documents; leave it out, and the train file will be divided")
    if not n_train or not n_val:
        raise UserError(
            f"{where} has {n_train + n_val:,} distinct documents, too few to divide into train and validation with "
            f"--val_fraction {options.val_fraction}; add documents or change --val_fraction"
        )


def _print_totals(info: DatasetInfo) -> None:
    report = info.report or {}
    if "read" in report:
        print(f"  read: {report['read']:,}, kept: {report['read'] - n_dropped(report):,}")
    for note, count in report.items():
        if count and note != "read":
            print(f"  {note}: {count:,}")
    for split in SPLITS:
        totals = info.splits[split]
        first, last = totals.files[0].file, totals.files[-1].file
        names = first if first == last else f"{first} to {last}"
        print(f"{split}: {totals.documents:,} documents, {totals.tokens:,} tokens in {names}")
