"""Models in the Hugging Face layout as checkpoints: logits against transformers, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from safetensors.torch import load_file, save_file

from common.cli import UserError
from exchange.loading import load_checkpoint, load_model, read_info
from setup_tokenizer import IM_END_ID, IM_START_ID, N_VOCAB

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64}


def oracle(vocab_size: int = 50257, **settings):
    """A random model of transformers', with weights large enough for the logits to differ clearly."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, **SHAPE, **settings)).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4).add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "tiny"
    oracle().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    """The saved model, to be spoiled."""
    return shutil.copytree(saved, tmp_path / "copy")


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def change_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(change(tensors), path)


def ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 50257, (2, 64), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_logits_equal_those_of_transformers(saved):
    model, info = load_model(saved)
    ours, _ = model(ids())
    theirs = oracle()(ids()).logits
    assert theirs.std() > 0.5
    assert (ours[..., :50257] - theirs).abs().max() < 1e-4
    assert info["format"] == "text"
    assert (model.config.n_vocab, model.config.vocab_size, model.config.block_size) == (N_VOCAB, 50304, 64)


def test_new_rows_are_the_mean_of_the_others_and_this_is_said(saved, capsys):
    weights = load_checkpoint(saved)["model"]
    mean = oracle().transformer.wte.weight.detach().mean(0)
    torch.testing.assert_close(weights["wte.weight"][50257:], mean.expand(47, -1))
    said = capsys.readouterr()
    assert said.out == ""  # gen.py's standard output is the text alone
    assert "<|im_start|> and <|im_end|> are new" in said.err
    assert load_checkpoint(saved)["training"] is None


def test_the_facts_alone_are_read_without_the_weights(copy):
    (copy / "model.safetensors").unlink()
    assert read_info(copy)["model"]["n_embd"] == 32


def test_a_sharded_model_reads_like_a_whole_one(saved, tmp_path):
    oracle().save_pretrained(tmp_path / "shards", max_shard_size="2MB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    whole, shards = load_checkpoint(saved)["model"], load_checkpoint(tmp_path / "shards")["model"]
    assert whole.keys() == shards.keys()
    assert all(torch.equal(whole[name], shards[name]) for name in whole)


def test_the_layout_of_the_published_files_is_read(saved, copy):
    """Names without a prefix, the causal mask among the weights, the head stored once more."""

    def as_published(tensors):
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        tensors |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril() for layer in range(2)}
        return tensors | {"lm_head.weight": tensors["wte.weight"].clone()}

    change_weights(copy, as_published)
    whole, published = load_checkpoint(saved)["model"], load_checkpoint(copy)["model"]
    assert whole.keys() == published.keys()
    assert all(torch.equal(whole[name], published[name]) for name in whole)


@pytest.mark.parametrize(("token", "is_kept"), [("<|im_start|>", True), ("[PAD]", False)])
def test_rows_of_another_vocabulary_are_kept_only_where_they_mean_chatml(tmp_path, token, is_kept, capsys):
    from exchange.tokenizer_files import tokenizer_json

    model = oracle(N_VOCAB)
    model.save_pretrained(tmp_path)
    tokenizer = tokenizer_json(N_VOCAB)
    tokenizer["added_tokens"][1]["content"] = token
    tokenizer["model"]["vocab"] = {name: i for name, i in tokenizer["model"]["vocab"].items() if i < 50257}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    rows = load_checkpoint(tmp_path)["model"]["wte.weight"]
    theirs = model.transformer.wte.weight.detach()
    for row in (IM_START_ID, IM_END_ID):
        assert torch.equal(rows[row], theirs[row]) == is_kept
    assert ("are new" in capsys.readouterr().err) != is_kept


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"activation_function": "relu"}, 'activation_function "relu"'),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx true"),
        ({"scale_attn_weights": False}, "scale_attn_weights false"),
        ({"n_inner": 100}, "n_inner 100"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon 1e-06"),
        ({"add_cross_attention": True}, "add_cross_attention true"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings false"),
        ({"vocab_size": 32000}, "a vocabulary of 32,000 ids"),
        ({"n_head": 5}, "n_embd (32) must be a multiple of n_head (5)"),
        ({"n_embd": "wide"}, "does not describe a GPT-2"),
        ({"n_layer": 3}, "do not fit its config.json"),
        ({"vocab_size": 50258}, "do not fit its config.json (1 differ, such as wte.weight)"),
    ],
)
def test_what_is_not_this_network_is_refused_in_a_sentence(copy, changes, named):
    change_config(copy, **changes)
    with pytest.raises(UserError, match=re.escape(named)) as caught:
        load_checkpoint(copy)
    assert "\n" not in str(caught.value)


def test_damaged_and_incomplete_folders_are_refused_in_a_sentence(saved, copy, tmp_path):
    def refused(pattern: str) -> None:
        with pytest.raises(UserError, match=pattern) as caught:
            load_checkpoint(copy)
        assert "\n" not in str(caught.value)

    change_weights(copy, lambda tensors: tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1})
    refused("is not tied")
    change_weights(copy, lambda tensors: {n: t for n, t in tensors.items() if not n.endswith("ln_f.bias")})
    refused("such as ln_f.bias")
    content = (saved / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[: len(content) // 2])
    refused("cannot be read")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    refused("pickled code")
    (copy / "pytorch_model.bin").unlink()
    refused("model.safetensors not found")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x"}}), "utf-8")
    refused("does not name files in its own folder")
    (copy / "vocab.json").write_text(json.dumps({"ein": 0, "anderes": 1}), "utf-8")
    refused("a different tokenizer")
    (copy / "config.json").write_text("{", "utf-8")
    refused("config.json cannot be read")
    (copy / "config.json").unlink()
    refused("config.json not found")


def test_scripts_take_a_folder_or_a_published_name_as_a_checkpoint(saved, python, tmp_path):
    from data.pipeline import Corpus, Dataset, PrepareOptions, prepare

    files = {name: (saved / name).read_bytes() for name in ("config.json", "model.safetensors")}
    data = tmp_path / "data"
    data.mkdir()
    texts = [f"The cat number {number} sat on the mat and saw the moon. " * 3 for number in range(80)]
    options = PrepareOptions(output_dir=str(data), val_fraction=0.2)
    prepare(Dataset("tale", "text", "a test", "MIT"), options, Corpus(texts))
    train = ["train.py", "--dataset", "tale", "--data_dir", str(data), "--out_dir", str(tmp_path / "models")]
    train += ["--init_from", str(saved), "--max_iters", "2", "--batch_size", "2", "--device", "cpu", "--no-compile"]
    gen = ["--prompt", "Once", "--max_tokens", "3", "--device", "cpu", "--temp", "0"]
    commands = [["gen.py", "gpt2", *gen], ["gen.py", "gpt2-medium", *gen], train]
    with HubServer({"openai-community/gpt2": files}) as hub:
        settings = {"env": os.environ | hub.environment(tmp_path / "cache"), "cwd": ROOT, "stdin": subprocess.DEVNULL}
        from_hub, not_there, trained = (
            subprocess.run([python, *command], capture_output=True, text=True, **settings) for command in commands
        )
    assert from_hub.returncode == 0, from_hub
    assert from_hub.stdout.startswith("Once")
    assert "are new in the vocabulary of gpt2" in from_hub.stderr
    assert not_there.returncode == 1
    assert re.fullmatch(
        r"(?s)(.*\n)?error: config.json of openai-community/gpt2-medium not downloaded \(.*404.*\); fetch "
        r"http://\S+/openai-community/gpt2-medium/resolve/main/config.json and model.safetensors into a folder.*\n",
        not_there.stderr,
    )
    assert trained.returncode == 0, trained
    info = read_info(tmp_path / "models" / "tale2.pt")
    assert (info["model"]["n_embd"], info["model"]["block_size"], info["iter_num"]) == (32, 64, 2)


def test_weights_in_half_precision_are_read_as_float32(saved, copy):
    change_weights(copy, lambda tensors: {name: tensor.half() for name, tensor in tensors.items()})
    halves = load_checkpoint(copy)["model"]
    assert {tensor.dtype for tensor in halves.values()} == {torch.float32}
    torch.testing.assert_close(
        halves["h.0.ln_1.weight"], load_checkpoint(saved)["model"]["h.0.ln_1.weight"].half().float()
    )


def test_a_folder_is_recognised_by_what_it_is(saved, tmp_path, monkeypatch):
    from exchange.hugging_face import is_hugging_face

    monkeypatch.chdir(tmp_path)
    assert is_hugging_face(saved)
    assert is_hugging_face(Path("gpt2-xl"))
    assert not is_hugging_face(Path("models/gpt2.pt"))
    Path("gpt2").write_bytes(b"a checkpoint")
    assert not is_hugging_face(Path("gpt2"))  # a file of that name is meant


def test_of_another_kind_of_model_the_kind_is_named_not_its_tokenizer(copy):
    content = {"model": {"type": "Unigram", "vocab": [["a", 0]]}, "added_tokens": []}
    (copy / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(UserError, match=r"tokenizer.json is not a GPT-2 tokenizer|of the kind 'Unigram'; use"):
        load_checkpoint(copy)
    (copy / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 32000}), "utf-8")
    with pytest.raises(UserError, match='has model_type "llama" and only "gpt2" is supported; use another model'):
        load_checkpoint(copy)
