"""Save and load Jojo's own checkpoints: written atomically, plain types only, a digest for every part.

A checkpoint is one file written by `torch.save`:

    format    "jojo-1"
    info      plain facts: model (GPTConfig as a dict), config (train.py's options), dataset, format ("text" or "chat"),
              data (the data set's .json; for a mixture, one entry per data set under "parts"), tokenizer, iter_num,
              tokens_seen, elapsed_s, train_loss, val_loss, ..., and adapter (see common/lora.py) if it is one
    model     the weights in float32, by name; for an adapter, only its factors
    training  what else is needed to resume: optimizers, scaler, data position, random states; None in a weights file
    digests   the sha256 of info, model and training

`exchange/loading.py` also loads models in other layouts (nanoGPT, Hugging Face).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import struct
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from common.cli import UserError
from common.files import TEMPORARY_SUFFIX, atomic_write, fsync_folder, write_error
from model import GPT, GPTConfig

FORMAT = "jojo-1"
PARTS = ("info", "model", "training")


def save_checkpoint(
    path: str | os.PathLike, model: GPT, info: Mapping, training: Mapping | None = None, weights: Mapping | None = None
) -> None:
    """Write a run to `path` atomically. Raises UserError if the disk is full or read-only.

    `info` and `training` may hold only plain types and tensors; the model's configuration is added to `info`.
    `weights` replaces the model's own state dict, for a model that is sharded over several processes.
    """
    weights = model.state_dict() if weights is None else weights
    parts = {
        "info": {**info, "model": dataclasses.asdict(model.config)},
        "model": {name: tensor.detach() for name, tensor in weights.items()},
        "training": training,
    }
    digests = {name: digest(part) for name, part in parts.items()}
    with atomic_write(path) as file:
        writer = _ErrorRecorder(file)
        try:
            torch.save({"format": FORMAT, **parts, "digests": digests}, cast(IO[bytes], writer))
        except RuntimeError:  # torch hides the error of the file system
            if writer.error:
                raise writer.error from None
            raise


class _ErrorRecorder:
    """A file that remembers its last write error, because torch replaces it with a RuntimeError."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def digest(part: object) -> str:
    """The sha256 of nested dicts, lists, tuples, tensors and plain values, in hexadecimal.

    It depends neither on the order of a dict's keys nor on the device of a tensor.
    """
    sha256 = hashlib.sha256()
    _feed(sha256, part)
    return sha256.hexdigest()


def _feed(sha256: Any, part: object) -> None:
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


def load_checkpoint(path: str | os.PathLike, parts: Collection[str] = PARTS) -> dict:
    """The named parts of a checkpoint, on the CPU and checked against their digests.

    The file is memory-mapped, so a part that is not requested is not read. Raises UserError for a file that is missing,
    damaged, not written by train.py, or contains pickled code.
    """
    return checked_parts(path, read_file(path), parts)


def read_file(path: str | os.PathLike) -> object:
    """What `torch.save` wrote, memory-mapped and not yet checked. Raises UserError for an unreadable or unsafe file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} not found; {_available_checkpoints(path.parent)}")
    try:
        # weights_only, always: unpickling anything but plain types and tensors can run code from the file.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a damaged pickle; our error message is clearer
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise UserError(_unreadable(path, error)) from error


def checked_parts(path: str | os.PathLike, content: object, parts: Collection[str]) -> dict:
    """The named parts of what `read_file` returned. Raises UserError if a part does not match its digest."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} was written by other software; use a checkpoint made by train.py")
    digests = content.get("digests")
    for name in parts:
        if name not in content or not isinstance(digests, dict) or digests.get(name) != _digest_or_none(content[name]):
            raise UserError(f"{path} is damaged (its {name} part does not match its digest); use another checkpoint")
    return {name: content[name] for name in parts}


def _digest_or_none(part: object) -> str | None:
    try:
        return digest(part)
    except (TypeError, RuntimeError):  # a damaged file can contain anything
        return None


def _unreadable(path: Path, error: Exception) -> str:
    if "Unsupported global" in str(error) or "Unsupported operand" in str(error):
        return f"{path} contains pickled code and was not loaded; use a checkpoint made by train.py"
    return f"{path} is not a readable checkpoint ({type(error).__name__}); use another file"


def _available_checkpoints(folder: Path) -> str:
    found = find_checkpoints(folder)
    if not found:
        return "make one with: python train.py"
    return f"there are {', '.join(str(path) for path in found[:8])}; make another with: python train.py"


def load_weights(model: GPT, weights: Mapping, path: str | os.PathLike) -> None:
    """Copy a loaded checkpoint's weights into `model`. Ids that the checkpoint lacks keep the model's own embeddings.

    A model with a shorter block size takes the first positions. Raises UserError if other shapes differ or if the
    checkpoint lacks more than ChatML's two ids.
    """
    fitted = dict(weights)
    if "wte.weight" in weights:
        known = weights["wte.weight"]
        if len(known) < model.config.n_vocab - 2:
            raise UserError(
                f"{path} has a vocabulary of {len(known)} ids instead of the {model.config.n_vocab} of the data's "
                "tokenizer; use another checkpoint"
            )
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
    """Skips `init.normal_`: a meta tensor has no values, and torch's implementation for it takes a second to import."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if func is torch.nn.init.normal_ else func(*args, **kwargs)


def build_model(path: str | os.PathLike, checkpoint: Mapping) -> GPT:
    """A model on the CPU that shares (does not copy) the weights of a loaded checkpoint."""
    try:
        with torch.device("meta"), _NoRandomValues():
            model = GPT(GPTConfig(**checkpoint["info"]["model"]))
        model.load_state_dict(checkpoint["model"], assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path} does not fit its own configuration ({_one_line(error)}); use another checkpoint"
        ) from error
    return model


def read_info(path: str | os.PathLike) -> dict:
    """A checkpoint's plain facts, without reading its weights. Raises UserError as `load_checkpoint` does."""
    return load_checkpoint(path, ("info",))["info"]


def find_checkpoints(folder: str | os.PathLike = "models") -> list[Path]:
    """The checkpoints in `folder`, newest first; a `-best` copy comes after the checkpoint that it is a copy of."""
    return sorted(Path(folder).glob("*.pt"), key=lambda path: (-path.stat().st_mtime_ns, len(path.name), path.name))


def readable_infos(
    paths: Iterable[Path], read: Callable[[Path], dict] = read_info, required: bool = False
) -> dict[Path, dict]:
    """What `read` returns for each checkpoint. Unreadable ones are skipped with a message on standard error.

    Raises the first UserError of `read` if `required` is set and no checkpoint can be read.
    """
    infos, unreadable = dict[Path, dict](), list[UserError]()
    for path in paths:
        try:
            infos[path] = read(path)
        except UserError as error:
            unreadable.append(error)
    if required and unreadable and not infos:
        raise unreadable[0]
    for reason in unreadable:
        print(f"skipped: {reason}", file=sys.stderr)
    return infos


def copy_checkpoint(path: str | os.PathLike, copy: str | os.PathLike) -> None:
    """Give a complete checkpoint a second name, atomically; later writes to the first name do not change the copy.

    Raises UserError if the folder is not writable.
    """
    temporary = Path(copy).with_name(f"{Path(copy).name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        temporary.unlink(missing_ok=True)
        os.link(path, temporary)  # no data is copied: atomic_write replaces files and never changes one in place
    except OSError:  # the file system has no hard links
        with open(path, "rb") as source, atomic_write(copy) as file:  # noqa: PTH123
            shutil.copyfileobj(source, file)
        return
    try:
        os.replace(temporary, copy)
        fsync_folder(Path(copy).parent)
    except OSError as error:
        raise write_error(copy, error) from error
    finally:
        temporary.unlink(missing_ok=True)  # os.replace does nothing if both names are the same file


def random_states(device: str) -> dict:
    """The states of the random generators of Python, NumPy, torch and the device, as plain types."""
    import random

    import numpy as np

    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = cast(tuple, np.random.get_state())
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
    """Restore the states from `random_states`. A state for another kind of device is ignored."""
    import random

    import numpy as np

    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and device.startswith("cuda"):
        state = states["cuda"]
        if isinstance(state, list):  # older checkpoints hold one state per device of the machine
            state = state[min(torch.device(device).index or 0, len(state) - 1)]
        torch.cuda.set_rng_state(state, device)
    if "mps" in states and device == "mps":
        torch.mps.set_rng_state(states["mps"])


def checkpoint_bytes(model: GPT, optimizer_floats_per_weight: int = 2) -> int:
    """The estimated size of a training checkpoint of `model`, in bytes; frozen weights do not count."""
    n_trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return n_trained * 4 * (1 + optimizer_floats_per_weight) + (1 << 20)


def keep_newest_files(folder: Path, pattern: str, keep: int) -> None:
    """Remove all but the `keep` newest files in `folder` that match `pattern`."""
    paths = sorted(folder.glob(pattern), key=lambda path: (path.stat().st_mtime_ns, path.name))
    for path in paths[: max(0, len(paths) - keep)]:
        with contextlib.suppress(OSError):  # already gone or not removable: the only cost is disk space
            path.unlink()
