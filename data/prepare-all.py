"""Prepare tales, chitchat and four data sets from the hub in one go. `make data` runs this.

    python data/prepare-all.py
    python data/prepare-all.py story chitchat --limit 20000
    python data/prepare-all.py --tokenizer tales

prints what each script prints, and at the end:

    prepared: story, dailydialog, chat, education, tales, chitchat
    missing: nothing

Downloads 2.2 GB for the stories and streams about 2 GB more; of Cosmopedia's stories the first 100,000 are used. A data
set that cannot be prepared does not stop the others. Data sets that are already prepared are skipped.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the project's modules are found anywhere

from common.cli import alternatives, check_options, option, parse_options, run_script

SCRIPTS: dict[str, tuple[str, ...]] = {
    "story": (),
    "dailydialog": (),
    "chat": (),
    "education": ("--limit", "100000"),
    "tales": (),
    "chitchat": (),
}


@dataclass(frozen=True)
class AllOptions:
    names: tuple[str, ...] = option((), "data sets to prepare (default: all)", nargs="*", positional=True)
    output_dir: str | None = option(None, "folder for the prepared files (default: the data folder)", metavar="DIR")
    limit: int | None = option(None, "use only the first N documents of each split", at_least=1, metavar="N")
    tokenizer: str | None = option(
        None,
        "a tokenizer: the name that train-tokenizer.py gave it, a tokenizer.json, or a checkpoint (default: gpt2)",
        metavar="NAME",
    )
    force: bool = option(False, "prepare again even if the files are up to date")

    def __post_init__(self) -> None:
        check_options(self)
        for name in self.names:
            if name not in SCRIPTS:
                raise ValueError(f"{name} is not one of these data sets; choose {alternatives(list(SCRIPTS))}")


def main() -> int:
    options = parse_options(AllOptions, __doc__)
    missing: dict[str, str] = {}
    names = options.names or tuple(SCRIPTS)
    for name in names:
        command = script_command(name, options)
        print(f"--- {shlex.join(command)} ---", flush=True)
        if subprocess.run([sys.executable, *command]).returncode:
            missing[name] = f"python {shlex.join(command)}"
        print(flush=True)
    print(f"prepared: {', '.join(name for name in names if name not in missing) or 'nothing'}")
    print(f"missing: {', '.join(missing) or 'nothing'}")
    for command_line in missing.values():
        print(f"  the error is above; to try again run: {command_line}")
    return 1 if missing else 0


def script_command(name: str, options: AllOptions) -> list[str]:
    """The script of a data set and its options; an option given here comes last and overrides the default."""
    command = [f"{Path(__file__).parent}/prepare-{name}.py", *SCRIPTS[name]]
    if options.output_dir:
        command += ["--output_dir", options.output_dir]
    if options.limit:
        command += ["--limit", str(options.limit)]
    if options.tokenizer:
        command += ["--tokenizer", options.tokenizer]
    return [*command, "--force"] if options.force else command


if __name__ == "__main__":
    run_script(main)
