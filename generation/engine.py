"""A loaded model that continues ids as text, piece by piece as the ids are generated.

engine = TextEngine(model, Settings(TEXT_SAMPLING))
print("".join(engine.stream([GPT2.endoftext, *GPT2.encode_text("Once upon a time")], max_tokens=100)))
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator, Iterator

import torch
from torch import Tensor

from common.cli import UserError
from common.numbers import significant
from generation.decoding import DecodeStep, decode_step, generate, new_cache
from generation.sampling import Sampling
from generation.text_stream import TextStream
from model import GPT, KVCache
from setup_tokenizer import GPT2, Tokenizer

LIKELIEST_SHOWN = 5  # ids whose log probabilities are recorded next to the drawn one's


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to draw ids, and when to stop."""

    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    seed: int | None = None  # None: a new one each time
    stop_ids: tuple[int, ...] = (GPT2.endoftext,)
    stop_texts: tuple[str, ...] = ()
    hidden_ids: tuple[int, ...] = ()  # left out of the text, but in the model's context like all others
    logprobs: bool = False  # record each token's log probability


class TextEngine:
    """A loaded model that continues ids as text (see chat.Engine) and keeps its key-value caches between calls."""

    def __init__(self, model: GPT, settings: Settings, decode: DecodeStep = decode_step, tokenizer: Tokenizer = GPT2):
        self.model, self.settings, self.decode = model, settings, decode
        self.tokenizer, self.enc = tokenizer, tokenizer.enc
        self.block_size = model.config.block_size
        self.temperature = settings.sampling.temperature
        self.generator = torch.Generator(model.wte.weight.device)
        self.seed = self.generator.seed() if settings.seed is None else settings.seed
        self.generator.manual_seed(self.seed)
        self.caches: dict[int, KVCache] = {}  # by their number of rows
        self.logprobs: list[dict] = []
        self._logits: Tensor | None = None
        self.tokens, self.later_tokens, self.first_token_s, self.later_s = 0, 0, 0.0, 0.0  # later: after the first step

    def stream(self, ids: list[int], max_tokens: int | None) -> Generator[str, None, None]:
        """The text that follows `ids`, in pieces, as it is generated."""
        for _, piece in self.stream_samples(ids, max_tokens, 1):
            yield piece

    def stream_samples(self, ids: list[int], max_tokens: int | None, n_samples: int) -> Iterator[tuple[int, str]]:
        """Several texts that follow `ids`, generated together: (number, piece) for each piece."""
        texts = [TextStream(self.enc, self.settings.stop_texts) for _ in range(n_samples)]
        running = set(range(n_samples))
        for tokens in self._steps([ids] * n_samples, max_tokens):
            for number in sorted(running):
                token = tokens[number]
                if token in self.settings.stop_ids:
                    running.discard(number)
                elif token not in self.settings.hidden_ids:
                    if piece := texts[number].feed(token):
                        yield number, piece
                    if texts[number].stopped:
                        running.discard(number)
            if not running:
                break
        for number, text in enumerate(texts):
            if piece := text.finish():
                yield number, piece

    def _steps(self, prompts: list[list[int]], max_tokens: int | None) -> Iterator[list[int]]:
        """The ids of each step; measures the time, and records log probabilities if the settings say so."""
        steps = generate(
            self.model,
            prompts,
            max_tokens,
            dataclasses.replace(self.settings.sampling, temperature=self.temperature),
            generator=self.generator,
            stop_ids=self.settings.stop_ids,
            cache=self._cache(len(prompts)),
            observe=self._keep_logits if self.settings.logprobs else None,
            decode=self.decode,
        )
        self.tokens, self.later_tokens, self.first_token_s, self.later_s = 0, 0, 0.0, 0.0
        started = time.perf_counter()
        try:
            for step, ids in enumerate(steps):
                tokens = ids.tolist()
                spent_s = time.perf_counter() - started
                n_tokens = sum(token >= 0 for token in tokens)
                self.tokens += n_tokens
                if step:
                    self.later_tokens += n_tokens
                    self.later_s += spent_s
                else:
                    self.first_token_s = spent_s
                if self._logits is not None:
                    self._record_logprobs(self._logits, step, tokens)
                yield tokens
                started = time.perf_counter()
        except FloatingPointError as error:
            raise UserError(f"{error}; try --dtype float32, or another checkpoint if training diverged") from error

    def _cache(self, n_rows: int) -> KVCache:
        """The cache for this number of rows, made once: zeroing it, and capturing CUDA graphs for it, takes time."""
        if n_rows not in self.caches:
            self.caches[n_rows] = new_cache(self.model, n_rows)
        return self.caches[n_rows]

    def _keep_logits(self, logits: Tensor) -> None:
        self._logits = logits.clone()

    def _record_logprobs(self, logits: Tensor, step: int, tokens: list[int]) -> None:
        """Log probabilities (nats) of the model itself, before temperature, filters and penalty."""
        logprobs = logits.log_softmax(-1)
        values, ids = logprobs.topk(min(LIKELIEST_SHOWN, logprobs.shape[-1]))
        for number, token in enumerate(tokens):
            if token < 0:
                continue
            likeliest = [
                {**self._token_entry(other), "logprob": round(value, 6)}
                for other, value in zip(ids[number].tolist(), values[number].tolist(), strict=True)
            ]
            logprob = round(float(logprobs[number, token]), 6)
            drawn = {"sample": number, "step": step, **self._token_entry(token), "logprob": logprob}
            self.logprobs.append({**drawn, "likeliest": likeliest})

    def _token_entry(self, token: int) -> dict:
        return {"id": token, "text": self.enc.decode_single_token_bytes(token).decode("utf-8", "backslashreplace")}

    def statistics(self) -> str:
        """The number of tokens and the speed of the last call, in one line."""
        rate = self.later_tokens / self.later_s if self.later_s else 0.0
        return (
            f"last: {self.tokens} tokens, the first after {self.first_token_s * 1000:.0f} ms, then "
            f"{significant(rate, 3)} tokens/s; temperature {self.temperature:g}, seed {self.seed}"
        )
