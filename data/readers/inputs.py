"""The files that --input names; in a folder, those of a known kind that contain data.

files = input_files(["books", "notes.txt"])
"""

from __future__ import annotations

import atexit
import codecs
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from common.cli import UserError
from common.text_files import HEAD_BYTES, binary_fault
from data.readers.files import (
    ALL_SUFFIXES,
    ARCHIVE_SUFFIXES,
    RECORD_SUFFIXES,
    SHARD_SUFFIXES,
    TEXT_SUFFIXES,
    known_kinds,
    not_found,
    read_blocks,
    split_suffix,
)

# Files of a repository that describe the data or the program, and are not data themselves.
_DESCRIPTIONS = (
    *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "croissant.json"),
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("vocab.json", "added_tokens.json", "package.json", "package-lock.json", "tsconfig.json"),
)
# With a text suffix, these are descriptions too if the folder contains records.
_DOCUMENTATION = ("readme", "license", "licence", "changelog", "citation", "contributing", "notice")
_FRONT_MATTER = re.compile(rb"(\xef\xbb\xbf)?---[ \t]*\r?\n(.*\n)?---[ \t]*(\r?\n|\Z)", re.DOTALL)
_SHOWN_NAMES = 5


def input_files(
    paths: Iterable[str | Path],
    suffixes: Sequence[str] = ALL_SUFFIXES,
    extra_suffixes: Sequence[str] = (),
    strict: bool = False,
    encoding: str | None = None,
    has_suffix_option: bool = False,
) -> list[Path]:
    """The files that --input names; a folder means all files of a known kind in it, sorted.

    `extra_suffixes` are those that --suffix adds; `has_suffix_option` says whether the script has that option. In a
    folder, hidden files, empty files, files of unknown kind, and descriptions such as the README.md of a data set of
    the hub are left out; what is left out is printed. With `encoding`, the files are copies in UTF-8. Raises UserError
    for a path that does not exist, a named file of unknown kind, with `strict` also one in a folder, and a folder
    without any file to read.
    """
    wanted = (*suffixes, *extra_suffixes)
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files += _files_of_folder(path, wanted, strict, has_suffix_option)
        elif not path.exists():
            raise not_found(path)
        elif split_suffix(path)[0] not in wanted:
            raise UserError(
                f"{path} is of unknown kind; --input reads {known_kinds(wanted)}"
                + (_suffix_advice([path]) if has_suffix_option else "")
            )
        else:
            files.append(path)
    return list(_copies_in_utf8(files, encoding)) if encoding else files


def parse_suffixes(words: Sequence[str]) -> tuple[str, ...]:
    """The suffixes that --suffix names, each with its dot. Raises ValueError for one that cannot be read as text.

    >>> parse_suffixes(["py", ".JS", "*.c"])
    ('.py', '.js', '.c')
    """
    suffixes = tuple(f".{word.removeprefix('*').removeprefix('.').lower()}" for word in words)
    for suffix in suffixes:
        if not re.fullmatch(r"\.[^./\\\s]+", suffix):
            raise ValueError(f"--suffix must be the end of file names, such as .py, not {suffix.removeprefix('.')!r}")
        if suffix in (*ALL_SUFFIXES, *ARCHIVE_SUFFIXES, *SHARD_SUFFIXES, ".gz", ".zst") and suffix not in TEXT_SUFFIXES:
            raise ValueError(f"--suffix {suffix}: files of this kind are not read as text; leave it out")
    return suffixes


def check_encoding(name: str) -> None:
    """Raise ValueError if Python does not know a text encoding of this name."""
    try:
        "a".encode(name)
        codecs.getincrementaldecoder(name)
    except (LookupError, UnicodeError) as error:
        raise ValueError(
            f"--encoding must be the name of a text encoding, such as windows-1252, utf-16 or gb18030, not {name!r}"
        ) from error


# --- folders ---


def _files_of_folder(folder: Path, suffixes: Sequence[str], strict: bool, has_suffix_option: bool) -> list[Path]:
    """The files of a folder that are read; prints what is left out."""
    hidden: dict[str, None] = {}
    unknown: list[Path] = []
    candidates: list[Path] = []
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        if hidden_part := next((part for part in parts if part.startswith(".")), None):
            hidden[hidden_part] = None
        elif file.is_file():
            (candidates if split_suffix(file)[0] in suffixes else unknown).append(file)
    has_records = any(split_suffix(file)[0] in RECORD_SUFFIXES and not _is_description(file) for file in candidates)
    described = [file for file in candidates if _is_description(file, has_records)]
    empty = [file for file in candidates if file not in described and not file.stat().st_size]
    found = [file for file in candidates if file not in described and file not in empty]
    advice = _suffix_advice(unknown) if has_suffix_option else ""
    if strict and unknown:
        raise UserError(
            f"{folder} contains {_count(unknown)} of unknown kind ({_kinds_of(unknown)}), which --strict refuses; move "
            f"them elsewhere or leave --strict out{advice}"
        )
    if not found:
        contents = f", but {_count(unknown)} of unknown kind ({_kinds_of(unknown)})" if unknown else ""
        raise UserError(
            f"{folder} contains no file of a known kind{contents}; --input reads {known_kinds(suffixes)}{advice}"
        )
    if hidden:
        print(f"left out of {folder}: {_shown(list(hidden))} (hidden)")
    if described:
        print(f"left out of {folder}: {_names(folder, described)} (a description, not data)")
    if empty:
        print(f"left out of {folder}: {_count(empty, 'empty file')} ({_names(folder, empty)})")
    if unknown:
        print(f"left out of {folder}: {_count(unknown)} of unknown kind ({_kinds_of(unknown)}){advice}")
    return found


def _is_description(file: Path, has_records: bool = False) -> bool:
    """Whether a file describes the data, such as a hub's card (README.md with front matter) or dataset_info.json."""
    name = file.name.lower()
    if name in _DESCRIPTIONS:
        return True
    if file.suffix.lower() not in TEXT_SUFFIXES:
        return False
    if has_records and file.stem.lower() in _DOCUMENTATION:
        return True
    if name != "readme.md":
        return False
    with file.open("rb") as opened:
        return _FRONT_MATTER.match(opened.read(1 << 20)) is not None


def _suffix_advice(files: Sequence[Path]) -> str:
    """The option that reads files of unknown kind as text, if some of them are text."""
    by_suffix: dict[str, Path] = {}
    for file in files:
        if file.stat().st_size:  # an empty file is neither text nor something else
            by_suffix.setdefault(split_suffix(file)[0], file)
    textual = [suffix for suffix, file in by_suffix.items() if suffix and _looks_like_text(file)]
    return f"; read them as text with --suffix {' '.join(sorted(textual))}" if textual else ""


def _looks_like_text(file: Path) -> bool:
    try:
        head = next(read_blocks(file))[:HEAD_BYTES]
    except (UserError, StopIteration):
        return False
    return binary_fault(file, head) is None and b"\0" not in head


def _count(files: Sequence[Path], what: str = "file") -> str:
    return f"{len(files):,} {what}{'' if len(files) == 1 else 's'}"


def _kinds_of(files: Sequence[Path]) -> str:
    """How many files of each kind, as a phrase.

    >>> _kinds_of([Path("a.py"), Path("b.py"), Path("Makefile")])
    '2 .py, Makefile'
    """
    kinds = Counter(split_suffix(file)[0] or file.name for file in files)
    return _shown([f"{count:,} {kind}" if kind.startswith(".") else kind for kind, count in kinds.most_common()])


def _names(folder: Path, files: Sequence[Path]) -> str:
    return _shown([str(file.relative_to(folder)) for file in files])


def _shown(words: list[str]) -> str:
    more = f" and {len(words) - _SHOWN_NAMES:,} more" if len(words) > _SHOWN_NAMES else ""
    return ", ".join(words[:_SHOWN_NAMES]) + more


# --- other encodings ---


def _copies_in_utf8(files: Sequence[Path], encoding: str) -> Iterator[Path]:
    """Each file, or its copy in UTF-8 if it contains text; the copies are removed when the program ends."""
    folder = Path(tempfile.mkdtemp(prefix="jojo-utf8-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for number, file in enumerate(files):
        # These formats define or state how their text is encoded.
        if split_suffix(file)[0] in (".parquet", ".epub", ".zip", *SHARD_SUFFIXES):
            yield file
            continue
        copy = folder / str(number) / (file.stem if split_suffix(file)[1] else file.name)
        copy.parent.mkdir()
        with copy.open("wb") as target:
            for text in _decoded(file, encoding):
                target.write(text.encode("utf-8", "surrogatepass"))
        yield copy


def _decoded(file: Path, encoding: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        for block in read_blocks(file):
            yield decoder.decode(block)
        yield decoder.decode(b"", final=True)
    except UnicodeError as error:
        where = f" ({error.reason})" if isinstance(error, UnicodeDecodeError) else ""
        raise UserError(
            f"{file} is not in {encoding}{where}; give its real encoding with --encoding, or leave that out for UTF-8"
        ) from error
