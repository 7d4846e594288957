"""Ask the hub whether every file that the prepare scripts download is still there.

    python testing_tools/check_sources.py

Prints one line per file and data set and downloads nothing. Exits with status 1 if a file is missing, so that a
scheduled CI run can report it.
"""

from __future__ import annotations

import fnmatch
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.cli import UserError, alternatives, first_cause, option, parse_options, run_script
from data.sources import SOURCES, HubSource


@dataclass(frozen=True)
class CheckOptions:
    names: tuple[str, ...] = option((), "data sets to check (default: all)", nargs="*", positional=True)

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in SOURCES:
                raise ValueError(f"{name} is not a data set of the hub; choose {alternatives(list(SOURCES))}")


def main() -> int:
    options = parse_options(CheckOptions, __doc__)
    n_files = n_missing = 0
    for name in options.names or SOURCES:
        for source in SOURCES[name]:
            missing = missing_files(source)
            for file in source.files:
                reason = missing.get(file)
                print(f"{'missing' if reason else 'ok':<8}{name:<14}{source}: {file}{f' ({reason})' if reason else ''}")
            n_files += len(source.files)
            n_missing += len(missing)
    print(f"{n_missing} of {n_files} files are missing")
    if n_missing:
        print("fix data/sources.py: name another revision, file or repository")
    return 1 if n_missing else 0


def missing_files(source: HubSource) -> dict[str, str]:
    """The files or patterns of a source that the hub does not have, with the reason.

    Raises UserError if the hub cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError

    try:
        found = huggingface_hub.HfApi().list_repo_files(
            source.repository, repo_type="dataset", revision=source.revision
        )
    except (OSError, HTTPError) as error:
        if getattr(error, "response", None) is None:
            raise UserError(
                f"{constants.ENDPOINT} cannot be reached ({first_cause(error)}); check the network, or HF_ENDPOINT"
            ) from error
        return dict.fromkeys(source.files, first_cause(error))
    return {pattern: "not in the repository" for pattern in source.files if not fnmatch.filter(found, pattern)}


if __name__ == "__main__":
    run_script(main)
