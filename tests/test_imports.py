"""Who may import whom, read from the syntax trees; and importing a module does nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {
    "common",
    "data",
    "training",
    "generation",
    "exchange",
    "fast",
}  # folders whose modules are imported as room.module
PARTS = [ROOT / "data" / part for part in ("readers", "layouts", "chitchat")]
FOLDERS = (ROOT, ROOT / "testing_tools", *(ROOT / room for room in sorted(ROOMS)), *PARTS)
PATHS = sorted(path for folder in FOLDERS for path in folder.glob("*.py"))
OWN = {path.stem for path in PATHS}
EVERYWHERE = {"cli", "device", "files", "hub"}

# Beside the standard library and EVERYWHERE: what a module imports when it is imported, and what only inside its
# functions. A module that is missing here may import any own module that is no script, and any installed package.
TABLE = {
    "cli": (set(), set()),
    "device": (set(), {"torch", "numpy"}),
    "allocator": (set(), set()),
    "files": (set(), set()),
    "setup_tokenizer": ({"tiktoken"}, {"numpy"}),
    "tied_head": ({"torch"}, set()),
    "cpu_backward": ({"torch"}, set()),
    "cuda_decode": ({"torch"}, set()),
    "model": ({"torch", "tied_head", "cpu_backward", "cuda_decode"}, set()),
    "tokenizer_files": ({"tiktoken", "setup_tokenizer"}, set()),
    "hugging_face": ({"torch", "model", "setup_tokenizer", "tokenizer_files"}, {"safetensors", "huggingface_hub"}),
    "checkpoint": ({"torch", "model", "hugging_face"}, {"numpy"}),
    "model_card": ({"mixture"}, set()),
    "gguf_file": ({"torch", "model", "setup_tokenizer", "tokenizer_files"}, {"gguf"}),
    "export": (
        {"model_card"},
        {"checkpoint", "hugging_face", "gguf_file", "model", "setup_tokenizer", "tokenizer_files"},
    ),
    "dataset": ({"setup_tokenizer", "token_stream"}, set()),
    "token_stream": ({"numpy", "setup_tokenizer"}, set()),
    "targets": ({"numpy", "setup_tokenizer"}, set()),
    "rows": ({"numpy", "token_stream", "model", "setup_tokenizer", "targets"}, set()),
    "batches": ({"numpy", "model", "rows"}, set()),
    "metrics": (set(), {"matplotlib", "torch"}),
    "mixture": ({"numpy"}, set()),
    "parallel": ({"torch", "numpy", "model"}, set()),
    "muon": ({"torch", "parallel"}, set()),
    "optimizers": ({"torch", "model", "muon"}, set()),
    "memory": ({"torch", "numpy", "model", "parallel", "tied_head"}, set()),
    "run": ({"torch", "model", "checkpoint", "metrics", "mixture", "parallel"}, set()),
    "measurements": ({"torch", "run"}, set()),
    "progress": ({"torch", "model", "mixture"}, {"setup_tokenizer"}),
    "start": ({"model", "checkpoint", "mixture", "parallel"}, set()),
    "train": (
        {
            "allocator",
            *("torch", "numpy", "model", "checkpoint", "batches", "measurements", "memory", "mixture", "optimizers"),
            *("dataset", "parallel", "progress", "rows", "run", "start", "targets"),
        },
        set(),
    ),
    "row_kernels": ({"torch"}, set()),
    "packed_linear": ({"torch", "model", "row_kernels"}, set()),
    "engine": ({"torch", "tiktoken", "model", "setup_tokenizer"}, set()),
    "chat": ({"setup_tokenizer"}, set()),
    "terminal": (set(), set()),
    "gen": ({"allocator", "setup_tokenizer", "chat", "terminal"}, {"checkpoint", "engine", "packed_linear", "mixture"}),
}
# Data is prepared without torch, directly or through another module.
NO_TORCH = {
    "cli",
    "device",
    "allocator",
    "files",
    "setup_tokenizer",
    "gen",
    "chat",
    "terminal",
    "tokenizer_demo",
    "prepare_with_extended_tokenizer",
    "tokenizer_files",
    "model_card",
    "mixture",
    "export",
}
DATA = {path for path in PATHS if path.relative_to(ROOT).parts[0] == "data"}
NO_TORCH |= {path.stem for path in DATA}


@dataclass(frozen=True)
class Imports:
    at_import: frozenset[str]
    in_functions: frozenset[str]


class _Collector(ast.NodeVisitor):
    def __init__(self):
        self.depth, self.found = 0, {False: set(), True: set()}

    def visit_FunctionDef(self, node):
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1

    visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

    def visit_If(self, node):
        if "TYPE_CHECKING" not in ast.dump(node.test):
            self.generic_visit(node)

    def visit_Import(self, node):
        self.found[self.depth > 0].update(alias.name.split(".")[0] for alias in node.names)

    def visit_ImportFrom(self, node):
        assert node.level == 0, "relative imports have no place among scripts"
        first, *rest = node.module.split(".")
        names = rest[-1:] or {alias.name for alias in node.names} if first in ROOMS else [first]
        self.found[self.depth > 0].update(names)


def imports_of(source: str) -> Imports:
    """The top-level names that a module imports, without the standard library."""
    collector = _Collector()
    collector.visit(ast.parse(source))
    at_import, in_functions = (names - set(sys.stdlib_module_names) for names in collector.found.values())
    return Imports(frozenset(at_import), frozenset(in_functions))


def is_script(path: Path) -> bool:
    """Whether a file is run rather than imported: it has an `if __name__ == "__main__"`."""
    return any(
        isinstance(node, ast.If) and "__main__" in ast.dump(node.test)
        for node in ast.parse(path.read_text("utf-8")).body
    )


SCRIPTS = {path.stem for path in PATHS if is_script(path)}
MEASURED = {"benchmark_work": {"train"}}  # the benchmark times the functions of the loop itself, not a copy


def test_the_reader_of_imports_sees_all_of_them():
    source = (
        "import os, torch.nn as nn\nfrom numpy import array\n"
        "if TYPE_CHECKING:\n    import tiktoken\n"
        "try:\n    import tqdm\nexcept ImportError:\n    pass\n"
        "class A:\n    import ftfy\n    def f(self):\n        import datasets\n"
        "g = lambda: __import__('os')\n"
    )
    assert imports_of(source) == Imports(frozenset({"torch", "numpy", "tqdm", "ftfy"}), frozenset({"datasets"}))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_what_its_room_allows(path):
    imports = imports_of(path.read_text("utf-8"))
    if path.stem in TABLE and path.parent not in PARTS:
        at_import, in_functions = TABLE[path.stem]
        assert imports.at_import - EVERYWHERE == at_import
        assert imports.in_functions - EVERYWHERE - at_import == in_functions
    if path.stem in NO_TORCH:
        assert "torch" not in imports.at_import
    if path in DATA:
        assert not {"torch", "model", "checkpoint", "train", "gen"} & (imports.at_import | imports.in_functions)
    imported_scripts = SCRIPTS & (imports.at_import | imports.in_functions)
    assert imported_scripts <= MEASURED.get(path.stem, set()), "scripts never import scripts"


def test_files_that_are_run_are_guarded():
    unguarded = []
    for path in PATHS:
        for node in ast.parse(path.read_text("utf-8")).body:
            call = node.value if isinstance(node, ast.Expr) else None
            if isinstance(call, ast.Call) and not ast.unparse(call).startswith("sys.path."):
                unguarded.append(f"{path.name}: {ast.unparse(call)}")
    assert not unguarded


def test_the_search_path_is_changed_once_and_only_where_folders_meet():
    for path in PATHS:
        changes = path.read_text("utf-8").count("sys.path.")
        if path.parent.name == "testing_tools":
            assert changes <= 1, path.name
        else:
            assert changes == (path in DATA and path.stem.startswith("prepare-")), path.name


# Imports each file under a name of its own and reports what that did beside defining names. The packages are imported
# first, so that what they do is not counted.
OBSERVER = """
import argparse, contextlib, importlib, importlib.util, io, json, os, random, sys, warnings
root, packages, paths = json.loads(sys.argv[1])
sys.argv = ["observer", "--nonsense"]
sys.path[:0] = [root, os.path.join(root, "testing_tools")]
warnings.simplefilter("ignore")
for name in packages:
    importlib.import_module(name)
import numpy
opened, report = [], {}
def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        opened.append(arguments[0])
sys.addaudithook(watch)
def refuse(*arguments, **settings):
    raise AssertionError("parsed arguments")
argparse.ArgumentParser.parse_args = refuse
argparse.ArgumentParser.parse_known_args = refuse
for path in paths:
    before = random.getstate(), str(numpy.random.get_state())
    opened.clear()
    output = io.StringIO()
    spec = importlib.util.spec_from_file_location("observed_" + os.path.basename(path)[:-3].replace("-", "_"), path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        spec.loader.exec_module(module)
    read = [name for name in opened if name.startswith(root) and not name.endswith((".py", ".pyc"))
            and ".pyc." not in name and os.sep + "site-packages" + os.sep not in name and not os.path.isdir(name)]
    seeded = before != (random.getstate(), str(numpy.random.get_state()))
    report[path] = [output.getvalue(), read, seeded]
print(json.dumps(report))
"""


def test_importing_prints_nothing_reads_nothing_and_seeds_nothing():
    import json

    used = set().union(*(imports_of(path.read_text("utf-8")).at_import for path in PATHS)) - OWN
    paths = [str(path) for path in PATHS]
    arguments = json.dumps([str(ROOT), sorted(used - {"pytest"}), paths])
    done = subprocess.run([sys.executable, "-c", OBSERVER, arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert sorted(report) == paths
    assert {path: found for path, found in report.items() if found != ["", [], False]} == {}


def test_torch_is_not_loaded_where_it_is_not_needed():
    paths = [path for path in PATHS if path.stem in NO_TORCH]
    program = (
        "import importlib.util, sys\n"
        f"sys.path[:0] = {[str(ROOT)]!r}\n"
        "for path in sys.argv[1:]:\n"
        "    spec = importlib.util.spec_from_file_location('observed', path)\n"
        "    sys.modules['observed'] = module = importlib.util.module_from_spec(spec)\n"
        "    spec.loader.exec_module(module)\n"
        "    assert 'torch' not in sys.modules, path\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *map(str, paths)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
