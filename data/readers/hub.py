"""Data sets of the Hugging Face hub: single files, and records streamed without storing the files."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TypeVar

from common.cli import UserError
from common.files import make_folder
from common.hub import NotDownloaded, fetch_file, file_url, not_downloaded
from data.sources import HubSource, StreamedSource

T = TypeVar("T")


def fetch_data_files(sources: Sequence[HubSource]) -> list[Path]:
    """The paths of a data set's files in the local cache, from the first source that has all of them.

    Prints a note when a source is skipped. Raises UserError that names every source if none can be downloaded.
    """
    failures: list[NotDownloaded] = []
    for source in sources:
        try:
            return [fetch_data_file(source, name) for name in source.files]
        except NotDownloaded as error:
            failures.append(error)
            if source is not sources[-1]:
                print(f"{error.what} not downloaded ({error.reason}); trying another source", file=sys.stderr)
    if len(failures) == 1:
        raise failures[0]
    reasons = " nor ".join(f"{failure.what} ({failure.reason})" for failure in failures)
    last = sources[-1]
    urls = " and ".join(file_url(last.repository, name, "dataset", last.revision) for name in last.files)
    names = " ".join(PurePosixPath(name).name for name in last.files)
    raise UserError(f"neither {reasons} was downloaded; fetch {urls} by hand and pass them with --input {names}")


def fetch_data_file(source: HubSource, name: str, remedy: str | None = None) -> Path:
    """The path of one file of a data set in the local cache. Raises NotDownloaded, or UserError for a full disk.

    `remedy` is as for `fetch_file`.
    """
    remedy = remedy or f"by hand and pass it with --input {PurePosixPath(name).name}"
    return fetch_file(source.repository, name, remedy, repo_type="dataset", revision=source.revision)


def is_cached(source: HubSource, name: str) -> bool:
    """Whether a file is in the local cache already."""
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(
        source.repository, name, repo_type="dataset", revision=source.revision
    )
    return isinstance(found, str)


def cache_folder() -> Path:
    """The folder of the local cache (HF_HOME), created if it is missing."""
    from huggingface_hub import constants

    return make_folder(Path(constants.HF_HUB_CACHE))


def stream_hub(
    repository: str,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    files: str | None = None,
) -> Iterator[dict]:
    """Records of a data set of the hub.

    `files` is the pattern of the files that contain `split`, for the error message. Raises UserError that names them,
    also if the connection breaks later.
    """
    os.environ.setdefault("USE_TORCH", "0")  # otherwise datasets imports torch to ask for its worker processes
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError

    try:
        yield from datasets.load_dataset(repository, name=config, split=split, revision=revision, streaming=True)
    except (OSError, HTTPError, DatasetsError, ValueError) as error:  # ValueError: unknown config, truncated parquet
        files = files or f"{config + '/' if config else ''}{split}-*.parquet"
        url = f"{constants.ENDPOINT}/datasets/{repository}/tree/{revision or 'main'}"
        raise not_downloaded(
            repository, error, f"fetch its files {files} by hand from {url} and pass them with --input"
        ) from error


def stream_splits(
    source: StreamedSource, documents_of: Callable[[Iterable[dict]], Iterator[T]]
) -> tuple[Iterator[T], Iterator[T] | None]:
    """The documents in the records of a data set's train split, and those of val, or None if it has no such split.

    Both are at the data set's commit. Raises UserError as `stream_hub` does.
    """
    hub = source.hub

    def documents(split: str) -> Iterator[T]:
        return documents_of(stream_hub(hub.repository, source.config, split, hub.revision, " and ".join(hub.files)))

    return documents(source.train), documents(source.val) if source.val else None
