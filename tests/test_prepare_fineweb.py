"""data/prepare-fineweb.py with a local server as the hub: complete, interrupted and resumed, damaged, disk full."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hub_server import HubServer

from data.dataset import open_dataset, read_info
from data.documents import read_prepared
from setup_tokenizer import ENDOFTEXT_ID
from tests.test_hub import ROOT, Outcome, Run, parquet, run_scripts  # noqa: F401
from tests.token_shards import ids_before, shard_bytes, write_shards

SCRIPT = str(ROOT / "data" / "prepare-fineweb.py")
REPOSITORY = "kjj0/fineweb10B-gpt2"
EDU_REPOSITORY = "karpathy/fineweb-edu-100B-gpt2-token-shards"
VAL, FIRST, SECOND = "fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"
TRAIN_IDS = ids_before([f"Page {n} of the web, with {n * n} words." for n in range(200)])
VAL_IDS = ids_before([f"Another page {n}." for n in range(40)])


def served(**changes: bytes) -> dict[str, dict[str, bytes]]:
    """What the hub serves: two train shards and one for validation; `changes` replace the content of VAL or FIRST."""
    halves = np.array_split(np.array(TRAIN_IDS), 2)
    files = {VAL: shard_bytes(VAL_IDS), FIRST: shard_bytes(halves[0]), SECOND: shard_bytes(halves[1])}
    names = {"val": VAL, "first": FIRST}
    return {REPOSITORY: files | {names[key]: content for key, content in changes.items()}}


def fineweb(run_scripts: Run, hub: HubServer, folder: Path, *options: str) -> Outcome:
    """How the script ends, with two shards and the output in `folder`/out."""
    arguments = [SCRIPT, "--output_dir", str(folder / "out"), "--shards", "2", *options]
    (outcome,) = run_scripts([arguments], folder, hub.environment(folder / "cache"))
    return outcome


def sentence_of(outcome: Outcome) -> str:
    assert outcome.status == 1 and "Traceback" not in outcome.errors, outcome.errors
    return outcome.errors.strip().splitlines()[-1]


def test_the_shards_are_downloaded_once_and_used_where_they_are(tmp_path, run_scripts):
    with HubServer(served()) as hub:
        outcome = fineweb(run_scripts, hub, tmp_path)
        assert not outcome.status, outcome.errors
        hub.requests.clear()
        again = fineweb(run_scripts, hub, tmp_path)
        assert not again.status and not any(request.startswith("GET") for request in hub.requests)
    assert "ODC-By" in outcome.output and "fineweb: kjj0/fineweb10B-gpt2, 2 of 103 shards" in outcome.output
    assert outcome.output.splitlines()[-1].startswith("next: python train.py --dataset fineweb")
    streams, info = open_dataset(tmp_path / "out", "fineweb")
    assert streams["train"].read(0, len(streams["train"])).tolist() == TRAIN_IDS
    assert streams["val"].read(0, len(streams["val"])).tolist() == VAL_IDS
    assert all(str(tmp_path / "cache") in file.file for split in info.splits.values() for file in split.files)
    assert info.yardstick.startswith(f"the first {len(VAL_IDS) - 1} tokens") and "3.28" in info.yardstick
    assert (info.splits["train"].documents, info.splits["val"].documents) == (200, 40)


def test_a_download_that_breaks_off_continues_with_the_next_run(tmp_path, run_scripts):
    with HubServer(served(), {SECOND: "cut"}) as hub:
        broken = fineweb(run_scripts, hub, tmp_path)
        hub.faults.clear()
        hub.requests.clear()
        again = fineweb(run_scripts, hub, tmp_path)
    sentence = sentence_of(broken)
    assert f"{SECOND} of {REPOSITORY} not downloaded" in sentence and "run the command again" in sentence
    assert not again.status, again.errors
    fetched = [request for request in hub.requests if request.startswith("GET")]
    assert fetched and all(SECOND in request for request in fetched), "what is complete is not fetched again"
    assert read_info(tmp_path / "out", "fineweb").splits["train"].tokens == len(TRAIN_IDS)


@pytest.mark.parametrize(
    ("damaged", "said"),
    [
        (shard_bytes([ENDOFTEXT_ID, 5], (1, 1)), "begins with 1"),
        (shard_bytes([ENDOFTEXT_ID, 5])[:-2], "has 1,026 bytes, but its header promises 2 tokens"),
        (shard_bytes([ENDOFTEXT_ID, 60000]), "contains the id 60000"),
    ],
    ids=["magic", "truncated", "id"],
)
def test_a_damaged_shard_is_refused_and_nothing_is_written(tmp_path, run_scripts, damaged, said):
    with HubServer(served(first=damaged)) as hub:
        sentence = sentence_of(fineweb(run_scripts, hub, tmp_path))
    assert FIRST in sentence and said in sentence
    assert not (tmp_path / "out" / "fineweb.json").exists()


FULL = """
import runpy, shutil, sys
sys.argv = {arguments!r}
free = shutil.disk_usage("/")._replace(free=1 << 20)
shutil.disk_usage = lambda path: free
runpy.run_path(sys.argv[0], run_name="__main__")
"""
LIMITED = """
import resource, runpy, signal, sys
sys.argv = {arguments!r}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.RLIM_INFINITY))
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (FULL, "downloading 3 shards needs 0.56 GiB in {cache}, but only 0.00 GiB are free"),
        (LIMITED, "{cache} not written: File too large"),  # the disk refuses while a shard is written
    ],
)
def test_a_full_disk_is_said_before_and_during_the_download(tmp_path, run_scripts, program, said):
    arguments = [SCRIPT, "--output_dir", str(tmp_path / "out"), "--shards", "2"]
    (tmp_path / "program.py").write_text(program.format(arguments=arguments))
    with HubServer(served()) as hub:
        environment = hub.environment(tmp_path / "cache")
        (outcome,) = run_scripts([[str(tmp_path / "program.py")]], tmp_path, environment)
    assert said.format(cache=tmp_path / "cache" / "hub") in sentence_of(outcome)


def test_fineweb_edu_has_its_own_repository_and_name(tmp_path, run_scripts):
    files = {f"edu_{name}": content for name, content in served()[REPOSITORY].items()}
    with HubServer({EDU_REPOSITORY: files}) as hub:
        outcome = fineweb(run_scripts, hub, tmp_path, "--edu")
    assert not outcome.status, outcome.errors
    assert f"fineweb-edu: {EDU_REPOSITORY}, 2 of 1001 shards" in outcome.output
    _, info = open_dataset(tmp_path / "out", "fineweb-edu")
    assert "3.28" not in info.yardstick, "that is a loss on FineWeb"


def test_local_shards_need_no_hub(tmp_path, run_scripts):
    write_shards(tmp_path / "shards", TRAIN_IDS, VAL_IDS)
    arguments = [SCRIPT, "--output_dir", "out", "--input", str(tmp_path / "shards")]
    outcomes = run_scripts([[*arguments, "--shards", "1"], arguments], tmp_path, {"HF_HUB_OFFLINE": "1"})
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes
    streams, info = open_dataset(tmp_path / "out", "fineweb")
    assert len(streams["train"]) == len(TRAIN_IDS) and "3 local shards" in info.source


def test_more_shards_than_there_are_is_an_error_of_the_options(tmp_path, run_scripts):
    (outcome,) = run_scripts([[SCRIPT, "--shards", "104"]], tmp_path, {})
    assert outcome.status == 2 and "--shards must be at most 103" in outcome.errors


def test_fineweb_edu_is_prepared_from_its_text_in_shards(tmp_path, run_scripts):
    texts = [f"Lesson {n} about {n * n} stars. They shine." for n in range(60)]
    card = b"---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n"
    card += b"  - {split: train, path: sample/10BT/*}\n- config_name: default\n  data_files:\n"
    card += b"  - {split: train, path: data/*/*}\n---\n"
    halves = [parquet([{"text": text, "url": "x"} for text in part]) for part in (texts[:30], texts[30:])]
    files = {f"sample/10BT/00{n}_00000.parquet": half for n, half in enumerate(halves)}
    script = str(ROOT / "data" / "prepare-fineweb-text.py")
    with HubServer({"HuggingFaceFW/fineweb-edu": {**files, "README.md": card}}) as hub:
        arguments = [script, "--output_dir", "out", "--shard_tokens", "200"]
        (outcome,) = run_scripts([arguments], tmp_path, hub.environment(tmp_path / "cache"))
    assert not outcome.status, outcome.errors
    info = read_info(tmp_path / "out", "fineweb-text")
    assert "fineweb-edu, sample-10BT" in info.source and "ODC-By" in info.licence
    assert len(info.splits["train"].files) > 2, "shards"
    found = [text for split in ("train", "val") for text in read_prepared(tmp_path / "out", info, split)]
    assert sorted(found) == sorted(texts)
