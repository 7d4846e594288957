"""Zip archives, read without writing anything to the disk.

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

# A member past this is taken for broken (or for an attack), not for data.
LARGEST_MEMBER_BYTES = 1 << 30

# What zipfile raises for damaged bytes, wherever the damage is (found by damaging every byte of an archive).
_ZIP_FAULTS = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, NotImplementedError, UnicodeDecodeError)


def zip_members(path: str | Path, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of the wanted files of a zip archive; those of zips within it follow as `inner.zip/name`.

    Nothing is written to the disk. `wanted` is asked about files, not about inner zips. Raises UserError for an
    archive that is missing, broken or encrypted, and for one with a member that tries to leave its folder.
    """
    yield from _zip_members(Path(path), str(path), wanted, depth=0)


def _zip_members(
    file: Path | io.BytesIO, where: str, wanted: Callable[[str], bool], depth: int, prefix: str = ""
) -> Iterator[tuple[str, bytes]]:
    try:
        archive = zipfile.ZipFile(file)
    except FileNotFoundError as error:
        raise UserError(f"{where} not found; check the path given to --input") from error
    except _ZIP_FAULTS as error:
        raise UserError(f"{where} is not a whole zip archive ({first_cause(error)}); fetch it again") from error
    with archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        for member in members:
            _check_member_name(member.filename, where)
        for member in members:
            name = member.filename
            if name.startswith("__MACOSX/") or PurePosixPath(name).name.startswith("."):
                continue
            if name.lower().endswith(".zip") and depth < 2:
                inner = io.BytesIO(read_zip_member(archive, name, where))
                yield from _zip_members(inner, f"{where}/{name}", wanted, depth + 1, f"{prefix}{name}/")
            elif wanted(prefix + name):
                yield prefix + name, read_zip_member(archive, name, where)


def _check_member_name(name: str, where: str) -> None:
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or parts[0].startswith("/") or ".." in parts or re.match("[A-Za-z]:", name):
        raise UserError(
            f"{where} holds a member that leaves its folder ({name!r}); do not use this archive, fetch another"
        )


def read_zip_member(archive: zipfile.ZipFile, name: str, where: str | Path) -> bytes:
    """The bytes of one member, its checksum verified. Raises UserError where it is encrypted, damaged or too large."""
    _check_member_name(name, str(where))
    member = archive.getinfo(name)
    if member.flag_bits & 1:
        raise UserError(f"{where}: {name} is encrypted; unpack the archive by hand and pass the files with --input")
    if member.file_size > LARGEST_MEMBER_BYTES:
        raise UserError(f"{where}: {name} is too large; unpack the archive by hand and pass the files with --input")
    try:
        return archive.read(member)
    except _ZIP_FAULTS as error:
        raise UserError(f"{where}: {name} is damaged ({first_cause(error)}); fetch the archive again") from error
