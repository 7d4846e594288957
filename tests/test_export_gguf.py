"""Exports as GGUF: names, shapes, tokenizer, and the ids that llama.cpp decodes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from common.cli import UserError
from data.vocabularies import open_tokenizer
from exchange import gguf_file
from exchange.hugging_face import complete_weights
from exchange.tokenizer_files import CHAT_TEMPLATE, merges, vocabulary
from export import ExportOptions, export
from generation.decoding import generate
from generation.sampling import Sampling
from setup_tokenizer import (
    ENDOFTEXT_ID,
    GPT2,
    IM_END_ID,
    N_VOCAB,
)
from tests.test_export import CHATS, CONFIG, TEXTS, chat, random_model, save  # noqa: F401
from tests.test_own_tokenizer import train_vocabulary

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


LLAMA_SERVER = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.n_ctx, params.n_parallel = sys.argv[1], 0, 128, 1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # by default float16
params.no_extra_bufts = True  # with AMX, some builds crash (ggml-org/llama.cpp issue 20824)
server = xllamacpp.Server(params)
print("at", server.listening_address, flush=True)
time.sleep(3600)
"""


@contextlib.contextmanager
def llama_cpp(path: Path) -> Iterator[Callable[[str, dict], dict]]:
    """llama.cpp's server with a model, as a function that posts a request to an endpoint and returns the answer."""
    with subprocess.Popen(
        [sys.executable, "-c", LLAMA_SERVER, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            address = next(line.split()[1] for line in process.stdout if line.startswith("at "))

            def post(endpoint: str, content: dict) -> dict:
                headers = {"Content-Type": "application/json"}
                request = urllib.request.Request(address + endpoint, json.dumps(content).encode(), headers)
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return json.load(answer)

            yield post
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f32", "q8_0"])
@pytest.mark.parametrize("is_own", [False, True], ids=["gpt2", "own"])
def test_llama_cpp_has_the_same_ids_for_texts_and_decodes_the_same(tmp_path, kind, is_own):
    """Greedy decoding of replies, equal for f32; 8 bits must agree on the first three ids at least."""
    pytest.importorskip("xllamacpp", reason="pip install xllamacpp")
    tokenizer, changes = GPT2, {}
    if is_own:
        train_vocabulary(tmp_path / "own-tokenizer.json", "gpt2")
        tokenizer = open_tokenizer("own", tmp_path)
        changes = {"n_vocab": tokenizer.n_vocab, "vocab_size": -(-tokenizer.n_vocab // 64) * 64}
    model = save(tmp_path, "chat", tokenizer.to_info(), **changes)
    export(ExportOptions(model, str(tmp_path / "out"), gguf=kind))
    with llama_cpp(tmp_path / "out" / f"model-{kind}.gguf") as post:
        for text in TEXTS[1:]:
            answer = post("/tokenize", {"content": text, "add_special": False, "parse_special": False})
            assert answer["tokens"] == tokenizer.encode_text(text)
        longest = 0
        for messages in CHATS:
            prompt = tokenizer.encode_chat(messages, add_generation_prompt=True)
            ours = [int(ids[0]) for ids in generate(random_model(**changes), [prompt], 20, Sampling(temperature=0))]
            ours = (ours[: ours.index(tokenizer.im_end)] if tokenizer.im_end in ours else ours)[: 64 - len(prompt)]
            settings = {"n_predict": 20, "temperature": 0, "return_tokens": True}
            theirs = post("/completion", {"prompt": prompt, **settings})["tokens"]
            same = len(ours) if kind == "f32" else min(3, len(ours))
            assert theirs[:same] == ours[:same]
            longest = max(longest, same)
    assert longest >= (15 if kind == "f32" else 3)
