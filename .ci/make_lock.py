"""Write requirements.lock: the exact version of every package that requirements-dev.txt installs.

    python .ci/make_lock.py

pip resolves the requirements as for an empty environment and installs nothing. The file is used as constraints
(`pip install -r requirements.txt -c requirements.lock`), so a package that another platform needs in addition is still
accepted. torch's build (CPU or CUDA) is the one that the package index offers. Its CUDA libraries, which torch pins
itself, and setuptools, which belongs to the environment, are left out.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = re.compile(r"nvidia-|cuda-|triton$|setuptools$")
HEADER = "# Made by `make lock`; use: pip install -r requirements.txt -c requirements.lock\n"


def main() -> None:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    command += ["--disable-pip-version-check", "--report", "-", "-r", "requirements-dev.txt"]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout)
    found = [(item["metadata"]["name"], item["metadata"]["version"]) for item in report["install"]]
    lines = [f"{name}=={version.partition('+')[0]}\n" for name, version in found if not LEFT_OUT.match(name)]
    (ROOT / "requirements.lock").write_text(HEADER + "".join(sorted(lines, key=str.lower)), "utf-8")


if __name__ == "__main__":
    main()
