"""The description of a prepared data set, data/<name>.json, and how a prepared data set is opened.

    streams, info = open_dataset(Path("data"), "story")
    streams["train"].read(0, 10), info.format

This module is the only reader and writer of the .json files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.cli import UserError
from common.files import sha256_file
from data.token_stream import TokenStream
from data.vocabularies import TOKENIZER_SUFFIX, tokenizer_of
from setup_tokenizer import GPT2, GPT2_DIGEST, N_VOCAB, TOKENIZER_NAME, control_ids

SPLITS = ("train", "val")
FORMATS = ("text", "chat", "preference", "label")
PREFERENCE_FORMATS = {"preference": "preference pairs", "label": "labelled answers"}  # and what they contain
PREPARE_COMMANDS = {
    "story": "python data/prepare-story.py",
    "dailydialog": "python data/prepare-dailydialog.py",
    "chat": "python data/prepare-chat.py",
    "chitchat": "python data/prepare-chitchat.py",
    "preferences": "python data/prepare-preferences.py",
    "education": "python data/prepare-education.py",
    "fineweb": "python data/prepare-fineweb.py",
    "fineweb-edu": "python data/prepare-fineweb.py --edu",
    "fineweb-text": "python data/prepare-fineweb-text.py",
    "knowledge": "python data/prepare-knowledge.py --api_url http://localhost:11434/v1 --model llama3.2",
}


# --- the description ---


@dataclass(frozen=True)
class FileInfo:
    """One .bin file of a split. `tokens` is None in descriptions that other programs wrote.

    A published shard is used without a copy: `file` is then its path, and its ids of the split are the `tokens` ids
    from `start_byte` on.
    """

    file: str
    sha256: str
    tokens: int | None = None
    start_byte: int = 0

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> FileInfo:
        """Parse a file's entry. Raises ValueError, KeyError or TypeError for anything else."""
        start_byte = _typed(entry.get("start_byte", 0), int)
        return cls(_typed(entry["file"], str), _typed(entry["sha256"], str), entry.get("tokens"), start_byte)

    def to_json(self) -> dict:
        start = {"start_byte": self.start_byte} if self.start_byte else {}
        return _without_none({"file": self.file, **start, "tokens": self.tokens, "sha256": self.sha256})


@dataclass(frozen=True)
class SplitInfo:
    """One split. `text_bytes` are UTF-8 bytes of text, without roles and control tokens.

    `untrained` are the (start, end) positions in the split of answers of weight 0, which are not targets.
    """

    tokens: int
    files: tuple[FileInfo, ...]
    documents: int | None = None
    text_bytes: int | None = None
    untrained: tuple[tuple[int, int], ...] = ()

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> SplitInfo:
        """Parse a split's entry. Raises ValueError, KeyError or TypeError for anything else."""
        files = tuple(FileInfo.from_json(file) for file in _typed(entry["files"], list))
        if not files:
            raise ValueError("a split has no file")
        untrained = tuple((_typed(start, int), _typed(end, int)) for start, end in entry.get("untrained") or ())
        return cls(_typed(entry["tokens"], int), files, entry.get("documents"), entry.get("text_bytes"), untrained)

    def to_json(self) -> dict:
        counts = _without_none({"documents": self.documents, "tokens": self.tokens, "text_bytes": self.text_bytes})
        untrained = {"untrained": [list(span) for span in self.untrained]} if self.untrained else {}
        return {**counts, "files": [file.to_json() for file in self.files], **untrained}


@dataclass(frozen=True)
class DatasetInfo:
    """What `<name>.json` says about a prepared data set.

    `format` is "text" (documents are texts), "chat" (documents are lists of messages), "preference" (documents are
    conversations that end with a chosen and a rejected answer) or "label" (one of the two is empty). Fields that are
    None are absent from the file; `extra` holds the entries that this version does not know.
    """

    name: str
    format: str
    source: str | None = None
    licence: str | None = None
    non_commercial: bool = False
    tokenizer: str = TOKENIZER_NAME
    n_vocab: int = N_VOCAB
    tokenizer_digest: str | None = None  # None for GPT-2's tokenizer
    dtype: str | None = None
    seed: int | None = None
    options: Mapping[str, Any] | None = None  # those that decide what the files contain
    input_digest: str | None = None  # identifies the input, to recognize a finished preparation
    splits: Mapping[str, SplitInfo] = field(default_factory=dict)
    report: Mapping[str, int] | None = None  # what each pass changed, dropped or found
    report_files: tuple[str, ...] | None = None
    yardstick: str | None = None  # published results to compare the validation loss with, if there are any
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def endoftext(self) -> int:
        """The id of `<|endoftext|>`."""
        return control_ids(self.n_vocab)[0]

    @property
    def has_text(self) -> bool:
        """Whether the documents are also kept as text, which published shards are not."""
        return not any(file.start_byte for split in self.splits.values() for file in split.files)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> DatasetInfo:
        """Parse the .json. Raises ValueError, KeyError or TypeError if an entry that training needs is wrong."""
        known = {each.name for each in dataclasses.fields(cls)} - {"extra"}
        values = {key: value for key, value in _typed(content, dict).items() if key in known}
        for key, kind in (("name", str), ("format", str), ("tokenizer", str), ("n_vocab", int), ("splits", dict)):
            _typed(values[key], kind)
        if values.get("tokenizer_digest") == GPT2_DIGEST:  # prepared with a copy of GPT-2's vocabulary
            values |= {"tokenizer": TOKENIZER_NAME, "tokenizer_digest": None}
        if values["format"] not in FORMATS:
            raise ValueError(f"unknown format {values['format']!r}")
        values["splits"] = {split: SplitInfo.from_json(values["splits"][split]) for split in SPLITS}
        if values.get("report_files") is not None:
            values["report_files"] = tuple(values["report_files"])
        return cls(**values, extra={key: value for key, value in content.items() if key not in known})

    def to_json(self) -> dict:
        """The content of the .json file; a data set's entry in a checkpoint has the same layout."""
        values: dict[str, Any] = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        extra = values.pop("extra")
        values["splits"] = {split: info.to_json() for split, info in self.splits.items()}
        values["report_files"] = list(self.report_files) if self.report_files is not None else None
        if self.options is None:  # not written by our prepare scripts, which always record these two
            values["non_commercial"] = self.non_commercial or None
            return {**_without_none(values), **extra}
        return {key: value for key, value in values.items() if value is not None or key == "input_digest"} | dict(extra)


def _typed(value: Any, kind: type) -> Any:
    """`value`, which must be of `kind`. Raises TypeError."""
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind.__name__}, found {type(value).__name__}")
    return value


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def read_info(folder: Path, name: str) -> DatasetInfo | None:
    """The description in `<name>.json`, or None if there is no such file. Raises UserError for a damaged one."""
    path = Path(folder) / f"{name}.json"
    if not path.is_file():
        return None
    try:
        return DatasetInfo.from_json(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); run: chmod u+r {path}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged; prepare the data again with: {prepare_command(name)}") from error


def info_bytes(info: DatasetInfo) -> bytes:
    """The bytes of the .json file."""
    return json.dumps(info.to_json(), ensure_ascii=False, indent=1).encode() + b"\n"


# --- in a checkpoint ---


def data_parts(data: Mapping[str, Any]) -> list[dict]:
    """The .json of each data set that a checkpoint was trained on: one, or one for each part of a mixture."""
    return data.get("parts") or [dict(data)]


def trained_on(info: Mapping[str, Any]) -> dict[str, dict]:
    """The data sets that a checkpoint was trained on, by name, each with the .json that its `info` holds."""
    return dict(zip(info["dataset"].split("+"), data_parts(info.get("data") or {}), strict=False))


# --- opening ---


def open_dataset(data_dir: Path, name: str) -> tuple[dict[str, TokenStream], DatasetInfo]:
    """The "train" and "val" streams of a prepared data set, checked, and its description.

    Raises UserError if a file is missing, empty or of odd length, contains ids outside the vocabulary, or does not
    match the .json.
    """
    info = read_info(data_dir, name)
    tokenizer = GPT2
    if info:
        tokenizer = tokenizer_of(data_dir, name, info.tokenizer, info.tokenizer_digest, prepare_command(name))
    streams = {}
    for split in SPLITS:
        paths = _bin_paths(data_dir, name, split, info)
        streams[split] = TokenStream(paths, tokenizer, parts=_parts(info, split))
    for split, stream in streams.items():
        stream.check_ids(prepare_command(name, info))
        if info and info.splits[split].untrained:
            stream.untrained = np.array(info.splits[split].untrained, dtype=np.int64)
    return streams, info or _describe_bins(streams, name)


def _describe_bins(streams: Mapping[str, TokenStream], name: str) -> DatasetInfo:
    """The description of .bin files without a .json."""
    kind = "chat" if len(streams["val"].positions_of(GPT2.im_start)) else "text"
    print(f"{name}: there is no {name}.json; the .bin files are read as {kind} in {TOKENIZER_NAME}")
    splits = {}
    for split, stream in streams.items():
        files = (FileInfo(path.name, sha256_file(path), path.stat().st_size // 2) for path in stream.paths)
        splits[split] = SplitInfo(len(stream), tuple(files))
    return DatasetInfo(name, kind, splits=splits)


def _parts(info: DatasetInfo | None, split: str) -> list[tuple[int, int]] | None:
    """The first byte and the number of ids in each file of published shards; None if the files contain only ids."""
    if info is None or info.has_text:
        return None
    return [(entry.start_byte, entry.tokens or 0) for entry in info.splits[split].files]


def _bin_paths(data_dir: Path, name: str, split: str, info: DatasetInfo | None) -> list[Path]:
    """The .bin files of a split, after checking their size and, if there is a .json, their sha256."""
    files = info.splits[split].files if info else (FileInfo(f"{name}-{split}.bin", sha256=""),)
    paths = [data_dir / entry.file for entry in files]
    command = prepare_command(name, info)
    for path, entry in zip(paths, files, strict=True):
        if not path.is_file():
            raise UserError(f"{path} not found; run: {command}{_already_prepared(data_dir)}")
        size = path.stat().st_size
        if size == 0:
            raise UserError(f"{path} is empty; prepare the data again with: {command}")
        if size % 2:
            raise UserError(f"{path} has an odd number of bytes, so it is not uint16; prepare it again with: {command}")
        if info and sha256_file(path) != entry.sha256:
            raise UserError(f"{path} does not match the sha256 in {name}.json; prepare the data again with: {command}")
    return paths


def short_splits(streams: Mapping[str, TokenStream], block_size: int) -> list[str]:
    """A sentence about each split that is shorter than one row, which padding then fills.

    Raises UserError for a split of a single token, because no token predicts it.
    """
    sentences = []
    for split, stream in streams.items():
        if len(stream) < 2:
            raise UserError(f"{stream.paths[0]} contains a single token, so there is nothing to predict; add text")
        if len(stream) < block_size + 1:
            remark = ", so the validation loss is only a rough estimate" if split == "val" else ""
            sentences.append(
                f"{stream.paths[0].name} contains {len(stream)} tokens, too few for a row of {block_size} and its last "
                f"target; the rest of the row is padding{remark}"
            )
    return sentences


def check_name(name: str, what: str = "data set") -> None:
    """Raise ValueError unless `name` can name a data set, or another thing, on the command line and in file names.

    The files of a data set must not replace those of a tokenizer, `<name>-tokenizer.json`.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ValueError(
            f"the name of a {what} consists of letters, digits, - and _ and begins with a letter or a digit; "
            f"{name!r} does not"
        )
    if what == "data set" and f"{name}.json".endswith(TOKENIZER_SUFFIX):
        raise ValueError(f"{name}.json would be the file of a tokenizer; use a name that does not end in -tokenizer")


def prepare_command(name: str, info: DatasetInfo | None = None) -> str:
    """The command that prepares a data set; `info` describes an earlier preparation, whose tokenizer is kept."""
    command = PREPARE_COMMANDS.get(name, f"python prepare_with_extended_tokenizer.py --input FILE --name {name}")
    if info is None or info.tokenizer_digest is None:
        return command
    return f"{command} --tokenizer {info.tokenizer}"


def encode_command(name: str, info: DatasetInfo, tokenizer: str, data_dir: str = "data") -> str:
    """The command that encodes a data set in `data_dir` again, with `tokenizer` as the value of --tokenizer.

    `info` describes it. A data set of which only the .bin files are known has to be prepared again. Published ids are
    GPT-2's, so there the text is prepared instead.
    """
    command = prepare_command(name)
    if not info.has_text:
        command = "python data/prepare-fineweb-text.py"
    elif info.source is not None and info.licence is not None:
        command = f"python prepare_with_extended_tokenizer.py --dataset {name}"
    folder = "" if data_dir == "data" else f" --output_dir {shlex.quote(data_dir)}"
    return f"{command}{folder} --tokenizer {shlex.quote(tokenizer)}"


def prepared_datasets(data_dir: Path) -> list[str]:
    """The names of the data sets whose training split is in the data folder, or in published shards elsewhere."""
    names = {path.name.split("-train")[0] for path in data_dir.glob("*-train*.bin")}
    for path in data_dir.glob("*.json"):
        with contextlib.suppress(UserError):  # not a description
            info = read_info(data_dir, path.stem)
            names |= {path.stem} if info and not info.has_text else set()
    return sorted(names)


def _already_prepared(data_dir: Path) -> str:
    found = prepared_datasets(data_dir)
    return f" (already prepared: {', '.join(found)})" if found else " (nothing is prepared yet)"
