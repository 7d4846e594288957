"""common/speedups.py: fast/ is left out on request and if the folder is missing, but not if it is broken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from common import speedups

ROOT = Path(speedups.__file__).parent.parent
PROGRAM = "from common.speedups import load_speedups; m = load_speedups(plain={}); print(m and m.__name__)"


def copy_of_loader(folder: Path) -> Path:
    (folder / "common").mkdir()
    (folder / "common" / "speedups.py").write_text(Path(speedups.__file__).read_text("utf-8"), "utf-8")
    return folder


def run(folder: Path, plain: bool) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", PROGRAM.format(plain)], capture_output=True, text=True, cwd=folder)


def test_the_package_is_loaded_unless_the_user_wants_the_plain_code(tmp_path):
    folder = copy_of_loader(tmp_path)
    (folder / "fast").mkdir()
    (folder / "fast" / "__init__.py").write_text("")
    assert run(folder, plain=False).stdout == "fast\n"
    assert run(folder, plain=True).stdout == "None\n"


def test_without_the_folder_the_plain_code_runs(tmp_path):
    done = run(copy_of_loader(tmp_path), plain=False)
    assert (done.stdout, done.stderr) == ("None\n", "")


def test_an_error_in_the_package_is_shown(tmp_path):
    folder = copy_of_loader(tmp_path)
    (folder / "fast").mkdir()
    (folder / "fast" / "__init__.py").write_text("import a_package_that_nobody_has")
    done = run(folder, plain=False)
    assert done.returncode == 1 and "a_package_that_nobody_has" in done.stderr
