"""The generation that benchmark.py times: ours and transformers', greedy, always the same number of new tokens."""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmark_timing import Work, on_device
from benchmark_training import gpt_config, transformers_config

from common.device import seed_everything
from common.speedups import load_speedups

TURN_TOKENS = 20  # tokens that the next turn of a chat adds to a prompt whose keys and values are cached
LATENCY_ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """The shape of the model, its device, precision and seed."""

    preset: str
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    device: str
    dtype: str
    seed: int = 1337


def generate_ours(options: Any, config: GenerationConfig) -> Work:
    """Generation as in gen.py, greedy and without stop tokens, with a new prompt each time."""
    fast = load_speedups(options.plain)
    if fast:
        fast.keep_freed_memory()
    from generation.decoding import decode_step
    from generation.engine import Settings, TextEngine
    from generation.sampling import GREEDY
    from model import GPT

    seed_everything(config.seed)
    model = in_precision(lambda: GPT(gpt_config(config)), config)
    decode = decode_step
    if fast:
        speedups = fast.speed_up_generation(model, options.quantize, options.streams)
        decode = speedups.decode
        print(f"ours: {speedups.description}")
    engine = TextEngine(model, Settings(GREEDY, seed=0, stop_ids=()), decode)
    prompts = random_prompts(options, model.config.n_vocab)

    def step() -> int:
        for _ in engine.stream_samples(next(prompts), options.max_tokens, options.streams):
            pass
        return options.streams * options.max_tokens

    work = on_device(step, config.device)
    return dataclasses.replace(work, latencies_s=lambda: latencies_s(engine, prompts, config.device))


def latencies_s(engine: Any, prompts: Iterator[list[int]], device: str) -> dict[str, float]:
    """Median seconds to the first token of a new prompt and of a next turn, compared with a plain forward pass."""
    import torch

    model = engine.model
    if len(prompt := next(prompts)) + TURN_TOKENS >= model.config.block_size:
        return {}
    turn = [*prompt, *next(prompts)[:1] * TURN_TOKENS]
    ids = torch.tensor([prompt], device=device)

    def forward() -> None:
        with torch.inference_mode():
            model.logits(model.hidden(ids)[:, -1]).argmax(-1).tolist()

    def next_token(ids: list[int]) -> None:
        for _ in engine.stream(ids, 1):
            pass

    calls: dict[str, Callable[[], None]] = {
        "plain forward": forward,
        "first token": lambda: next_token(prompt),
        f"{TURN_TOKENS} ids more": lambda: next_token(turn),
    }
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(LATENCY_ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            found[name].append(time.perf_counter() - start)
        next_token(next(prompts))  # afterwards the cache holds nothing of the prompt
    return {name: statistics.median(values) for name, values in found.items()}


def generate_transformers(options: Any, config: GenerationConfig) -> Work:
    """transformers' `generate` with its cache, greedily, the same number of new tokens in the same precision."""
    import torch
    from transformers import GPT2LMHeadModel

    torch.manual_seed(config.seed)
    model = in_precision(lambda: GPT2LMHeadModel(transformers_config(config)), config)
    model.generation_config.eos_token_id = None  # it must not stop early
    prompts = random_prompts(options, gpt_config(config).n_vocab)
    settings = {"max_new_tokens": options.max_tokens, "do_sample": False, "use_cache": True, "pad_token_id": 0}

    def step() -> int:
        ids = torch.tensor([next(prompts)] * options.streams, device=config.device)
        made = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        return made.numel() - ids.numel()

    return on_device(step, config.device)


def in_precision(make_model: Callable, config: GenerationConfig) -> Any:
    """A model for generation, created in its precision, so that it is never in memory twice."""
    import torch

    torch.set_default_dtype(getattr(torch, config.dtype))
    try:
        model = make_model()
    finally:
        torch.set_default_dtype(torch.float32)
    return model.to(config.device).eval().requires_grad_(False)


def random_prompts(options: Any, n_vocab: int) -> Iterator[list[int]]:
    """An endless supply of prompts. Each starts differently from the one before, so that no cache helps."""
    generator = random.Random(0)
    first = 0
    while True:
        first = (first + 1) % n_vocab
        yield [first, *(generator.randrange(n_vocab) for _ in range(options.prompt_tokens - 1))]
