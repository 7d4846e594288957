"""Zip archives, read without unpacking them to the disk.

for name, content in zip_members("ijcnlp_dailydialog.zip", lambda name: name.endswith(".txt")): ...
"""

from __future__ import annotations

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from common.cli import UserError, first_cause
from data.readers.files import not_found

# A larger member is assumed to be broken (or an attack), not data.
MAX_MEMBER_BYTES = 1 << 30

# What zipfile raises for damaged bytes, wherever they are (found by damaging every byte of an archive).
_ZIP_FAULTS = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, NotImplementedError, UnicodeDecodeError)


def zip_members(path: str | Path, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of the wanted files of a zip archive; files of a zip inside it are named `inner.zip/name`.

    `wanted` is called for files, not for inner zips. Raises UserError for an archive that is missing, damaged or
    encrypted, and for one with a member whose path leaves the archive's folder.
    """
    yield from _zip_members(Path(path), str(path), wanted, depth=0)


def _zip_members(
    file: Path | io.BytesIO, where: str, wanted: Callable[[str], bool], depth: int, prefix: str = ""
) -> Iterator[tuple[str, bytes]]:
    try:
        archive = zipfile.ZipFile(file)
    except FileNotFoundError as error:
        raise not_found(where) from error
    except _ZIP_FAULTS as error:
        raise UserError(f"{where} is not a complete zip archive ({first_cause(error)}); download it again") from error
    with archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        for member in members:
            _check_member_name(member.filename, where)
        for member in members:
            name = member.filename
            if name.startswith("__MACOSX/") or PurePosixPath(name).name.startswith("."):
                continue
            if name.lower().endswith(".zip") and depth < 2:
                inner = io.BytesIO(_read_member(archive, name, where))
                yield from _zip_members(inner, f"{where}/{name}", wanted, depth + 1, f"{prefix}{name}/")
            elif wanted(prefix + name):
                yield prefix + name, _read_member(archive, name, where)


def _check_member_name(name: str, where: str) -> None:
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or parts[0].startswith("/") or ".." in parts or re.match("[A-Za-z]:", name):
        raise UserError(
            f"{where} contains a member whose path leaves the folder ({name!r}); do not use this archive, get another"
        )


def _read_member(archive: zipfile.ZipFile, name: str, where: str) -> bytes:
    """The bytes of one member, checksum verified. Raises UserError if it is encrypted, damaged or too large."""
    member = archive.getinfo(name)
    if member.flag_bits & 1:
        raise UserError(f"{where}: {name} is encrypted; unpack the archive and pass the files with --input")
    if member.file_size > MAX_MEMBER_BYTES:
        raise UserError(f"{where}: {name} is too large; unpack the archive and pass the files with --input")
    try:
        return archive.read(member)
    except _ZIP_FAULTS as error:
        raise UserError(f"{where}: {name} is damaged ({first_cause(error)}); download the archive again") from error
