"""The one loader of fast/, which replaces plain parts by faster ones."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType


def load_speedups(plain: bool = False) -> ModuleType | None:
    """The package `fast`; None with `plain`, or if its folder was deleted. Any fault inside it is raised."""
    if plain or importlib.util.find_spec("fast") is None:
        return None
    return importlib.import_module("fast")
