"""Save and load a run: atomic, plain types, never pickled code, with a digest over every part.

A checkpoint is one file written by `torch.save`:

    format    "jojo-1"
    info      plain facts: model (GPTConfig as a dict), config (train.py's options), dataset, format ("text" or "chat"),
              data (the data set's .json; of a mixture, its "parts" are), tokenizer, iter_num, tokens_seen, elapsed_s,
              train_loss, val_loss, ...
    model     the weights in float32, by name
    training  what a resume needs besides: optimizers, scaler, data position, random states; None in a weights file
    digests   sha256 of each of info, model and training
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from common.cli import UserError
from common.files import TEMPORARY_SUFFIX, atomic_write, fsync_folder, write_error
from exchange.hugging_face import is_hugging_face, load_folder
from model import GPT, GPTConfig

FORMAT = "jojo-1"
PARTS = ("info", "model", "training")
GPT2_VOCAB = 50257  # ids of the vocabulary without ChatML's


def save_checkpoint(
    path: str | os.PathLike, model: GPT, info: Mapping, training: Mapping | None = None, weights: Mapping | None = None
) -> None:
    """Write a run to `path`, whole or not at all. Raises UserError where the disk is full or read-only.

    `info` and `training` hold plain types and tensors alone; the model's configuration is added to `info`.
    `weights` are the model's where it holds them in pieces.
    """
    weights = model.state_dict() if weights is None else weights
    parts = {
        "info": {**info, "model": dataclasses.asdict(model.config)},
        "model": {name: tensor.detach() for name, tensor in weights.items()},
        "training": training,
    }
    digests = {name: digest(part) for name, part in parts.items()}
    with atomic_write(path) as file:
        writer = _RememberError(file)
        try:
            torch.save({"format": FORMAT, **parts, "digests": digests}, writer)
        except RuntimeError:  # torch hides what the file system said
            if writer.error:
                raise writer.error from None
            raise


class _RememberError:
    """A file whose write error can be asked for after torch has turned it into one of its own."""

    def __init__(self, file):
        self._file = file
        self.error: OSError | None = None

    def write(self, data) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def digest(part) -> str:
    """The sha256 of nested dicts, lists, tuples, tensors and plain values, in hexadecimal.

    Independent of the order of a dict's keys and of the device that a tensor lies on.
    """
    sha256 = hashlib.sha256()
    _feed(sha256, part)
    return sha256.hexdigest()


def _feed(sha256, part) -> None:
    if isinstance(part, Tensor):
        flat = part.detach().to("cpu").contiguous().reshape(-1)
        sha256.update(f"tensor {part.dtype} {tuple(part.shape)}:".encode())
        sha256.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    elif isinstance(part, Mapping):
        sha256.update(f"dict {len(part)}:".encode())
        for key in sorted(part, key=repr):
            _feed(sha256, key)
            _feed(sha256, part[key])
    elif isinstance(part, (list, tuple)):
        sha256.update(f"list {len(part)}:".encode())
        for item in part:
            _feed(sha256, item)
    elif isinstance(part, float):
        sha256.update(b"float:" + struct.pack("<d", part))
    elif part is None or isinstance(part, (bool, int, str)):
        sha256.update(f"{type(part).__name__} {part!r}\n".encode())
    else:
        raise TypeError(f"a checkpoint holds plain types and tensors, not {type(part).__name__}")


def load_checkpoint(path: str | os.PathLike, parts: tuple[str, ...] = PARTS) -> dict:
    """The named parts of a checkpoint, on the CPU and checked against their digests.

    Memory-mapped: a part that is not asked for is not read. Raises UserError, in one sentence, for a file that is
    missing, damaged, of other software or holding pickled code. nanoGPT's own checkpoints load as weights, with
    "training" None, and so do folders in the Hugging Face layout and OpenAI's models by their names ("gpt2").
    """
    path = Path(path)
    if is_hugging_face(path):
        return load_folder(path, parts)
    if not path.is_file():
        raise UserError(f"{path} not found; {_what_exists(path.parent)}")
    try:
        # No unsafe fallback, ever: a pickle that needs more than plain types and tensors is refused.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a damaged pickle: the error says enough
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file can make the unpickler raise anything at all
        raise UserError(_unreadable(path, error)) from error
    if isinstance(content, dict) and {"model", "model_args"} <= content.keys():
        return _from_nanogpt(path, content)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is a checkpoint of other software; give one that train.py made")
    digests = content.get("digests")
    for name in parts:
        if name not in content or not isinstance(digests, dict) or digests.get(name) != _digest_or_none(content[name]):
            raise UserError(f"{path} is damaged (its {name} part does not match its digest); use another checkpoint")
    return {name: content[name] for name in parts}


def _digest_or_none(part) -> str | None:
    try:
        return digest(part)
    except (TypeError, RuntimeError):  # a damaged file can hold anything
        return None


def _unreadable(path: Path, error: Exception) -> str:
    if "Unsupported global" in str(error) or "Unsupported operand" in str(error):
        return f"{path} holds pickled code and was not loaded; give a checkpoint that train.py made"
    return (
        f"{path} is not a readable checkpoint ({type(error).__name__}); it is damaged or of another kind, use another"
    )


def _what_exists(folder: Path) -> str:
    found = find_checkpoints(folder)
    if not found:
        return "make one with: python train.py"
    return "there are " + ", ".join(str(path) for path in found[:8]) + "; make another with: python train.py"


def _from_nanogpt(path: Path, content: dict) -> dict:
    """A checkpoint in nanoGPT's layout as ours, weights alone: the names lose their prefixes."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # it has no digest, but the CRC of each tensor
    except (zipfile.BadZipFile, NotImplementedError, OSError) as error:
        damaged = str(error)
    if damaged:
        raise UserError(f"{path} is damaged ({damaged}); use another checkpoint")
    try:
        names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias")
        settings = {name: content["model_args"][name] for name in names}
        state = {}
        for name, tensor in content["model"].items():
            name = name.removeprefix("_orig_mod.").removeprefix("transformer.")
            if name != "lm_head.weight" and not name.endswith(".attn.bias"):  # tied head, causal mask
                state[name] = tensor.float()
        settings["n_vocab"] = min(GPTConfig.n_vocab, settings["vocab_size"])
        config = GPTConfig(**settings)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} looks like a nanoGPT checkpoint, but is incomplete ({error}); use another") from error
    info = {"model": dataclasses.asdict(config), "dataset": "unknown", "format": "text", "config": {}, "data": {}}
    return {"info": {**info, "origin": "nanoGPT"}, "model": state, "training": None}


def load_weights(model: GPT, weights: Mapping, path: str | os.PathLike) -> None:
    """Copy a loaded checkpoint's weights into `model`; ids that they lack keep the model's new embeddings.

    A model with a shorter block takes the first positions. Raises UserError where the shapes differ otherwise, or the
    vocabulary is not GPT-2's.
    """
    fitted = dict(weights)
    if "wte.weight" in weights:
        known = weights["wte.weight"]
        if len(known) < GPT2_VOCAB:
            raise UserError(f"{path} has a vocabulary of {len(known)} ids, not GPT-2's; use another checkpoint")
        fitted["wte.weight"] = torch.cat([known.to(model.wte.weight), model.wte.weight[len(known) :].detach()])
    if "wpe.weight" in weights:
        fitted["wpe.weight"] = weights["wpe.weight"][: model.config.block_size]
    try:
        model.load_state_dict(fitted)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the model ({_one_line(error)}); use another checkpoint") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


class _NoRandomValues(TorchFunctionMode):
    """Leaves out `init.normal_`: a meta tensor has no values, and torch's stand-in costs a second of imports."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return kwargs["tensor"] if func is torch.nn.init.normal_ else func(*args, **kwargs)


def build_model(path: str | os.PathLike, checkpoint: Mapping) -> GPT:
    """A model on the CPU with a loaded checkpoint's weights (shared, not copied)."""
    try:
        with torch.device("meta"), _NoRandomValues():
            model = GPT(GPTConfig(**checkpoint["info"]["model"]))
        model.load_state_dict(checkpoint["model"], assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path} does not fit its own configuration ({_one_line(error)}); use another checkpoint"
        ) from error
    return model


def load_model(path: str | os.PathLike, device: str = "cpu", dtype: str = "float32") -> tuple[GPT, dict]:
    """A checkpoint's model in evaluation mode on `device` in `dtype`, and its info. Raises as `load_checkpoint`."""
    checkpoint = load_checkpoint(path, ("info", "model"))
    model = build_model(path, checkpoint).to(device=device, dtype=getattr(torch, dtype))
    return model.eval().requires_grad_(False), checkpoint["info"]


def read_info(path: str | os.PathLike) -> dict:
    """A checkpoint's plain facts, without reading its weights. Raises as `load_checkpoint`."""
    return load_checkpoint(path, ("info",))["info"]


def find_checkpoints(folder: str | os.PathLike = "models") -> list[Path]:
    """The checkpoints in `folder`, newest first."""
    return sorted(Path(folder).glob("*.pt"), key=lambda path: path.stat().st_mtime, reverse=True)


def copy_checkpoint(path: str | os.PathLike, copy: str | os.PathLike) -> None:
    """Give a complete checkpoint a second name that later writes of the first leave alone; whole or not at all.

    Raises UserError where the folder cannot be written.
    """
    temporary = Path(copy).with_name(f"{Path(copy).name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        temporary.unlink(missing_ok=True)
        os.link(path, temporary)  # no copying: atomic_write replaces the first name, never its content
    except OSError:  # a file system without hard links
        with open(path, "rb") as source, atomic_write(copy) as file:  # noqa: PTH123
            shutil.copyfileobj(source, file)
        return
    try:
        os.replace(temporary, copy)
        fsync_folder(Path(copy).parent)
    except OSError as error:
        raise write_error(copy, error) from error
    finally:
        temporary.unlink(missing_ok=True)  # a rename between two names of one file does nothing


def random_states(device: str) -> dict:
    """The states of Python's, NumPy's and torch's generators and of the device's own, as plain types."""
    import random

    import numpy as np

    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    states = {
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if device.startswith("cuda"):
        states["cuda"] = torch.cuda.get_rng_state(device)
    if device == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_states(states: Mapping, device: str) -> None:
    """Put the generators into states that `random_states` gave; that of a device of another kind is left out."""
    import random

    import numpy as np

    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and device.startswith("cuda"):
        state = states["cuda"]
        if isinstance(state, list):  # an older checkpoint has a state for each of its machine's devices
            state = state[min(torch.device(device).index or 0, len(state) - 1)]
        torch.cuda.set_rng_state(state, device)
    if "mps" in states and device == "mps":
        torch.mps.set_rng_state(states["mps"])


def checkpoint_bytes(model: GPT, optimizer_floats_per_weight: int = 2) -> int:
    """About how large a training checkpoint of `model` will be, in bytes."""
    return model.n_params() * 4 * (1 + optimizer_floats_per_weight) + (1 << 20)


def prune_kept(folder: Path, pattern: str, keep: int) -> None:
    """Remove all but the `keep` youngest files that match `pattern` in `folder`."""
    paths = sorted(folder.glob(pattern), key=lambda path: (path.stat().st_mtime_ns, path.name))
    for path in paths[: max(0, len(paths) - keep)]:
        with contextlib.suppress(OSError):  # gone, or not ours to remove: the disk stays fuller, nothing is lost
            path.unlink()
