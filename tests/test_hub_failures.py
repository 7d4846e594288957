"""Downloads from the hub that fail or break off: one sentence, and nothing left behind."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from hub_server import HubServer, closed_endpoint, hub_environment

from data.dataset import read_info
from tests.test_hub import (  # noqa: F401
    DATASETS,
    ROOT,
    Outcome,
    Run,
    assert_one_sentence,
    chat_records,
    parquet,
    prepare_all,
    repositories,
    run_scripts,
)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("missing", "HTTP 404"),
        ("cut", ""),
        ("wrong length", ""),
        ("no network", "Connect"),
    ],
)
def test_a_failed_download_is_one_sentence_and_leaves_nothing_behind(tmp_path, run_scripts, fault, said):
    faults = {path: fault for *_, path, _ in DATASETS.values()}
    with HubServer(repositories(), faults) as hub:
        endpoint = closed_endpoint() if fault == "no network" else hub.endpoint
        outcomes = prepare_all(run_scripts, tmp_path, hub_environment(endpoint, tmp_path / "cache"))
    for name, outcome in outcomes.items():
        assert_one_sentence(name, outcome)
        assert said in outcome.errors.strip().splitlines()[-1], outcome.errors
    left = [path.name for path in tmp_path.glob("out/*") if not path.name.endswith(".lock")]
    assert left == []


def run_program(run_scripts: Run, program: str, folder: Path, environment: dict[str, str]) -> Outcome:
    """How a few lines of Python end."""
    (folder / "program.py").write_text(program)
    (outcome,) = run_scripts([[str(folder / "program.py")]], folder, environment)
    return outcome


def test_a_connection_cut_once_is_resumed_where_it_broke(tmp_path, run_scripts):
    # huggingface_hub writes in pieces of 10 MiB and resumes after the last one.
    payload = os.urandom(1 << 20) * 24
    program = """
import hashlib
from data.readers.hub import fetch_data_files
from data.sources import HubSource
(path,) = fetch_data_files([HubSource("owner/name", "main", ("big.bin",))])
print(hashlib.sha256(path.read_bytes()).hexdigest())
"""
    with HubServer({"owner/name": {"big.bin": payload}}, {"big.bin": "cut once"}) as hub:
        outcome = run_program(run_scripts, program, tmp_path, hub.environment(tmp_path / "cache"))
    assert outcome.output.strip() == hashlib.sha256(payload).hexdigest(), outcome.errors
    assert hub.ranges == [f"big.bin {10 << 20}"]


def test_a_connection_that_breaks_between_records_is_one_sentence(tmp_path, run_scripts):
    first, second = "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"
    files = {path: parquet([{"text": path}] * 10) for path in (first, second)}
    program = """
from data.readers.hub import stream_hub
from common.cli import UserError
count = 0
try:
    for record in stream_hub("owner/name"):
        count += 1
except UserError as error:
    print(count, error)
"""
    with HubServer({"owner/name": files}, {second: "cut"}) as hub:
        outcome = run_program(run_scripts, program, tmp_path, hub.environment(tmp_path / "cache"))
    count, sentence = outcome.output.split(" ", 1)
    assert int(count) == 10
    assert sentence.startswith("owner/name not downloaded") and "--input" in sentence


def test_every_chat_source_is_read_in_its_own_layout_and_a_gated_one_asks_for_a_token(tmp_path, run_scripts):
    rows = [
        {
            "message_id": f"{role}{n}",
            "parent_id": parent,
            "role": role,
            "text": f"{role} {n}",
            "rank": rank,
            "lang": "en",
        }
        for n in range(12)
        for role, parent, rank in (("prompter", None, None), ("assistant", f"prompter{n}", 0))
    ]
    pairs = [{"instruction": f"q{n}", "context": "", "response": f"a{n}", "category": "x"} for n in range(20)]
    served = {
        "HuggingFaceTB/smoltalk": {
            "data/everyday-conversations/train-00000-of-00001.parquet": parquet(chat_records(0, 9)),
            "data/everyday-conversations/test-00000-of-00001.parquet": parquet(chat_records(9, 11)),
            "data/all/train-00000-of-00009.parquet": parquet(chat_records(20, 30)),
            "README.md": b"---\nconfigs:\n- config_name: all\n  data_files:\n"
            b"  - {split: train, path: data/all/train-*}\n- config_name: everyday-conversations\n  data_files:\n"
            b"  - {split: train, path: data/everyday-conversations/train-*}\n"
            b"  - {split: test, path: data/everyday-conversations/test-*}\n---\n",
        },
        "OpenAssistant/oasst1": {
            "data/train-00000-of-00001.parquet": parquet(rows[:18]),
            "data/validation-00000-of-00001.parquet": parquet(rows[18:]),
        },
        "databricks/databricks-dolly-15k": {
            "databricks-dolly-15k.jsonl": "".join(json.dumps(pair) + "\n" for pair in pairs).encode()
        },
        "HuggingFaceTB/smol-smoltalk": dict.fromkeys(
            ("data/train-0.parquet", "data/test-0.parquet"), parquet(chat_records(0, 9))
        ),
    }
    expected = {"everyday": (9, 2), "oasst1": (9, 3), "dolly": (19, 1)}
    script = str(ROOT / "data" / "prepare-chat.py")
    runs = [[script, "--source", source, "--output_dir", str(tmp_path / source)] for source in expected]
    runs.append([script, "--output_dir", str(tmp_path / "gated")])
    with HubServer(served, dict.fromkeys(served["HuggingFaceTB/smol-smoltalk"], "gated")) as hub:
        *outcomes, gated = run_scripts(runs, tmp_path, hub.environment(tmp_path / "cache"))
    assert gated.status == 1 and "HF_TOKEN" in gated.errors.splitlines()[-1] and "Traceback" not in gated.errors
    for (source, counts), outcome in zip(expected.items(), outcomes, strict=True):
        assert not outcome.status, outcome.errors
        splits = read_info(tmp_path / source, "chat").splits
        assert tuple(splits[split].documents for split in ("train", "val")) == counts
