"""A page about a prepared data set: counts, lengths, tokens saved, text shared with validation, samples.

Every prepare script writes it with --report: `story.md` and its picture `story-lengths.png`, next to the data.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from data.dataset import SPLITS, DatasetInfo
from data.dedup import shared_ngrams
from data.documents import TEXT_END, Document, read_document_line, read_ids, read_prepared, text_path
from data.encoding import encode_documents
from data.writing import staged_file
from setup_tokenizer import GPT2, Tokenizer, get_base_tokenizer, render_chat

SAMPLES = 10
SAMPLE_CHARACTERS = 1500
MEASURED_CHARACTERS = 20_000_000

# Characters that a terminal or browser acts on instead of showing: controls, line separators, writing directions.
_ACTIVE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def write_report(folder: Path, staging: Path, info: DatasetInfo, tokenizer: Tokenizer = GPT2) -> DatasetInfo:
    """Write a page and a picture about the files in `folder` into `staging`; returns the extended description.

    Reads only the prepared files. Raises UserError if they are damaged or the disk is full.
    """
    shared = shared_ngrams(read_ids(folder, info, "train"), read_ids(folder, info, "val"), tokenizer=tokenizer)
    lengths = {split: document_lengths(folder, info, split) for split in SPLITS}
    picture = f"{info.name}-lengths.png"
    with staged_file(staging / picture) as file:
        file.write(draw_lengths(lengths, info.name, documents_word(info)))
    with staged_file(staging / f"{info.name}.md") as file:
        file.write(page(folder, info, shared, lengths, picture, tokenizer).encode())
    report = {**(info.report or {}), **shared}
    return dataclasses.replace(info, report=report, report_files=(f"{info.name}.md", picture))


def page(
    folder: Path,
    info: DatasetInfo,
    shared: Mapping[str, int],
    lengths: Mapping[str, np.ndarray],
    picture: str,
    tokenizer: Tokenizer,
) -> str:
    """The page in Markdown; `shared` comes from `shared_ngrams`."""
    licence = (info.licence or "") + (" (non-commercial use only)" if info.non_commercial else "")
    documents = documents_word(info)
    splits = [(split, info.splits[split]) for split in SPLITS]
    totals = [(name, split.documents, split.tokens, split.text_bytes) for name, split in splits]
    quantiles = [(split, *np.percentile(lengths[split], [0, 5, 50, 95, 100]).astype(int)) for split in SPLITS]
    passes = sorted((what, count) for what, count in (info.report or {}).items() if what not in shared)
    options = {key: value for key, value in (info.options or {}).items() if value not in (None, False)}
    options = {"seed": info.seed, **options}
    parts = [
        f"# {as_text(info.name)}",
        f"Source: {as_text(info.source or '')}. Licence: {as_text(licence)}.",
        f"Prepared with {as_text(', '.join(f'{key} {value}' for key, value in options.items()))}.",
        table(("split", documents, "tokens", "bytes of text"), totals),
        "## What each pass did",
        table(("what", documents), passes),
        "## Text that train and validation share",
        "An n-gram is n tokens in a row within one document or message.",
        table(("what", "count"), shared.items()),
        f"## Lengths\n\n![Lengths of the {documents}]({picture})",
        table(("tokens of", "shortest", "5 %", "median", "95 %", "longest"), quantiles),
        f"## Tokens\n\n{token_efficiency(folder, info, tokenizer)}",
        f"## Samples\n\nUp to {SAMPLES} of the train {documents}, drawn at random.",
        *(fenced(sample) for sample in draw_samples(folder, info)),
    ]
    return "\n\n".join(parts) + "\n"


def documents_word(info: DatasetInfo) -> str:
    """What the documents of a data set are called."""
    return {"chat": "conversations", "preference": "pairs", "label": "labelled answers"}.get(info.format, "documents")


# --- pieces of Markdown ---


def table(header: Iterable[str], rows: Iterable[tuple]) -> str:
    """A table; numbers are right-aligned, with thousands separators."""
    rows = [tuple(f"{cell:,}" if isinstance(cell, int | np.integer) else as_text(cell) for cell in row) for row in rows]
    header = tuple(map(as_text, header))
    rule = ("---", *("---:" for _ in header[1:]))
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def as_text(text: str) -> str:
    r"""Text on one line, in which all Markdown is escaped.

    >>> as_text("a|b *c*")
    'a\\|b \\*c\\*'
    """
    text = _shown(text).replace("\n", " ")
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", text)


def fenced(text: str) -> str:
    """Text as a code block, whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{_shown(text)}\n{fence}"


def _shown(text: str) -> str:
    """Text in which active characters are shown as escapes."""
    return _ACTIVE.sub(lambda match: f"\\u{ord(match[0]):04x}", text.replace("\r\n", "\n"))


# --- lengths ---


def document_lengths(folder: Path, info: DatasetInfo, split: str) -> np.ndarray:
    """The number of tokens of each document, without <|endoftext|>: 4 bytes of memory per document."""
    parts = [(n_tokens - 1).astype(np.uint32) for _, n_tokens in read_ids(folder, info, split)]
    return np.concatenate(parts)


def draw_lengths(lengths: Mapping[str, np.ndarray], title: str, documents: str = "documents") -> bytes:
    """A histogram of the documents' lengths as a PNG, one line per split."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

    longest = max(int(part.max()) for part in lengths.values())
    shortest = max(1, min(int(part.min()) for part in lengths.values()))
    is_wide = longest > 20 * shortest
    if is_wide:
        bins = np.unique(np.geomspace(shortest, longest + 1, 60).astype(int))
    else:
        bins = np.arange(shortest, longest + 2, max(1, (longest - shortest) // 60))
    figure = Figure(figsize=(8, 4), layout="constrained", dpi=110)
    axes = figure.subplots()
    for (split, part), colour in zip(lengths.items(), ("tab:blue", "tab:orange"), strict=True):
        counts, edges = np.histogram(np.maximum(part, 1), bins=[*bins, longest + 2])
        median = int(np.median(part))
        axes.stairs(
            counts / len(part), edges, color=colour, label=f"{split}: {len(part):,} {documents}, median {median:,}"
        )
        axes.axvline(median, color=colour, linestyle=":", linewidth=1)
    if is_wide:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel(f"length of the {documents} (tokens)")
    axes.set_ylabel(f"share of the {documents}")
    axes.set_title(title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


# --- tokens ---


def token_efficiency(folder: Path, info: DatasetInfo, tokenizer: Tokenizer = GPT2) -> str:
    """A sentence: bytes of text per token, and what the tokenizer saves compared with GPT-2's.

    For GPT-2's extended tokenizer, this is what its control tokens save in conversations.
    """
    train = info.splits["train"]
    per_token = f"{(train.text_bytes or 0) / train.tokens:.2f} bytes of text per token in train."
    if tokenizer != GPT2:
        n_documents, n_gpt2, n_own = count_tokens(read_prepared(folder, info, "train"), tokenizer)
        return (
            f"{per_token} The first {n_documents:,} train {documents_word(info)} take {n_gpt2:,} tokens with GPT-2's "
            f"tokenizer and {n_own:,} with {as_text(tokenizer.name)}."
        )
    if info.format == "text":
        return f"{per_token} The base tokenizer gives the same tokens, because plain text contains no control tokens."
    n_documents, n_base, n_extended = count_tokens(read_prepared(folder, info, "train"))
    return (
        f"{per_token} The first {n_documents:,} train {documents_word(info)} take {n_base:,} tokens with the base "
        f"tokenizer, which spells `<|im_start|>` and `<|im_end|>` out, and {n_extended:,} with the extended one: "
        f"{1 - n_extended / n_base:.1%} fewer."
    )


def count_tokens(documents: Iterable[Document], tokenizer: Tokenizer = GPT2) -> tuple[int, int, int]:
    """(documents, tokens by GPT-2, tokens by `tokenizer`), with `<|endoftext|>`, of the first MEASURED_CHARACTERS.

    GPT-2's tokens are those of its base tokenizer, which spells ChatML's control tokens out.
    """
    base = get_base_tokenizer()
    n_documents = n_base = n_extended = n_characters = 0
    for document in documents:
        text = document if isinstance(document, str) else render_chat(document)
        n_documents += 1
        n_base += len(base.encode_ordinary(text)) + 1  # <|endoftext|> is one token in both
        n_extended += len(encode_documents([document], tokenizer))
        n_characters += len(text)
        if n_characters >= MEASURED_CHARACTERS:
            break
    return n_documents, n_base, n_extended


# --- samples ---


def draw_samples(folder: Path, info: DatasetInfo) -> list[str]:
    """Up to SAMPLES train documents as text, in the order of the file; long ones are cut.

    Documents are drawn by random positions in the file, so that it is not read completely. If a few long documents
    receive nearly all positions, the first ones of the file are added.
    """
    path, format = text_path(folder, info, "train"), info.format
    end = TEXT_END.encode() if format == "text" else b"\n"
    found: dict[int, bytes] = {}
    with path.open("rb") as file:
        for position in np.random.default_rng(info.seed).integers(path.stat().st_size, size=4 * SAMPLES):
            file.seek(position)
            _read_past(file, end)
            _read_into(found, file, end)
        file.seek(0)
        while _read_into(found, file, end):
            pass
    documents = [read_document_line(found[start], format) for start in sorted(found)]
    texts = [document if isinstance(document, str) else render_chat(document).rstrip("\n") for document in documents]
    return [text if len(text) <= SAMPLE_CHARACTERS else f"{text[:SAMPLE_CHARACTERS]} [...]" for text in texts]


def _read_into(found: dict[int, bytes], file: io.BufferedReader, end: bytes) -> bool:
    """Add the document at the file's current position; False at the file's end, or if there are enough documents."""
    start = file.tell()
    line = _read_past(file, end) if len(found) < SAMPLES else b""
    if line:
        found[start] = line
    return bool(line)


def _read_past(file: io.BufferedReader, end: bytes) -> bytes:
    """The file's bytes from the current position through the next `end`, or all of them without one."""
    found = bytearray()
    while line := file.readline():
        found += line
        if found.endswith(end):
            break
    return bytes(found)
