"""Many processes: the same losses as one, checkpoints that fit every layout, and an end to every job."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from common.checkpoint import read_info
from common.cli import UserError
from tests.fake_job import fake_job
from tests.tiny import differences, load_checkpoint, losses, options_of_run, prepare, prepare_labels, prepare_pairs, run
from training import parallel
from training.metrics import read_metrics
from training.options import TrainOptions
from training.resume import options_after_restart

ROOT = Path(train.__file__).parent
PROCESSES = 2
N_ITERS = 10
LAST = f"chat{N_ITERS}.pt"
MODEL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16}
# Iterations of eight rows; three validation batches, which two processes cannot share equally.
ADAMW = {
    **{
        "dataset": "chat",
        "max_iters": N_ITERS,
        "optimizer": "adamw",
        "batch_size": 2,
        "gradient_accumulation_steps": 4,
    },
    **{"eval_interval": N_ITERS // 2, "eval_iters": 3, **MODEL},
}
# A micro-batch for each process, whose gradients add up in one order. In any other order the last digits differ, and
# Muon's bfloat16 makes 1e-4 of that: one process alone differs as much between 4 x 2 and 1 x 8 rows.
MUON = {**ADAMW, "optimizer": "muon", "batch_size": 4, "gradient_accumulation_steps": 2, "grad_clip": 0.0}
# Large enough for the kernels of fast/block_kernel.py and its neighbours, where the processor has AMX.
WIDER = {"n_embd": 32, "n_head": 1, "block_size": 64, "batch_size": 16}
KERNELS = {**MUON, **WIDER, "dataset": "text", "dtype": "bfloat16"}
# An adapter, of the first run of the job.
LORA = {**ADAMW, **dict.fromkeys(MODEL), "lora_rank": 4, "lora_chat_rows": True, "dtype": "bfloat16"}


def preferring(data: Path, objective: str) -> dict:
    """A run of DPO or KTO from the model in the folder of the data; three validation batches here, too."""
    dataset = {"dpo": "pairs", "kto": "labels"}[objective]
    settings = {"dataset": dataset, "objective": objective, "init_from": str(data / "chat2.pt"), "learning_rate": 1e-2}
    shape = dict.fromkeys(MODEL)
    return {**ADAMW, **shape, **settings, "batch_size": 4, "gradient_accumulation_steps": 2, "eval_iters": 3}


DROPOUT = {**ADAMW, "dropout": 0.2, "max_iters": 6, "eval_interval": 3, "dataset": "text"}

# One process of a job: the runs of a list one after another. "alone" is a run of the first process, and "stop_after" a
# signal that reaches the second. "dies" kills the second process in step 7.
WORKER = """
import json, os, signal, sys, torch
from unittest import mock
from common.cli import run_script
from fast import keep_freed_memory
from tests.tiny import in_step, run
from training import parallel

def die(gpt, output):
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)

def main():
    keep_freed_memory()
    torch.set_num_threads(1)
    runs = json.load(open(sys.argv[1]))
    with parallel.join_job():
        for options in runs:
            alone, steps, dies = (options.pop(name, None) for name in ("alone", "stop_after", "dies"))
            with in_step(13 if dies else 10**9, die):  # two micro-batches per step
                if not alone:
                    mine = 9999 if steps and parallel.is_first() else steps
                    status = run(stop_after=mine, **options)
                elif parallel.is_first():
                    with mock.patch("torch.distributed.is_initialized", lambda: False):
                        status = run(stop_after=steps, **options)
            print("status", status, flush=True)
            parallel.any_process(False)  # wait for the files of a run of the first process
    return parallel.leave_job(status)

run_script(main)
"""


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = prepare(tmp_path_factory.mktemp("data"), n_tokens=4000)
    prepare_pairs(folder, n_pairs=16)
    prepare_labels(folder, n_labels=18)
    prepare(folder, "chat", n_tokens=4000)
    assert run(folder, folder, **{**ADAMW, "max_iters": 2, "block_size": 64, "n_embd": 16}) == 0
    return folder


def start(folder: Path, runs: list[dict], restarts: int = 0) -> subprocess.Popen:
    """A job of two processes, started as a person does."""
    folder.mkdir(exist_ok=True)
    (folder / "worker.py").write_text(WORKER)
    (folder / "runs.json").write_text(json.dumps(runs, default=str))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}"]
    command = [*torchrun, f"--max-restarts={restarts}", str(folder / "worker.py"), str(folder / "runs.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def output_of(process: subprocess.Popen) -> str:
    try:
        return process.communicate(timeout=150)[0]
    finally:
        process.kill()


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """The folder of what one process makes of each kind of run."""
    folder = tmp_path_factory.mktemp("straight")
    objectives = {objective: preferring(data, objective) for objective in ("dpo", "kto")}
    for name, options in {"adamw": ADAMW, "muon": MUON, "kernels": KERNELS, **objectives}.items():
        assert run(data, folder / name, **options) == 0
    assert run(data, folder / "lora", **LORA, init_from=str(folder / "adamw" / LAST)) == 0
    return folder


@pytest.fixture(scope="module")
def job(data, straight, tmp_path_factory):
    """The folder and the output of one job of two processes that makes run after run."""
    folder = tmp_path_factory.mktemp("job")

    def options(name, **changes):
        return {"data_dir": data, "out_dir": folder / name, **changes}

    resumed = {"resume": True, "dataset": "chat", "max_iters": N_ITERS}
    runs = [
        options("adamw-ddp", **ADAMW),
        options("adamw-fsdp", **ADAMW, parallel="fsdp"),
        options("lora-ddp", **LORA, init_from=straight / "adamw" / LAST),
        options("muon-ddp", **MUON),
        options("muon-fsdp", **MUON, parallel="fsdp", activation_checkpointing=True),
        options("kernels-ddp", **KERNELS),
        options("kernels-fsdp", **KERNELS, parallel="fsdp"),
        # One process, two, two in pieces, two, one.
        options("layouts", **ADAMW, alone=True, stop_after=2),
        options("layouts", **resumed, stop_after=2),
        options("layouts", **resumed, parallel="fsdp", stop_after=2),
        options("layouts", **resumed, parallel="ddp", stop_after=2),
        options("layouts", **resumed, alone=True),
        options("muon-layouts", **MUON, parallel="fsdp", stop_after=3),
        options("muon-layouts", **resumed, parallel="ddp", stop_after=3),
        options("muon-layouts", **resumed, alone=True),
        *(options(f"{kind}-dropout", **DROPOUT, parallel=kind) for kind in ("ddp", "fsdp")),
        *(options(f"{kind}-stopped", **DROPOUT, parallel=kind, stop_after=2) for kind in ("ddp", "fsdp")),
        *(options(f"{kind}-stopped", resume=True, dataset="text", max_iters=6) for kind in ("ddp", "fsdp")),
        *(
            options(f"{objective}-{kind}", **preferring(data, objective), parallel=kind)
            for objective in ("dpo", "kto")
            for kind in ("ddp", "fsdp")
        ),
        options("dpo-layouts", **preferring(data, "dpo"), alone=True, stop_after=2),
        options("dpo-layouts", resume=True, dataset="pairs", max_iters=N_ITERS, stop_after=2),
        options("dpo-layouts", resume=True, dataset="pairs", max_iters=N_ITERS, parallel="fsdp"),
        options("unequal", **{**ADAMW, "batch_size": 3, "gradient_accumulation_steps": 1}),
    ]
    process = start(folder, runs)
    return folder, output_of(process), process.returncode


def largest_difference(folder: Path, reference: Path, column: int = 1) -> float:
    """Between two runs' training losses, or column 2: their validation losses."""
    ours, theirs = (losses(next(path.glob("*.jsonl"))) for path in (folder, reference))
    assert [row[0] for row in ours] == [row[0] for row in theirs] == list(range(N_ITERS + 1))
    pairs = [(a[column], b[column]) for a, b in zip(ours, theirs, strict=True) if a[column] is not None]
    assert len(pairs) == (N_ITERS if column == 1 else 3)
    return max(abs(a - b) for a, b in pairs)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_processes_have_the_losses_of_one(job, straight, kind, optimizer):
    folder, output, _ = job
    assert output.count("status 0") >= 4, output
    for column in (1, 2):
        assert largest_difference(folder / f"{optimizer}-{kind}", straight / optimizer, column) < 1e-5
    theirs, ours = (load_checkpoint(path / LAST) for path in (straight / optimizer, folder / f"{optimizer}-{kind}"))
    for name, weight in theirs["model"].items():
        torch.testing.assert_close(ours["model"][name], weight, rtol=0, atol=1e-4)
    assert ours["info"]["tokens_seen"] == theirs["info"]["tokens_seen"] == N_ITERS * 8 * 16


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_have_the_losses_of_one_with_the_kernels_of_a_cpu(job, straight, kind):
    """The gradients of two processes are rounded in another order, which Muon's bfloat16 products magnify."""
    folder, output, _ = job
    for column in (1, 2):
        assert largest_difference(folder / f"kernels-{kind}", straight / "kernels", column) < 2e-3, output


def test_an_adapter_trained_by_two_processes_is_that_of_one(job, straight):
    folder, output, _ = job
    for column in (1, 2):
        assert largest_difference(folder / "lora-ddp", straight / "lora", column) < 1e-4, output
    ours, theirs = (load_checkpoint(path / LAST)["model"] for path in (folder / "lora-ddp", straight / "lora"))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-3)


@pytest.mark.parametrize("run_name", ["dpo-ddp", "dpo-fsdp", "dpo-layouts", "kto-ddp", "kto-fsdp"])
def test_preferences_in_two_processes_have_the_losses_of_one(job, straight, run_name):
    folder, output, _ = job
    objective = run_name[:3]
    for column in (1, 2):
        assert largest_difference(folder / run_name, straight / objective, column) < 1e-5, output
    ours, theirs = (next(path.glob("*.npz")) for path in (folder / run_name, straight / objective))
    assert ours.name == theirs.name
    with np.load(ours) as found, np.load(theirs) as expected:
        for split in ("train", "val"):
            np.testing.assert_allclose(found[split], expected[split], atol=1e-5)
    log, straight_log = (read_metrics(next(path.parent.glob(f"*{N_ITERS}.jsonl"))) for path in (ours, theirs))
    for name in ("reward_margin", "accuracy", "drift", "val_reward_margin"):
        values, expected_values = (
            [record[name] for record in records if name in record] for records in (log, straight_log)
        )
        assert values == pytest.approx(expected_values, abs=1e-5) and values


@pytest.mark.parametrize(("name", "optimizer"), [("layouts", "adamw"), ("muon-layouts", "muon")])
def test_a_checkpoint_of_one_layout_continues_in_any_other(job, straight, name, optimizer):
    folder, output, _ = job
    assert largest_difference(folder / name, straight / optimizer) < 1e-5, output
    saved, plain = (load_checkpoint(path / LAST)["training"] for path in (folder / name, straight / optimizer))
    for ours, theirs in zip(saved["optimizers"], plain["optimizers"], strict=True):
        assert ours["state"].keys() == theirs["state"].keys()
        for number, state in theirs["state"].items():
            for key, value in state.items():
                torch.testing.assert_close(ours["state"][number][key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_with_as_many_processes_a_resume_is_exact_with_dropout_too(job, kind):
    folder, output, _ = job
    for name in ("stopped", "dropout"):
        (folder / f"{kind}-{name}.txt").touch()  # there are no samples to compare
    assert differences(folder / f"{kind}-stopped", folder / f"{kind}-dropout") == [], output
    training = load_checkpoint(folder / f"{kind}-dropout" / "text6.pt")["training"]
    assert len(training["random_of_others"]) == PROCESSES - 1
    assert not torch.equal(training["random_of_others"][0]["torch"], training["random"]["torch"])


def test_only_the_first_process_prints_and_an_error_of_all_is_printed_once(job):
    _, output, status = job
    assert status != 0
    sentence = (
        "error: --batch_size 3 x --gradient_accumulation_steps 1 are 3 sequences per iteration, which 2 processes "
        "cannot share equally; change --gradient_accumulation_steps to a multiple of 2"
    )
    assert output.count(sentence) == 1
    assert output.count("Traceback") == 1, "torchrun's own"
    assert output.count("resume: parallel ddp -> fsdp") == 2, "once for each run that changes its layout"


def test_after_a_killed_process_a_restart_continues_by_itself(data, straight, tmp_path):
    runs = [{"data_dir": data, "out_dir": tmp_path / "run", **ADAMW, "dies": True, "parallel": "fsdp"}]
    process = start(tmp_path, runs, restarts=1)
    output = output_of(process)
    assert process.returncode == 0, output
    assert "exitcode: -9" in output and "Traceback" not in output
    assert "restart 1 by torchrun: resuming" in output and f"iteration {N_ITERS // 2} of {N_ITERS}" in output
    assert largest_difference(tmp_path / "run", straight / "adamw") < 1e-5


def test_a_signal_to_torchrun_stops_all_processes_with_the_work_saved(data, tmp_path):
    long = {**ADAMW, "max_iters": 5000, "eval_interval": 5000}
    process = start(tmp_path, [{"data_dir": data, "out_dir": tmp_path / "run", **long, "parallel": "fsdp"}])
    for line in process.stdout:
        if line.startswith("iter    3/"):
            break
    process.send_signal(signal.SIGTERM)
    output = output_of(process)
    assert output.count("stopping after this iteration") == 1
    assert "stopped at iteration" in output, output
    assert load_checkpoint(tmp_path / "run" / "chat5000.pt")["info"]["iter_num"] >= 3


# What needs no second process


def test_the_computed_table_is_what_the_page_computes(capsys):
    page = (ROOT / "docs" / "many-devices.md").read_text("utf-8")
    (code,), (table,) = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("python", "text"))
    exec(code, {})
    assert capsys.readouterr().out == table


def test_each_process_has_its_share_and_together_they_have_all():
    rows, shares = np.arange(24).reshape(12, 2), []
    for rank in range(3):
        with fake_job(rank, size=3):
            shares.append(parallel.own_share(rows))
    assert np.concatenate(shares).tolist() == rows.tolist()
    with fake_job(size=3):
        assert parallel.micro_batch_size(8, 3) == 8
        assert parallel.micro_batch_size(12, 1) == 4
        with pytest.raises(UserError, match="are 10 sequences per iteration, which 3 processes cannot share equally"):
            parallel.micro_batch_size(10, 1)


def test_a_lost_process_is_a_sentence_and_other_errors_stay_what_they_are():
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:7")
    with fake_job(rank=1, size=2):
        sentence = str(parallel.lost_process_error(lost, "models/story5000.pt"))
        assert "process 1 lost contact" in sentence and "--resume models/story5000.pt" in sentence
        others = RuntimeError("shapes cannot be multiplied"), ValueError("gloo"), torch.OutOfMemoryError("CUDA out")
        assert [parallel.lost_process_error(error, None) for error in others] == [None] * 3
    assert parallel.lost_process_error(lost, None) is None


def test_half_a_job_is_refused_and_without_torchrun_there_is_one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    with parallel.join_job():
        assert (parallel.rank(), parallel.world_size(), parallel.job_name()) == (0, 1, None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="RANK is not; start several processes with torchrun"), parallel.join_job():
        pass


def test_each_process_takes_its_own_device(monkeypatch):
    taken = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", taken.append)
    monkeypatch.setattr("torch.cuda.mem_get_info", None)  # which would take memory on every device
    with fake_job(rank=3, size=4, local_rank=1, local_size=2):
        found = [parallel.choose_devices(word) for word in (None, "auto", "cuda", "cuda:0", "cpu")]
        assert found == [*["cuda:1"] * 4, "cpu"]
        assert taken == ["cuda:1"] * 4
        with pytest.raises(UserError, match="--device mps"):
            parallel.choose_devices("mps")
    sentence = "4 processes on this machine, which has 2 CUDA devices; use --nproc_per_node=2"
    with fake_job(size=4, local_size=4), pytest.raises(UserError, match=sentence):
        parallel.choose_devices(None)


def test_a_restart_takes_only_what_its_own_job_wrote(data, tmp_path, monkeypatch):
    def after(options, given, job, restarts=0):
        """The options with which that job's processes start."""
        for name, value in (("TORCHELASTIC_RUN_ID", job), ("TORCHELASTIC_RESTART_COUNT", str(restarts))):
            monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
        return options_after_restart(options, given, read_info)

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    options = {**ADAMW, "max_iters": 2}
    assert run(data, tmp_path, **options) == 0
    options, given = options_of_run(data, tmp_path, **options, init_from="gpt2")
    for job, restarts in (("a", 0), ("b", 1), (None, 1)):
        assert after(options, given, job, restarts) == (options, given)
    options, given = after(options, given, "a", 1)
    assert options.resume == given["resume"] == str(tmp_path / "chat2.pt")
    assert options.init_from is None and "init_from" not in given

    further = TrainOptions(resume=str(tmp_path / "chat2.pt"), max_iters=4)
    given = {"resume": further.resume, "max_iters": 4}
    assert after(further, given, "a", 1)[0].resume == further.resume, "it has not been saved anew"
    assert run(data, tmp_path, resume=tmp_path / "chat2.pt", max_iters=4) == 0
    assert after(further, given, "a", 1)[0].resume == str(tmp_path / "chat4.pt")


def test_a_restart_skips_unreadable_checkpoints_of_another_length(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    assert run(data, tmp_path, **{**ADAMW, "max_iters": 2}) == 0
    (tmp_path / "chat9.pt").write_bytes(b"damaged")
    options, given = options_of_run(data, tmp_path, **{**ADAMW, "max_iters": None})
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert options_after_restart(options, given, read_info)[0].resume == str(tmp_path / "chat2.pt")
    assert f"skipped: {tmp_path / 'chat9.pt'} is not a readable checkpoint" in capsys.readouterr().err
