"""What a prepare script prints last: a training command that fits the data, how long it takes here, and warnings.

training: 100 iterations, 8.2 epochs, about 3 minutes on this CPU
next: python train.py --dataset diary --preset tiny --max_iters 100
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shlex
import time
from pathlib import Path

import numpy as np

from common.cli import UserError
from common.flops import flops_per_token
from common.numbers import duration_in_words
from data.dataset import DatasetInfo, read_info
from data.epochs import FINE_TUNING_ROWS, FITTING_EPOCHS, Portion, fine_tuning_iters, fitting_iters, in_words
from setup_tokenizer import Tokenizer

BLOCK_SIZE, ROWS_PER_ITER = 256, 16  # train.py's defaults on a CPU
DEMO_BLOCK_SIZE = 512  # of `make demo`, whose model has a tokenizer of its own
SMALL_FROM = 20_000_000  # tokens; with fewer, `tiny` is large enough and twice as fast
MANY_EPOCHS = 2 * FITTING_EPOCHS  # with more, a model mostly repeats what it has read
ENOUGH_TOKENS = 50_000  # with this many, the fewest iterations are FITTING_EPOCHS epochs
OWN_SHARE = 0.2  # share of the rows for the user's conversations when a chat model is fine-tuned on them

SHAPES = {"tiny": (4, 128), "small": (4, 256)}  # layers and width of train.py's presets
N_PRODUCTS, PAUSE_S = 15, 0.02  # to measure the CPU's speed
# The speed of a training step as a fraction of that of numpy's float32 products. Measured on an AMD EPYC with AVX2:
# 0.86 on one core (1,480 tokens/s of `tiny`, 77 GFLOP/s of numpy). Two cores help numpy more than training.
EFFICIENCY = 0.7
# How much faster the blocks and the head are in bfloat16, which numpy does not support. With AMX, fitted to two cores
# of an Intel Xeon with 260 GFLOP/s of numpy: the demo's model trains at 72,000 tokens/s, `small` at 26,700 with 4,096
# ids and at 7,900 with GPT-2's. With AVX512_BF16 not measured, but computed from older tokens per second, assuming 200
# GFLOP/s of numpy.
BFLOAT16_GAINS = {"amx_bf16": (3.7, 4.5), "avx512_bf16": (2.5, 2.5)}
START_S = 15.0  # loading torch, and the evaluations of a short run


@dataclasses.dataclass(frozen=True)
class Advice:
    """How to train on a data set: train.py's arguments, and what they mean."""

    arguments: list[str]
    preset: str
    rows: int  # per iteration
    block_size: int
    iters: int
    epochs: float
    warnings: list[str]


def print_advice(info: DatasetInfo, data_dir: str | None, models: Path = Path("models")) -> None:
    """Print how to train on a data set that was prepared in `data_dir` (None: the data folder); the command is last."""
    advice = advise(info, data_dir, models)
    for warning in advice.warnings:
        print(f"warning: {warning}")
    tokens = advice.iters * advice.rows * advice.block_size
    shape = (*SHAPES[advice.preset], info.n_vocab, advice.block_size)
    seconds = tokens * seconds_per_token(shape, numpy_flops(), cpu_flags()) + START_S
    epochs = in_words(advice.epochs)
    print(f"training: {advice.iters:,} iterations, {epochs} epochs, {duration_in_words(seconds)} on this CPU")
    print(f"next: {shlex.join(['python', 'train.py', *advice.arguments])}")


def advise(info: DatasetInfo, data_dir: str | None, models: Path) -> Advice:
    """How to train on a data set that was prepared in `data_dir` (None: the data folder).

    If there are few conversations, the advice is to fine-tune a chitchat model in `models`, if there is one.
    """
    alone, rows, block_size = Portion(info.name, info.splits["train"].tokens), ROWS_PER_ITER, BLOCK_SIZE
    iters = fitting_iters([alone], block_size, rows)
    epochs = alone.epochs(iters, block_size, rows)
    preset = "tiny" if alone.tokens < SMALL_FROM else "small"
    arguments = ["--dataset", info.name, *(["--preset", preset] if preset == "tiny" else [])]
    warnings = []
    folder = Path(data_dir) if data_dir else Path(__file__).parent
    are_few = epochs > MANY_EPOCHS and info.format == "chat" and info.name != "chitchat"
    if are_few and (base := chat_model(models, folder, info.tokenizer_digest)):
        added, rows = Portion(info.name, alone.tokens, OWN_SHARE), FINE_TUNING_ROWS
        block_size = DEMO_BLOCK_SIZE if info.tokenizer_digest else BLOCK_SIZE
        iters = fine_tuning_iters([added], block_size, rows)
        epochs = added.epochs(iters, block_size, rows)
        arguments = ["--dataset", mixture_of(info), "--init_from", str(base)]
    elif epochs > MANY_EPOCHS:
        warnings.append(few_tokens_warning(info, epochs))
    if (n_val := info.splits["val"].tokens) <= BLOCK_SIZE:
        warnings.append(
            f"validation holds only {n_val} tokens, too few for a row of {BLOCK_SIZE}, so its loss is a rough "
            "estimate; add documents, or use a larger --val_fraction"
        )
    arguments += ["--max_iters", str(iters), *(["--data_dir", data_dir] if data_dir else [])]
    return Advice(arguments, preset, rows, block_size, iters, epochs, warnings)


def mixture_of(info: DatasetInfo) -> str:
    """The --dataset value that mixes a data set with chitchat."""
    return f"chitchat={1 - OWN_SHARE:g},{info.name}={OWN_SHARE:g}"


def few_tokens_warning(info: DatasetInfo, epochs: float) -> str:
    """A warning that there are too few tokens to train a new model, and what to do instead."""
    train = info.splits["train"]
    if info.format == "chat":
        return (
            f"from so few conversations ({train.documents}), a new model learns these sentences, not how to chat; to "
            "add them to a model that chats: make demo, prepare them again with --tokenizer talk, then python train.py "
            f"--dataset {mixture_of(info)} --init_from models/chitchat1500.pt (docs/fine-tuning.md)"
        )
    return (
        f"there are only {train.tokens:,} tokens: the model reads them {in_words(epochs)} times and mostly repeats "
        f"them; add text ({ENOUGH_TOKENS:,} tokens, about {ENOUGH_TOKENS * 4 // 1000} kB, are read {FITTING_EPOCHS} "
        "times), or start from a model that knows more: --init_from CHECKPOINT (docs/fine-tuning.md)"
    )


def chat_model(models: Path, folder: Path, tokenizer_digest: str | None) -> Path | None:
    """The newest checkpoint of a run on chitchat, by its name, if it and chitchat in `folder` have that tokenizer.

    `tokenizer_digest` is None for GPT-2's tokenizer.
    """
    chitchat = read_info(folder, "chitchat")
    if chitchat is None or chitchat.tokenizer_digest != tokenizer_digest:
        return None
    found = [path for path in models.glob("chitchat*.pt") if re.fullmatch(r"chitchat\d+", path.stem)]
    if not found:
        return None
    from common.checkpoint import read_info as read_facts  # imports torch

    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(UserError):  # a damaged file
            if Tokenizer.from_info(read_facts(path), str(path)).digest == tokenizer_digest:
                return path
    return None


# --- how long it takes ---


def seconds_per_token(shape: tuple[int, int, int, int], float32_flops: float, flags: set[str]) -> float:
    """An estimate of the time that training takes per token, for a `shape` as `flops_per_token` takes it.

    `float32_flops` are the FLOP/s of numpy's products, `flags` the CPU's features. The embedding's padding, which the
    network adds, is left out: at most 63 rows, and less than 1 % of the work.
    """
    n_layer, n_embd, _, block_size = shape
    in_blocks = flops_per_token(n_layer, n_embd, 0, block_size)
    in_head = flops_per_token(*shape) - in_blocks
    gains = next((gains for flag, gains in BFLOAT16_GAINS.items() if flag in flags), (1.0, 1.0))
    return (in_blocks / gains[0] + in_head / gains[1]) / (float32_flops * EFFICIENCY)


def numpy_flops() -> float:
    """The FLOP/s of the fastest of N_PRODUCTS of numpy's products in float32.

    Another program on the same cores can make a product twenty times slower. After a pause, the next one is usually
    fast again.
    """
    matrix = np.full((512, 512), 0.5, dtype=np.float32)
    out = np.empty_like(matrix)
    times = []
    for _ in range(N_PRODUCTS):
        start = time.perf_counter()
        np.matmul(matrix, matrix, out=out)
        times.append(time.perf_counter() - start)
        time.sleep(PAUSE_S)
    return 2 * len(matrix) ** 3 / min(times)


def cpu_flags() -> set[str]:
    """The CPU's features as Linux names them; empty elsewhere."""
    with contextlib.suppress(OSError):
        return set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    return set()
