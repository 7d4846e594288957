"""Learn the vocabulary of a tokenizer from text, and write it as data/<name>-tokenizer.json.

    texts -> the most frequent pairs -> merges -> tokenizer.json

The merges are learned by Hugging Face's `tokenizers`, which only this module imports. testing_tools/learn_bpe.py shows
in plain Python what happens inside. data/tokenizer_texts.py reads the texts.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiktoken

from common.cli import UserError, check_options, option
from common.files import atomic_write, remove_stale_temporaries
from common.token_patterns import PATTERNS
from common.tokenizer_json import Vocabulary, byte_characters, parse_tokenizer_json, tokenizer_json
from data.dataset import check_name
from data.earlier import digest_of_files, earlier_info
from data.pipeline import DATA_FOLDER
from data.readers.files import ALL_SUFFIXES
from data.readers.inputs import check_encoding, input_files, parse_suffixes
from data.readers.recognize import ReadingOptions, recognize_files
from data.tokenizer_texts import ChosenTexts, bytes_that_fit, survey
from data.vocabularies import tokenizer_path
from setup_tokenizer import ENDOFTEXT, GPT2_NAMES, IM_END, IM_START, encode_text, get_base_tokenizer

CONTROL_TOKENS = (ENDOFTEXT, IM_START, IM_END)  # the last ids, in this order
N_BYTES = 256
MAX_VOCAB_SIZE = 1 << 16  # prepared data stores ids as uint16
MAX_TOKEN_LENGTH = 128  # that of GPT-2's longest token; without a limit, lines of dashes become tokens
MIN_FREQUENCY = 2  # a pair that occurs once says nothing about the language
SLICE_CHARACTERS = 50_000  # tiktoken fails on much longer stretches of white space
N_LONGEST = 10
TOKENIZERS_VERSION = "0.23.3"


@dataclass(frozen=True)
class TrainTokenizerOptions(ReadingOptions):
    """The options of data/train-tokenizer.py."""

    input: tuple[str, ...] = option(
        (), "files and folders with the text to learn from", nargs="+", metavar="PATH", group="data"
    )
    name: str = option("mine", "name of the tokenizer", metavar="NAME", group="output")
    vocab_size: int = option(
        4096,
        "number of ids: 256 bytes, the merges, and 3 control tokens",
        at_least=N_BYTES + len(CONTROL_TOKENS) + 1,
        at_most=MAX_VOCAB_SIZE,
        metavar="N",
        group="tokenizer",
    )
    pattern: str = option(
        "gpt2",
        "how text is cut into pieces: as in GPT-2, or for many scripts, with at most three digits per piece",
        choices=tuple(PATTERNS),
        group="tokenizer",
    )
    max_bytes: int | None = option(
        None,
        "learn from at most N bytes, spread evenly over the input (default: as much as fits into 1 GB of memory)",
        at_least=1,
        metavar="N",
        group="data",
    )
    encoding: str | None = option(
        None, "encoding of the files, such as windows-1252 or utf-16 (default: UTF-8)", metavar="NAME", group="data"
    )
    suffix: tuple[str, ...] = option(
        (), "also read files whose names end like this as text, such as .py", nargs="+", metavar="S", group="data"
    )
    source: str | None = option(
        None, "where the text comes from (default: the names of the files)", metavar="TEXT", group="data"
    )
    licence: str = option("not stated (--licence)", "licence of the text", metavar="TEXT", group="data")
    output_dir: str | None = option(
        None, "folder for the tokenizer (default: the data folder)", metavar="DIR", group="output"
    )
    force: bool = option(False, "replace the tokenizer of this name, even if prepared data uses it", group="output")

    def __post_init__(self) -> None:
        check_options(self)
        if not self.input:
            raise ValueError("--input is missing; name files or folders with text")
        check_name(self.name, "tokenizer")
        if self.name in GPT2_NAMES:
            raise ValueError(f"--name {self.name} is the name of GPT-2's tokenizer; choose another")
        if self.encoding is not None:
            check_encoding(self.encoding)
        parse_suffixes(self.suffix)


def train_tokenizer(options: TrainTokenizerOptions) -> Path:
    """Learn a tokenizer as the options say, write its file and print what it is; returns the file's path.

    Raises UserError if the file exists, if prepared data uses it, and for an input that cannot be read or has too
    little text for the vocabulary.
    """
    _require_tokenizers()
    folder = Path(options.output_dir) if options.output_dir else DATA_FOLDER
    path = tokenizer_path(folder, options.name)
    refuse_to_replace(path, options)
    suffixes = parse_suffixes(options.suffix)
    files = input_files(options.input, ALL_SUFFIXES, suffixes, encoding=options.encoding, has_suffix_option=True)
    files = sorted(files, key=lambda file: (file.name, digest_of_files([file])))  # so that their order does not matter
    found = recognize_files(files, options.input, options.field, options.divide_within_lines, options.me)
    surveyed, pattern = survey(found), PATTERNS[options.pattern]
    max_bytes = options.max_bytes or bytes_that_fit(surveyed.sample, pattern)
    texts = ChosenTexts(found, surveyed, max_bytes)
    vocabulary = learn(texts, pattern, options.vocab_size - len(CONTROL_TOKENS), texts.estimated_n_parts)
    texts.report("--max_bytes" if options.max_bytes else "more might need over 1 GB of memory; --max_bytes allows it")
    if len(vocabulary.tokens) + len(CONTROL_TOKENS) < options.vocab_size:
        raise too_little_text(vocabulary, texts, options)
    files = [recognized.path for recognized in found]
    facts = {
        "name": options.name,
        "digest": vocabulary.digest,
        "pattern": options.pattern,
        "source": options.source or ", ".join(sorted(file.name for file in files)),
        "licence": options.licence,
        "input_digest": digest_of_files(files),
        "text_bytes": texts.n_bytes,
        "trained_with": f"tokenizers {importlib.metadata.version('tokenizers')}",
        **measure(vocabulary, surveyed.sample),
        "longest_tokens": longest_tokens(vocabulary),
    }
    write_tokenizer(path, vocabulary, facts)
    print_summary(path, vocabulary, facts)
    return path


# --- before any work ---


def _require_tokenizers() -> None:
    """Raise UserError unless Hugging Face's tokenizers is installed."""
    try:
        import tokenizers  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"training a tokenizer needs the package tokenizers; run: pip install tokenizers=={TOKENIZERS_VERSION}"
        ) from error


def refuse_to_replace(path: Path, options: TrainTokenizerOptions) -> None:
    """Raise UserError for a folder that is missing, and without --force for a file that exists or data that uses it."""
    if not path.parent.is_dir():
        raise UserError(f"--output_dir {path.parent} does not exist; run: mkdir -p {path.parent}")
    if options.force:
        return
    if users := datasets_using(path.parent, options.name):
        raise UserError(
            f"data prepared in {path.parent} uses a tokenizer {options.name} ({', '.join(users)}) and would not fit "
            "another one; choose another --name, or replace it with --force and prepare that data again"
        )
    if path.exists():
        raise UserError(f"{path} exists; choose another --name, or replace it with --force")


def datasets_using(folder: Path, name: str) -> list[str]:
    """The names of the prepared data sets in `folder` whose ids are those of the tokenizer `name`."""
    found = [path.stem for path in sorted(folder.glob("*.json"))]
    infos = {stem: earlier_info(folder, stem) for stem in found}
    return [stem for stem, info in infos.items() if info is not None and info.tokenizer == name]


# --- learning ---


def learn(texts: Iterable[str], pattern: str, n_tokens: int, n_texts: int | None = None) -> Vocabulary:
    """The 256 bytes and the most frequent merges of the texts, `n_tokens` in all or as many as occur twice.

    The result depends neither on the order of the texts nor on the number of threads: of pairs that are equally
    frequent, the one with the lowest ids is merged. `n_texts` is for the progress bars, which a terminal shows.
    """
    import tokenizers
    from tokenizers.trainers import BpeTrainer

    characters = byte_characters()
    alphabet = sorted(characters, key=lambda byte: characters[byte])  # the order in which the trainer numbers them
    untrained = Vocabulary(pattern, tuple(bytes([byte]) for byte in alphabet))
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(untrained, {})))
    trainer = BpeTrainer(
        vocab_size=n_tokens,
        min_frequency=MIN_FREQUENCY,
        initial_alphabet=list(characters.values()),
        max_token_length=MAX_TOKEN_LENGTH,
        show_progress=sys.stderr is not None and sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer, n_texts)
    return parse_tokenizer_json(tokenizer.to_str(), "the trained tokenizer")


def too_little_text(vocabulary: Vocabulary, texts: ChosenTexts, options: TrainTokenizerOptions) -> UserError:
    """The UserError for texts in which too few pairs occur twice."""
    possible = len(vocabulary.tokens) + len(CONTROL_TOKENS)
    remedy = f"use --vocab_size {possible} at most, or give more text"
    if possible <= N_BYTES + len(CONTROL_TOKENS):
        remedy = "give more text"
    return UserError(
        f"{texts.n_bytes:,} bytes of text are too few for --vocab_size {options.vocab_size}, because only "
        f"{possible - N_BYTES - len(CONTROL_TOKENS):,} merges occur twice; {remedy}"
    )


# --- what was learned ---


def measure(vocabulary: Vocabulary, texts: Sequence[str]) -> dict[str, Any]:
    """Bytes per token of this vocabulary and of GPT-2's on the same texts."""
    enc = tiktoken.Encoding(
        "measured", pat_str=vocabulary.pattern, mergeable_ranks=vocabulary.ranks(), special_tokens={}
    )
    n_bytes = sum(len(text.encode()) for text in texts)
    n_tokens = {
        name: sum(len(encode_text(piece, encoding)) for text in texts for piece in _slices(text))
        for name, encoding in (("own", enc), ("gpt2", get_base_tokenizer()))
    }
    return {
        "measured_bytes": n_bytes,
        "bytes_per_token": round(n_bytes / n_tokens["own"], 4),
        "bytes_per_token_gpt2": round(n_bytes / n_tokens["gpt2"], 4),
    }


def _slices(text: str) -> Iterator[str]:
    for start in range(0, len(text), SLICE_CHARACTERS):
        yield text[start : start + SLICE_CHARACTERS]


def longest_tokens(vocabulary: Vocabulary) -> list[str]:
    """The tokens with the most bytes as text, longest first; of equally long ones, those merged first."""
    tokens = sorted(vocabulary.tokens, key=len, reverse=True)[:N_LONGEST]
    return [token.decode("utf-8", "backslashreplace") for token in tokens]


def write_tokenizer(path: Path, vocabulary: Vocabulary, facts: Mapping[str, Any]) -> None:
    """Write the tokenizer.json, with the control tokens as the last ids."""
    controls = {token: len(vocabulary.tokens) + index for index, token in enumerate(CONTROL_TOKENS)}
    content = tokenizer_json(vocabulary, controls, facts)
    remove_stale_temporaries(path)
    with atomic_write(path, "w", encoding="utf-8", newline="\n") as file:
        json.dump(content, file, ensure_ascii=False, indent=1)
        file.write("\n")


def print_summary(path: Path, vocabulary: Vocabulary, facts: Mapping[str, Any]) -> None:
    """Print what the tokenizer is and how to use it."""
    n_ids = len(vocabulary.tokens) + len(CONTROL_TOKENS)
    print(
        f"{path}: {n_ids:,} ids ({N_BYTES} bytes, {len(vocabulary.tokens) - N_BYTES:,} merges, "
        f"{len(CONTROL_TOKENS)} control tokens), pattern {facts['pattern']}"
    )
    print(f"licence: {facts['licence']}; source: {facts['source']}")
    print(
        f"bytes per token: {facts['bytes_per_token']:.2f}; with GPT-2's 50,257 ids: "
        f"{facts['bytes_per_token_gpt2']:.2f} (on {facts['measured_bytes']:,} bytes of this text)"
    )
    print(f"longest tokens: {', '.join(map(repr, facts['longest_tokens']))}")
    print(f"digest: {facts['digest']}")
    word = facts["name"] if path.parent == DATA_FOLDER else path
    print(f"next: pass --tokenizer {word} to a prepare script")
