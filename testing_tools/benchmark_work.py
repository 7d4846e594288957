"""What each side of benchmark.py does, step by step, and what time and memory that takes.

work = WORKS["train"]["ours"](options, training_config(options))
seconds, tokens = timed(work, steps=10)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from common.cli import UserError
from common.device import allow_tf32, autocast, choose_device, choose_dtype, seed_everything
from fast.allocator import keep_freed_memory

ROOT = Path(__file__).resolve().parent.parent
SAMPLE_S = 0.1  # between two looks at the memory of a process tree
TURN_TOKENS = 20  # ids that a next turn adds to a prompt whose keys and values are kept
LATENCY_ROUNDS = 5
PEER_CHARACTERS = 100_000_000  # of the documents, what the one thread of tiktoken encodes


@dataclasses.dataclass(frozen=True)
class Work:
    """One side's work: `step` does it once and returns its tokens, `peak_bytes` tells the most memory it took."""

    step: Callable[[], int]
    peak_bytes: Callable[[], int | None]
    synchronize: Callable[[], object] = lambda: None  # waits until the device has done what it was told
    latencies_s: Callable[[], dict[str, float]] = dict  # what else can be timed in the state that the rounds leave
    repeats: bool = True  # whether a step is short, so that it is warmed up and a round is made of many


def training_config(options):
    """The TrainConfig of a long run with these options on the chosen device. Raises UserError as train.py does."""
    from model import PRESETS
    from train import TrainConfig, resolve

    if options.preset is not None and options.preset not in PRESETS:
        raise UserError(f"--preset {options.preset}: unknown; use {', '.join(PRESETS)}")
    names = {field.name for field in dataclasses.fields(options)} & {f.name for f in dataclasses.fields(TrainConfig)}
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    config = resolve(TrainConfig(**given), choose_device(options.device), chat=False)
    longest = options.prompt_tokens + options.max_tokens
    if options.task == "generate" and longest > config.block_size:
        raise UserError(f"{longest} tokens exceed the block size {config.block_size}; use a smaller --max_tokens")
    return config


def model_config(config):
    """The GPTConfig of a TrainConfig. Raises UserError for numbers that do not fit together."""
    from model import GPTConfig

    try:
        return GPTConfig(**{name: getattr(config, name) for name in ("block_size", "n_layer", "n_head", "n_embd")})
    except ValueError as error:
        raise UserError(f"{error}; change --n_embd or --n_head") from error


def train_ours(options, config) -> Work:
    """train.py's iteration, optimizer steps included, on random rows."""
    keep_freed_memory()
    import numpy as np
    import torch

    import train
    from training.memory import move_model
    from training.optimizers import init_optimizer_states, make_optimizers
    from training.start import make_model

    allow_tf32()
    seed_everything(config.seed)
    model = move_model(make_model(config, None), config.device).train()
    optimizers = make_optimizers(model, config)
    scaler = torch.amp.GradScaler(config.device.partition(":")[0], enabled=config.dtype == "float16")
    n_rows = config.batch_size * config.gradient_accumulation_steps
    rows = np.random.default_rng(0).integers(model.config.n_vocab, size=(n_rows, config.block_size + 1))
    ids, targets = rows[:, :-1].copy(), rows[:, 1:].copy()
    if config.compile:
        train.compile_or_eager(model, config, ids[: config.batch_size], targets[: config.batch_size])
    init_optimizer_states(optimizers)

    def step() -> int:
        train.forward_backward(model, config, ids, targets, optimizers, scaler)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        model.zero_grad(set_to_none=True)
        return ids.size

    return on_device(step, config.device)


def train_transformers(options, config) -> Work:
    """The loop that a user of transformers writes: plain float32, on CUDA with all that makes it fast there."""
    from transformers import GPT2LMHeadModel

    seed_everything(config.seed)
    model = GPT2LMHeadModel(transformers_config(config)).to(config.device).train()
    model.loss_type = "ForCausalLM"  # else it says that it has to guess

    def logits_and_loss(ids):
        return None, model(input_ids=ids, labels=ids, use_cache=False).loss

    return simple_loop(model, logits_and_loss, config, tuned=config.device.startswith("cuda"))


def train_plain(options, config) -> Work:
    """A loop as nanoGPT's with its defaults on a CPU: float32, eager."""
    return nanogpt_like(config, tuned=False)


def train_compiled(options, config) -> Work:
    """A loop as nanoGPT's with its best flags, which are its defaults on CUDA."""
    return nanogpt_like(config, tuned=True)


def nanogpt_like(config, tuned: bool) -> Work:
    """Our network in a loop of nanoGPT's kind: cross entropy of whole logits, which `logits, loss = ...` keeps."""
    from torch.nn.functional import cross_entropy

    from model import GPT

    seed_everything(config.seed)
    model = GPT(model_config(config)).to(config.device).train()

    def logits_and_loss(ids):
        logits, _ = model(ids)
        return logits, cross_entropy(logits.flatten(0, 1), ids.flatten())

    return simple_loop(model, logits_and_loss, config, tuned)


def simple_loop(model, logits_and_loss: Callable, config, tuned: bool) -> Work:
    """AdamW and clipping around a model; `tuned` adds autocast, torch.compile and the fused optimizer.

    `logits_and_loss` takes ids (B, T). The logits that it returns live until the next micro-batch has made its own.
    """
    import torch

    rates = {"lr": config.learning_rate, "betas": (0.9, 0.95), "weight_decay": config.weight_decay}
    optimizer = torch.optim.AdamW(model.parameters(), **rates, fused=True if tuned else None)
    forward = torch.compile(logits_and_loss) if tuned else logits_and_loss
    dtype = choose_dtype(None, config.device) if tuned else "float32"
    scaler = torch.amp.GradScaler(config.device.partition(":")[0], enabled=dtype == "float16")
    shape = (config.batch_size, config.block_size)
    n_vocab = model_config(config).n_vocab
    batches = [torch.randint(n_vocab, shape, device=config.device) for _ in range(config.gradient_accumulation_steps)]
    logits = None

    def step() -> int:
        nonlocal logits
        for ids in batches:
            with autocast(config.device, dtype):
                logits, loss = forward(ids)
            scaler.scale(loss / len(batches)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return config.tokens_per_iter

    return on_device(step, config.device)


def peer_setting(task: str, peer: str, device: str) -> str:
    """How a peer works, in words."""
    if task == "prepare":
        return "one thread of encode_ordinary"
    if task == "generate":
        return "its generate with a cache, greedy, in our precision"
    if peer == "compiled" or (peer == "transformers" and device.startswith("cuda")):
        return f"{choose_dtype(None, device)} autocast, torch.compile, fused AdamW, whole logits"
    return "float32, eager, AdamW, whole logits"


def transformers_config(config):
    """The same shape for transformers, without dropout."""
    from transformers import GPT2Config

    shape = model_config(config)
    return GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.block_size,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        n_embd=shape.n_embd,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )


def generate_ours(options, config) -> Work:
    """What gen.py does with a prompt, greedily and without a stop id, text included; a new prompt each time."""
    keep_freed_memory()
    import torch

    from generation.engine import Settings, TextEngine
    from generation.packed_linear import pack_linears
    from model import GPT

    seed_everything(config.seed)
    model = in_precision(lambda: GPT(model_config(config)), config)
    print(f"ours: {pack_linears(model, options.quantize, options.streams)}")
    engine = TextEngine(model, Settings(temperature=0, seed=0, stop_ids=()))
    prompts = random_prompts(options, model.config.n_vocab)

    def step() -> int:
        for _ in engine.stream_samples(next(prompts), options.max_tokens, options.streams):
            pass
        return options.streams * options.max_tokens

    def latencies_s() -> dict[str, float]:
        if len(prompt := next(prompts)) + TURN_TOKENS >= model.config.block_size:
            return {}
        turn = [*prompt, *next(prompts)[:1] * TURN_TOKENS]
        ids = torch.tensor([prompt], device=config.device)

        def forward() -> None:
            with torch.inference_mode():
                model.next_logits(model.hidden(ids)[:, -1]).argmax(-1).tolist()

        def next_token(ids: list[int]) -> None:
            for _ in engine.stream(ids, 1):
                pass

        calls = {
            "plain forward": forward,
            "first token": lambda: next_token(prompt),
            f"{TURN_TOKENS} ids more": lambda: next_token(turn),
        }
        found = {name: [] for name in calls}
        for _ in range(LATENCY_ROUNDS):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                found[name].append(time.perf_counter() - start)
            next_token(next(prompts))  # the cache then knows nothing of the prompt
        return {name: statistics.median(values) for name, values in found.items()}

    return dataclasses.replace(on_device(step, config.device), latencies_s=latencies_s)


def generate_transformers(options, config) -> Work:
    """transformers' `generate` with its cache, greedily, the same number of new tokens in the same precision."""
    import torch
    from transformers import GPT2LMHeadModel

    torch.manual_seed(config.seed)
    model = in_precision(lambda: GPT2LMHeadModel(transformers_config(config)), config)
    model.generation_config.eos_token_id = None  # never ends before its time
    prompts = random_prompts(options, model_config(config).n_vocab)
    settings = {"max_new_tokens": options.max_tokens, "do_sample": False, "use_cache": True, "pad_token_id": 0}

    def step() -> int:
        ids = torch.tensor([next(prompts)] * options.streams, device=config.device)
        made = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        return made.numel() - ids.numel()

    return on_device(step, config.device)


def in_precision(make_model: Callable, config):
    """A model for generation, made in its precision from the start: never twice in memory."""
    import torch

    torch.set_default_dtype(getattr(torch, config.dtype))
    try:
        model = make_model()
    finally:
        torch.set_default_dtype(torch.float32)
    return model.to(config.device).eval().requires_grad_(False)


def random_prompts(options, n_vocab: int) -> Iterator[list[int]]:
    """Prompts without end; each begins otherwise than the one before, so that no cache knows it."""
    generator = random.Random(0)
    first = 0
    while True:
        first = (first + 1) % n_vocab
        yield [first, *(generator.randrange(n_vocab) for _ in range(options.prompt_tokens - 1))]


def prepare_ours(options, config) -> Work:
    """data/prepare-story.py from its start to its end, cleaning and deduplication included; the file is read before."""
    from data.readers.text import read_text_documents

    text_bytes = sum(len(document.encode()) for document in read_text_documents(options.input))
    peak = PeakMemory()

    def step() -> int:
        with tempfile.TemporaryDirectory() as folder:
            arguments = ("--input", options.input, "--output_dir", folder)
            command = [sys.executable, str(ROOT / "data" / "prepare-story.py"), *arguments]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            with process, peak.watch(process.pid):
                _, errors = process.communicate()
            if process.returncode:
                reason = errors.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
                raise UserError(f"data/prepare-story.py failed: {reason[0].removeprefix('error: ')}")
            splits = json.loads((Path(folder) / "story.json").read_text(encoding="utf-8"))["splits"].values()
        # All that was read counts, also what the deduplication dropped; the documents' ends do not.
        tokens = sum(split["tokens"] - split["documents"] for split in splits)
        return round(text_bytes * tokens / sum(split["text_bytes"] for split in splits))

    return Work(step, lambda: peak.bytes, repeats=False)


def prepare_tiktoken(options, config) -> Work:
    """One thread of tiktoken over the same documents, or over the first of many; reading them is not counted."""
    from data.readers.text import read_text_documents
    from setup_tokenizer import get_base_tokenizer

    documents, characters = [], 0
    for document in read_text_documents(options.input):
        documents.append(document)
        characters += len(document)
        if characters >= PEER_CHARACTERS:
            break
    enc = get_base_tokenizer()
    enc.encode_ordinary("its tables are made at the first call")
    return Work(lambda: sum(len(enc.encode_ordinary(text)) for text in documents), process_peak_bytes, repeats=False)


# --- time and memory ---


def on_device(step: Callable[[], int], device: str) -> Work:
    """Work on a device, which is waited for and whose memory counts; on a CPU that of the process."""
    import torch

    if device.startswith("cuda"):
        return Work(step, lambda: torch.cuda.max_memory_allocated(device), lambda: torch.cuda.synchronize(device))
    return Work(step, process_peak_bytes, torch.mps.synchronize if device == "mps" else lambda: None)


def process_peak_bytes() -> int | None:
    """The most memory that this process held at a time (Linux; elsewhere None)."""
    return _kib_in(Path("/proc/self/status"), "VmHWM:")


def tree_bytes(process_id: int) -> int:
    """Memory that a process and its descendants hold now, shared pages divided among those that share them (Linux)."""
    folder = Path(f"/proc/{process_id}")
    total = _kib_in(folder / "smaps_rollup", "Pss:") or 0
    try:
        children = " ".join(path.read_text() for path in folder.glob("task/*/children")).split()
    except OSError:  # it has ended
        return total
    return total + sum(tree_bytes(int(child)) for child in children)


def _kib_in(path: Path, label: str) -> int | None:
    """The number of KiB behind `label` in one of the system's text files, in bytes; None where there is none."""
    try:
        lines = path.read_text().splitlines()
    except OSError:  # another system, or the process has ended
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(label)), None)


class PeakMemory:
    """The most memory that a process tree was seen to hold, in bytes; None before that."""

    def __init__(self):
        self.bytes: int | None = None

    @contextlib.contextmanager
    def watch(self, process_id: int):
        """Look again and again while the block runs."""
        ended = threading.Event()

        def look() -> None:
            while not ended.wait(SAMPLE_S):
                if seen := tree_bytes(process_id):
                    self.bytes = max(self.bytes or 0, seen)

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def timed(work: Work, steps: int, clock: Callable[[], float] = time.perf_counter) -> tuple[float, int]:
    """(seconds, tokens) of a number of steps, up to the moment when the device has done them."""
    work.synchronize()
    start = clock()
    tokens = sum(work.step() for _ in range(steps))
    work.synchronize()
    return clock() - start, tokens


WORKS = {
    "train": {
        "ours": train_ours,
        "transformers": train_transformers,
        "plain": train_plain,
        "compiled": train_compiled,
    },
    "generate": {"ours": generate_ours, "transformers": generate_transformers},
    "prepare": {"ours": prepare_ours, "tiktoken": prepare_tiktoken},
}
PEERS = {task: tuple(sides)[1:] for task, sides in WORKS.items()}
