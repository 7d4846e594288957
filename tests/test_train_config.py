"""From options to a configuration: what is refused, what is chosen, and that every field has its final value."""

from __future__ import annotations

import dataclasses
import itertools
import re
import typing
from pathlib import Path

import pytest

import train
from common.cli import UserError, given_options, parse_options
from common.device import has_cpp_compiler
from setup_tokenizer import N_VOCAB
from tests.fake_job import fake_job
from tests.tiny import load_checkpoint, run
from training.adapter_config import FIELDS
from training.config import RunConfig, default_learning_rate, make_config
from training.options import TrainOptions
from training.schedule import schedule

ROOT = Path(train.__file__).parent


def facts_of(kind: str, tokens: int = 10_000_000, name: str = "mine", **more) -> dict:
    """What make_config reads of a data set's facts."""
    return {"name": name, "format": kind, "n_vocab": N_VOCAB, "splits": {"train": {"tokens": tokens}}, **more}


TEXT = facts_of("text")
SMALL_VOCABULARY = {**TEXT, "n_vocab": 4096}
CHAT = facts_of("chat")
MIXED = {"format": "chat", "n_vocab": N_VOCAB, "parts": [{**TEXT, "weight": 0.5}, {**CHAT, "weight": 0.5}]}


def config_of(data=TEXT, device: str = "cpu", **options) -> RunConfig:
    return make_config(TrainOptions(**options), options, device, data, speed_up=lambda *arguments: None)


# The command line


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--max_iters", "0"], "--max_iters must be at least 1, not 0"),
        (["--batch_size", "0"], "--batch_size must be at least 1, not 0"),
        (["--batch_size", "many"], "--batch_size must be a number or auto, not 'many'"),
        (["--dropout", "1"], "--dropout must be at least 0 and below 1, not 1.0"),
        (["--learning_rate", "nan"], "--learning_rate must be at least 0, not nan"),
        (["--muon_learning_rate", "-1"], "--muon_learning_rate must be at least 0"),
        (["--seed", str(2**63)], "--seed must be at least 0 and below"),
        (["--init_from", ""], "--init_from is empty; name a checkpoint"),
        (["--dataset", "../story"], "dataset must be a name such as story"),
        (["--max_iter", "5"], "did you mean --max_iters"),
    ],
)
def test_a_wrong_option_is_a_usage_error(words, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_options(TrainOptions, "", words)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_given_options_hold_what_was_given():
    words = ["--resume", "--batch_size", "auto", "--no-compile"]
    assert given_options(TrainOptions, words) == {"resume": "", "batch_size": "auto", "compile": False}
    assert parse_options(TrainOptions, "", words).batch_size == "auto"


def test_the_defaults_are_the_readmes():
    options = TrainOptions()
    assert (options.dataset, config_of().max_iters, options.seed) == ("story", 5000, 1337)
    assert options.checkpoint_path == "models/story5000.pt"


def test_every_option_is_in_a_group_and_is_read():
    assert all(field.metadata["option"].group for field in dataclasses.fields(TrainOptions))
    source = "".join(path.read_text("utf-8") for path in [ROOT / "train.py", *(ROOT / "training").glob("*.py")])
    names = {field.name for field in dataclasses.fields(TrainOptions)}
    unread = {name for name in names if not re.search(rf"\b(config|options)\.{name}\b", source)}
    assert unread <= {"n_layer", "n_head", "n_embd"}  # read as names of training.initialization.SHAPE


# What is chosen


@pytest.mark.parametrize("device", ["cpu", "mps"])
@pytest.mark.parametrize("data", [TEXT, CHAT, MIXED], ids=["text", "chat", "mixed"])
def test_every_field_has_a_value_of_its_type(device, data):
    config = config_of(data, device)
    for name, kind in typing.get_type_hints(RunConfig).items():
        assert isinstance(getattr(config, name), kind), name
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.batch_size = 1


def test_the_fields_are_the_keys_of_a_checkpoint(straight):
    saved = load_checkpoint(straight / "text10.pt")["info"]["config"]
    assert list(saved) == [field.name for field in dataclasses.fields(RunConfig)]
    # The keys of a checkpoint before there was a RunConfig (commit c54421c).
    expected = """
        dataset max_iters seed preset n_layer n_head n_embd block_size dropout batch_size gradient_accumulation_steps
        loss_on document_mask optimizer learning_rate muon_learning_rate min_lr schedule warmup_iters weight_decay
        muon_weight_decay grad_clip eval_interval eval_iters log_interval keep tensorboard device dtype compile
        activation_checkpointing parallel deterministic data_dir out_dir resume init_from val_rows
    """
    new = {"n_vocab", "objective", "beta", "label_smoothing", "sft_weight", "residual_dtype", "compile_scope"}
    new |= {"embedding_weight_decay", *FIELDS}
    assert [key for key in saved if key not in new] == expected.split()


@pytest.mark.parametrize(
    ("data", "given", "expected"),
    [
        (TEXT, {}, {"schedule": "wsd", "loss_on": "all", "document_mask": False, "preset": "small", "n_embd": 256}),
        (CHAT, {}, {"schedule": "cosine", "loss_on": "assistant", "document_mask": True}),
        (MIXED, {}, {"schedule": "cosine", "loss_on": "assistant", "document_mask": False}),
        (CHAT, {"schedule": "wsd", "document_mask": False}, {"schedule": "wsd", "document_mask": False}),
        (TEXT, {}, {"batch_size": 16, "gradient_accumulation_steps": 1, "val_rows": 320, "block_size": 256}),
        (TEXT, {"n_embd": 384}, {"learning_rate": 3e-3, "min_lr": 3e-3 / 10}),
        (TEXT, {"n_embd": 512}, {"learning_rate": 6e-4}),
        (SMALL_VOCABULARY, {}, {"learning_rate": 6e-3, "muon_learning_rate": 0.02, "min_lr": 6e-3 / 10}),
        (SMALL_VOCABULARY, {"optimizer": "adamw"}, {"learning_rate": 3e-3}),
        (SMALL_VOCABULARY, {"n_embd": 512}, {"learning_rate": 6e-4}),
        (SMALL_VOCABULARY, {"learning_rate": 1e-3}, {"learning_rate": 1e-3}),
        ({**CHAT, "n_vocab": 4096}, {}, {"learning_rate": 3e-3}),
        (TEXT, {"max_iters": 100, "dtype": "bfloat16"}, {"warmup_iters": 5, "eval_interval": 25, "compile": False}),
        (TEXT, {"max_iters": 5000, "dtype": "bfloat16"}, {"compile": False}),
        (TEXT, {"max_iters": 5000, "dtype": "bfloat16", "n_embd": 768}, {"compile": has_cpp_compiler()}),
        (TEXT, {"max_iters": 5000, "dtype": "bfloat16", "dropout": 0.1}, {"compile": False}),
        (TEXT, {"max_iters": 5000, "dtype": "float32", "n_embd": 768}, {"compile": False}),
        (TEXT, {"learning_rate": 0.0}, {"learning_rate": 0.0, "min_lr": 0.0}),
    ],
)
def test_the_defaults_follow_from_data_device_and_shape(data, given, expected):
    config = config_of(data, **given)
    assert {name: getattr(config, name) for name in expected} == expected


def test_fine_tuning_of_text_starts_from_the_usual_rate():
    shape = {"n_embd": 128, "n_vocab": 4096}
    assert default_learning_rate(TrainOptions(), {"text"}, shape) == 6e-3
    assert default_learning_rate(TrainOptions(init_from="story.pt"), {"text"}, shape) == 3e-3


def test_without_the_fast_parts_nothing_is_compiled():
    plain = make_config(TrainOptions(max_iters=5000), {}, "cpu", TEXT)
    assert plain.compile is False
    for name in ("compile", "activation_checkpointing"):
        with pytest.raises(UserError, match=f"--{name} needs the folder fast/"):
            make_config(TrainOptions(**{name: True}), {name: True}, "cpu", TEXT)


def test_embeddings_decay_like_matrices_with_adamw_and_not_with_muon():
    decays = [config_of(TEXT, optimizer=name).embedding_weight_decay for name in ("adamw", "muon")]
    assert decays == [0.1, 0.0]
    assert config_of(TEXT, optimizer="adamw", weight_decay=0.3).embedding_weight_decay == 0.3
    assert config_of(TEXT, embedding_weight_decay=0.2).embedding_weight_decay == 0.2


def test_blocks_are_compiled_as_one_piece_only_where_that_is_possible():
    assert config_of(TEXT).compile_scope == "block"
    as_one = {"compile": True, "compile_scope": "model"}
    assert config_of(TEXT, **as_one).compile_scope == "model"
    with pytest.raises(UserError, match=r"no effect without torch\.compile; add --compile, or use --compile_scope"):
        config_of(TEXT, compile_scope="model")
    with pytest.raises(UserError, match=r"no effect without torch\.compile; use --compile_scope block"):
        config_of(TEXT, compile=False, compile_scope="model")
    with pytest.raises(UserError, match=r"no effect without torch\.compile; use --compile_scope block"):
        make_config(TrainOptions(compile_scope="model"), {"compile_scope": "model"}, "cpu", TEXT)
    with pytest.raises(UserError, match="combined with --activation_checkpointing; use --compile_scope block"):
        config_of(TEXT, **as_one, activation_checkpointing=True)
    with fake_job(size=2), pytest.raises(UserError, match=r"needs a single process, .*; use --compile_scope block"):
        config_of(TEXT, **as_one)


def test_a_residual_stream_in_bfloat16_is_refused_where_it_has_no_use():
    assert config_of(TEXT).residual_dtype == "float32"
    rounded = {"residual_dtype": "bfloat16"}
    assert config_of(TEXT, dtype="bfloat16", **rounded).residual_dtype == "bfloat16"
    with pytest.raises(UserError, match="cannot be combined with float32; use --dtype bfloat16 or --residual_dtype"):
        config_of(TEXT, dtype="float32", **rounded)
    with pytest.raises(UserError, match="needs fast/ and no --plain; give --residual_dtype float32"):
        make_config(TrainOptions(dtype="bfloat16", **rounded), rounded, "cpu", TEXT)


def test_targets_that_text_cannot_have_are_refused(data, tmp_path):
    with pytest.raises(UserError, match="--loss_on assistant: text is text, which has no assistant"):
        run(data, tmp_path, loss_on="assistant")
    assert not list(tmp_path.iterdir())


def test_a_weight_decay_that_decays_nothing_is_refused(data, half, tmp_path):
    for arguments in ({"out_dir": tmp_path / "new"}, {"out_dir": half, "resume": True}):
        with pytest.raises(UserError, match="--weight_decay is for --optimizer adamw; with muon use --muon_weight_"):
            run(data, weight_decay=0.2, **arguments)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(UserError, match=r"n_embd .* must be a multiple of n_head .*; change --n_embd or --n_head"):
        config_of(n_embd=10, n_head=3)


# The schedule


def shares(kind: str) -> list[float]:
    config = config_of(max_iters=100, warmup_iters=10, learning_rate=1e-3, min_lr=1e-4, schedule=kind)
    return [schedule(iter_num, config) for iter_num in range(101)]


def test_the_schedule_warms_up_and_falls_to_the_lowest_rate():
    values = shares("cosine")
    assert values[0] == pytest.approx(0.1) and values[9] == values[10] == 1
    assert all(a > b for a, b in itertools.pairwise(values[10:]))
    assert values[55] == pytest.approx(0.1 + 0.9 / 2) and values[100] == pytest.approx(0.1)


def test_wsd_stays_at_the_peak_until_a_fifth_is_left():
    values = shares("wsd")
    assert values[4] == pytest.approx(0.5) and set(values[9:81]) == {1}
    assert all(a > b for a, b in itertools.pairwise(values[80:]))
    assert values[85] == pytest.approx(1 - 0.9 / 2) and values[100] == pytest.approx(0.1)
