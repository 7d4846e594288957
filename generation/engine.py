"""Ids to text while they come, and a loaded model that continues ids as text.

engine = TextEngine(model, Settings(temperature=0.8))
print("".join(engine.stream([ENDOFTEXT_ID, *encode_text("Once upon a time")], max_tokens=100)))
"""

from __future__ import annotations

import codecs
import dataclasses
import time
from collections.abc import Iterator, Sequence

import tiktoken
import torch
from torch import Tensor

from common.cli import UserError
from model import GPT, KVCache
from setup_tokenizer import ENDOFTEXT_ID, get_extended_tokenizer

LIKELY_SHOWN = 5  # ids whose log probabilities are noted beside the drawn one's


class TextStream:
    """The text of ids fed one by one; what might still become a character or a stop text is held back.

    Without stop texts the joined pieces are `enc.decode(ids)`. `stopped` tells that a stop text has come: what
    stands before it has been given, it and what follows are not.
    """

    def __init__(self, enc: tiktoken.Encoding, stop_texts: Sequence[str] = ()):
        self.enc = enc
        self.stop_texts = [text for text in stop_texts if text]
        self.stopped = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def feed(self, token: int) -> str:
        """The text that is certain after one more id; often empty."""
        return self._release(self._decoder.decode(self.enc.decode_single_token_bytes(token)))

    def finish(self) -> str:
        """What was held back, when no id follows; bytes that are no whole character stand as U+FFFD."""
        text = self._release(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return text + ("" if self.stopped else rest)

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [(start + len(stop), start) for stop in self.stop_texts if (start := self._held.find(stop)) >= 0]
        if found:  # the first to be complete counts, however the tokens divide the text
            self.stopped = True
            return self._held[: min(found)[1]]
        certain = len(self._held) - self._possible_beginning()
        released, self._held = self._held[:certain], self._held[certain:]
        return released

    def _possible_beginning(self) -> int:
        """How many of the last characters held may be the beginning of a stop text."""
        longest = 0
        for stop in self.stop_texts:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to draw ids and when to stop; `model.sample` explains the first five."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None  # None: another one each time
    stop_ids: tuple[int, ...] = (ENDOFTEXT_ID,)
    stop_texts: tuple[str, ...] = ()
    logprobs: bool = False  # note each token's log probability


class TextEngine:
    """A loaded model that continues ids as text (see chat.Engine), and keeps its key-value cache between calls."""

    def __init__(self, model: GPT, settings: Settings):
        self.model, self.settings = model, settings
        self.enc = get_extended_tokenizer()
        self.block_size = model.config.block_size
        self.temperature = settings.temperature
        device = model.wte.weight.device
        self.generator = torch.Generator(device)
        self.seed = self.generator.seed() if settings.seed is None else settings.seed
        self.generator.manual_seed(self.seed)
        self.caches: dict[int, KVCache] = {}  # by the number of rows
        self.logprobs: list[dict] = []
        self._logits: Tensor | None = None
        self.tokens, self.rest_tokens, self.first_token_s, self.rest_s = 0, 0, 0.0, 0.0  # rest: after the first step

    def stream(self, ids: list[int], max_tokens: int | None) -> Iterator[str]:
        """The text that follows `ids`, in pieces, as it is made."""
        for _, piece in self.stream_samples(ids, max_tokens, 1):
            yield piece

    def stream_samples(self, ids: list[int], max_tokens: int | None, n_samples: int) -> Iterator[tuple[int, str]]:
        """Several texts that follow `ids`, made together: (number, piece) as the pieces come."""
        texts = [TextStream(self.enc, self.settings.stop_texts) for _ in range(n_samples)]
        going_on = set(range(n_samples))
        for tokens in self._steps([ids] * n_samples, max_tokens):
            for number in sorted(going_on):
                token = tokens[number]
                if token in self.settings.stop_ids:
                    going_on.discard(number)
                else:
                    if piece := texts[number].feed(token):
                        yield number, piece
                    if texts[number].stopped:
                        going_on.discard(number)
            if not going_on:
                break
        for number, text in enumerate(texts):
            if piece := text.finish():
                yield number, piece

    def _steps(self, prompts: list[list[int]], max_tokens: int | None) -> Iterator[list[int]]:
        """The ids of each step, timed and, where it is asked for, with their log probabilities noted."""
        steps = self.model.generate(
            prompts,
            max_tokens,
            temperature=self.temperature,
            generator=self.generator,
            stop_ids=self.settings.stop_ids,
            cache=self._cache(len(prompts)),
            observe=self._keep_logits if self.settings.logprobs else None,
            cuda_graph=True,
            top_k=self.settings.top_k,
            top_p=self.settings.top_p,
            min_p=self.settings.min_p,
            repetition_penalty=self.settings.repetition_penalty,
        )
        self.tokens, self.rest_tokens, self.first_token_s, self.rest_s = 0, 0, 0.0, 0.0
        started = time.perf_counter()
        try:
            for step, ids in enumerate(steps):
                tokens = ids.tolist()
                spent_s = time.perf_counter() - started
                n_tokens = sum(token >= 0 for token in tokens)
                self.tokens += n_tokens
                if step:
                    self.rest_tokens += n_tokens
                    self.rest_s += spent_s
                else:
                    self.first_token_s = spent_s
                if self.settings.logprobs:
                    self._note_logprobs(step, tokens)
                yield tokens
                started = time.perf_counter()
        except FloatingPointError as error:
            raise UserError(f"{error}; try --dtype float32, or another checkpoint if training diverged") from error

    def _cache(self, n_rows: int) -> KVCache:
        """The cache for so many rows, made once: zeroing it, and capturing CUDA graphs around it, takes time."""
        if n_rows not in self.caches:
            self.caches[n_rows] = self.model.new_cache(n_rows)
        return self.caches[n_rows]

    def _keep_logits(self, logits: Tensor) -> None:
        self._logits = logits.clone()

    def _note_logprobs(self, step: int, tokens: list[int]) -> None:
        """Log probabilities (nats) by the model alone, before temperature, filters and penalty."""
        logprobs = self._logits.log_softmax(-1)
        values, ids = logprobs.topk(min(LIKELY_SHOWN, logprobs.shape[-1]))
        for number, token in enumerate(tokens):
            if token < 0:
                continue
            likely = [
                {**self._described(other), "logprob": round(value, 6)}
                for other, value in zip(ids[number].tolist(), values[number].tolist(), strict=True)
            ]
            logprob = round(float(logprobs[number, token]), 6)
            facts = {"sample": number, "step": step, **self._described(token), "logprob": logprob, "likeliest": likely}
            self.logprobs.append(facts)

    def _described(self, token: int) -> dict:
        return {"id": token, "text": self.enc.decode_single_token_bytes(token).decode("utf-8", "backslashreplace")}

    def statistics(self) -> str:
        """What the last call cost, in a line."""
        rate = self.rest_tokens / self.rest_s if self.rest_s else 0.0
        return (
            f"last: {self.tokens} tokens, the first after {self.first_token_s * 1000:.0f} ms, then "
            f"{rate:.1f} tokens/s; temperature {self.temperature:g}, seed {self.seed}"
        )
