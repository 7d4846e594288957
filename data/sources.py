"""Where documents come from: files of the hub, local files of every usual format, chat in every usual layout.

    for document in read_text_documents("stories.txt"): ...
    for messages in conversations(read_records("chat.jsonl")): ...

Everything streams: a few blocks, records or one document are in memory at a time, except that OASST's message rows
are gathered before their trees can be walked, and that a .json file that is one object is read whole. `datasets`,
`pyarrow` and `huggingface_hub` are imported when they are needed, so that local text is read without them.
"""

from __future__ import annotations

import codecs
import gzip
import itertools
import json
import os
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from common.cli import UserError, first_cause
from data.chat_layouts import Message, conversations, layout_of

ENDOFTEXT = b"<|endoftext|>"
UTF8_BOM = b"\xef\xbb\xbf"

TEXT_SUFFIXES = (".txt", ".md", ".text", ".markdown")
RECORD_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet")
COMPRESSION_SUFFIXES = {".gz": "gzip", ".zst": "zstd"}

BLOCK_BYTES = 1 << 20
# A text without any <|endoftext|> is cut at blank lines into documents of at most this size.
PLAIN_DOCUMENT_BYTES = 64 << 10
# No document grows past this: a longer stretch without <|endoftext|> is cut like a text that has none.
LONGEST_DOCUMENT_BYTES = 16 << 20
# A JSON record past this is taken for broken (or for an attack), not for data.
LONGEST_RECORD_CHARACTERS = 256 << 20


# ---- the hub -------------------------------------------------------------------------------------------------------


def fetch_file(repo_id: str, filename: str, repo_type: str = "dataset", revision: str | None = None) -> Path:
    """Path of one file of the hub in the local cache, downloaded first where it is not there.

    huggingface_hub resumes, checks and caches it, and reads HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN. Raises
    UserError that names the file to fetch by hand, whatever goes wrong.
    """
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    try:
        return Path(huggingface_hub.hf_hub_download(repo_id, filename, repo_type=repo_type, revision=revision))
    except (OSError, HTTPError, ValueError) as error:  # ValueError: a file of the wrong length, an invalid name
        url = huggingface_hub.hf_hub_url(repo_id, filename, repo_type=repo_type, revision=revision)
        raise UserError(
            f"{filename} of {repo_id} not downloaded ({first_cause(error)}); fetch {url} by hand and pass it with "
            f"--input {PurePosixPath(filename).name}"
        ) from error


def hub_commit(repo_id: str) -> str | None:
    """The commit at which a data set's repository stands: what tells a finished preparation from an outdated one.

    None where the hub cannot be asked, offline for instance; reading from it then says why.
    """
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    try:
        return huggingface_hub.HfApi().dataset_info(repo_id).sha
    except (OSError, HTTPError, ValueError):
        return None


def stream_hub(
    repo_id: str,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    data_files: str | Sequence[str] | None = None,
    by_hand: str | None = None,
) -> Iterator[dict]:
    """Records of a data set of the hub, streamed without storing its files.

    `by_hand` is the pattern of the files that hold `split`, for the error. Raises UserError that names them, also
    when the connection breaks in the middle.
    """
    os.environ.setdefault("USE_TORCH", "0")  # datasets would import torch to ask for its worker processes
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError

    try:
        yield from datasets.load_dataset(
            repo_id, name=config, split=split, revision=revision, data_files=data_files, streaming=True
        )
    except (OSError, HTTPError, DatasetsError, ValueError) as error:  # ValueError: unknown config, cut parquet file
        wanted = by_hand or data_files or f"{config + '/' if config else ''}{split}-*.parquet"
        raise UserError(
            f"{repo_id} not read from the hub ({first_cause(error)}); fetch its files {wanted} by hand from "
            f"{constants.ENDPOINT}/datasets/{repo_id}/tree/{revision or 'main'} and pass them with --input"
        ) from error


# ---- local files ---------------------------------------------------------------------------------------------------


def input_files(paths: Iterable[str | Path], suffixes: Sequence[str] = TEXT_SUFFIXES + RECORD_SUFFIXES) -> list[Path]:
    """The files that `--input` names; a folder stands for the files of known kind in it, sorted, hidden ones not.

    Raises UserError for a path that is not there, a file of unknown kind and a folder that holds none of known kind.
    """
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            found = [file for file in sorted(path.rglob("*")) if _is_wanted(file, path, suffixes)]
            if not found:
                raise UserError(f"{path} holds no file of a known kind; --input takes {_known(suffixes)}")
            files += found
        elif not path.exists():
            raise UserError(f"{path} not found; check the path given to --input")
        elif split_suffix(path)[0] not in suffixes:
            raise UserError(f"{path} is of no known kind; --input takes {_known(suffixes)}")
        else:
            files.append(path)
    return files


def _is_wanted(file: Path, folder: Path, suffixes: Sequence[str]) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and file.is_file() and split_suffix(file)[0] in suffixes


def _known(suffixes: Sequence[str]) -> str:
    return f"{', '.join(suffixes)}, each also .gz or .zst, and folders of them"


def split_suffix(path: str | Path) -> tuple[str, str | None]:
    """A file's kind and compression by its name.

    >>> split_suffix("stories.txt.gz")
    ('.txt', 'gzip')
    """
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    compression = COMPRESSION_SUFFIXES.get(suffixes[-1]) if suffixes else None
    if compression:
        suffixes.pop()
    return suffixes[-1] if suffixes else "", compression


def is_text(path: str | Path) -> bool:
    """Whether a file is one of text, not of records, by its name; compressed or not."""
    return split_suffix(path)[0] in TEXT_SUFFIXES


def read_blocks(path: str | Path) -> Iterator[bytes]:
    """A file's bytes in blocks, decompressed where its name ends in .gz or .zst.

    Raises UserError where the file is missing, empty, cannot be read or is damaged.
    """
    path = Path(path)
    compression = split_suffix(path)[1]
    is_empty = True
    try:
        with _open_bytes(path, compression) as file:
            while block := file.read(BLOCK_BYTES):
                is_empty = False
                yield block
    except FileNotFoundError as error:
        raise UserError(f"{path} not found; check the path given to --input") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged ({first_cause(error)}); fetch or compress it again") from error
    except OSError as error:
        remedy = "fetch or compress it again" if compression else "check the path given to --input"
        raise UserError(f"{path} cannot be read ({error.strerror or first_cause(error)}); {remedy}") from error
    if is_empty:
        raise UserError(f"{path} is empty; give --input a file that holds documents")


def _open_bytes(path: Path, compression: str | None):
    if compression == "gzip":
        return gzip.open(path, "rb")
    if compression == "zstd":
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path), "rb"), "zstd")
    return open(path, "rb", buffering=0)  # noqa: PTH123


# ---- text ----------------------------------------------------------------------------------------------------------


def read_text_documents(path: str | Path, divide_within_lines: bool = False) -> Iterator[str]:
    """The documents of a text file, which lines `<|endoftext|>` divide.

    Within a line `<|endoftext|>` is text, for a person's notes may speak of it; `divide_within_lines` is for dumps
    that put it anywhere. A file that is not divided is one document up to 64 KB; a longer one is cut at blank lines
    (where there is none: at a line end, a space, a character) into documents of at most 64 KB. Line ends around a
    document are removed. Raises UserError for a file that is missing, empty, damaged or not UTF-8 (with the byte
    offset).
    """
    for offset, raw in _raw_documents(read_blocks(path), divide_within_lines):
        try:
            yield raw.decode().strip("\r\n")
        except UnicodeDecodeError as error:
            raise not_utf8(path, offset + error.start) from error


# The line feed is looked for behind the token, so that the search runs by the token's bytes.
_SEPARATOR_LINE = re.compile(rb"<\|endoftext\|>(?:(?<=\n.{13})|(?<=\A.{13}))[ \t\r]*(?:\n|\Z)")
_SEPARATOR = re.compile(re.escape(ENDOFTEXT))


def _raw_documents(blocks: Iterable[bytes], divide_within_lines: bool = False) -> Iterator[tuple[int, bytes]]:
    """(byte offset, bytes) of each document."""
    separator = _SEPARATOR if divide_within_lines else _SEPARATOR_LINE
    rest, offset, is_separated, at_line_start = b"", 0, False, True  # `rest` stands at `offset` in the file
    for block in itertools.chain(blocks, [b""]):
        if not offset and not rest and block.startswith(UTF8_BOM):
            block, offset = block[len(UTF8_BOM) :], len(UTF8_BOM)
        rest += block
        # A line is judged when it is whole: when its line feed was read, or the file ends.
        end = len(rest) if divide_within_lines or not block else _end_of_last(b"\n", rest, 0, len(rest))
        start = 0
        for match in separator.finditer(rest, 0, end):
            if match.start() or at_line_start or divide_within_lines:
                is_separated = True
                yield offset + start, rest[start : match.start()]
                start, at_line_start = match.end(), True
        rest, offset = rest[start:], offset + start
        if len(rest) > LONGEST_DOCUMENT_BYTES:
            *documents, rest = _cut_at_blank_lines(rest)
            for document in documents:
                yield offset, document
                offset += len(document)
                at_line_start = document.endswith(b"\n")
    for document in [rest] if is_separated else _cut_at_blank_lines(rest):
        if document.strip():
            yield offset, document
        offset += len(document)


def _cut_at_blank_lines(text: bytes) -> list[bytes]:
    """`text` in pieces of at most PLAIN_DOCUMENT_BYTES that end, if they can, at a blank line."""
    pieces, start = [], 0
    while len(text) - start > PLAIN_DOCUMENT_BYTES:
        end = start + PLAIN_DOCUMENT_BYTES
        for boundaries in ((b"\n\n", b"\n\r\n"), (b"\n",), (b" ",)):
            if cut := max(_end_of_last(boundary, text, start, end) for boundary in boundaries):
                end = cut
                break
        else:
            while end > start + 1 and text[end] & 0xC0 == 0x80:  # within a character of several bytes
                end -= 1
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _end_of_last(boundary: bytes, text: bytes, start: int, end: int) -> int:
    """Where the last `boundary` in text[start:end] ends, 0 where there is none."""
    found = text.rfind(boundary, start, end)
    return 0 if found < 0 else found + len(boundary)


def not_utf8(path: str | Path, offset: int) -> UserError:
    """The sentence for a byte that is not UTF-8."""
    return UserError(f"{path} is not UTF-8 at byte {offset}; convert it, for instance with: iconv -t UTF-8")


# ---- records -------------------------------------------------------------------------------------------------------


def read_records(path: str | Path) -> Iterator[dict]:
    """The records of a .json, .jsonl, .ndjson or .parquet file, each also .gz or .zst.

    A .json file holds a list of records, an object in which one field holds such a list, one record, or a record a
    line. Raises UserError for a file that is missing, empty, damaged or not UTF-8, for broken JSON and for an element
    that is not an object (with the line number).
    """
    kind = split_suffix(path)[0]
    if kind == ".parquet":
        yield from _parquet_records(path)
    elif kind == ".json":
        yield from _json_records(path)
    elif kind in (".jsonl", ".ndjson"):
        yield from _json_line_records(path)
    else:
        raise UserError(f"{path} is of no known kind; records are read from {_known(RECORD_SUFFIXES)}")


def _json_line_records(path: str | Path) -> Iterator[dict]:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            yield _as_object(_parse_json(line, path, number), path, number)


def _lines(path: str | Path) -> Iterator[str]:
    """A file's lines; only a line feed ends one, as JSON Lines has it."""
    parts: list[str] = []
    for text in _decoded_blocks(path):
        *lines, rest = text.split("\n")
        if lines:
            yield "".join([*parts, lines[0]])
            yield from lines[1:]
            parts = []
        parts.append(rest)
    yield "".join(parts)


def _decoded_blocks(path: str | Path) -> Iterator[str]:
    """A file's text in blocks, a byte order mark removed. Raises UserError with the offset of a byte not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    for block in read_blocks(path):
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block)
        except UnicodeDecodeError as error:
            raise not_utf8(path, offset - pending + error.start) from error
        if text := text if offset else text.removeprefix("\ufeff"):
            yield text
        offset += len(block)
    if decoder.getstate()[0]:
        raise not_utf8(path, offset - len(decoder.getstate()[0]))


def _parse_json(text: str, path: str | Path, first_line: int):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _broken_json(path, first_line + getattr(error, "lineno", 1) - 1, error) from error


def _broken_json(path: str | Path, line: int, error: ValueError | RecursionError) -> UserError:
    if isinstance(error, json.JSONDecodeError):
        what = f"{error.msg.removesuffix(' at')}, column {error.colno}"
    elif isinstance(error, RecursionError):
        what = "nested too deeply"
    else:
        what = str(error)
    return UserError(f"{path} line {line}: broken JSON ({what}); mend or remove that line")


def _as_object(value, path: str | Path, line: int) -> dict:
    if not isinstance(value, dict):
        raise UserError(f"{path} line {line}: expected an object, found {type(value).__name__}; mend or remove it")
    return value


def _json_records(path: str | Path) -> Iterator[dict]:
    """Records of a .json file: a list is read element by element, anything else line by line or whole."""
    if _JsonReader(path).peek() == "[":
        for line, value in _list_elements(path):
            yield _as_object(value, path, line)
        return
    lines = (line for line in _lines(path) if line.strip())
    first, second = next(lines, ""), next(lines, "")
    if second and _is_json_object(first):
        yield from _json_line_records(path)
    elif first:
        value = _as_object(_parse_json("".join(_decoded_blocks(path)), path, 1), path, 1)
        yield from _records_within(value, path)


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _records_within(value: dict, path: str | Path) -> Iterator[dict]:
    """The records of the one field that lists objects; `value` itself where it is a record."""
    lists = [field for field, content in value.items() if _lists_objects(content)]
    if layout_of(value) or len(lists) != 1:
        yield value
        return
    for record in value[lists[0]]:
        yield _as_object(record, path, 1)


def _lists_objects(content) -> bool:
    return isinstance(content, list) and bool(content) and isinstance(content[0], dict)


def _list_elements(path: str | Path) -> Iterator[tuple[int, object]]:
    """(line number, value) of each element of the JSON list that a file holds, without reading it whole."""
    reader = _JsonReader(path)
    reader.take("[")
    if reader.peek() == "]":
        reader.take("]")
    else:
        closing = ","
        while closing == ",":
            reader.peek()
            yield reader.line, reader.value()
            closing = reader.take(",]")
    if reader.peek():
        raise _broken_json(path, reader.line, ValueError("something follows the list"))


class _JsonReader:
    """Reads a JSON file a value at a time; `line` is the number of the line where it stands."""

    _SPACE = re.compile(r"[ \t\r\n]*")
    _DECODER = json.JSONDecoder()

    def __init__(self, path: str | Path):
        self.line = 1
        self._path = path
        self._blocks = _decoded_blocks(path)
        self._text, self._position = "", 0

    def peek(self) -> str:
        """The next character that is no space, "" at the end."""
        while True:
            self._advance(self._SPACE.match(self._text, self._position).end())
            if self._position < len(self._text):
                return self._text[self._position]
            self._text, self._position = next(self._blocks, ""), 0
            if not self._text:
                return ""

    def take(self, expected: str) -> str:
        """The next character that is no space, which must be one of `expected`."""
        found = self.peek()
        if not found or found not in expected:
            raise _broken_json(self._path, self.line, ValueError(f"expected {' or '.join(expected)}"))
        self._advance(self._position + 1)
        return found

    def value(self):
        """The value that begins at the next character."""
        while True:
            try:
                value, end = self._DECODER.raw_decode(self._text, self._position)
            except (ValueError, RecursionError) as error:
                # The text is broken, or the value's rest is still to be read.
                if not self._read_more():
                    line = self.line - self._text.count("\n", 0, self._position) + getattr(error, "lineno", 1) - 1
                    raise _broken_json(self._path, max(line, self.line), error) from error
            else:
                self._advance(end)
                return value

    def _advance(self, position: int) -> None:
        self.line += self._text.count("\n", self._position, position)
        self._position = position

    def _read_more(self) -> bool:
        """Append as much text again as is unread, so that a long value takes linear time; False where there is none."""
        parts = [self._text[self._position :]]
        wanted = 2 * len(parts[0])
        if wanted > 2 * LONGEST_RECORD_CHARACTERS:
            return False
        while sum(map(len, parts)) <= wanted and (block := next(self._blocks, "")):
            parts.append(block)
        if len(parts) == 1:
            return False
        self._text, self._position = "".join(parts), 0
        return True


def _parquet_records(path: str | Path) -> Iterator[dict]:
    import pyarrow
    import pyarrow.parquet

    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} not found; check the path given to --input")
    try:
        with _seekable(path) as file:
            parquet = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=BLOCK_BYTES)
            for batch in parquet.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a whole parquet file ({first_cause(error)}); fetch it again") from error


def _seekable(path: Path):
    """A file to seek in: parquet is read from its end, which a compressed stream does not offer."""
    if split_suffix(path)[1] is None:
        return open(path, "rb")  # noqa: PTH123
    file = tempfile.TemporaryFile()  # noqa: SIM115
    for block in read_blocks(path):
        file.write(block)
    file.seek(0)
    return file


def text_fields(
    records: Iterable[Mapping], field: str = "text", skipped: Counter | None = None, where: str | Path = "the input"
) -> Iterator[str]:
    """The text in one field of each record; records without text are counted in `skipped`.

    Raises UserError for a record that lacks the field or holds something other than text in it.
    """
    skipped = Counter() if skipped is None else skipped
    for number, record in enumerate(records, 1):
        if field not in record:
            raise UserError(
                f"{where}: record {number} has no field {field!r}; name one of its fields with --field "
                f"({', '.join(map(str, record)) or 'it has none'})"
            )
        text = record[field]
        if text is None or text == "":
            skipped["record without text"] += 1
        elif not isinstance(text, str):
            raise UserError(f"{where}: field {field!r} of record {number} is not text; name another with --field")
        else:
            yield text


# ---- what a file holds ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recognised:
    """What `recognise` found in a file: kind is "text" or "chat", `layout` says which, in words."""

    path: Path
    kind: str
    layout: str
    compression: str | None
    divide_within_lines: bool = False

    def __str__(self) -> str:
        packed = f", {self.compression}" if self.compression else ""
        return f"{self.path}: {self.kind} ({self.layout}{packed})"


def recognise(path: str | Path, field: str = "text", divide_within_lines: bool = False) -> Recognised:
    """What one file holds, by its name and its first record; `field` is where a text record's text stands.

    `divide_within_lines`: as `read_text_documents` takes it.

    Raises UserError for a file of unknown kind and for records that are neither chat nor have the field.
    """
    path = Path(path)
    compression = split_suffix(path)[1]
    if is_text(path):
        head = b"".join(block for block, _ in zip(read_blocks(path), range(4), strict=False))
        return Recognised(path, "text", _text_layout(head, divide_within_lines), compression, divide_within_lines)
    first = next(read_records(path), None)
    if first is None:
        raise UserError(f"{path} holds no record; give --input a file that holds documents")
    if layout := layout_of(first):
        return Recognised(path, "chat", layout, compression)
    if not isinstance(first.get(field), str):
        raise UserError(
            f"{path} holds neither chat nor a text field {field!r}; name the field that holds the text with --field "
            f"({', '.join(map(str, first)) or 'it has none'})"
        )
    return Recognised(path, "text", f"records with the field {field!r}", compression)


def _text_layout(head: bytes, divide_within_lines: bool) -> str:
    separator = _SEPARATOR if divide_within_lines else _SEPARATOR_LINE
    if separator.search(head):
        return "documents divided by <|endoftext|>"
    if ENDOFTEXT in head:
        return "plain text, in which <|endoftext|> within a line is text; --divide_within_lines divides there"
    return "plain text, long ones cut at blank lines"


def read_documents(
    found: Recognised, field: str = "text", skipped: Counter | None = None, oasst_all_paths: bool = False
) -> Iterator[str] | Iterator[list[Message]]:
    """The documents of a file that `recognise` described: texts or conversations."""
    if found.kind == "chat":
        return conversations(read_records(found.path), oasst_all_paths, skipped, where=found.path)
    if is_text(found.path):
        return read_text_documents(found.path, found.divide_within_lines)
    return text_fields(read_records(found.path), field, skipped, where=found.path)
