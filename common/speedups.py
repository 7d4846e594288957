"""The one module that imports fast/, and only if the folder exists and the user wants it."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parent.parent / "fast"


def load_speedups(plain: bool, folder: Path = FOLDER) -> ModuleType | None:
    """The package `fast`, or None with `--plain` and in a copy of the project without the folder.

    An error inside the package is not caught: a broken installation must not silently run slowly.
    """
    if plain or not (folder / "__init__.py").is_file():
        return None
    return importlib.import_module("fast")
