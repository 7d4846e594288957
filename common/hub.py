"""Files of the Hugging Face hub, downloaded once into the local cache."""

from __future__ import annotations

import errno
from pathlib import Path

from common.cli import UserError, first_cause
from common.files import write_error

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # of the cache, not of the network


class NotDownloaded(UserError):
    """A file that could not be downloaded: `what` it is, the `reason`, and the `url` to fetch it from by hand."""

    def __init__(self, what: str, reason: str, url: str, remedy: str):
        super().__init__(f"{what} not downloaded ({reason}); fetch {url} {remedy}")
        self.what, self.reason, self.url = what, reason, url


def fetch_file(
    repository: str, name: str, remedy: str, *, repo_type: str = "model", revision: str | None = None
) -> Path:
    """The path of one file of the hub in the local cache, downloaded first if it is not there.

    huggingface_hub resumes, checks and caches the download, and reads HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN. If
    the download fails, NotDownloaded gives the file's address; `remedy` completes its "fetch URL ...". Raises another
    UserError if the cache cannot be written, for example because the disk is full.
    """
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError

    try:
        return Path(huggingface_hub.hf_hub_download(repository, name, repo_type=repo_type, revision=revision))
    except (OSError, HTTPError, ValueError) as error:  # ValueError: a file of the wrong length, an invalid name
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise write_error(constants.HF_HUB_CACHE, error) from error
        url = file_url(repository, name, repo_type, revision)
        raise NotDownloaded(f"{name} of {repository}", first_cause(error), url, remedy) from error


def file_url(repository: str, name: str, repo_type: str, revision: str | None) -> str:
    """The address from which a browser downloads a file of the hub."""
    import huggingface_hub

    return huggingface_hub.hf_hub_url(repository, name, repo_type=repo_type, revision=revision)


def not_downloaded(what: str, error: Exception, remedy: str) -> UserError:
    """The UserError for something that could not be downloaded."""
    return UserError(f"{what} not downloaded ({first_cause(error)}); {remedy}")
