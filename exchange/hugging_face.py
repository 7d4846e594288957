"""Read and write GPT-2 in the Hugging Face layout: config.json and safetensors.

    load_checkpoint("gpt2"), load_checkpoint("some/folder")     # exchange/loading.py calls `load_folder` for both

Hugging Face stores GPT-2's linear layers as (in, out), Jojo as (out, in). Otherwise only the names differ.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.cli import UserError, first_cause
from common.embedding import extended_embedding
from common.hub import fetch_file
from common.tokenizer_json import stored_name
from exchange.tokenizer_files import vocabulary
from model import GPT, GPTConfig, padded_vocab_size
from setup_tokenizer import ENDOFTEXT_ID, GPT2, GPT2_NAMES, IM_END, IM_START, Tokenizer, parse_tokenizer

# OpenAI's weights on the hub, by the names of our presets.
HUB_MODELS = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}

# Stored as (in, out) in the Hugging Face layout: the original GPT-2 code used 1x1 convolutions.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def is_hugging_face(path: Path) -> bool:
    """Whether `path` is a folder, or the name of one of OpenAI's models (unless a file has that name)."""
    return path.is_dir() or (str(path) in HUB_MODELS and not path.exists())


def load_folder(path: Path, parts: Collection[str]) -> dict:
    """The named parts of a folder in the Hugging Face layout, or of one of HUB_MODELS; "training" is None.

    The weights are downloaded only if "model" is requested. Raises UserError for a model that is missing, damaged, or
    not a GPT-2.
    """
    settings = _read_json(_file(path, "config.json"))
    _require_supported(path, settings)
    tokenizer, tokenizer_ids = _tokenizer_of(path)
    config = model_config(path, settings, tokenizer)
    info = {
        "model": dataclasses.asdict(config),
        "config": {},
        "dataset": "unknown",
        "data": {},
        "format": "chat" if _is_chat(path) else "text",
        "tokenizer": {**tokenizer.to_info(), "n_vocab": config.n_vocab},
        "origin": f"Hugging Face ({HUB_MODELS.get(str(path), path.name)})",
    }
    found: dict[str, Any] = {"info": info, "training": None}
    if "model" in parts:
        n_kept = _n_kept_rows(settings["vocab_size"], tokenizer_ids, tokenizer)
        weights = _read_weights(path, config, settings["vocab_size"])
        embedding = weights["wte.weight"][:n_kept]
        weights["wte.weight"] = extended_embedding(embedding, tokenizer.im_start, config.vocab_size)
        found["model"] = weights
        if n_kept < tokenizer.n_vocab:
            print(
                f"note: {IM_START} and {IM_END} are new in the vocabulary of {path}; their embeddings start as the "
                "mean of all others, so the model cannot chat before it is trained on chat data",
                file=sys.stderr,
            )
    return {name: found[name] for name in parts}


def _is_chat(path: Path) -> bool:
    """Whether a local model has a ChatML template for `apply_chat_template`."""
    template = path / "chat_template.jinja"
    if template.is_file():
        return IM_START in template.read_text("utf-8")
    tokenizer_config = path / "tokenizer_config.json"
    return tokenizer_config.is_file() and IM_START in str(_read_json(tokenizer_config).get("chat_template"))


# ---- config.json ---------------------------------------------------------------------------------------------------


def _require_supported(path: Path, settings: Mapping) -> None:
    """Raise UserError for a config.json that describes another kind of model, or features that `model.GPT` lacks."""
    n_embd = settings.get("n_embd")
    accepted = {  # the first value is the one that a missing entry means
        "model_type": ("gpt2",),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "n_inner": (None, 4 * n_embd if isinstance(n_embd, int) else settings.get("n_inner")),
        "layer_norm_epsilon": (1e-5,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    }
    for name, values in accepted.items():
        if settings.get(name, values[0]) not in values:
            expected = " or ".join(map(json.dumps, values))
            raise UserError(
                f"{path} has {name} {json.dumps(settings[name])} and only {expected} is supported; use another model"
            )


def model_config(path: Path, settings: Mapping, tokenizer: Tokenizer = GPT2) -> GPTConfig:
    """The shape of the model that a config.json describes. Raises UserError if it does not fit the tokenizer."""
    try:
        vocab_size = settings["vocab_size"]
        padded = padded_vocab_size(tokenizer.n_vocab)
        if not tokenizer.im_start <= vocab_size <= padded:
            whose = "GPT-2's" if tokenizer == GPT2 else "its tokenizer's"
            raise UserError(
                f"{path} has a vocabulary of {vocab_size:,} ids, which is not {whose} {tokenizer.im_start:,}; use "
                "another model"
            )
        return GPTConfig(
            block_size=settings["n_positions"],
            vocab_size=padded,
            n_vocab=tokenizer.n_vocab,
            n_layer=settings["n_layer"],
            n_head=settings["n_head"],
            n_embd=settings["n_embd"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}/config.json does not describe a GPT-2 ({type(error).__name__}: {error}); use another model"
        ) from error


def config_json(config: GPTConfig, end_id: int, tokenizer: Tokenizer = GPT2) -> dict:
    """The config.json of a model without padding in its vocabulary."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "vocab_size": config.n_vocab,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": tokenizer.endoftext,
        "eos_token_id": end_id,
        "pad_token_id": tokenizer.endoftext,
        "dtype": "float32",
    }


def check_exportable(path: str, config: GPTConfig, tokenizer: Tokenizer = GPT2) -> None:
    """Raise UserError unless the model has its tokenizer's vocabulary, with or without ChatML's tokens."""
    if config.n_vocab not in (tokenizer.im_start, tokenizer.n_vocab):
        raise UserError(
            f"{path} has a vocabulary of {config.n_vocab:,} ids, which does not belong to this project's tokenizer; "
            "export a model made by train.py"
        )


# ---- weights -------------------------------------------------------------------------------------------------------


def complete_weights(weights: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Our weights in float32 in the form that other programs expect: no padding rows, zeros for missing biases."""
    with torch.device("meta"):
        shapes = GPT(dataclasses.replace(config, vocab_size=config.n_vocab, bias=True)).state_dict()
    complete = {}
    for name, expected in shapes.items():
        if name in weights:
            complete[name] = weights[name][: len(expected)].float().contiguous()
        else:
            complete[name] = torch.zeros(expected.shape)
    return complete


def to_hugging_face(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`complete_weights` under the names and in the orientation of transformers' GPT2LMHeadModel."""
    return {
        f"transformer.{name}": tensor.T.contiguous() if name.endswith(TRANSPOSED) else tensor
        for name, tensor in weights.items()
    }


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as one safetensors file. Raises UserError if the disk is full or read-only."""
    import safetensors
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:  # it hides the error of the file system
        raise UserError(
            f"{path.name} not written ({first_cause(error)}); free some space and run the command again"
        ) from error


def _read_weights(path: Path, config: GPTConfig, vocab_size: int) -> dict[str, Tensor]:
    """The weights under our names, the embedding as stored. Raises UserError if they do not fit."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in GPT(config).state_dict().items()}
    shapes["wte.weight"] = torch.Size([vocab_size, config.n_embd])
    weights = {}
    for name, tensor in _stored_tensors(path).items():
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")):  # the causal mask, stored by old versions
            continue
        weights[name] = tensor.float().T.contiguous() if name.endswith(TRANSPOSED) else tensor.float()
    head = weights.pop("lm_head.weight", None)
    faults = [name for name, shape in shapes.items() if name not in weights or weights[name].shape != shape]
    faults += weights.keys() - shapes.keys()
    if faults:
        raise UserError(
            f"the weights of {path} do not fit its config.json ({len(faults)} differ, such as {faults[0]}); "
            "download or save the model again"
        )
    if head is not None and not torch.equal(head, weights["wte.weight"]):
        raise UserError(
            f"the output layer of {path} is not tied to its embedding, which is not supported; use another model"
        )
    return weights


def _n_kept_rows(vocab_size: int, tokenizer_ids: Mapping[str, int], tokenizer: Tokenizer) -> int:
    """How many rows of an embedding to keep: all except ChatML's two if other tokens use their ids."""
    chatml = {IM_START: tokenizer.im_start, IM_END: tokenizer.im_end}
    if vocab_size < tokenizer.n_vocab or any(tokenizer_ids.get(token, id_) != id_ for token, id_ in chatml.items()):
        return tokenizer.im_start
    others = [token for token, id_ in tokenizer_ids.items() if id_ in chatml.values() and token not in chatml]
    return tokenizer.im_start if others else tokenizer.n_vocab


def _stored_tensors(path: Path) -> dict[str, Tensor]:
    import safetensors

    tensors: dict[str, Tensor] = {}
    for file in _weight_files(path):
        try:
            with safetensors.safe_open(file, framework="pt") as content:
                tensors |= {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        except (OSError, safetensors.SafetensorError) as error:
            raise _unreadable(file, error) from error
    return tensors


def _weight_files(path: Path) -> list[Path]:
    """The safetensors file, or all files that the index of a sharded model names."""
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return [_file(path, "model.safetensors")]
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(re.fullmatch(r"[\w.-]+", str(name)) for name in names.values()):
        raise UserError(f"{index} does not name files in its own folder; download or save the model again")
    return [_file(path, name) for name in sorted(set(names.values()))]


# ---- files ---------------------------------------------------------------------------------------------------------


def _file(path: Path, name: str) -> Path:
    """A file of the model: in the folder, or downloaded from the hub into its cache."""
    if not path.is_dir():
        other = "model.safetensors" if name == "config.json" else "config.json"
        return fetch_file(HUB_MODELS[str(path)], name, f"and {other} into a folder, and use that folder instead")
    if (path / name).is_file():
        return path / name
    if name.endswith(".safetensors") and (path / "pytorch_model.bin").is_file():
        raise UserError(
            f"{path} contains its weights as pickled code (pytorch_model.bin), which is not loaded; save the model as "
            "safetensors, for example with transformers' save_pretrained"
        )
    raise UserError(
        f"{path / name} not found; use a folder with config.json and model.safetensors, or a file made by train.py"
    )


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not contain a JSON object; download or save the model again")
    return content


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be read ({first_cause(error)}); download or save the model again")


def _tokenizer_of(path: Path) -> tuple[Tokenizer, dict[str, int]]:
    """The tokenizer of a model, and its ids by token as the files give them; GPT-2's and {} if it has none.

    Raises UserError if it is neither GPT-2's nor one whose ids are those of our Tokenizer, as in our exports.
    """
    ids: dict[str, int] = {}
    content: dict[str, Any] = {}
    file = path / "tokenizer.json"
    if not path.is_dir():
        return GPT2, ids
    try:
        if file.is_file():
            content = _read_json(file)
            ids = {**content["model"]["vocab"], **{token["content"]: token["id"] for token in content["added_tokens"]}}
        elif (file := path / "vocab.json").is_file():
            added = path / "added_tokens.json"
            ids = {**_read_json(file), **(_read_json(added) if added.is_file() else {})}
        if not ids or all(ids.get(token) == id_ for id_, token in enumerate(vocabulary()[:ENDOFTEXT_ID])):
            return GPT2, ids
    except (KeyError, TypeError) as error:
        raise UserError(f"{file} is not a GPT-2 tokenizer ({error}); use another model") from error
    if file.name == "tokenizer.json":
        names = [stored_name(content), re.sub(r"[^A-Za-z0-9_-]+", "_", path.resolve().name).strip("_-"), "own"]
        name = next(name for name in names if name and name not in GPT2_NAMES)
        try:
            tokenizer = parse_tokenizer(name, file.read_text(encoding="utf-8"), str(file))
        except UserError as error:  # without its remedy, another tokenizer
            raise UserError(f"{str(error).partition('; ')[0]}; use another model") from error
        if all(ids.get(token) == id_ for id_, token in enumerate(vocabulary(tokenizer))):
            return tokenizer, ids
    raise UserError(
        f"{path} has a different tokenizer from GPT-2's ({file.name}), and its ids are not those of an export by Jojo; "
        "use another model"
    )
