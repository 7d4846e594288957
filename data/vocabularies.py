"""The tokenizers of data sets: found by name or file, and stored next to the data as `<name>-tokenizer.json`."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

from common.cli import UserError
from common.files import atomic_write
from common.tokenizer_json import tokenizer_json
from setup_tokenizer import GPT2, GPT2_NAMES, TOKENIZER_NAME, Tokenizer, parse_tokenizer

DATA_FOLDER = Path(__file__).resolve().parent
TOKENIZER_SUFFIX = "-tokenizer.json"


def tokenizer_path(folder: Path, name: str) -> Path:
    """The file of the tokenizer `name`."""
    return folder / f"{name}{TOKENIZER_SUFFIX}"


def open_tokenizer(word: str, folder: Path) -> Tokenizer:
    """The tokenizer that --tokenizer names: "gpt2", a name, a file in the layout of tokenizer.json, or a checkpoint.

    A name is looked up in `folder`, then in the project's data folder. A model's folder means its tokenizer.json.
    Raises UserError if there is no such tokenizer, or if it would have a name of GPT-2's.
    """
    if word in GPT2_NAMES:
        return GPT2
    if word.endswith(".pt"):
        return _of_checkpoint(re.sub(r"(\.pt)\+.*", r"\1", word), folder)  # of BASE+ADAPTER the base
    if word.endswith(".json") or "/" in word:
        path = Path(word, "tokenizer.json") if Path(word).is_dir() else Path(word)
        tokenizer = _read(path, name_of(path))
        if name_of(path) in GPT2_NAMES and tokenizer != GPT2:
            raise UserError(
                f"{path} would be called {name_of(path)}, which is the name of GPT-2's own tokenizer; copy it to "
                f"another name: cp {path} own-tokenizer.json"
            )
        return tokenizer
    for data_folder in (folder, DATA_FOLDER):
        if (path := tokenizer_path(data_folder, word)).is_file():
            return _read(path, word)
    if Path(word, "tokenizer.json").is_file():
        return open_tokenizer(f"{word}/tokenizer.json", folder)
    paths = [*folder.glob(f"*{TOKENIZER_SUFFIX}"), *DATA_FOLDER.glob(f"*{TOKENIZER_SUFFIX}")]
    known = sorted({path.name.removesuffix(TOKENIZER_SUFFIX) for path in paths})
    others = f" (there are gpt2, {', '.join(known)})" if known else ""
    name = word if name_of(Path(word)) == word else "NAME"  # which it would have to be called
    raise UserError(
        f"the tokenizer {word!r} is not in {folder}{others}; train one with: "
        f"python data/train-tokenizer.py --name {name} --input FILE"
    )


def _of_checkpoint(word: str, folder: Path) -> Tokenizer:
    """The tokenizer in a checkpoint of train.py.

    Its digest becomes part of its name if `folder` has another tokenizer of that name, or if no file can have it.
    """
    from common.checkpoint import read_info  # imports torch

    tokenizer = Tokenizer.from_info(read_info(word), word)
    if tokenizer == GPT2:
        return GPT2
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", tokenizer.name).strip("_-") or "own"
    is_free = name == tokenizer.name and name not in GPT2_NAMES
    path = tokenizer_path(folder, name)
    if is_free and (not path.is_file() or _read(path, name) == tokenizer):
        return tokenizer
    return dataclasses.replace(tokenizer, name=f"{name}-{tokenizer.digest:.8}")


def name_of(path: Path) -> str:
    """The name of the tokenizer in a file: the file's own or, for tokenizer.json, its folder's.

    >>> name_of(Path("data/tales-tokenizer.json")), name_of(Path("my-model/tokenizer.json"))
    ('tales', 'my-model')
    """
    stem = path.name.removesuffix(".json").removesuffix("tokenizer").removesuffix("-") or path.resolve().parent.name
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_-") or "own"


def tokenizer_of(folder: Path, dataset: str, name: str, digest: str | None, command: str) -> Tokenizer:
    """The tokenizer with which a data set in `folder` was prepared; `command` prepares it again.

    Raises UserError if its file is missing or contains another vocabulary.
    """
    if name == TOKENIZER_NAME and digest is None:
        return GPT2
    path = tokenizer_path(folder, name)
    if not path.is_file():
        raise UserError(
            f"{path}, the tokenizer of {dataset}, not found; copy it there, or prepare the data again with: "
            f"{command} --tokenizer FILE"
        )
    tokenizer = _read(path, name)
    if tokenizer.digest != digest:
        raise UserError(
            f"{path} is not the vocabulary with which {dataset} was prepared; prepare the data again with: "
            f"{command} --tokenizer {name}"
        )
    return tokenizer


def is_other_tokenizer(folder: Path, name: str, digest: str) -> bool:
    """Whether the file of the tokenizer `name` contains another vocabulary; False if there is no file."""
    path = tokenizer_path(folder, name)
    return path.is_file() and _read(path, name).digest != digest


def keep_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Store a tokenizer next to the data that is prepared with it, unless it is there already or GPT-2's.

    Raises UserError if the file of that name contains another vocabulary.
    """
    if tokenizer.vocabulary is None:
        return
    path = tokenizer_path(folder, tokenizer.name)
    if path.is_file():
        if _read(path, tokenizer.name).digest != tokenizer.digest:
            raise UserError(f"{path} contains another vocabulary; rename the file that --tokenizer names")
        return
    content = tokenizer_json(tokenizer.vocabulary, tokenizer.special_tokens)
    with atomic_write(path) as file:
        file.write(json.dumps(content, ensure_ascii=False, indent=1).encode() + b"\n")


def _read(path: Path, name: str) -> Tokenizer:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path} not found; pass a name, a tokenizer.json or a checkpoint with --tokenizer") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); run: chmod u+r {path}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text, so not a tokenizer.json; use another file") from error
    return parse_tokenizer(name, text, str(path))
