"""The prepare scripts against a stand-in for the hub on loopback: success, and each way in which a download fails.

The real huggingface_hub and datasets run, for each state of the network in a process of their own, which a process
with their dependencies in memory forks: importing these takes longer than the scripts do.
"""

from __future__ import annotations

import functools
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hub_server import HubServer, closed_endpoint, hub_environment

from data.dataset import read_info
from data.documents import read_prepared
from data.sources import SOURCES
from tests.forked_python import forked_python

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process for each state of the network")

# The clients' waits between retries (25 s in all without a network) are skipped, the retries are not.
PRELUDE = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import numpy, pandas, pyarrow.dataset, pyarrow.parquet, tqdm
from data.encoding import encode_documents
encode_documents(["a text"])
time.sleep = lambda seconds: None
assert not {{"huggingface_hub", "datasets"}} & set(sys.modules), "these read the environment when they are imported"
"""


class Outcome(NamedTuple):
    """How a script ended."""

    status: int
    output: str
    errors: str


Run = Callable[[list[list[str]], Path, dict[str, str]], list[Outcome]]


@pytest.fixture(scope="module")
def run_scripts(tmp_path_factory) -> Iterator[Run]:
    """A function from ([script, argument, ...] of each run, working folder, environment) to the runs' outcomes."""
    with forked_python(tmp_path_factory.mktemp("python"), PRELUDE) as python:

        def run_scripts(runs: list[list[str]], folder: Path, environment: dict[str, str]) -> list[Outcome]:
            settings = {"cwd": folder, "env": os.environ | environment, "stdin": subprocess.DEVNULL}
            done = [subprocess.run([python, *run], capture_output=True, text=True, **settings) for run in runs]
            return [Outcome(each.returncode, each.stdout, each.stderr) for each in done]

        yield run_scripts


def parquet(records: list[dict]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file, compression="none", row_group_size=500)
    return file.getvalue()


def talks(first: int, last: int) -> list[list[str]]:
    return [[f"Question {number} ?", f"Answer {number} ."] for number in range(first, last)]


def chat_records(first: int, last: int) -> list[dict]:
    roles = ("user", "assistant")
    return [
        {"messages": [{"role": role, "content": turn} for role, turn in zip(roles, talk, strict=True)]}
        for talk in talks(first, last)
    ]


def stories(first: int, last: int) -> bytes:
    return "".join(f"Story {number}.\n<|endoftext|>\n" for number in range(first, last)).encode()


# Data set -> script, repository, files for train and validation, documents expected in each.
DIALOGUE_FILES = (
    "data/train-00000-of-00001-f151c79abb2c1fd5.parquet",
    "data/validation-00000-of-00001-2407eb323af19881.parquet",
)
DATASETS = {
    "story": ("prepare-story.py", "roneneldan/TinyStories", "TinyStoriesV2-GPT4-train.txt", (30, 5)),
    "dailydialog": ("prepare-dailydialog.py", "OpenRL/daily_dialog", DIALOGUE_FILES[0], (30, 5)),
    "chat": ("prepare-chat.py", "HuggingFaceTB/smol-smoltalk", "data/train-00000-of-00001.parquet", (2000, 5)),
    "education": (
        "prepare-education.py",
        "HuggingFaceTB/cosmopedia",
        "data/stories/train-00000-of-00001.parquet",
        (38, 2),
    ),
}
COSMOPEDIA_CARD = b"""---
configs:
- config_name: stories
  data_files:
  - split: train
    path: data/stories/train-*
- config_name: wikihow
  data_files:
  - split: train
    path: data/wikihow/train-*
---
"""


@functools.cache
def repositories() -> dict[str, dict[str, bytes]]:
    return {
        "roneneldan/TinyStories": {
            "TinyStoriesV2-GPT4-train.txt": stories(0, 30),
            "TinyStoriesV2-GPT4-valid.txt": stories(30, 35),
        },
        "OpenRL/daily_dialog": {
            DIALOGUE_FILES[0]: parquet([{"dialog": talk} for talk in talks(0, 30)]),
            DIALOGUE_FILES[1]: parquet([{"dialog": talk} for talk in talks(30, 35)]),
        },
        "HuggingFaceTB/smol-smoltalk": {
            "data/train-00000-of-00001.parquet": parquet(chat_records(0, 2000)),
            "data/test-00000-of-00001.parquet": parquet(chat_records(2000, 2005)),
        },
        "HuggingFaceTB/cosmopedia": {
            "README.md": COSMOPEDIA_CARD,
            "data/stories/train-00000-of-00001.parquet": parquet(
                [{"text": f"Lesson {n}.", "prompt": "p"} for n in range(40)]
            ),
            "data/wikihow/train-00000-of-00001.parquet": parquet([{"text": "How to.", "prompt": "p"}]),
        },
    }


def prepare_all(run_scripts: Run, folder: Path, environment: dict[str, str], *options: str) -> dict[str, Outcome]:
    """Data set -> how its script ended."""
    runs = [
        [str(ROOT / "data" / script), "--output_dir", str(folder / "out"), *options] for script, *_ in DATASETS.values()
    ]
    return dict(zip(DATASETS, run_scripts(runs, folder, environment), strict=True))


def assert_one_sentence(name: str, outcome: Outcome) -> None:
    """The script ended with status 1 and one sentence that names --input and the file to fetch by hand."""
    errors = outcome.errors
    assert outcome.status == 1, errors
    assert "Traceback" not in errors
    sentence = errors.strip().splitlines()[-1]
    assert sentence.startswith("error: ") and "--input" in sentence, errors
    _, repository, path, _ = DATASETS[name]
    assert repository in sentence
    assert path in sentence or path.replace("00000-of-00001", "*") in sentence


def test_every_script_prepares_what_the_hub_serves_once(tmp_path, run_scripts):
    with HubServer(repositories()) as hub:
        environment = hub.environment(tmp_path / "cache")
        outcomes = prepare_all(run_scripts, tmp_path, environment)
        for name, (script, repository, _, (n_train, n_val)) in DATASETS.items():
            assert not outcomes[name].status, outcomes[name].errors
            info = read_info(tmp_path / "out", name)
            found = [len(list(read_prepared(tmp_path / "out", info, split))) for split in ("train", "val")]
            assert found == [n_train, n_val], script
            assert any(repository in request for request in hub.requests)
        asked = len(hub.requests)
        again = prepare_all(run_scripts, tmp_path, environment)
        assert all("already prepared" in outcome.output for outcome in again.values())
        assert not any("GET" in request and "/resolve/" in request for request in hub.requests[asked:])
        # What was fetched as a file is in the cache: offline mode finds it there. What was streamed is not stored.
        asked = len(hub.requests)
        offline = prepare_all(run_scripts, tmp_path, environment | {"HF_HUB_OFFLINE": "1"}, "--force")
        recognized = prepare_all(run_scripts, tmp_path, environment | {"HF_HUB_OFFLINE": "1"})
        assert len(hub.requests) == asked
        hub.commit = hub.commit[::-1]
        (later,) = run_scripts(
            [[str(ROOT / "data" / "prepare-education.py"), "--output_dir", str(tmp_path / "out")]],
            tmp_path,
            environment,
        )
    assert not later.status and "already prepared" in later.output, "the revision is pinned"
    assert read_info(tmp_path / "out", "education").input_digest == SOURCES["cosmopedia"][0].revision
    assert all("already prepared" in outcome.output for outcome in recognized.values()), "a pinned revision is known"
    assert not offline["story"].status and not offline["dailydialog"].status, offline
    for name in ("chat", "education"):
        assert_one_sentence(name, offline[name])


def test_a_second_source_is_tried_when_the_first_is_gone(tmp_path, run_scripts):
    official, copy = SOURCES["dailydialog"]
    served = {
        source.repository: {
            name: parquet([{"dialog": talk} for talk in talks(*part)])
            for name, part in zip(source.files, ((0, 30), (30, 35)), strict=True)
        }
        for source in (official, copy)
    }
    script = str(ROOT / "data" / "prepare-dailydialog.py")
    used = {}
    for gone in ((), (official,), (official, copy)):
        folder = tmp_path / str(len(gone))
        folder.mkdir()
        with HubServer(served) as hub:
            hub.gone_revisions = {source.revision for source in gone}
            (used[len(gone)],) = run_scripts(
                [[script, "--output_dir", str(folder / "out")]], folder, hub.environment(folder / "cache")
            )
            fetched = {
                repository for repository in served if any(f"GET /datasets/{repository}/" in r for r in hub.requests)
            }
        if len(gone) < 2:
            assert not used[len(gone)].status, used[len(gone)].errors
            assert fetched - {source.repository for source in gone} == {(official, copy)[len(gone)].repository}
            info = read_info(folder / "out", "dailydialog")
            assert [info.splits[split].documents for split in ("train", "val")] == [30, 5]
    assert "trying another source" in used[1].errors
    for split in ("train", "val"):
        first, second = (tmp_path / n / "out" / f"dailydialog-{split}.bin" for n in "01")
        assert first.read_bytes() == second.read_bytes()
    sentence = used[2].errors.strip().splitlines()[-1]
    assert used[2].status == 1 and sentence.startswith(f"error: neither {official.files[0]} of {official.repository}")
    for part in (copy.repository, "HTTP 404", *copy.files, copy.revision, "--input train-00000"):
        assert part in sentence


def test_only_the_hubs_own_conversion_and_fineweb_are_not_pinned_by_commit():
    branches = [source for sources in SOURCES.values() for source in sources if not source.is_pinned]
    assert [source.revision for source in branches] == ["refs/convert/parquet", "main", "main", "main"]


def test_all_data_sets_in_one_go_and_what_is_missing_is_said(tmp_path):
    served = {name: files for name, files in repositories().items() if name != "OpenRL/daily_dialog"}
    command = [sys.executable, str(ROOT / "data" / "prepare-all.py"), "dailydialog", "story", "--limit", "20"]
    with HubServer(served) as hub:
        done = subprocess.run(
            [*command, "--output_dir", str(tmp_path / "out")],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env=os.environ | hub.environment(tmp_path / "cache"),
        )
    assert done.returncode == 1
    lines = done.stdout.strip().splitlines()
    assert lines[-3:-1] == ["prepared: story", "missing: dailydialog"] and "prepare-dailydialog.py" in lines[-1]
    assert read_info(tmp_path / "out", "story").splits["train"].documents == 20, "a failure does not stop the others"


def test_check_sources_asks_for_every_file_and_names_the_missing_ones(tmp_path, run_scripts):
    def an_existing_name(pattern: str) -> str:
        return pattern.replace("*", "00000-of-00001")

    served: dict[str, dict[str, bytes]] = {}
    for source in (source for sources in SOURCES.values() for source in sources):
        served.setdefault(source.repository, {}).update({an_existing_name(name): b"x" for name in source.files})
    script = str(ROOT / "testing_tools" / "check_sources.py")
    with HubServer(served) as hub:
        environment = hub.environment(tmp_path / "cache")
        (complete,) = run_scripts([[script]], tmp_path, environment)
        assert not any("/resolve/" in request for request in hub.requests), "nothing is downloaded"
        assert all(any(repository in request for request in hub.requests) for repository in served)
        del served["roneneldan/TinyStories"]["TinyStoriesV2-GPT4-valid.txt"]
        del served["OpenAssistant/oasst1"]
        hub.gone_revisions = {SOURCES["squad"][0].revision}
        (broken, one) = run_scripts([[script], [script, "dolly"]], tmp_path, environment)
    (offline,) = run_scripts([[script]], tmp_path, hub_environment(closed_endpoint(), tmp_path / "cache"))
    assert complete.status == 0 and complete.output.strip().endswith("files are missing"), complete.errors
    assert complete.output.splitlines()[-1].startswith("0 of ")
    assert broken.status == 1 and "4 of " in broken.output
    missing = [line for line in broken.output.splitlines() if line.startswith("missing")]
    assert [line.split()[1] for line in missing] == ["story", "oasst1", "oasst1", "squad"]
    assert "not in the repository" in missing[0] and "HTTP 404" in missing[1]
    assert one.status == 0 and "0 of 1 files" in one.output
    assert offline.status == 1 and "cannot be reached" in offline.errors
