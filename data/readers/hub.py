"""Data sets of the Hugging Face hub: single files, and records streamed without storing the files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from common.hub import fetch_file, not_downloaded


def fetch_data_file(repository: str, name: str) -> Path:
    """The path of one file of a data set in the local cache. Raises UserError if it cannot be downloaded."""
    remedy = f"by hand and pass it with --input {PurePosixPath(name).name}"
    return fetch_file(repository, name, remedy, repo_type="dataset")


def hub_commit(repository: str) -> str | None:
    """The current commit of a data set's repository, which tells a finished preparation from an outdated one.

    None if the hub cannot be asked, for instance offline; reading from it then reports why.
    """
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    try:
        return huggingface_hub.HfApi().dataset_info(repository).sha
    except (OSError, HTTPError, ValueError):
        return None


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
