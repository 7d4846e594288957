"""Files of an earlier preparation in the output folder: reused if that preparation is finished, replaced otherwise."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from common.cli import UserError
from common.files import sha256_file
from data.dataset import SPLITS, DatasetInfo, read_info
from data.documents import text_path
from data.vocabularies import is_other_tokenizer

# Two preparations with the same values of these fields write the same files.
_IDENTITY = (
    *("name", "format", "source", "licence", "non_commercial", "n_vocab", "tokenizer_digest", "dtype"),
    *("seed", "options", "input_digest"),
)


def digest_of_files(files: Sequence[Path]) -> str | None:
    """A digest of the files' names and bytes, None without files. Raises UserError for one that cannot be read."""
    digest = hashlib.sha256()
    for file in files:
        try:
            digest.update(f"{file.name} {sha256_file(file)}\n".encode())
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}); pass a readable file with --input") from error
    return digest.hexdigest() if files else None


def earlier_info(folder: Path, name: str) -> DatasetInfo | None:
    """The description of an earlier preparation, or None if it is missing or damaged and will be replaced."""
    try:
        return read_info(folder, name)
    except UserError:
        return None


def finished_info(folder: Path, wanted: DatasetInfo) -> DatasetInfo | None:
    """The description of a finished preparation that is the same as `wanted`, if its files are complete."""
    found = earlier_info(folder, wanted.name)
    if found is None or wanted.input_digest is None:
        return None
    if any(getattr(found, key) != getattr(wanted, key) for key in _IDENTITY):
        return None
    if wanted.tokenizer_digest is None and found.tokenizer != wanted.tokenizer:  # GPT-2's has no digest, only a name
        return None
    if wanted.tokenizer_digest is not None and is_other_tokenizer(folder, found.tokenizer, wanted.tokenizer_digest):
        return None
    for split in SPLITS:
        if not text_path(folder, found, split).is_file():
            return None
        for entry in found.splits[split].files:
            path = folder / entry.file
            if not path.is_file() or path.stat().st_size != 2 * (entry.tokens or 0):
                return None
    return found


def remove_leftovers(folder: Path, earlier: DatasetInfo | None, info: DatasetInfo) -> None:
    """Remove the files of an earlier preparation of the same name that the new one did not replace."""
    current = {text_path(folder, info, split).name for split in SPLITS}
    current |= {entry.file for split in info.splits.values() for entry in split.files}
    current |= set(info.report_files or ())
    for path in folder.iterdir():
        is_ours = _is_data_file(path.name, info.name) or path.name in _report_files(earlier)
        if is_ours and path.name not in current:
            path.unlink()


def refuse_to_replace(files: Sequence[Path], folder: Path, name: str) -> None:
    """Raise UserError for an input that the output would replace."""
    others = (f"{name}.json", f"{name}.md", f"{name}-lengths.png")
    for file in files:
        is_output = _is_data_file(file.name, name) or file.name in others
        if is_output and file.resolve().parent == folder.resolve():
            raise UserError(f"{file} would be replaced by the prepared data; choose another --output_dir")


def refuse_to_replace_page(folder: Path, name: str, earlier: DatasetInfo | None) -> None:
    """Raise UserError if the report's page would replace a file that is not a report."""
    page = folder / f"{name}.md"
    if page.exists() and page.name not in _report_files(earlier):
        raise UserError(f"--report would replace {page}; move that file or choose another --output_dir")


def _is_data_file(file_name: str, name: str) -> bool:
    """Whether the preparation of data set `name` may write a file of this name."""
    return bool(re.fullmatch(re.escape(name) + r"-(train|val)((-\d{5})?\.bin|\.txt|\.jsonl)", file_name))


def _report_files(info: DatasetInfo | None) -> tuple[str, ...]:
    return (info.report_files or ()) if info else ()
