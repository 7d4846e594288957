"""Training an adapter: what is saved, resuming bit by bit, refusals, and memory."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest
import torch

from common.checkpoint import digest, read_info, save_checkpoint
from common.cli import UserError
from common.lora import Adapter
from exchange.loading import load_checkpoint as load_merged
from exchange.loading import load_unmerged
from model import GPT, GPTConfig
from tests.tiny import OPTIONS, load_checkpoint, losses, run, same_as
from training.frozen_model import frozen_model, trial_model
from training.memory import StepMemory, largest_by_trying
from training.options import TrainOptions
from training.progress import Clock, Sampler

pytestmark = pytest.mark.usefixtures("one_thread", "quick_disk")

NO_SHAPE = dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size"))


@pytest.fixture(scope="module")
def base(data, tmp_path_factory) -> Path:
    """A trained text model, and the digest of its file before any adapter."""
    folder = tmp_path_factory.mktemp("base")
    assert run(data, folder) == 0
    return folder / "text10.pt"


def lora(base: Path, **changes) -> dict:
    return {**NO_SHAPE, "init_from": str(base), "lora_rank": 2, "dataset": "text", **changes}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
        ({"lora_layers": "attention", "plain": True}, {"attn.c_attn", "attn.c_proj"}),
        ({"dataset": "chat", "lora_layers": "mlp", "dtype": "bfloat16"}, {"mlp.c_fc", "mlp.c_proj", "wte.rows"}),
        ({"dataset": "chat", "lora_chat_rows": False, "dtype": "float16"}, None),
    ],
    ids=["all", "attention-plain", "chat-mlp-bfloat16", "float16"],
)
def test_only_factors_are_trained_and_saved(data, base, tmp_path, changes, names):
    before, given = sha256(base), lora(base, **changes)
    assert run(data, tmp_path, **given) == 0
    assert sha256(base) == before
    saved = load_checkpoint(tmp_path / f"{given['dataset']}10.pt")
    if names:
        kinds = {name if name == "wte.rows" else ".".join(name.split(".")[2:4]) for name in saved["model"]}
        assert kinds == names
    assert all(tensor.dtype == torch.float32 and tensor.any() for tensor in saved["model"].values())
    adapter = Adapter(**saved["info"]["adapter"])
    assert adapter.base == str(base) and adapter.base_digest == digest(load_checkpoint(base)["model"])
    n_params = adapter.n_params(GPTConfig(**saved["info"]["model"]))
    assert sum(tensor.numel() for tensor in saved["model"].values()) == n_params
    assert saved["info"]["config"]["optimizer"] == "adamw"
    states = [value for each in saved["training"]["optimizers"][0]["state"].values() for value in each.values()]
    assert sum(state.numel() for state in states if state.dim()) == 2 * n_params


@pytest.mark.parametrize(
    "changes",
    [{"dropout": 0.2, "dataset": "text"}, {"dataset": "chat", "dtype": "bfloat16"}, {"dataset": "text", "plain": True}],
    ids=["dropout", "chat-bfloat16", "plain"],
)
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(data, base, tmp_path, changes):
    given = lora(base, **changes)
    name = f"{given['dataset']}10"
    straight, stopped = tmp_path / "a" / name, tmp_path / "b" / name
    assert run(data, straight, **given) == 0
    straight.with_suffix(".txt").touch()
    assert run(data, stopped, stop_after=3, **given) == 130
    resumed = {"resume": True, "dataset": given["dataset"], **({"plain": True} if "plain" in changes else {})}
    assert run(data, stopped, stop_after=4, **resumed) == 130
    assert run(data, stopped, **resumed) == 0
    assert [found for found in same_as(stopped, straight) if not found.endswith("info.config")] == []
    ours, theirs = (read_info(folder / f"{name}.pt")["config"] for folder in (stopped, straight))
    changed = {key for key in theirs if ours[key] != theirs[key]}
    assert changed == {"resume", "out_dir", "init_from"}  # a resumed run starts from itself


def test_the_losses_start_where_the_base_is_and_fall(data, base, tmp_path):
    run(data, tmp_path, **lora(base, lora_rank=8, max_iters=40, learning_rate=1e-2))
    first, *_, last = [row[2] for row in losses(tmp_path / "text40.jsonl") if row[2] is not None]
    assert first == pytest.approx(read_info(base)["val_loss"], abs=1e-5)
    assert last < first


def test_the_model_that_is_loaded_is_the_one_that_was_evaluated(data, base, tmp_path):
    """The training run evaluates base and factors; continuing the merged weights starts with the same loss."""
    given = lora(base, dataset="chat", dtype="float32")
    run(data, tmp_path / "a", **given)
    adapter = tmp_path / "a" / "chat10.pt"
    run(data, tmp_path / "b", stop_after=0, init_from=str(adapter), dataset="chat", **NO_SHAPE)
    run(data, tmp_path / "c", stop_after=1, init_from=f"{base}+{adapter}", dataset="chat", **NO_SHAPE)
    start = losses(tmp_path / "c" / "chat10.jsonl")[0][2]
    assert start == pytest.approx(read_info(adapter)["val_loss"], abs=1e-5)


@torch.no_grad()
def test_low_precision_of_the_frozen_matrices_changes_no_result(base):
    saved = load_merged(base)
    config = GPTConfig(**saved["info"]["model"])
    low = frozen_model(config, saved["model"], "bfloat16", str(base)).eval()
    high = frozen_model(config, saved["model"], "float32", str(base)).eval()
    assert low.h[0].mlp.c_fc.weight.dtype == torch.bfloat16 and low.wte.weight.dtype == torch.float32
    ids = torch.arange(16)[None]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(low(ids)[0], high(ids)[0])


def test_samples_are_printed_in_low_precision(data, base, tmp_path, capsys):
    assert run(data, tmp_path, sample=Sampler(), **lora(base, dtype="bfloat16")) == 0
    assert capsys.readouterr().out.count("sample:") == 3


def test_a_shorter_block_takes_the_first_positions(data, base, tmp_path):
    run(data, tmp_path, **lora(base, block_size=8))
    merged = load_merged(tmp_path / "text10.pt", ("model",))["model"]
    assert torch.equal(merged["wpe.weight"], load_checkpoint(base)["model"]["wpe.weight"][:8])


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": 8}, "--lora_rank needs a trained model; name it with --init_from"),
        ({"lora_alpha": 8.0, "init_from": "a.pt"}, "--lora_alpha belongs to an adapter; add --lora_rank"),
        ({"lora_layers": "mlp"}, "--lora_layers belongs to an adapter"),
        ({"lora_rank": 0, "init_from": "a.pt"}, "--lora_rank must be at least 1"),
        ({"lora_rank": 2, "init_from": "a.pt", "lora_layers": "head"}, "attention, mlp or all"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainOptions(**options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 9}, r"--lora_rank 9 exceeds the width 8 of .*; use a smaller one"),
        ({"optimizer": "muon"}, "--optimizer muon is for whole matrices"),
        ({"parallel": "fsdp"}, "--parallel fsdp does not shard a model with an adapter"),
        ({"n_embd": 16}, "--n_embd 16 contradicts"),
    ],
)
def test_what_does_not_fit_an_adapter_is_refused(data, base, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        run(data, tmp_path, **lora(base, **changes))
    assert not list(tmp_path.iterdir())


def test_the_bases_own_file_and_an_adapter_as_base_are_refused(data, base, tmp_path):
    with pytest.raises(UserError, match="which is its base; change --max_iters"):
        run(data, base.parent, **lora(base))
    run(data, tmp_path, **lora(base))
    with pytest.raises(UserError, match=r"is an adapter itself; .*export.py"):
        run(data, tmp_path / "b", **lora(tmp_path / "text10.pt"))


def test_an_adapter_has_no_embeddings_to_decay(data, base, tmp_path):
    with pytest.raises(UserError, match="--embedding_weight_decay has no effect with --lora_rank; leave it out"):
        run(data, tmp_path, **lora(base), embedding_weight_decay=0.2)


def test_resuming_keeps_the_adapters_settings(data, base, tmp_path):
    run(data, tmp_path, stop_after=3, **lora(base))
    with pytest.raises(UserError, match=r"--lora_rank 4 contradicts .*text10.pt, which was made with 2"):
        run(data, tmp_path, resume=True, lora_rank=4)
    with pytest.raises(UserError, match="--lora_layers mlp contradicts"):
        run(data, tmp_path, resume=True, lora_layers="mlp")
    assert run(data, tmp_path, resume=True, lora_rank=2) == 0


def test_a_full_run_does_not_become_an_adapter(data, half):
    with pytest.raises(UserError, match=r"--lora_rank 4 contradicts .*text10.pt, which was made with None"):
        run(data, half, resume=True, lora_rank=4)


def test_resuming_without_the_base_is_refused(data, base, tmp_path):
    moved = tmp_path / "base.pt"
    moved.write_bytes(base.read_bytes())
    run(data, tmp_path / "a", stop_after=3, **lora(moved))
    moved.rename(tmp_path / "elsewhere.pt")
    with pytest.raises(UserError, match=r"text10.pt needs its base .*base.pt, which was not found; put the base next"):
        run(data, tmp_path / "a", resume=True)
    (tmp_path / "elsewhere.pt").rename(tmp_path / "a" / "base.pt")
    assert run(data, tmp_path / "a", resume=True) == 0


def test_factors_that_do_not_fit_their_settings_are_refused(data, base, tmp_path):
    run(data, tmp_path, stop_after=3, **lora(base))
    path = tmp_path / "text10.pt"
    saved = load_checkpoint(path)
    gpt = GPT(GPTConfig(**saved["info"]["model"]))
    factors = {name: tensor for name, tensor in saved["model"].items() if "h.1.mlp.c_fc" not in name}
    save_checkpoint(path, gpt, saved["info"], saved["training"], factors)
    with pytest.raises(UserError, match=r"does not fit its own settings \(h.1.mlp.c_fc.lora_A\)"):
        run(data, tmp_path, resume=True)


# --- memory ---


def test_frozen_weights_need_no_gradients_and_states():
    full = StepMemory(GPTConfig(), "cpu", "bfloat16")
    adapter = dataclasses.replace(full, adapter=Adapter(8))
    weights = sum(parameter.numel() for parameter in GPT(GPTConfig()).parameters())
    saved = full.bytes(1) - adapter.bytes(1)
    assert saved == pytest.approx(16 * (weights - Adapter(8).n_params(GPTConfig())), rel=0.02)


def test_a_micro_batch_is_tried_with_the_adapter():
    tried = []

    def watch(model, *settings):
        model.register_forward_pre_hook(lambda module, arguments: tried.append(module))

    step = StepMemory(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16), "meta", "float32", adapter=Adapter(2))
    assert largest_by_trying(step, [4, 2], watch) == 4
    trained = [name for name, weight in tried[0].named_parameters() if weight.requires_grad]
    assert trained[:2] == ["h.0.attn.c_attn.lora_A", "h.0.attn.c_attn.lora_B"]
    low = trial_model(step.model, Adapter(2), "cpu", "bfloat16")
    assert low.h[0].mlp.c_fc.weight.dtype == torch.bfloat16


def test_the_speed_counts_no_gradients_of_frozen_weights(data, base, tmp_path):
    counts = []

    def count(training):
        clock = Clock(training.model, training.config, training.data.facts, training.config.tokens_per_iter, 0)
        frozen = [name for name, weight in training.model.named_parameters() if not weight.requires_grad]
        sizes = {name: weight.numel() for name, weight in training.model.named_parameters()}
        products = 6 * sum(sizes.values()) - 6 * sizes["wpe.weight"]
        products -= 2 * sum(sizes[name] for name in frozen if name != "wpe.weight")
        attention = 12 * 2 * 8 * 16
        counts.append((clock.flops_per_iter, (products + attention) * training.config.tokens_per_iter, len(frozen)))

    run(data, tmp_path / "full", stop_after=0, adjust=count)
    run(data, tmp_path / "lora", stop_after=0, adjust=count, **lora(base))
    (full, expected_full, none), (found, expected, many) = counts
    assert (full, none) == (expected_full, 0) and found == expected and many > 20


def test_unmerged_holds_the_base_and_the_factors(data, base, tmp_path):
    run(data, tmp_path, stop_after=3, **lora(base))
    loaded = load_unmerged(tmp_path / "text10.pt")
    assert loaded["training"] is not None and set(loaded) == {"info", "model", "training", "base"}
    assert all("lora" in name for name in loaded["model"])
    assert OPTIONS["n_layer"] == loaded["info"]["model"]["n_layer"]
