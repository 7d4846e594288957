"""Write a model as one GGUF file, the format of llama.cpp and Ollama: weights, tokenizer and chat template.

    write_gguf(Path("model-q8_0.gguf"), weights, config, "q8_0", is_chat=True, name="story5000")

The names are those of llama.cpp's gpt2 architecture, which uses the embedding as the output layer if the file has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from common.cli import UserError
from common.token_patterns import GPT2_PATTERN
from exchange.tokenizer_files import CHAT_TEMPLATE, merges, vocabulary
from model import GPTConfig
from setup_tokenizer import GPT2, Tokenizer

KINDS = ("f32", "bf16", "q8_0")
Q8_0_BLOCK = 32  # weights per scale

NAMES = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def require_gguf(kind: str, config: GPTConfig, tokenizer: Tokenizer = GPT2) -> None:
    """Raise UserError unless `write_gguf` can write this kind of file here; call it before any work is done."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError("--gguf needs the gguf package; run: pip install gguf==0.19.0") from error
    if tokenizer.vocabulary and tokenizer.vocabulary.pattern != GPT2_PATTERN:
        raise UserError(
            f"--gguf: llama.cpp does not know the pattern of the tokenizer {tokenizer.name}; leave --gguf out, or "
            "train the tokenizer with --pattern gpt2"
        )
    if kind == "q8_0" and config.n_embd % Q8_0_BLOCK:
        raise UserError(
            f"--gguf q8_0 needs an n_embd that is a multiple of {Q8_0_BLOCK}, not {config.n_embd}; use --gguf bf16"
        )


def gguf_name(name: str) -> str:
    """The name of one of our weights in a GGUF file.

    >>> gguf_name("h.3.attn.c_proj.weight")
    'blk.3.attn_output.weight'
    """
    module, _, kind = name.rpartition(".")
    if not module.startswith("h."):
        return f"{NAMES[module]}.{kind}"
    _, layer, part = module.split(".", 2)
    return f"blk.{layer}.{NAMES[part]}.{kind}"


def write_gguf(
    path: Path,
    weights: Mapping[str, Tensor],
    config: GPTConfig,
    kind: str,
    is_chat: bool,
    name: str,
    tokenizer: Tokenizer = GPT2,
) -> None:
    """Write `complete_weights` and the tokenizer. `kind` is the matrices' precision: f32, bf16 or q8_0 (8 bits)."""
    import gguf

    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT2])
    try:
        _add_settings(writer, config, kind, name)
        _add_tokenizer(writer, config.n_vocab, is_chat, tokenizer)
        quantization = gguf.GGMLQuantizationType[kind.upper()]
        for our_name, tensor in weights.items():
            data = tensor.numpy()
            # Vectors and positions stay in float32, as in llama.cpp's own converter: they are small.
            if tensor.dim() == 1 or our_name == "wpe.weight" or kind == "f32":
                writer.add_tensor(gguf_name(our_name), data)
            else:
                data = gguf.quants.quantize(data, quantization)
                writer.add_tensor(gguf_name(our_name), data, raw_dtype=quantization)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _add_settings(writer: Any, config: GPTConfig, kind: str, name: str) -> None:
    import gguf

    file_types = {"f32": "ALL_F32", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_name(name)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType[file_types[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tokenizer(writer: Any, n_vocab: int, is_chat: bool, tokenizer: Tokenizer) -> None:
    import gguf

    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    kinds = [normal if id_ < tokenizer.endoftext else control for id_ in range(n_vocab)]
    end_id = tokenizer.im_end if is_chat else tokenizer.endoftext
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary(tokenizer)[:n_vocab])
    writer.add_token_types(kinds)
    n_bytes = 256  # the first tokens are the single bytes, which are not merged from others
    writer.add_token_merges([" ".join(pair) for pair in merges(tokenizer)[: max(0, n_vocab - n_bytes)]])
    writer.add_bos_token_id(tokenizer.endoftext)
    writer.add_eos_token_id(end_id)
    writer.add_eot_token_id(end_id)
    writer.add_pad_token_id(tokenizer.endoftext)
    writer.add_unk_token_id(tokenizer.endoftext)
    writer.add_add_bos_token(False)
    if is_chat:
        writer.add_chat_template(CHAT_TEMPLATE)
