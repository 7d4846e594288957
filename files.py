"""Files that are whole or not there: atomic writing, locks that die with their process, digests, free space."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from runtime import UserError

TEMPORARY_SUFFIX = ".tmp"


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb", **open_settings) -> Iterator:
    """Open a file that appears under `path` only when it is complete and on the disk.

    Writes to `<path>.<process id>.tmp` beside it, flushes and fsyncs it, renames it over `path` and fsyncs the
    folder. Any exception leaves `path` as it was and no temporary file. Raises UserError where the disk is full or
    the folder cannot be written.
    """
    path = Path(path)
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
        _fsync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _WRITE_FAULTS:
            raise write_error(path, error) from error
        raise


_WRITE_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO, errno.EPERM}


def write_error(path: str | os.PathLike, error: OSError) -> UserError:
    """The sentence for a file that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{path} not written: the disk is full; free some space and run the command again")
    return UserError(f"{path} not written: {error.strerror or error}; choose a folder that can be written")


def _fsync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the system can (Windows cannot open a folder)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_stale_temporaries(path: str | os.PathLike) -> list[Path]:
    """Remove what dead writers of `path` left beside it, and say which files these were.

    A temporary file names its writer's process; that of a living process stays.
    """
    path = Path(path)
    removed = []
    for temporary in path.parent.glob(f"{path.name}.*{TEMPORARY_SUFFIX}"):
        process_id = temporary.name[len(path.name) + 1 : -len(TEMPORARY_SUFFIX)]
        if process_id.isdigit() and (int(process_id) == os.getpid() or not _is_alive(int(process_id))):
            temporary.unlink(missing_ok=True)
            removed.append(temporary)
    return removed


def _is_alive(process_id: int) -> bool:
    if os.name == "nt":
        return True  # os.kill(pid, 0) ends the process there; leave its files alone
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


class FileLock:
    """A lock on `path` that the operating system drops when its process ends, however it ends.

    Raises UserError when another process holds it.
    """

    def __init__(self, path: str | os.PathLike, what: str):
        self.path = Path(path)
        try:
            self._file = open(self.path, "a+")  # noqa: SIM115, PTH123
        except OSError as error:
            raise write_error(self.path, error) from error
        try:
            _lock(self._file)
        except OSError as error:
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

    def __exit__(self, *exception) -> None:
        self.release()


def _lock(file) -> None:
    if os.name == "nt":
        import msvcrt

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def sha256_file(path: str | os.PathLike) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:  # noqa: PTH123
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def require_free_space(folder: str | os.PathLike, needed_bytes: int, what: str) -> None:
    """Raise UserError unless `folder`'s disk has `needed_bytes` free."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise UserError(
            f"{what} needs {needed_bytes / 2**30:.2f} GiB in {folder} and {free_bytes / 2**30:.2f} GiB is free; "
            "free some space or choose another folder"
        )
