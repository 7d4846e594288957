"""Which module may import which, read from the syntax trees; and importing a module has no side effects."""

from __future__ import annotations

import ast
import graphlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("common", "data", "training", "generation", "evaluation", "exchange", "serving", "fast", "testing_tools")
PATHS = sorted([*ROOT.glob("*.py"), *(path for room in LAYERS for path in (ROOT / room).rglob("*.py"))])


def module_name(path: Path) -> str:
    """The dotted name under which a file is imported; a package's name for its __init__.py."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in PATHS}
SOURCES = {name: path.read_text("utf-8") for name, path in MODULES.items()}
SCRIPTS = {
    name
    for name, source in SOURCES.items()
    if any(isinstance(node, ast.If) and "__main__" in ast.dump(node.test) for node in ast.parse(source).body)
}

# The modules outside its own row that a room may import: whole rooms or single modules. The order is the direction:
# a row names only earlier ones. common.checkpoint and common.lora have rows of their own because they are above the
# network.
TABLE: dict[str, set[str]] = {
    "common": set(),
    "setup_tokenizer": {"common"},
    "model": set(),
    "common.checkpoint": {"common", "model"},
    "common.lora": {"common", "model"},  # training makes adapters, and exchange merges, reads and writes them
    "data": {"common", "setup_tokenizer"},
    "generation": {"common", "setup_tokenizer", "model"},
    "training": {
        *("common", "setup_tokenizer", "model", "data.dataset", "data.token_stream"),
        "data.epochs",  # the iterations that fit a data set: train.py's default is what the prepare scripts advise
        *("generation.decoding", "generation.sampling"),  # for the sample that is printed at each evaluation
    },
    "exchange": {"common", "setup_tokenizer", "model", "data.dataset"},
    "evaluation": {"common", "setup_tokenizer", "model", "data.token_stream", "training.targets", "generation"},
    "serving": {"common", "setup_tokenizer", "model", "generation"},
    "fast": {"common", "model", "generation"},
    "testing_tools": {*LAYERS, "setup_tokenizer", "model"} - {"testing_tools", "fast"},
    "scripts": {*LAYERS, "setup_tokenizer", "model"} - {"testing_tools", "fast"},
}
# Imports outside the table, with the reason.
EXCEPTIONS = {
    ("common.speedups", "fast"),  # the one loader of the package
}

# Modules that load without torch, so that --help and data preparation start at once.
NO_TORCH_ROOMS = ("data",)
NO_TORCH = {
    *("common.cli", "common.output", "common.device", "common.files", "common.hub", "common.ngrams", "common.numbers"),
    *(
        "common.speedups",
        "common.threads",
        "common.token_patterns",
        "common.tokenizer_json",
        "setup_tokenizer",
        "training.mixture",
    ),
    *("exchange.tokenizer_files", "exchange.model_card"),
    *(
        "generation.chat",
        "generation.terminal",
        "generation.word_wrap",
        "gen",
        "serve",
        "export",
        "tokenizer_demo",
        "prepare_with_extended_tokenizer",
    ),
}


def room_of(module: str) -> str:
    """The row of TABLE that a module belongs to."""
    first = module.partition(".")[0]
    return next((row for row in (module, first) if row in TABLE), "scripts")


class _Collector(ast.NodeVisitor):
    """The dotted names that a module imports: at import time under False, inside functions under True."""

    def __init__(self) -> None:
        self.depth, self.found = 0, {False: set(), True: set()}

    def visit_FunctionDef(self, node):
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1

    visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

    def visit_If(self, node):
        if "TYPE_CHECKING" in ast.dump(node.test):  # what only the type checker reads is not loaded
            self.depth += 1
            for child in node.body:
                self.visit(child)
            self.depth -= 1
            for child in node.orelse:
                self.visit(child)
        else:
            self.generic_visit(node)

    def visit_Import(self, node):
        self.found[self.depth > 0].update(alias.name for alias in node.names)

    def visit_ImportFrom(self, node):
        assert node.level == 0, "modules are imported by their full name"
        self.found[self.depth > 0].update(f"{node.module}.{alias.name}" for alias in node.names)

    def visit_Call(self, node):
        if ast.unparse(node.func) == "importlib.import_module" and isinstance(node.args[0], ast.Constant):
            self.found[self.depth > 0].add(node.args[0].value)
        self.generic_visit(node)


def imports_of(source: str) -> tuple[set[str], set[str]]:
    """The dotted names that a module imports at import time, and those only for its functions or the type checker."""
    collector = _Collector()
    collector.visit(ast.parse(source))
    return collector.found[False], collector.found[True]


def own_module(name: str, importer: str) -> str | None:
    """The module of this project that a dotted name is in; None for an installed package.

    A script in testing_tools/ imports the modules of its own folder without the folder's name.
    """
    if importer.startswith("testing_tools.") and f"testing_tools.{name.partition('.')[0]}" in MODULES:
        return f"testing_tools.{name.partition('.')[0]}"
    parts = name.split(".")
    return next((known for n in range(len(parts), 0, -1) if (known := ".".join(parts[:n])) in MODULES), None)


GRAPH = {
    importer: {found for name in set.union(*imports_of(source)) if (found := own_module(name, importer))} - {importer}
    for importer, source in SOURCES.items()
}


def edges() -> Iterator[tuple[str, str]]:
    for importer, imported in sorted(GRAPH.items()):
        for module in sorted(imported):
            yield importer, module


def is_allowed(importer: str, imported: str) -> bool:
    """Whether the table lets `importer` import `imported`."""
    room = room_of(importer)
    if room == room_of(imported) and room != "scripts":
        return imported not in SCRIPTS
    allowed = TABLE[room]
    return imported not in SCRIPTS and any(imported == name or imported.startswith(f"{name}.") for name in allowed)


def test_the_reader_of_imports_sees_all_of_them():
    source = (
        "import os, torch.nn as nn\nfrom numpy import array\n"
        "if TYPE_CHECKING:\n    import tiktoken\nelse:\n    import json\n"
        "try:\n    import tqdm\nexcept ImportError:\n    pass\n"
        "class A:\n    import ftfy\n    def f(self):\n        import datasets\n"
        "g = lambda: importlib.import_module('fast')\n"
    )
    at_import, in_functions = imports_of(source)
    assert at_import == {"os", "torch.nn", "numpy.array", "json", "tqdm", "ftfy"}
    assert in_functions == {"tiktoken", "datasets", "fast"}
    assert own_module("common.cli.UserError", "gen") == "common.cli"
    assert own_module("device_limits.n_cores", "testing_tools.benchmark") == "testing_tools.device_limits"
    assert own_module("numpy.array", "gen") is None


def test_imports_follow_the_table():
    unexpected = {edge for edge in edges() if not is_allowed(*edge)}
    assert unexpected - EXCEPTIONS == set()
    assert unexpected >= EXCEPTIONS, "an exception that nothing needs any more"


def test_the_table_allows_nothing_that_no_module_needs():
    rooms = {room_of(module) for module in MODULES} - {"testing_tools", "scripts"}  # which may import every room
    needed = {(room_of(importer), imported) for importer, imported in edges()}
    unused = {
        (room, name)
        for room in rooms
        for name in TABLE[room]
        if not any(room == other and f"{imported}.".startswith(f"{name}.") for other, imported in needed)
    }
    assert unused == set()


def test_the_table_points_downward():
    order = list(TABLE)
    for room, allowed in TABLE.items():
        if room not in ("testing_tools", "scripts"):  # at the top
            assert all(order.index(room_of(name)) < order.index(room) for name in allowed), room


def test_no_module_imports_itself_in_a_circle():
    """Nor does one that only the type checker reads: a reader meets it all the same."""
    try:
        list(graphlib.TopologicalSorter(GRAPH).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"circular import: {' -> '.join(error.args[1])}")


def test_the_network_imports_torch_alone():
    packages = {name.partition(".")[0] for name in set.union(*imports_of(SOURCES["model"]))}
    assert packages - set(sys.stdlib_module_names) == {"torch"}


def test_data_never_imports_torch():
    for name, source in SOURCES.items():
        if name.partition(".")[0] in NO_TORCH_ROOMS:
            assert "torch" not in {found.partition(".")[0] for found in set.union(*imports_of(source))}, name


def test_files_that_are_run_are_guarded():
    unguarded = []
    for name, source in SOURCES.items():
        for node in ast.parse(source).body:
            call = node.value if isinstance(node, ast.Expr) else None
            if isinstance(call, ast.Call) and not ast.unparse(call).startswith("sys.path."):
                unguarded.append(f"{name}: {ast.unparse(call)}")
    assert not unguarded


def test_the_search_path_is_changed_once_and_only_by_scripts_in_a_folder():
    for name, source in SOURCES.items():
        changes = source.count("sys.path.")
        if name.startswith("testing_tools."):
            assert changes <= 1, name
        else:
            assert changes == name.startswith(("data.prepare-", "data.train-")), name


# Imports each file under a new name and reports what that did besides defining names. Installed packages are imported
# first, so that their own side effects are not counted.
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
    missing = {"fast.triton_attention"} if importlib.util.find_spec("triton") is None else set()
    paths = [str(path) for path in PATHS if path not in {MODULES[name] for name in missing}]
    packages = {
        name.partition(".")[0]
        for importer, source in SOURCES.items()
        if importer not in missing
        for name in imports_of(source)[0]
        if own_module(name, importer) is None
    } - set(LAYERS)
    arguments = json.dumps([str(ROOT), sorted(packages - set(sys.stdlib_module_names) - {"pytest"}), paths])
    done = subprocess.run([sys.executable, "-c", OBSERVER, arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert sorted(report) == paths
    assert {path: found for path, found in report.items() if found != ["", [], False]} == {}


def test_torch_is_not_loaded_where_it_is_not_needed():
    names = sorted(name for name in MODULES if name in NO_TORCH or name.partition(".")[0] in NO_TORCH_ROOMS)
    program = (
        "import importlib.util, sys\n"
        f"sys.path[:0] = {[str(ROOT)]!r}\n"
        "for path in sys.argv[1:]:\n"
        "    spec = importlib.util.spec_from_file_location('observed', path)\n"
        "    sys.modules['observed'] = module = importlib.util.module_from_spec(spec)\n"
        "    spec.loader.exec_module(module)\n"
        "    assert 'torch' not in sys.modules, path\n"
    )
    paths = [str(MODULES[name]) for name in names]
    done = subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
