"""The documents of a prepared data set as text: how they are stored next to the ids, and how they are read back.

    info = read_info(folder, "story")
    for document in read_prepared(folder, info, "val"): ...

Texts are in <name>-<split>.txt, each followed by a line `<|endoftext|>`; conversations are in <name>-<split>.jsonl,
one {"messages": [...]} per line. Preference pairs have one {"prompt": [...], "chosen": [...], "rejected": [...]} per
line, which is TRL's layout; in memory a pair is a conversation that ends with both answers. Labelled answers have
{"prompt": [...], "completion": [...], "label": true or false}; in memory they are pairs whose other answer is empty.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from common.cli import UserError
from data.dataset import DatasetInfo
from setup_tokenizer import ENDOFTEXT

Document = str | list[dict]

TEXT_END = f"\n{ENDOFTEXT}\n"  # ends each document of a .txt
READ_TOKENS = 1 << 20

_SEPARATOR_LINE = re.compile(r"^(\\*<\|endoftext\|>)$", re.MULTILINE)
_ESCAPED_SEPARATOR_LINE = re.compile(r"^\\(\\*<\|endoftext\|>)$", re.MULTILINE)


def document_line(document: Document) -> bytes:
    """A text as stored in the .txt, or a conversation as stored in the .jsonl, including the final line feed.

    A line of a text that spells the separator is escaped with a backslash.
    """
    if is_pair(document):
        *prompt, chosen, rejected = (
            {"role": message["role"], "content": message["content"]} for message in cast(list[dict], document)
        )
        if chosen["content"] and rejected["content"]:
            record: dict = {"prompt": prompt, "chosen": [chosen], "rejected": [rejected]}
        else:
            is_good = bool(chosen["content"])
            record = {"prompt": prompt, "completion": [chosen if is_good else rejected], "label": is_good}
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    if not isinstance(document, str):
        messages = [
            {"role": message["role"], "content": message["content"], **({"weight": 0} if is_untrained(message) else {})}
            for message in document
        ]
        return json.dumps({"messages": messages}, ensure_ascii=False).encode() + b"\n"
    if ENDOFTEXT in document:
        document = _SEPARATOR_LINE.sub(r"\\\1", document)
    return f"{document}{TEXT_END}".encode()


def is_pair(document: Document) -> bool:
    """Whether a document is a preference pair, or a labelled answer: its last two messages are the chosen and the
    rejected answer."""
    return not isinstance(document, str) and bool(document) and "preferred" in document[-1]


def is_untrained(message: Mapping) -> bool:
    """Whether a message is an answer of weight 0, which is context for what follows and not a target."""
    return message.get("weight") == 0


def read_document_line(line: bytes, format: str) -> Document:
    """The document that `document_line` stored as `line`. Raises ValueError, KeyError or TypeError for other bytes."""
    if format == "chat":
        return json.loads(line)["messages"]
    if format == "preference":
        pair = json.loads(line)
        return _pair_in_memory(pair["prompt"], pair["chosen"][0], pair["rejected"][0])
    if format == "label":
        labelled = json.loads(line)
        answer, empty = labelled["completion"][0], {"role": "assistant", "content": ""}
        chosen, rejected = (answer, empty) if labelled["label"] else (empty, answer)
        return _pair_in_memory(labelled["prompt"], chosen, rejected)
    text = line.decode().removesuffix(TEXT_END)
    return _ESCAPED_SEPARATOR_LINE.sub(r"\1", text) if ENDOFTEXT in text else text


def _pair_in_memory(prompt: list[dict], chosen: dict, rejected: dict) -> list[dict]:
    return [*prompt, {**chosen, "preferred": True}, {**rejected, "preferred": False}]


def text_path(folder: Path, info: DatasetInfo, split: str) -> Path:
    """The file with a split's documents as text."""
    return Path(folder) / f"{info.name}-{split}.{'txt' if info.format == 'text' else 'jsonl'}"


def read_prepared(folder: Path, info: DatasetInfo, split: str) -> Iterator[Document]:
    """The documents of a prepared split, exactly as they were encoded."""
    path = text_path(folder, info, split)
    try:
        for line in document_lines(folder, info, split):
            yield read_document_line(line, info.format)
    except FileNotFoundError as error:
        raise UserError(f"{path} not found; prepare {info.name} again from its source") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged; prepare {info.name} again from its source") from error


def document_lines(folder: Path, info: DatasetInfo, split: str) -> Iterator[bytes]:
    """The documents of a prepared split as `document_line` stored them."""
    with text_path(folder, info, split).open("rb") as file:
        if info.format != "text":
            yield from file
        else:
            for text in _text_lines(file):
                yield text + TEXT_END.encode()


def _text_lines(file: BinaryIO) -> Iterator[bytes]:
    rest = b""
    while chunk := file.read(1 << 20):
        *whole, rest = (rest + chunk).split(TEXT_END.encode())
        yield from whole
    if rest:
        raise ValueError("the last document does not end with the separator")


def read_ids(folder: Path, info: DatasetInfo, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, number of tokens of each document) of a prepared split, in batches of about READ_TOKENS ids.

    Every batch consists of whole documents.
    """
    rest = np.zeros(0, dtype="<u2")
    for entry in info.splits[split].files:
        with (folder / entry.file).open("rb") as file:
            while len(part := np.fromfile(file, dtype="<u2", count=READ_TOKENS)):
                ids = np.concatenate([rest, part])
                ends = np.flatnonzero(ids == info.endoftext) + 1
                whole = int(ends[-1]) if len(ends) else 0
                ids, rest = ids[:whole], ids[whole:]
                if whole:
                    yield ids, np.diff(ends, prepend=0)
