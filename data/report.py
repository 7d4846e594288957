"""A page about a prepared data set: counts, lengths, tokens saved, text shared with validation, samples.

`--report` of every prepare script writes it beside the data: `story.md` and its picture `story-lengths.png`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from data.dedup import shared_ngrams
from data.prepared import (
    TEXT_END,
    base_encoding,
    control_ids,
    read_document_line,
    read_ids,
    read_prepared,
    text_path,
    writing,
)
from setup_tokenizer import encode_documents, get_base_tokenizer, get_extended_tokenizer, render_chat

SAMPLES = 10
SAMPLE_CHARACTERS = 1500
MEASURED_CHARACTERS = 20_000_000
SPLITS = ("train", "val")
TOTALS = ("documents", "tokens", "text_bytes")

# Characters that a terminal or a browser obeys rather than shows: controls, line separators, writing directions.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def write_report(folder: Path, staging: Path, description: Mapping) -> dict:
    """Write the page and its picture about the files in `folder` into `staging`; return what the description gains.

    Reads the prepared files only. Raises UserError where they are damaged or the disk is full.
    """
    name = description["name"]
    control = control_ids(get_extended_tokenizer(base_encoding(description)))
    shared = shared_ngrams(*(read_ids(folder, description, split) for split in SPLITS), control)
    lengths = {split: document_lengths(folder, description, split) for split in SPLITS}
    picture = f"{name}-lengths.png"
    with writing(staging / picture) as file:
        file.write(draw_lengths(lengths, name, documents_word(description)))
    with writing(staging / f"{name}.md") as file:
        file.write(page(folder, description, shared, lengths, picture).encode())
    return {"report": {**description["report"], **shared}, "report_files": [f"{name}.md", picture]}


def page(
    folder: Path, description: Mapping, shared: Mapping[str, int], lengths: Mapping[str, np.ndarray], picture: str
) -> str:
    """The page in Markdown; `shared` comes from `shared_ngrams`."""
    licence = description["licence"] + (" (non-commercial use only)" if description["non_commercial"] else "")
    documents = documents_word(description)
    totals = [(split, *(description["splits"][split][key] for key in TOTALS)) for split in SPLITS]
    quantiles = [(split, *np.percentile(lengths[split], [0, 5, 50, 95, 100]).astype(int)) for split in SPLITS]
    passes = sorted((what, count) for what, count in description["report"].items() if what not in shared)
    options = {key: value for key, value in description["options"].items() if value not in (None, False)}
    options = {"seed": description["seed"], **options}
    parts = [
        f"# {as_text(description['name'])}",
        f"Source: {as_text(description['source'])}. Licence: {as_text(licence)}.",
        f"Prepared with {as_text(', '.join(f'{key} {value}' for key, value in options.items()))}.",
        table(("split", documents, "tokens", "bytes of text"), totals),
        "## What each pass did",
        table(("what", documents), passes),
        "## Text that train and validation share",
        "An n-gram is n tokens in a row within one document or message.",
        table(("what", "count"), shared.items()),
        f"## Lengths\n\n![Lengths of the {documents}]({picture})",
        table(("tokens of", "shortest", "5 %", "median", "95 %", "longest"), quantiles),
        f"## Tokens\n\n{token_efficiency(folder, description)}",
        f"## Samples\n\nUp to {SAMPLES} of the train {documents}, drawn at random.",
        *(fenced(sample) for sample in draw_samples(folder, description)),
    ]
    return "\n\n".join(parts) + "\n"


def documents_word(description: Mapping) -> str:
    """What the documents of a data set are called."""
    return "conversations" if description["format"] == "chat" else "documents"


# --- pieces of Markdown ---


def table(header: Iterable[str], rows: Iterable[tuple]) -> str:
    """A table; numbers stand at the right, and their thousands are set apart."""
    rows = [tuple(f"{cell:,}" if isinstance(cell, int | np.integer) else as_text(cell) for cell in row) for row in rows]
    header = tuple(map(as_text, header))
    rule = ("---", *("---:" for _ in header[1:]))
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def as_text(text: str) -> str:
    r"""Text on one line in which Markdown finds nothing to obey.

    >>> as_text("a|b *c*")
    'a\\|b \\*c\\*'
    """
    text = _shown(text).replace("\n", " ")
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", text)


def fenced(text: str) -> str:
    """Text as a block of code, whose fence is longer than any that the text holds."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{_shown(text)}\n{fence}"


def _shown(text: str) -> str:
    """Text in which characters that would be obeyed stand as escapes."""
    return _OBEYED.sub(lambda match: f"\\u{ord(match[0]):04x}", text.replace("\r\n", "\n"))


# --- lengths ---


def document_lengths(folder: Path, description: Mapping, split: str) -> np.ndarray:
    """The number of tokens of each document, without <|endoftext|>: 4 bytes of memory a document."""
    parts = [(n_tokens - 1).astype(np.uint32) for _, n_tokens in read_ids(folder, description, split)]
    return np.concatenate(parts)


def draw_lengths(lengths: Mapping[str, np.ndarray], title: str, documents: str = "documents") -> bytes:
    """A PNG of the histogram of the documents' lengths, one line a split."""
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


def token_efficiency(folder: Path, description: Mapping) -> str:
    """A sentence: bytes of text a token, and for conversations what the extended tokenizer saves."""
    train = description["splits"]["train"]
    per_token = f"{train['text_bytes'] / train['tokens']:.2f} bytes of text a token in train."
    if description["format"] != "chat":
        return f"{per_token} The base tokenizer makes the same tokens, for plain text holds no control tokens."
    n_documents, n_base, n_extended = count_tokens(read_prepared(folder, description, "train"))
    return (
        f"{per_token} The first {n_documents:,} train conversations take {n_base:,} tokens of the base tokenizer, "
        f"which spells `<|im_start|>` and `<|im_end|>` out, and {n_extended:,} of the extended one: "
        f"{1 - n_extended / n_base:.1%} fewer."
    )


def count_tokens(
    conversations: Iterable[list[dict]], max_characters: int = MEASURED_CHARACTERS
) -> tuple[int, int, int]:
    """(conversations, base tokens, extended tokens) of ChatML with `<|endoftext|>`, up to `max_characters` of text."""
    base = get_base_tokenizer()
    n_documents = n_base = n_extended = n_characters = 0
    for messages in conversations:
        text = render_chat(messages)
        n_documents += 1
        n_base += len(base.encode_ordinary(text)) + 1  # <|endoftext|> is one token in both
        n_extended += len(encode_documents([messages]))
        n_characters += len(text)
        if n_characters >= max_characters:
            break
    return n_documents, n_base, n_extended


# --- samples ---


def draw_samples(folder: Path, description: Mapping) -> list[str]:
    """Up to ten train documents as text, in the order in which they stand; long ones are cut.

    A document is drawn by a random place in the file, so that the file need not be read. Where a few long documents
    take nearly all places, the first ones of the file make up the number.
    """
    path, format = text_path(folder, description, "train"), description["format"]
    end = b"\n" if format == "chat" else TEXT_END.encode()
    found: dict[int, bytes] = {}
    with path.open("rb") as file:
        for place in np.random.default_rng(description["seed"]).integers(path.stat().st_size, size=4 * SAMPLES):
            file.seek(place)
            _read_past(file, end)
            _read_into(found, file, end)
        file.seek(0)
        while _read_into(found, file, end):
            pass
    documents = [read_document_line(found[start], format) for start in sorted(found)]
    texts = [document if isinstance(document, str) else render_chat(document).rstrip("\n") for document in documents]
    return [text if len(text) <= SAMPLE_CHARACTERS else f"{text[:SAMPLE_CHARACTERS]} [...]" for text in texts]


def _read_into(found: dict[int, bytes], file: io.BufferedReader, end: bytes) -> bool:
    """Add the document where the file stands, by its place; False at the file's end, and when there are enough."""
    start = file.tell()
    line = _read_past(file, end) if len(found) < SAMPLES else b""
    if line:
        found[start] = line
    return bool(line)


def _read_past(file: io.BufferedReader, end: bytes) -> bytes:
    """The file's bytes from where it stands to the next `end`, that included; all of them where there is none."""
    found = bytearray()
    while line := file.readline():
        found += line
        if found.endswith(end):
            break
    return bytes(found)
