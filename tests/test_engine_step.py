"""The step for data engines: its shards against the result of one machine, alone and in datatrove's local executor."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from data.dataset import open_dataset
from data.documents import read_prepared
from data.engine_step import TokenShards
from data.readers.shards import check_shard, read_shard_documents
from tests.test_prepare_story import inline  # noqa: F401

OWN = "prepare_with_extended_tokenizer.py"
TEXTS = [f"Page {n}: â€œTomâ€ has {n * n} cats.\r\nThey   play {'and play ' * (n % 9)}." for n in range(120)]


def one_machine(folder, inline) -> list[str]:
    """The documents that the usual preparation makes of TEXTS, sorted."""
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), "utf-8")
    inline(OWN, "--input", "texts.jsonl", "--name", "one", "--output_dir", ".")
    _, info = open_dataset(folder, "one")
    return sorted(text for split in ("train", "val") for text in read_prepared(folder, info, split))


def test_the_shards_of_two_tasks_are_the_documents_of_one_machine(tmp_path, inline):
    step = TokenShards("shards", tokens_per_shard=500, batch_characters=400)
    halves = [[SimpleNamespace(text=text) for text in part] for part in (TEXTS[:60] + TEXTS[:9], TEXTS[60:])]
    passed = [list(step(half, rank, 2)) for rank, half in enumerate(halves)]
    assert passed == halves, "documents are passed on"
    paths = sorted((tmp_path / "shards").iterdir())
    assert len(paths) > 4 and all(check_shard(path).documents for path in paths)
    found = [text for path in paths for text in read_shard_documents(path)]
    assert sorted(found) == one_machine(tmp_path, inline), "repeats within a task are dropped"
    inline(OWN, "--input", "shards", "--name", "web", "--output_dir", ".")
    streams, info = open_dataset(tmp_path, "web")
    n_tokens = sum(check_shard(path).tokens for path in paths)
    assert len(streams["train"]) + len(streams["val"]) == n_tokens and not info.has_text
    again = list(step(halves[0][:1], 0, 2))
    assert len(again) == 1 and len(list((tmp_path / "shards").glob("train_00000_*"))) == 1, "a task is repeated alone"


def test_it_is_a_step_of_datatroves_local_executor(tmp_path, inline):
    pytest.importorskip("datatrove", reason="pip install -r requirements-engine.txt")
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader

    (tmp_path / "input").mkdir()
    for number in range(3):
        records = [json.dumps({"text": text, "id": str(n)}) + "\n" for n, text in enumerate(TEXTS[number::3])]
        (tmp_path / "input" / f"{number}.jsonl").write_text("".join(records), "utf-8")
    pipeline = [JsonlReader(str(tmp_path / "input")), TokenShards(str(tmp_path / "shards"))]
    LocalPipelineExecutor(pipeline=pipeline, tasks=3, workers=1, logging_dir=str(tmp_path / "logs")).run()
    paths = sorted((tmp_path / "shards").iterdir())
    assert [path.name for path in paths] == [f"train_{rank:05d}_00000.bin" for rank in range(3)]
    assert sorted(text for path in paths for text in read_shard_documents(path)) == one_machine(tmp_path, inline)
