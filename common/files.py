"""Writing files completely or not at all, locks that end with their process, checksums, and free space."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from common.cli import UserError

TEMPORARY_SUFFIX = ".tmp"


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb", **open_settings: Any) -> Iterator[IO[Any]]:
    """Open a file that appears as `path` only when it is complete and on the disk.

    Writes to `<path>.<process id>.tmp` in the same folder, flushes and fsyncs it, renames it to `path` and fsyncs the
    folder. After any exception `path` is unchanged and the temporary file is gone. Raises UserError if the disk is
    full or the folder cannot be written.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a folder, or a device such as /dev/null, which the rename would replace
        raise UserError(f"{path} not written: it is not a regular file; choose another name")
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        file = open(temporary, mode, **open_settings)  # noqa: SIM115, PTH123
    except OSError as error:
        raise write_error(path, error) from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if (
            isinstance(error, OSError)
            and error.filename in (None, str(temporary), temporary)  # other errors concern another file
            and error.errno in _WRITE_ERRORS
        ):
            raise write_error(path, error) from error
        raise


@contextlib.contextmanager
def atomic_files(folder: str | os.PathLike, name: str) -> Iterator[Path]:
    """A temporary folder for a group of files that appear in `folder` together when the block ends.

    Each file must be complete and on the disk by then. The files are renamed in the order in which they were last
    changed, so write the file that describes the others last. After any exception `folder` is unchanged. Only one
    writer at a time may use a `name`: the files of an earlier writer that was killed are removed.
    """
    folder = Path(folder)
    staging = folder / f".{name}{TEMPORARY_SUFFIX}"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir()
    except OSError as error:
        raise write_error(folder, error) from error
    try:
        yield staging
        for path in sorted(staging.iterdir(), key=lambda path: path.stat().st_mtime_ns):
            try:
                os.replace(path, folder / path.name)
            except OSError as error:
                raise write_error(folder / path.name, error) from error
        fsync_folder(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


_WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO, errno.EPERM}


def write_error(path: str | os.PathLike, error: OSError) -> UserError:
    """The UserError for a file that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{path} not written: the disk is full; free some space and run the command again")
    return UserError(f"{path} not written: {error.strerror or error}; choose a writable folder")


def make_folder(folder: Path) -> Path:
    """The folder, created if it is missing. Raises UserError if that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error
    return folder


def fsync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power failure. Does nothing on Windows, which cannot open a folder."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_stale_temporaries(path: str | os.PathLike) -> list[Path]:
    """Remove temporary files next to `path` whose writers are no longer running; returns their paths.

    The name of a temporary file contains its writer's process id; the file of a running process is kept.
    """
    path = Path(path)
    removed = []
    for temporary in path.parent.glob(f"{glob.escape(path.name)}.*{TEMPORARY_SUFFIX}"):
        process_id = temporary.name[len(path.name) + 1 : -len(TEMPORARY_SUFFIX)]
        if process_id.isdecimal() and (int(process_id) == os.getpid() or not _is_alive(int(process_id))):
            temporary.unlink(missing_ok=True)
            removed.append(temporary)
    return removed


def _is_alive(process_id: int) -> bool:
    if os.name == "nt":
        return True  # os.kill(pid, 0) would end the process; keep its files
    try:
        os.kill(process_id, 0)
    except (ProcessLookupError, OverflowError):  # no such process, or a number that no process has
        return False
    except PermissionError:
        pass
    return True


class FileLock:
    """A lock on `path` that the operating system releases when the process ends, however it ends.

    Raises UserError if another process holds the lock.
    """

    def __init__(self, path: str | os.PathLike, what: str):
        self.path = Path(path)
        try:
            self._file = open(self.path, "a+")  # noqa: SIM115, PTH123
        except OSError as error:
            raise write_error(self.path, error) from error
        try:
            lock_file(self._file)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):  # for example a file system without locks
                self._file.close()
                raise write_error(self.path, error) from error
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise UserError(f"{what} is in use by another run (process {holder}); wait for it or stop it") from error
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def release(self) -> None:
        self._file.close()

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def lock_file(file: IO[Any]) -> None:
    """Lock a file until it is closed. Raises OSError (EAGAIN or EACCES) if another process has locked it."""
    if sys.platform == "win32":
        import msvcrt

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def sha256_file(path: str | os.PathLike) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:  # noqa: PTH123
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def require_target(option: str, path: str | os.PathLike) -> None:
    """Raise UserError, before any work is done, if the file that an option names cannot be written."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"--{option} {path} is a folder; name a file")
    if not path.parent.is_dir():
        raise UserError(f"--{option} {path}: the folder {path.parent} does not exist; run: mkdir -p {path.parent}")


def require_free_space(folder: str | os.PathLike, needed_bytes: int, what: str) -> None:
    """Raise UserError unless the disk of `folder` has `needed_bytes` free."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise UserError(
            f"{what} needs {needed_bytes / 2**30:.2f} GiB in {folder}, but only {free_bytes / 2**30:.2f} GiB are free; "
            "free some space or choose another folder"
        )
