"""Exports as GGUF: names, shapes, tokenizer, and the ids that llama.cpp decodes."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

from common.cli import UserError
from exchange import gguf_file
from exchange.hugging_face import complete_weights
from exchange.tokenizer_files import CHAT_TEMPLATE, merges, vocabulary
from export import ExportOptions, export
from generation.decoding import generate
from generation.sampling import Sampling
from setup_tokenizer import (
    ENDOFTEXT_ID,
    IM_END_ID,
    N_VOCAB,
    encode_chat,
    encode_text,
)
from tests.test_export import CHATS, CONFIG, TEXTS, chat, random_model, save  # noqa: F401

# ---- GGUF ----------------------------------------------------------------------------------------------------------


def read_gguf(path: Path) -> tuple[dict, dict]:
    """(metadata, {name: reader's tensor}) of a GGUF file."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}, {t.name: t for t in reader.tensors}


@pytest.fixture(scope="module")
def gguf_content(chat) -> tuple[dict, dict]:
    return read_gguf(chat / "model-f32.gguf")


def test_gguf_holds_the_weights_under_llama_cpps_names(gguf_content):
    from gguf import MODEL_ARCH, MODEL_TENSORS, TENSOR_NAMES

    weights = random_model().state_dict()
    _, tensors = gguf_content
    known = {TENSOR_NAMES[tensor] for tensor in MODEL_TENSORS[MODEL_ARCH.GPT2]}
    known = {name.format(bid=layer) for name in known for layer in range(2)} - {"output"}  # tied to the embedding
    assert {name.rpartition(".")[0] for name in tensors} == known
    assert len(tensors) == len(weights)
    pairs = {
        "token_embd.weight": weights["wte.weight"][:N_VOCAB],
        "position_embd.weight": weights["wpe.weight"],
        "output_norm.bias": weights["ln_f.bias"],
        "blk.1.attn_qkv.weight": weights["h.1.attn.c_attn.weight"],
        "blk.0.attn_output.weight": weights["h.0.attn.c_proj.weight"],
        "blk.1.ffn_up.bias": weights["h.1.mlp.c_fc.bias"],
        "blk.1.ffn_down.weight": weights["h.1.mlp.c_proj.weight"],
        "blk.0.attn_norm.weight": weights["h.0.ln_1.weight"],
        "blk.0.ffn_norm.weight": weights["h.0.ln_2.weight"],
    }
    for name, tensor in pairs.items():
        assert np.array_equal(tensors[name].data, tensor.numpy()), name


def test_gguf_holds_the_shape_and_the_tokenizer(chat, gguf_content):
    facts, _ = gguf_content
    shape = {"block_count": 2, "context_length": 64, "embedding_length": 32, "feed_forward_length": 128}
    assert facts["general.architecture"] == "gpt2"
    assert {name: facts[f"gpt2.{name}"] for name in shape} == shape
    assert facts["gpt2.attention.head_count"] == 2
    assert facts["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    of_tokenizer = {name.removeprefix("tokenizer.ggml."): value for name, value in facts.items()}
    assert (of_tokenizer["model"], of_tokenizer["pre"], of_tokenizer["add_bos_token"]) == ("gpt2", "gpt-2", False)
    assert of_tokenizer["tokens"] == vocabulary()
    assert of_tokenizer["merges"] == [" ".join(pair) for pair in merges()]
    control, normal = 3, 1
    assert of_tokenizer["token_type"] == [normal] * 50256 + [control] * 3
    ends = [of_tokenizer[f"{name}_token_id"] for name in ("bos", "eos", "eot")]
    assert ends == [ENDOFTEXT_ID, IM_END_ID, IM_END_ID]
    assert facts["tokenizer.chat_template"] == CHAT_TEMPLATE


@pytest.mark.parametrize(("kind", "error"), [("bf16", 2**-8), ("q8_0", 2**-7)])
def test_small_gguf_kinds_round_only_the_matrices(tmp_path, kind, error):
    """bfloat16 keeps 8 bits of each weight, q8_0 7 bits of the largest in its block of 32."""
    from gguf.quants import dequantize

    model = random_model()
    weights = complete_weights(model.state_dict(), model.config)
    gguf_file.write_gguf(tmp_path / "model.gguf", weights, dataclasses.replace(CONFIG, n_vocab=2), kind, True, "x")
    _, tensors = read_gguf(tmp_path / "model.gguf")
    for name, ours in {"blk.1.ffn_up.weight": "h.1.mlp.c_fc.weight", "token_embd.weight": "wte.weight"}.items():
        exact = weights[ours].numpy()
        assert tensors[name].tensor_type.name == kind.upper()
        rounded = dequantize(tensors[name].data, tensors[name].tensor_type)
        largest = (
            np.abs(exact).reshape(-1, 32).max(1, keepdims=True) if kind == "q8_0" else np.abs(exact).reshape(-1, 32)
        )
        assert (np.abs(rounded - exact).reshape(-1, 32) <= error * largest).all()
        assert not np.array_equal(rounded, exact)
    for name in ("blk.0.ffn_up.bias", "position_embd.weight", "output_norm.weight"):
        assert tensors[name].tensor_type.name == "F32"


def test_gguf_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch):
    narrow = save(tmp_path, "text", n_embd=48)
    with pytest.raises(UserError, match="multiple of 32, not 48; use --gguf bf16"):
        export(ExportOptions(narrow, str(tmp_path / "out"), gguf="q8_0"))
    monkeypatch.setitem(sys.modules, "gguf", None)  # as if it were not installed
    with pytest.raises(UserError, match="pip install gguf=="):
        export(ExportOptions(narrow, str(tmp_path / "out"), gguf="f32"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_llama_cpp_decodes_the_same_ids(tmp_path, monkeypatch, kind):
    """Greedy decoding of 50 ids, equal for f32; 8 bits must agree on the first ones at least."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python builds it in some minutes")
    default_params = llama_cpp.llama_cpp.llama_model_default_params

    def without_amx():  # which crashes in some builds (ggml-org/llama.cpp issue 20824)
        params = default_params()
        params.use_extra_bufts = False
        return params

    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_model_default_params", without_amx)
    monkeypatch.setattr(llama_cpp, "llama_model_default_params", without_amx)
    export(ExportOptions(save(tmp_path, "chat"), str(tmp_path / "out"), gguf=kind))
    prompt = encode_chat(CHATS[0], add_generation_prompt=True)
    ours = [int(ids[0]) for ids in generate(random_model(), [prompt], 50 - 1, Sampling(temperature=0))]
    llama = llama_cpp.Llama(str(tmp_path / "out" / f"model-{kind}.gguf"), n_ctx=64, n_threads=1, verbose=False)
    llama.eval(prompt)
    theirs = []
    for _ in ours:
        theirs.append(llama.sample(temp=0.0))
        llama.eval(theirs[-1:])
    same = len(ours) if kind == "f32" else 5
    assert theirs[:same] == ours[:same]
    for text in TEXTS[1:]:
        assert llama.tokenize(text.encode(), add_bos=False, special=False) == encode_text(text)
    assert (llama.token_eos(), llama.token_bos()) == (IM_END_ID, ENDOFTEXT_ID)
