"""The benchmark: its report follows from what it timed, and it runs from end to end on tiny shapes."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "testing_tools"
sys.path.insert(0, str(TOOLS))
import benchmark  # noqa: E402
import benchmark_generation  # noqa: E402
import benchmark_timing  # noqa: E402
import benchmark_training  # noqa: E402
import benchmark_work  # noqa: E402
import device_limits  # noqa: E402

sys.path.remove(str(TOOLS))

from common.cli import UserError  # noqa: E402
from common.device import choose_dtype, n_cores  # noqa: E402
from model import GPT  # noqa: E402

KEYS = {
    *("task", "preset", "device", "dtype", "ours_tokens_per_s", "peer_tokens_per_s", "ratio", "mfu"),
    *("peak_memory_bytes", "peer_peak_memory_bytes", "floor_tokens_per_s", "rounds"),
}
SHAPE = ("--n_layer", "1", "--n_head", "2", "--n_embd", "16", "--block_size", "16", "--device", "cpu", "--rounds", "1")
MACHINE = device_limits.Machine("test", peak=1e12, peak_source="table", bandwidth=1e10)


def run_benchmark(python: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [python, TOOLS / "benchmark.py", *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        stdin=subprocess.DEVNULL,
    )


def measured(python: str, folder: Path, *arguments: object) -> dict:
    """What a run writes as JSON."""
    done = run_benchmark(python, *arguments, "--json", folder / "figures.json")
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "figures.json").read_text("utf-8"))


def options(task: str, **changes) -> benchmark.BenchmarkOptions:
    return benchmark.BenchmarkOptions(task=task, **{"device": "cpu", "dtype": "float32", **changes})


def fake_clock(*moments: float):
    left = iter(moments)
    return lambda: next(left)


# --- the figures, from fake times ---


def test_a_round_is_timed_until_the_device_has_done_it():
    events = []

    def step() -> int:
        events.append("step")
        return 50

    work = benchmark_timing.Work(step, lambda: None, lambda: events.append("wait"))
    assert benchmark_timing.timed(work, 3, fake_clock(10.0, 12.5)) == (2.5, 150)
    assert events == ["wait", "step", "step", "step", "wait"]


def test_rounds_alternate_and_the_ratio_is_that_of_the_medians():
    order = []

    def side(name: str, *speeds: float):
        left = iter(speeds)
        return lambda: order.append(name) or next(left)

    found = benchmark.alternate({"ours": side("ours", 10, 1000, 30), "peer": side("peer", 4, 1, 5)}, rounds=3)
    assert order == ["ours", "peer"] * 3
    order.clear()
    warmed = benchmark.alternate({"ours": side("ours", 1, 10, 20), "peer": side("peer", 2, 4, 5)}, 2, warm_up=True)
    assert order == ["ours", "peer"] * 3 and warmed == {"ours": [10, 20], "peer": [4, 5]}
    figures = benchmark.figures(found["ours"], found["peer"])
    assert (figures["ours_tokens_per_s"], figures["peer_tokens_per_s"], figures["ratio"]) == (30, 4, 7.5)


def test_without_a_peer_there_is_no_ratio():
    figures = benchmark.figures([3.0], None)
    assert figures["ratio"] is figures["peer_tokens_per_s"] is None


def test_the_table_shows_what_was_found():
    found = benchmark.figures([4000.0, 4400.0], [1000.0, 1100.0])
    found |= {"task": "train", "preset": "small", "device": "cpu", "device_name": "A CPU", "dtype": "bfloat16"}
    found |= {
        "peer": "transformers",
        "peer_setting": "float32, eager",
        "rounds": 2,
        "start_up_s": 12.0,
        "peer_start_up_s": 1.0,
    }
    found |= {"peak_memory_bytes": 2**30, "peer_peak_memory_bytes": None, "mfu": 0.5, "flops_per_s": 1e12}
    found |= {"peak_flops": 2e12, "peak_flops_source": "a matmul", "floor_tokens_per_s": 8400.0}
    text = "\n".join(benchmark.table(found))
    for shown in (
        "A CPU",
        "preset small",
        "transformers: float32, eager",
        "4,200",
        "1,050",
        "4,000-4,400",
        "1,024",
        "n/a",
        "4.00",
        "50.0%",
        "8,400",
    ):
        assert shown in text


# --- the floor ---


def test_the_training_floor_is_that_of_the_flops_and_the_optimizers_bytes():
    config = benchmark_work.training_config(options("train", preset="tiny", batch_size=4, optimizer="adamw"))
    model = GPT(benchmark_training.gpt_config(config))
    flops, seconds = device_limits.training_floor(config, MACHINE)
    assert flops == model.flops_per_token()
    optimizer_s = 28 * model.n_params() / 1e10 / (4 * 256)
    assert seconds == pytest.approx(flops / 1e12 + optimizer_s)


def test_generating_one_token_costs_one_read_of_the_weights_and_twice_the_flops_of_each():
    chosen = options("generate", preset="tiny", prompt_tokens=1, max_tokens=1, dtype="bfloat16")
    config = benchmark_work.generation_config(chosen)
    model = GPT(benchmark_training.gpt_config(config))
    used = model.n_params() - model.wpe.weight.numel() - (model.config.vocab_size - model.config.n_vocab) * 128
    flops, seconds = device_limits.generation_floor(chosen, config, MACHINE)
    assert flops == 2 * used + 2 * 4 * 128
    assert seconds == pytest.approx(2 * used / 1e10)


def test_streams_share_the_reading_of_the_weights_and_8_bits_halve_it():
    def floor(**changes) -> float:
        chosen = options("generate", preset="tiny", dtype="bfloat16", prompt_tokens=4, max_tokens=50, **changes)
        return device_limits.generation_floor(chosen, benchmark_work.generation_config(chosen), MACHINE)[1]

    assert floor(streams=4) == pytest.approx(floor() / 4, rel=0.1)
    assert floor(quantize="int8") == pytest.approx(floor() / 2, rel=0.1)


def test_a_matmul_and_a_copy_give_the_machines_limits():
    assert 1e7 < device_limits.matmul_flops("cpu", "float32", 64) < 1e15
    assert 1e7 < device_limits.memory_bandwidth("cpu", 1 << 20) < 1e13


# --- the work ---


def test_our_training_step_trains_and_the_peer_has_the_same_shape():
    pytest.importorskip("transformers")
    chosen = options("train", n_layer=1, n_head=2, n_embd=16, block_size=8, batch_size=2, compile=False)
    config = benchmark_work.training_config(chosen)
    works = [benchmark_work.WORKS["train"][side](chosen, config) for side in ("ours", "transformers")]
    assert [work.step() for work in works] == [16, 16]
    from transformers import GPT2LMHeadModel

    peer = GPT2LMHeadModel(benchmark_training.transformers_config(config))
    ours = GPT(benchmark_training.gpt_config(config))
    assert sum(weight.numel() for weight in peer.parameters()) == ours.n_params()


def test_both_sides_have_the_vocabulary_that_was_asked_for():
    config = benchmark_work.training_config(options("train", preset="tiny", n_vocab=1000))
    ours = benchmark_training.gpt_config(config)
    assert (ours.n_vocab, ours.vocab_size) == (1000, 1024)
    assert benchmark_training.transformers_config(config).vocab_size == 1024


def test_the_loops_as_nanogpts_differ_in_precision_and_compilation(monkeypatch):
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 2}
    config = benchmark_work.training_config(options("train", **shape, gradient_accumulation_steps=2))
    compiled, dtypes = [], []
    real = torch.nn.functional.cross_entropy
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", lambda *a: dtypes.append(a[0].dtype) or real(*a))
    assert [benchmark_work.WORKS["train"][peer](None, config).step() for peer in ("plain", "compiled")] == [32, 32]
    best = getattr(torch, choose_dtype(None, "cpu"))
    assert len(compiled) == 1 and dtypes == [torch.float32] * 2 + [best] * 2


def test_a_simple_loop_clips_the_gradient_steps_and_keeps_the_last_logits():
    config = benchmark_work.training_config(options("train", preset="tiny", gradient_accumulation_steps=1))
    weights = torch.nn.ParameterList([torch.zeros(4)])
    made, norms = [], []

    def logits_and_loss(ids):
        logits = weights[0] * len(ids)
        made.append(weakref.ref(logits))
        return logits, logits.sum()

    work = benchmark_training.simple_loop(weights, logits_and_loss, config, tuned=False)
    note_norm = register_optimizer_step_pre_hook(lambda *_: norms.append(weights[0].grad.norm().item()))
    work.step()
    assert weights[0].tolist() == pytest.approx([-config.learning_rate] * 4)  # as Adam's first step, with no decay of 0
    assert weights[0].grad is None
    work.step()
    note_norm.remove()
    assert norms == pytest.approx([config.grad_clip] * 2)
    assert [logits() is not None for logits in made] == [False, True]


def test_both_sides_generate_as_many_tokens_as_asked():
    pytest.importorskip("transformers")
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32}
    chosen = options("generate", **shape, streams=2, prompt_tokens=3, max_tokens=7)
    config = benchmark_work.generation_config(chosen)
    works = [benchmark_work.WORKS["generate"][side](chosen, config) for side in ("ours", "transformers")]
    assert [work.step() for work in works] == [14, 14]


def test_a_prompt_is_timed_against_a_plain_forward_and_the_turn_after_it():
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 64, "device": "cpu", "dtype": "float32"}
    for prompt_tokens, names in ((3, ["plain forward", "first token", "20 ids more"]), (44, [])):
        chosen = options("generate", **shape, prompt_tokens=prompt_tokens, max_tokens=7)
        work = benchmark_generation.generate_ours(chosen, benchmark_work.generation_config(chosen))
        found = work.latencies_s()
        assert list(found) == names and all(seconds > 0 for seconds in found.values())


def test_no_prompt_begins_like_the_one_before():
    prompts = benchmark_generation.random_prompts(options("generate", prompt_tokens=2), n_vocab=3)
    some = [next(prompts) for _ in range(7)]
    assert all(len(prompt) == 2 for prompt in some)
    assert all(a[0] != b[0] for a, b in itertools.pairwise(some))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")
def test_the_memory_of_a_process_tree_counts_its_children():
    child = "x = bytearray(60 << 20); import time; time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    peak = benchmark_timing.PeakMemory()
    with subprocess.Popen([sys.executable, "-c", parent], start_new_session=True) as process:
        with peak.watch(process.pid):
            deadline = time.monotonic() + 20
            while (peak.bytes or 0) < 60 << 20 and time.monotonic() < deadline:
                time.sleep(0.05)
        os.killpg(process.pid, 9)
    assert 60 << 20 < peak.bytes < 200 << 20


# --- from the command line to the JSON ---


def test_train_from_the_command_line(tmp_path, python):
    found = measured(python, tmp_path, "train", *SHAPE, "--batch_size", 2, "--no-compile", "--round_s", 0.2)
    assert found.keys() >= KEYS
    assert found["peer_tokens_per_s"] is found["ratio"] is found["peer_peak_memory_bytes"] is None
    assert found["mfu"] == pytest.approx(found["flops_per_s"] / found["peak_flops"])
    assert 0 < found["mfu"] < 1 and found["ours_tokens_per_s"] < found["floor_tokens_per_s"]
    if sys.platform == "linux":
        assert found["peak_memory_bytes"] > 50 << 20


class SideHere:
    """benchmark.Side without its process: the same work here."""

    start_up_s = 0.0

    def __init__(self, side, chosen, config):
        self.work = benchmark.WORKS[chosen.task][side](chosen, config)

    def measure(self) -> float:
        seconds, tokens = benchmark.timed(self.work, 1)
        return tokens / seconds

    def finish(self) -> tuple[int | None, dict[str, float]]:
        return self.work.peak_bytes(), self.work.latencies_s()


@pytest.mark.parametrize("task", ["train", "generate"])
def test_both_sides_are_measured_and_compared(task):
    pytest.importorskip("transformers")
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 2, "compile": False}
    lengths = {"max_tokens": 4, "prompt_tokens": 2}
    chosen = options(task, **shape, **lengths, rounds=2, peer="transformers")
    found = benchmark.measure_model(chosen, lambda device, dtype: MACHINE, SideHere)
    assert found.keys() >= KEYS
    assert found["ratio"] == found["ours_tokens_per_s"] / found["peer_tokens_per_s"]
    assert len(found["ours_rounds"]) == len(found["peer_rounds"]) == 2
    assert found["preset"] == "custom" and found["peak_flops"] == MACHINE.peak


def test_prepare_beside_one_thread_of_tiktoken(tmp_path, python):
    generator = random.Random(1)
    stories = (" ".join(generator.choices(("cat", "dog", "sun", "ran", "saw"), k=40)) for _ in range(300))
    path = tmp_path / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(stories), encoding="utf-8")
    found = measured(python, tmp_path, "prepare", "--input", path, "--rounds", 1, "--peer", "tiktoken")
    assert found.keys() >= KEYS
    assert found["ratio"] == pytest.approx(found["ours_tokens_per_s"] / found["peer_tokens_per_s"])
    assert found["floor_tokens_per_s"] == pytest.approx(n_cores() * found["peer_tokens_per_s"])


# --- faults ---


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ((), 2, "required: task"),
        (("train", "--rounds", "0"), 2, "--rounds must be at least 1, not 0"),
        (("train", "--round_s", "0"), 2, "--round_s must be above 0, not 0.0"),
        (("prepare",), 2, "prepare needs --input"),
        (
            ("train", "--peer", "tiktoken"),
            2,
            "compared with transformers or plain or compiled, not tiktoken",
        ),
        (("train", "--quantize", "int8"), 2, "--quantize is only for generate"),
        (("train", "--json", "nowhere/x.json"), 1, "the folder nowhere does not exist; run: mkdir -p nowhere"),
        (("prepare", "--input", "nowhere.txt"), 1, "nowhere.txt not found; check the path given to --input"),
    ],
)
def test_a_users_mistake_is_a_sentence(python, arguments, status, message):
    done = run_benchmark(python, *arguments)
    assert done.returncode == status
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_shape_that_does_not_fit_is_refused_before_anything_is_measured():
    with pytest.raises(UserError, match="unknown; use one of tiny, small"):
        benchmark_work.training_config(options("train", preset="huge"))
    with pytest.raises(UserError, match="300 tokens exceed the block size 256"):
        benchmark_work.generation_config(options("generate", preset="tiny", prompt_tokens=100))
    with pytest.raises(UserError, match="multiple of n_head"):
        benchmark_training.gpt_config(benchmark_work.training_config(options("train", n_embd=10, n_head=3)))


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "train", "--peer", "transformers"])
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="transformers is not installed; run: pip install"):
        benchmark.main()


class Pipe:
    """A pipe's end whose other end asks for nothing."""

    def __init__(self):
        self.sent = []

    def send(self, what) -> None:
        self.sent.append(what)


def test_running_out_of_memory_is_one_sentence():
    def build(options, config):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    pipe = Pipe()
    benchmark.serve("ours", options("train"), None, pipe, {"train": {"ours": build}})
    assert "out of memory; use a smaller --batch_size" in str(pipe.sent[0])


def test_a_bug_in_a_side_shows_its_traceback():
    def build(options, config):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        benchmark.serve("ours", options("train"), None, Pipe(), {"train": {"ours": build}})


def test_a_side_that_is_killed_is_named_with_its_status():
    class Killed:
        exitcode = -9

        def join(self) -> None:
            pass

    side = object.__new__(benchmark.Side)
    side.name, side.process = "ours", Killed()
    side.pipe, theirs = multiprocessing.Pipe()
    theirs.close()
    with pytest.raises(UserError, match="ours ended with status -9; if no reason"):
        side.measure()
