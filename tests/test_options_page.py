"""docs/options.md is what testing_tools/make_options_page.py writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = (
    "import sys; sys.path.insert(0, 'testing_tools'); import make_options_page as page\n"
    "sys.stdout.reconfigure(encoding='utf-8'); print('\\n'.join(page.script_paths()), page.options_page(), sep='\\f')"
)


def test_the_page_is_up_to_date_and_has_a_section_per_script():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, encoding="utf-8", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    paths, expected = done.stdout.removesuffix("\n").split("\f")
    page = (ROOT / "docs" / "options.md").read_text("utf-8")
    assert page == expected, "run: python testing_tools/make_options_page.py"
    folders = (".", "data", "testing_tools")
    scripts = [path.relative_to(ROOT).as_posix() for folder in folders for path in (ROOT / folder).glob("*.py")]
    for script in scripts:
        source = (ROOT / script).read_text("utf-8")
        if "parse_options(" in source and "__main__" in source:
            assert script in paths.splitlines() or script == "testing_tools/make_options_page.py", script
