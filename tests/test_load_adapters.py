"""Adapters wherever a checkpoint is named: pairs, bases found and checked, PEFT's layout, and clear refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import gen
import serve
from common.checkpoint import digest, save_checkpoint
from common.cli import UserError
from common.lora import LAYERS, Adapter, adapt, trained_weights
from exchange.choosing import chat_models, named_model, newest_models
from exchange.loading import load_checkpoint, load_model, load_unmerged, read_info, split_pair, weights_digest
from export import ExportOptions, export
from model import GPT, GPTConfig
from serving.models import model_cards
from setup_tokenizer import N_VOCAB

CONFIG = GPTConfig(block_size=64, n_layer=2, n_head=2, n_embd=32)
COUNTS = {"documents": 1234, "tokens": 56789}
DATA = {"name": "story", "format": "text", "splits": {"train": COUNTS, "val": COUNTS}}
FACTS = {"dataset": "story", "format": "text", "data": DATA, "iter_num": 10, "tokens_seen": 10_000_000}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, with models/base.pt, and models/other.pt of other weights."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for seed, name in enumerate(("base", "other")):
        save_checkpoint(f"models/{name}.pt", random_gpt(seed), {**FACTS, "config": {"max_iters": 10}})
    return tmp_path


def random_gpt(seed: int = 0) -> GPT:
    """A model whose logits depend on every weight."""
    torch.manual_seed(seed)
    gpt = GPT(CONFIG)
    for weight in gpt.parameters():
        weight.data.mul_(4).add_(0.05 * torch.randn_like(weight))
    return gpt.eval()


def write_adapter(path: str = "models/adapter.pt", base: str = "models/base.pt", **changes) -> GPT:
    """An adapter of models/base.pt that has learned something, as train.py writes it; returns its model."""
    weights = load_checkpoint(base, ("model",))["model"]
    adapter = Adapter(**{"rank": 4, "alpha": 8.0, "base": base, "base_digest": digest(weights), **changes})
    gpt = random_gpt()
    adapt(gpt, adapter)
    with torch.no_grad():
        for weight in trained_weights(gpt).values():
            weight.add_(0.1 * torch.randn_like(weight))
    facts = {**FACTS, "format": "chat", "data": {**DATA, "format": "chat"}, "adapter": dataclasses.asdict(adapter)}
    info = {**facts, "config": {"max_iters": 10, "init_from": base}}
    save_checkpoint(path, gpt, info, {"optimizers": []}, trained_weights(gpt))
    return gpt.requires_grad_(False)


def sample_ids(n_vocab: int = N_VOCAB) -> torch.Tensor:
    ids = torch.randint(0, n_vocab, (2, 64), generator=torch.Generator().manual_seed(0))
    ids[0, :2] = torch.tensor([N_VOCAB - 2, N_VOCAB - 1])
    return ids


# --- pairs and lone adapters ---


@pytest.mark.parametrize("rows", [False, True], ids=["matrices", "rows"])
@pytest.mark.parametrize("path", ["models/adapter.pt", "models/base.pt+models/adapter.pt"], ids=["alone", "pair"])
def test_an_adapter_is_loaded_merged_with_its_base(folder, path, rows):
    gpt = write_adapter(chat_rows=rows)
    model, info = load_model(path)
    torch.testing.assert_close(model(sample_ids())[0], gpt(sample_ids())[0], atol=1e-4, rtol=1e-5)
    assert info["format"] == "chat" and info == read_info(path)
    assert type(model) is GPT and model.state_dict().keys() == random_gpt().state_dict().keys()
    assert load_checkpoint(path)["training"] is None and load_unmerged(path)["training"] == {"optimizers": []}


def test_a_base_next_to_the_adapter_is_found(folder):
    write_adapter()
    (folder / "models").rename(folder / "moved")
    assert load_model("moved/adapter.pt")[1]["format"] == "chat"


def test_names_with_a_plus_are_files_first(folder):
    write_adapter("models/chitchat+own300.pt")
    assert split_pair("models/chitchat+own300.pt") == (None, "models/chitchat+own300.pt")
    pair = "models/base.pt+models/chitchat+own300.pt"
    assert split_pair(pair) == ("models/base.pt", "models/chitchat+own300.pt")
    assert load_model(pair)[1]["format"] == "chat"
    Path("models/base.pt").rename("models/a+b10.pt")
    assert split_pair("models/a+b10.pt+models/chitchat+own300.pt") == ("models/a+b10.pt", "models/chitchat+own300.pt")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("models/other.pt+models/adapter.pt", r"other.pt is not the base of the adapter .*\(sha256 \w{12} instead of"),
        ("models/adapter.pt+models/base.pt", r"name the base first: models/base.pt\+models/adapter.pt"),
        ("models/adapter.pt+models/adapter.pt", "are both adapters; name a base first"),
        ("models/base.pt+models/other.pt", "other.pt is not an adapter; name models/other.pt alone, or an adapter"),
        ("models/missing.pt+models/adapter.pt", "models/missing.pt not found; there are"),
        ("models/base.pt+models/missing.pt", "models/missing.pt not found; there are"),
    ],
)
def test_a_wrong_pair_is_refused_with_what_to_do(folder, path, message):
    write_adapter()
    with pytest.raises(UserError, match=message):
        load_model(path)


def test_a_missing_and_a_changed_base_are_refused(folder):
    write_adapter()
    Path("models/other.pt").replace("models/base.pt")
    with pytest.raises(UserError, match=r"base.pt is not the base of .*as it was then .*BASE\+models/adapter.pt"):
        load_model("models/adapter.pt")
    Path("models/base.pt").unlink()
    with pytest.raises(
        UserError, match=r"needs its base models/base.pt, which was not found; .*BASE\+models/adapter.pt"
    ):
        read_info("models/adapter.pt")


def test_a_damaged_adapter_is_refused(folder):
    write_adapter()
    content = Path("models/adapter.pt").read_bytes()
    middle = len(content) // 2
    Path("models/adapter.pt").write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(UserError, match=r"adapter.pt is damaged"):
        load_model("models/adapter.pt")
    Path("models/adapter.pt").write_bytes(content[:middle])
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_model("models/adapter.pt")


def test_factors_of_another_shape_are_refused(folder):
    gpt = write_adapter()
    info = read_info("models/adapter.pt")
    factors = {**trained_weights(gpt.requires_grad_(True)), "h.0.mlp.c_fc.lora_B": torch.zeros(3, 4)}
    factors = {name: tensor for name, tensor in factors.items() if "lora" in name}
    save_checkpoint("models/adapter.pt", gpt, info, None, factors)
    with pytest.raises(UserError, match=r"does not fit its base .*h.0.mlp.c_fc"):
        load_model("models/adapter.pt")


# --- lists of models ---


def test_adapters_are_listed_with_their_base(folder, capsys):
    write_adapter()
    (found,) = chat_models()
    assert found.name == "adapter" and "adapter of base" in found.description
    assert [model.name for model in newest_models()] == ["adapter", "other", "base"]
    pair = named_model("models/base.pt+models/adapter.pt", chat_models())
    assert pair.info["format"] == "chat" and pair.name == "adapter"
    cards = model_cards({str(found.path): found.info, str(pair.path): pair.info})
    assert list(cards) == ["adapter", "adapter#2"] and cards["adapter"].can_chat
    Path("models/base.pt").unlink()
    assert [model.name for model in newest_models()] == ["other"]
    assert "skipped: the adapter models/adapter.pt needs its base" in capsys.readouterr().err


def test_the_digest_is_that_of_the_weights_as_they_are_loaded(folder):
    """Of a checkpoint the one that it contains, of an adapter that of the merged weights."""
    write_adapter()
    for path in ("models/base.pt", "models/adapter.pt", "models/base.pt+models/adapter.pt"):
        assert weights_digest(path) == digest(load_checkpoint(path)["model"])
    assert weights_digest("models/adapter.pt") != weights_digest("models/base.pt") != weights_digest("models/other.pt")


def test_gen_and_serve_load_an_adapter(folder, capsys):
    write_adapter()
    load, _ = serve.model_loader(serve.ServeOptions(device="cpu", dtype="float32", exact=True))("models/adapter.pt")
    models = gen.CurrentModel(gen.GenOptions("models/adapter.pt", device="cpu", dtype="float32"))
    ids = sample_ids()
    assert torch.equal(models.engine.model(ids)[0], load(ids)[0])
    assert "* adapter  story, 10.0 M tokens, adapter of base" in models.listing()
    assert torch.equal(models.load("models/base.pt+models/adapter.pt").model(ids)[0], load(ids)[0])
    assert not torch.equal(models.load("base").model(ids)[0], load(ids)[0])


# --- export, and PEFT ---


@torch.no_grad()
def test_an_export_is_the_merged_model(folder):
    write_adapter(chat_rows=True)
    export(ExportOptions("models/base.pt+models/adapter.pt", "out"))
    merged = load_checkpoint("models/adapter.pt", ("model",))["model"]
    found = load_file("out/model.safetensors")
    assert torch.equal(found["transformer.h.1.mlp.c_fc.weight"], merged["h.1.mlp.c_fc.weight"].T)
    assert torch.equal(found["transformer.wte.weight"], merged["wte.weight"][:N_VOCAB])
    assert "An adapter (LoRA, rank 4), merged with base.pt" in Path("out/README.md").read_text()


@torch.no_grad()
@pytest.mark.parametrize(("layers", "rows"), [("all", False), ("all", True), ("attention", True), ("mlp", False)])
def test_peft_gives_our_logits_and_back(folder, layers, rows):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    gpt = write_adapter(layers=layers, chat_rows=rows)
    export(ExportOptions("models/base.pt", "exported"))
    names = export(ExportOptions("models/base.pt+models/adapter.pt", "for-peft", peft=True))
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("exported"), "for-peft").eval()
    ids = sample_ids()
    expected = gpt(ids)[0]
    assert (expected - random_gpt()(ids)[0]).abs().max() > 0.1
    assert (theirs(ids).logits - expected[..., :N_VOCAB]).abs().max() < 1e-4
    theirs.save_pretrained("saved-by-peft")
    for path in ("models/base.pt+saved-by-peft", "exported+for-peft", "for-peft"):
        model, info = load_model(path)
        torch.testing.assert_close(model(ids)[0], expected, atol=1e-4, rtol=1e-5)
        assert info["adapter"]["layers"] == layers and info["adapter"]["chat_rows"] == rows
        assert info["format"] == ("chat" if rows else "text")


@torch.no_grad()
def test_an_adapter_that_peft_trained_is_read(folder):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    export(ExportOptions("models/base.pt", "exported"))
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["c_attn", "c_fc"], "use_rslora": True}
    torch.manual_seed(0)
    theirs = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained("exported"), peft.LoraConfig(fan_in_fan_out=True, **settings)
    ).eval()
    for name, weight in theirs.named_parameters():
        if "lora_B" in name:
            weight.normal_(std=0.03)
    theirs.save_pretrained("theirs")
    model, info = load_model("theirs")
    assert info["adapter"]["layers"] == "some" and info["adapter"]["base"] == "exported"
    torch.testing.assert_close(model(sample_ids())[0], theirs(sample_ids()).logits, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "has use_dora true, which is not supported"),
        ({"peft_type": "IA3"}, 'has peft_type "IA3"'),
        ({"trainable_token_indices": {"wte": [5, 6]}}, r"the embeddings of the ids \[5, 6\]"),
        ({"r": None}, "adapter_config.json is not complete"),
        (None, "adapter_config.json cannot be read"),
    ],
)
def test_adapters_of_another_kind_are_refused(folder, changes, message):
    write_adapter()
    export(ExportOptions("models/adapter.pt", "out", peft=True))
    file = Path("out/adapter_config.json")
    file.write_text("{" if changes is None else json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        load_model("out")


def test_weights_that_are_not_gpt2s_are_refused(folder):
    write_adapter()
    export(ExportOptions("models/adapter.pt", "out", peft=True))
    save_file(
        {"base_model.model.model.layers.0.q_proj.lora_A.weight": torch.zeros(4, 32)}, "out/adapter_model.safetensors"
    )
    with pytest.raises(UserError, match=r"q_proj.lora_A.weight, which is not supported; use an adapter of GPT-2"):
        load_model("out")
    Path("out/adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=r"adapter_model.safetensors cannot be read"):
        load_model("out")


def test_only_an_adapter_is_exported_as_one(folder):
    with pytest.raises(UserError, match=r"base.pt is not an adapter; leave --peft out"):
        export(ExportOptions("models/base.pt", "out", peft=True))
    write_adapter()
    with pytest.raises(UserError, match="--peft writes an adapter alone, and --gguf a whole model"):
        export(ExportOptions("models/adapter.pt", "out", peft=True, gguf="f32"))
    export(ExportOptions("models/adapter.pt", "out", peft=True))
    export(ExportOptions("models/base.pt", "out", force=True))
    assert not Path("out/adapter_config.json").exists(), "transformers would add it to the model"
    assert set(LAYERS) == {"attention", "mlp", "all"}
