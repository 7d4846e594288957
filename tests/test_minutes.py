"""--minutes and --preset auto: what they add to the command line, from a given speed and from real steps."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import time
from pathlib import Path

import pytest

import train
from common.cli import UserError, given_options, parse_options
from common.device import has_cpp_compiler
from model import GPT, PRESETS
from tests.test_train_config import facts_of
from tests.tiny import OPTIONS, StopAfter, losses, prepare, run
from training.config import RunConfig, make_config
from training.minutes import document_size, fit_minutes, mean_document_size
from training.options import TrainOptions
from training.shapes import Shape, n_evaluations
from training.speed import iteration_s

ROOT = Path(train.__file__).parent
SHAPE = ("n_layer", "n_head", "n_embd")
# Of --preset auto for repeated text.
RECIPE = {"schedule": "cosine", "min_lr": 0.0, "muon_weight_decay": 0.1, "embedding_weight_decay": 0.2}
STORIES = facts_of("text", 2_300_000)
STORIES["n_vocab"] = 4096
STORIES["splits"]["train"]["documents"] = 11_000  # of 209 tokens


class Machine:
    """A machine that computes so many FLOP/s with every model, and whose clock advances while a step is timed."""

    def __init__(self, flops: float, trial_s: float = 0.0, opening_s: float = 0.0):
        self.flops, self.trial_s, self.opening_s, self.now = flops, trial_s, opening_s, 0.0
        self.timed: list[RunConfig] = []

    def iteration_s(self, config: RunConfig, document_size: float = 0.0) -> float:
        self.timed.append(config)
        self.now += self.trial_s
        shape = Shape(config.n_layer, config.n_head, config.n_embd, config.block_size)
        return config.tokens_per_iter * shape.flops_per_token(config.n_vocab) / self.flops

    def config(self, facts=STORIES, **given) -> RunConfig:
        """The configuration of a run on this machine."""

        def configure(options: TrainOptions) -> RunConfig:
            return make_config(options, given, "cpu", facts, speed_up=lambda *arguments: None)

        options = TrainOptions(**given)
        return configure(
            fit_minutes(options, "cpu", facts, configure, self.iteration_s, self.opening_s, lambda: self.now)
        )

    def seconds(self, config: RunConfig) -> float:
        """How long the iterations of a run take."""
        return config.max_iters * self.iteration_s(config)


def test_auto_chooses_shape_batch_and_iterations(capsys):
    machine = Machine(1.3e11)
    config = machine.config(preset="auto", minutes=15)
    assert (config.n_layer, config.n_embd, config.block_size, config.preset) == (4, 192, 512, "auto")
    assert config.batch_size * config.gradient_accumulation_steps == 8
    assert 0.85 * 900 < machine.seconds(config) < 900
    speed = 1.3e11 / Shape(4, 6, 192, 512).flops_per_token(4096)
    printed = capsys.readouterr().out
    assert (
        f"auto: 4 layers x 192, block size 512, {config.max_iters:,} iterations of 4,096 tokens, about 15 minutes "
        f"(measured {round(speed, -2):,.0f} tokens/s)\n"
    ) in printed
    assert "note:" not in printed


def test_opening_the_data_counts_towards_the_minutes():
    quick, slow = Machine(1.3e11), Machine(1.3e11, opening_s=200.0)
    saved = quick.seconds(quick.config(preset="auto", minutes=15)) - slow.seconds(
        slow.config(preset="auto", minutes=15)
    )
    assert saved == pytest.approx(200, rel=0.1)


def test_train_measures_how_long_opening_takes(tmp_path, monkeypatch):
    passed = []
    monkeypatch.setattr(train, "fit_minutes", lambda options, *others: passed.append(others[-1]) or options)
    given = {**OPTIONS, "data_dir": str(prepare(tmp_path / "data")), "out_dir": str(tmp_path)}
    start = time.monotonic()
    train.plan(TrainOptions(**given), given, None)
    assert 0 < passed[0] < time.monotonic() - start


def test_minutes_alone_choose_the_iterations_of_the_given_model(capsys):
    machine = Machine(1.3e11)
    config = machine.config(preset="tiny", minutes=5)
    tiny = PRESETS["tiny"]
    assert (config.n_layer, config.n_embd, config.batch_size) == (tiny.n_layer, tiny.n_embd, 16)
    assert 0.7 * 300 < machine.seconds(config) < 285
    assert re.search(r"^minutes: [\d,]+ iterations of 4,096 tokens, about 5 minutes \(", capsys.readouterr().out)


def test_without_either_nothing_is_timed():
    machine = Machine(1e11)
    assert machine.config().max_iters == 5000 and not machine.timed


def test_a_longer_run_reads_more_or_is_larger():
    machine, found = Machine(1.3e11), []
    for minutes in (0.5, 1, 2, 5, 10, 20, 60, 200):
        config = machine.config(preset="auto", minutes=minutes)
        found.append((config.n_embd, config.max_iters * config.tokens_per_iter / config.n_embd**2))
        assert machine.seconds(config) <= 60 * minutes
        assert config.max_iters * config.tokens_per_iter <= 24.1 * 2_300_000
    assert [width for width, _ in found] == sorted(width for width, _ in found)
    assert found[0][0] < found[-1][0]


def test_a_faster_machine_trains_a_larger_model():
    widths = [Machine(flops).config(preset="auto", minutes=5).n_embd for flops in (1e10, 1e11, 1e12)]
    assert widths == sorted(set(widths))


def test_the_time_until_training_starts_counts():
    slow = Machine(1.3e11, trial_s=60).config(preset="small", minutes=5, eval_iters=1)
    fast = Machine(1.3e11).config(preset="small", minutes=5, eval_iters=1)
    assert fast.max_iters - slow.max_iters == pytest.approx(60 / (300 - 15) * fast.max_iters, rel=0.1)
    late = Machine(1.3e11, trial_s=1000).config(preset="small", minutes=5, eval_iters=1)
    assert late.max_iters > 0.4 * fast.max_iters  # half of the time, less the evaluations


def test_the_chosen_run_is_timed_as_it_runs_compiled_if_it_is_long_and_in_low_precision():
    def timed(minutes: float, dtype: str = "bfloat16", **given) -> list[bool]:
        machine = Machine(1e12)
        config = machine.config(preset="gpt2", block_size=256, minutes=minutes, dtype=dtype, **given)
        assert machine.timed[-1].compile == config.compile
        return [each.compile for each in machine.timed]

    assert timed(1) == timed(5, "float32") == [False]
    assert timed(5) == [False, has_cpp_compiler()]
    assert timed(1, compile=True) == [False, True]


def test_blocks_that_are_compiled_as_one_piece_are_first_timed_without():
    machine = Machine(1e12)
    machine.config(preset="tiny", minutes=1, compile=True, compile_scope="model")
    assert [(each.compile, each.compile_scope) for each in machine.timed] == [(False, "block"), (True, "model")]


def test_each_part_of_a_mixture_takes_time_to_evaluate():
    machine, given = Machine(1.3e11), {"preset": "tiny", "minutes": 5, "eval_interval": 50}
    parts = [{**STORIES, "name": f"part{index}", "weight": 1 / 3} for index in range(3)]
    mixture = {"format": "text", "n_vocab": 4096, "parts": parts}
    for facts, n_parts in ((STORIES, 1), (mixture, 3)):
        config = machine.config(facts, **given)
        eval_s = machine.iteration_s(config) / config.batch_size * config.val_rows / 3
        n_evals = n_evaluations(config.max_iters, 50)
        assert 275 < machine.seconds(config) + n_parts * n_evals * eval_s < 285


def test_few_data_are_not_read_too_often(capsys):
    config = Machine(1e11).config(facts_of("text", 400_000), preset="auto", minutes=600)
    rows = config.batch_size * config.gradient_accumulation_steps
    assert 23.9 < config.max_iters * rows / (400_000 / config.block_size) < 24.1 and config.dropout == 0.1
    printed = capsys.readouterr().out
    assert "note: this is less than --minutes 600, because with more than 24 epochs" in printed
    # What the note recommends is the same run with another number of iterations.
    old, new = re.search(r"to train longer, replace (.*) with (.*) N$", printed, re.MULTILINE).groups()
    assert old == "--preset auto --minutes 600"
    words = [*new.split(), str(config.max_iters)]
    options = parse_options(TrainOptions, "", words)
    given = given_options(TrainOptions, words)
    longer = make_config(options, given, "cpu", facts_of("text", 400_000), speed_up=lambda *arguments: None)
    assert dataclasses.replace(longer, preset="auto", compile=config.compile) == config
    plain = Machine(1e11).config(facts_of("text", 400_000), preset="auto", minutes=600, dropout=0.0)
    rows = plain.batch_size * plain.gradient_accumulation_steps
    assert 7.9 < plain.max_iters * rows / (400_000 / plain.block_size) < 8.1
    assert "because with more than 8 epochs" in capsys.readouterr().out
    diary = Machine(1e11).config(facts_of("text", 4_000), preset="auto", minutes=600)
    assert diary.max_iters == 100  # as few as the default


def test_options_on_the_command_line_win():
    machine = Machine(1.3e11)
    config = machine.config(
        preset="auto", minutes=15, n_layer=3, block_size=128, batch_size=5, gradient_accumulation_steps=2
    )
    assert (config.n_layer, config.block_size, config.batch_size, config.gradient_accumulation_steps) == (3, 128, 5, 2)
    assert machine.config(preset="auto", minutes=15, learning_rate=1e-4).learning_rate == 1e-4
    assert machine.config(preset="auto", minutes=15, eval_interval=7).eval_interval == 7


def test_text_that_is_read_several_times_has_its_own_recipe():
    def recipe(minutes: float, facts=STORIES, **given) -> dict:
        config = Machine(3e11).config(facts, preset="auto", minutes=minutes, **given)
        return {name: getattr(config, name) for name in RECIPE}

    defaults = {"schedule": "wsd", "min_lr": 6e-3 / 10, "muon_weight_decay": 0.01, "embedding_weight_decay": 0.0}
    assert recipe(15) == RECIPE and recipe(3) == defaults, "4 epochs, and less than 2"
    given = {"min_lr": 1e-5, "muon_weight_decay": 0.0, "embedding_weight_decay": 0.0}
    assert recipe(15, **given) == {**RECIPE, **given}
    assert recipe(15, schedule="wsd")["schedule"] == "wsd"
    assert recipe(15, optimizer="adamw") == {**defaults, "min_lr": 3e-3 / 10, "embedding_weight_decay": 0.1}
    chat = {**facts_of("chat", 1_000_000), "n_vocab": 4096}
    mixture = {**STORIES, "parts": [{**STORIES, "weight": 0.5}, {**chat, "weight": 0.5}]}
    assert recipe(60, chat)["min_lr"] == recipe(60, mixture)["min_lr"] == 3e-3 / 10
    small = Machine(3e11).config(preset="small", minutes=60)
    assert {name: getattr(small, name) for name in RECIPE} == defaults, "only with --preset auto"


def test_text_that_is_read_6_times_has_dropout_unless_it_takes_too_long():
    def dropout(minutes: float, facts=STORIES, slower: float = 1.1, **given) -> float:
        machine = Machine(3e11)
        iteration_s = machine.iteration_s
        machine.iteration_s = lambda config, size=0.0: iteration_s(config) * (slower if config.dropout else 1)
        return machine.config(facts, preset="auto", minutes=minutes, **given).dropout

    assert dropout(15) == 0, "4 epochs"
    assert dropout(30) == 0.07 and dropout(30, dropout=0.0) == 0 and dropout(15, dropout=0.2) == 0.2
    assert dropout(30, slower=3) == 0, "and with it less than 6 epochs"
    assert dropout(120) == 0.1, "26 epochs, limited to 24"
    machine = Machine(3e11)
    assert machine.config(preset="auto", minutes=120).dropout == machine.timed[-1].dropout
    assert dropout(60, {**facts_of("chat", 1_000_000), "n_vocab": 4096}) == 0
    assert Machine(3e11).config(preset="tiny", minutes=60).dropout == 0


def test_text_has_attention_inside_documents_unless_it_is_compared_with_published_losses():
    def has_mask(facts=STORIES, **given) -> bool:
        return Machine(3e11).config(facts, minutes=5, **{"preset": "auto", **given}).document_mask

    chat = {**facts_of("chat", 1_000_000), "n_vocab": 4096}
    mixture = {**STORIES, "parts": [{**STORIES, "weight": 0.5}, {**chat, "weight": 0.5}]}
    assert has_mask() and has_mask(chat) and not has_mask(mixture), "a mixture as without --preset auto"
    assert not has_mask({**STORIES, "yardstick": "GPT-2: 3.28"})
    assert not has_mask(document_mask=False) and not has_mask(preset="tiny")


def test_shapes_that_do_not_fit_with_the_given_rows_are_not_chosen(monkeypatch):
    machine, asked = Machine(3e11), []

    def fits(config, device, batch_size, logits_rows=None):
        asked.append(batch_size)
        return config.n_embd <= 192

    monkeypatch.setattr("training.minutes.model_fits", fits)
    config = machine.config(preset="auto", minutes=60, batch_size=300)
    assert config.n_embd == 192 == max(each.n_embd for each in machine.timed) and set(asked) == {300}


def test_the_context_holds_the_documents():
    long = facts_of("text", 10**9)
    long["splits"]["train"]["documents"] = 10**6  # of 1,000 tokens
    chat = facts_of("chat", 10**6)
    chat["splits"]["train"]["documents"] = 5_000  # of 200 tokens; two fill a row
    assert (document_size(STORIES), document_size(long), document_size(chat)) == (512, 1024, 512)
    assert document_size({"parts": [{**STORIES, "weight": 0.5}, {**long, "weight": 0.5}]}) == 1024
    assert document_size(facts_of("text")) == 256  # the number of documents is not known
    assert mean_document_size(STORIES) == pytest.approx(209, abs=1) and mean_document_size(facts_of("text")) == 0


@pytest.mark.parametrize(("size", "expected"), [(0, [0] * 16), (5.2, [0] * 5 + [1] * 5 + [2] * 5 + [3])])
def test_steps_are_timed_with_documents_of_the_datas_size(monkeypatch, size, expected):
    seen = []

    def forward(self, idx, targets, documents=None, positions=None):
        seen.append((documents[0].tolist(), positions[0].tolist()))
        return None, self.wte.weight.sum()

    monkeypatch.setattr(GPT, "forward", forward)
    monkeypatch.setattr("training.speed.MIN_SECONDS", 0.0)
    config = make_config(TrainOptions(**OPTIONS, document_mask=True), OPTIONS, "cpu", facts_of("text"))
    assert iteration_s(config, size) > 0
    documents, positions = seen[0]
    assert documents == expected
    assert positions == [n - expected.index(number) for n, number in enumerate(expected)]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"preset": "auto"},
            "--preset auto chooses a model for the time that you have; add it, for example: --minutes",
        ),
        ({"minutes": 5.0, "max_iters": 10}, "--minutes and --max_iters both say how long to train; leave one out"),
        ({"minutes": 5.0, "parallel": "fsdp"}, "cannot time the steps of a sharded model"),
        (
            {"minutes": 5.0, "objective": "dpo", "dataset": "mine", "init_from": "x.pt"},
            "cannot time the steps of --objective dpo",
        ),
        ({"minutes": 5.0, "preset": "auto", "init_from": "x.pt"}, "but x.pt already has one; leave --preset out"),
        ({"minutes": 5.0, "preset": "auto", "n_head": 1000}, "--n_head 1000 does not divide a width"),
    ],
)
def test_what_cannot_be_combined_is_refused(given, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        Machine(1e11).config(**given)


# Real steps on a tiny data set


def test_a_run_is_chosen_from_real_steps_and_is_that_of_the_same_numbers(tmp_path, capsys):
    data = prepare(tmp_path / "data")
    numbers = {"n_layer": 1, "n_embd": 32, **{name: value for name, value in OPTIONS.items() if name not in SHAPE}}
    del numbers["max_iters"]
    given = {**numbers, "preset": "auto", "minutes": 60, "data_dir": str(data), "out_dir": str(tmp_path / "auto")}
    planned = train.plan(TrainOptions(**given), given, None)
    config = planned.config
    # However fast the machine is, an hour is more than 24 epochs of 38 rows, 2 rows each.
    assert (config.preset, config.n_embd, config.n_head, config.max_iters) == ("auto", 32, 1, 456)
    line = r"^auto: 1 layers x 32, block size 16, 456 iterations of 32 tokens, .* \(measured [\d,.]+ tokens/s\)$"
    assert re.search(line, capsys.readouterr().out, re.MULTILINE)
    training = train.build(planned, None, lambda *arguments: False, lambda *arguments: None)
    assert train.run_to_end(training, None, lambda: StopAfter(5)) == 130

    by_hand = {"n_layer": 1, "n_head": 1, "n_embd": 32, "max_iters": 456, "document_mask": True, **RECIPE}
    by_hand["dropout"] = 0.1
    assert run(data, tmp_path / "hand", plain=True, stop_after=5, **by_hand) == 130
    assert losses(tmp_path / "auto" / "text456.jsonl") == losses(tmp_path / "hand" / "text456.jsonl")

    capsys.readouterr()
    again = {**given, "resume": str(tmp_path / "auto" / "text456.pt")}
    resumed = train.plan(TrainOptions(**again), again, None)
    assert resumed.config == dataclasses.replace(config, resume=again["resume"])
    printed = capsys.readouterr().out
    assert "resume: --minutes has no effect, because the run keeps its iterations" in printed
    assert "measured" not in printed


def test_the_command_runs_without_a_terminal(tmp_path, python):
    data = prepare(tmp_path / "data")
    command = [python, "train.py", "--dataset", "text", "--data_dir", str(data), "--preset", "auto"]
    command += ["--minutes", "60", "--eval_iters", "1", "--out_dir", str(tmp_path / "models"), "--device", "cpu"]
    command += ["--n_embd", "16", "--n_layer", "1", "--block_size", "16", "--batch_size", "2", "--no-compile"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert "auto: 1 layers x 16" in done.stdout and (tmp_path / "models" / "text456.pt").is_file()
