"""Files that are whole or not there: atomic writing, locks that die with their process, digests, free space."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from common.cli import UserError

TEMPORARY_SUFFIX = ".tmp"


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb", **open_settings) -> Iterator:
    """Open a file that appears under `path` only when it is complete and on the disk.

    Writes to `<path>.<process id>.tmp` beside it, flushes and fsyncs it, renames it over `path` and fsyncs the
    folder. Any exception leaves `path` as it was and no temporary file. Raises UserError where the disk is full or
    the folder cannot be written.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a folder, or a device such as /dev/null, which a rename would replace
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
        ours = isinstance(error, OSError) and error.filename in (None, str(temporary), temporary)
        if ours and error.errno in _WRITE_FAULTS:  # a fault that names another file is not about this one
            raise write_error(path, error) from error
        raise


@contextlib.contextmanager
def atomic_files(folder: str | os.PathLike, name: str) -> Iterator[Path]:
    """A folder to write a group of files into, which appear in `folder` together when the block ends.

    Each file must be complete and on the disk by then; they are renamed in the order in which they were last
    changed, so write the file that vouches for the others last. Any exception leaves `folder` as it was. One writer
    at a time: what an earlier, killed writer of the same `name` left is removed.
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


_WRITE_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO, errno.EPERM}


def write_error(path: str | os.PathLike, error: OSError) -> UserError:
    """The sentence for a file that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{path} not written: the disk is full; free some space and run the command again")
    return UserError(f"{path} not written: {error.strerror or error}; choose a folder that can be written")


def fsync_folder(folder: Path) -> None:
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
    for temporary in path.parent.glob(f"{glob.escape(path.name)}.*{TEMPORARY_SUFFIX}"):
        process_id = temporary.name[len(path.name) + 1 : -len(TEMPORARY_SUFFIX)]
        if process_id.isdecimal() and (int(process_id) == os.getpid() or not _is_alive(int(process_id))):
            temporary.unlink(missing_ok=True)
            removed.append(temporary)
    return removed


def _is_alive(process_id: int) -> bool:
    if os.name == "nt":
        return True  # os.kill(pid, 0) ends the process there; leave its files alone
    try:
        os.kill(process_id, 0)
    except (ProcessLookupError, OverflowError):  # no such process, or a number that no process has
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
            if error.errno not in (errno.EAGAIN, errno.EACCES):  # a file system without locks, say
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


def require_target(option: str, path: str | os.PathLike) -> None:
    """Raise UserError, before any work is done, where the file that an option names could not be written."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"--{option} {path}: that is a folder; name a file")
    if not path.parent.is_dir():
        raise UserError(f"--{option} {path}: there is no folder {path.parent}; make it with mkdir -p")


def require_free_space(folder: str | os.PathLike, needed_bytes: int, what: str) -> None:
    """Raise UserError unless `folder`'s disk has `needed_bytes` free."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise UserError(
            f"{what} needs {needed_bytes / 2**30:.2f} GiB in {folder} and {free_bytes / 2**30:.2f} GiB is free; "
            "free some space or choose another folder"
        )
