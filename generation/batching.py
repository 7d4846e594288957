"""Continuous batching: texts join and leave a batch between two decode steps, each with its own settings.

engine = BatchEngine(model, max_rows=16)
engine.submit([Stream(Request(prompt, max_tokens=100), print)])
while engine.step():
    ...

The batch is put together anew for each step ("Orca", Yu et al. 2022, section 3.1). Between the steps prompts are
prefilled in chunks ("Sarathi", Agrawal et al. 2023, section 4), so that running texts are not held up.
"""

from __future__ import annotations

import collections
import itertools
import math
import threading
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from common.device import without_cudnn_attention
from generation.decoding import common_prefix
from generation.row_cache import DecodeRows, RowCache, decode_rows, prefill_chunk
from generation.sampling import Sampling, draw
from generation.stream import Stream, TokenLogprob
from model import GPT

CHUNK_TOKENS = 128  # of a prompt per prefill pass; fixed, so that rounding does not depend on the other requests
# The time for prefilling between two decode steps, as a multiple of a decode step: a compromise between an early first
# token and the speed of the other texts.
PREFILL_SHARE = 2.2
PREFILL_ALONE_S = 0.25  # the time for prefilling while nothing is decoded


class QueueFull(Exception):
    """More than `max_waiting` texts are waiting."""


class BatchEngine:
    """Generates many texts at once with one model. One thread calls `step`; `submit` may be called from any."""

    def __init__(
        self,
        model: GPT,
        max_rows: int = 16,
        max_waiting: int = 64,
        decode: DecodeRows = decode_rows,
        chunk_tokens: int = CHUNK_TOKENS,
        keep_prefixes: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.model, self.max_waiting, self.decode = model, max_waiting, decode
        self.chunk_tokens, self.keep_prefixes, self.clock = chunk_tokens, keep_prefixes, clock
        self.block_size, self.n_vocab = model.config.block_size, model.config.n_vocab
        weight = model.ln_f.weight
        self.device = weight.device
        self.cache = RowCache(model.config, max_rows, weight.device, weight.dtype)
        self.waiting: collections.deque[Stream] = collections.deque()
        self.prefilling: list[Stream] = []  # in the order of their arrival
        self.decoding: list[Stream] = []
        self.last_used = [0] * max_rows  # when each row was released, in releases
        self.decode_s = 0.0  # the duration of a decode step, smoothed
        self._releases = itertools.count(1)
        self._lock = threading.Lock()  # guards `waiting`

    @property
    def max_rows(self) -> int:
        return len(self.last_used)

    @property
    def rows_in_use(self) -> int:
        return len(self.prefilling) + len(self.decoding)

    def submit(self, streams: Sequence[Stream]) -> None:
        """Queue texts, first come, first served. Raises QueueFull, and queues none of them, if too many are waiting."""
        with self._lock:
            free = self.max_rows - self.rows_in_use
            if len(self.waiting) + len(streams) > self.max_waiting + max(0, free):
                raise QueueFull
            self.waiting.extend(streams)

    @torch.inference_mode()
    @without_cudnn_attention()
    def step(self) -> bool:
        """Admit, prefill for a while, and decode one id of each running text; False if there is nothing to do."""
        self._release_cancelled()
        self._admit()
        self._prefill()
        self._decode()
        return bool(self.waiting or self.prefilling or self.decoding)

    def fail(self, message: str) -> None:
        """End every text with an error and clear the cache; call it in the thread that calls `step`."""
        with self._lock:
            streams = [*self.prefilling, *self.decoding, *self.waiting]
            self.waiting.clear()
            self.prefilling, self.decoding = [], []
        self.cache.tokens = [[] for _ in self.cache.tokens]
        for stream in streams:
            stream.fail(message)

    # --- rows ---

    def _release_cancelled(self) -> None:
        for running in (self.prefilling, self.decoding):
            for stream in [stream for stream in running if stream.is_cancelled]:
                running.remove(stream)
                self._release(stream)
        with self._lock:
            if any(stream.is_cancelled for stream in self.waiting):
                self.waiting = collections.deque(stream for stream in self.waiting if not stream.is_cancelled)

    def _release(self, stream: Stream) -> None:
        self.last_used[stream.row] = next(self._releases)

    def _admit(self) -> None:
        while self.waiting and self.rows_in_use < self.max_rows:
            with self._lock:
                if not self.waiting:
                    return
                stream = self.waiting.popleft()
                stream.context = stream.context[-self.block_size :]
                if not stream.request.slides:
                    stream.limit = min(stream.limit, max(1, self.block_size - len(stream.context)))
                stream.row = self._choose_row(stream.context)
                self.prefilling.append(stream)

    def _choose_row(self, context: list[int]) -> int:
        """The free row that already contains the conversation so far, or else the least recently used free row."""
        taken = {stream.row for stream in (*self.prefilling, *self.decoding)}
        free = [row for row in range(self.max_rows) if row not in taken]
        shared = {row: common_prefix(self.cache.tokens[row], context) for row in free}
        best = max(free, key=lambda row: shared[row])
        if shared[best] and 2 * shared[best] >= len(self.cache.tokens[best]):  # little of it would be lost
            return best
        return min(free, key=lambda row: self.last_used[row])

    # --- prompts ---

    def _prefill(self) -> None:
        started = self.clock()
        while self.prefilling:
            self._prefill_chunk(self.prefilling[0])
            allowed_s = PREFILL_SHARE * self.decode_s if self.decoding else PREFILL_ALONE_S
            if self.clock() - started >= allowed_s:
                return

    def _prefill_chunk(self, stream: Stream) -> None:
        request, tokens = stream.request, self.cache.tokens
        if stream.cached_tokens is None:
            if request.prompt_logprobs or not self.keep_prefixes:
                tokens[stream.row], stream.cached_tokens = [], 0
            else:
                stream.cached_tokens = self.cache.share_prefix(stream.row, stream.context)
        start = len(tokens[stream.row])
        ids = stream.context[start : start + self.chunk_tokens]
        hidden = prefill_chunk(self.model, self.cache, stream.row, ids)
        if request.prompt_logprobs and not stream.n_tokens:
            self._keep_prompt_logprobs(stream, start, hidden)
        if len(tokens[stream.row]) < len(stream.context):
            return
        self.prefilling.remove(stream)
        if request.max_tokens == 0:
            stream.finish_without_tokens()
            self._release(stream)
            return
        self.decoding.append(stream)
        self._draw([stream], self.model.logits(hidden[-1:]))

    def _keep_prompt_logprobs(self, stream: Stream, start: int, hidden: Tensor) -> None:
        """Record the log probability of each prompt token that follows a position of this chunk."""
        following = stream.context[start + 1 : start + 1 + len(hidden)]
        if following:
            logits = self.model.logits(hidden[: len(following)])
            stream.prompt_logprobs += token_logprobs(logits, following, stream.request.top_logprobs or 0)

    # --- decoding ---

    def _decode(self) -> None:
        self._make_room()
        if not self.decoding:
            return
        started = self.clock()
        rows = [stream.row for stream in self.decoding]
        lengths = [len(self.cache.tokens[row]) for row in rows]
        ids = [stream.next_id for stream in self.decoding]
        logits = self.decode(self.model, torch.tensor(ids, device=self.device), rows, lengths, self.cache)
        for row, token in zip(rows, ids, strict=True):
            self.cache.tokens[row].append(token)
        self._draw(list(self.decoding), logits)
        spent_s = self.clock() - started
        self.decode_s = spent_s if not self.decode_s else 0.8 * self.decode_s + 0.2 * spent_s

    def _make_room(self) -> None:
        """Let texts whose row is full start again from the newest half of the window; they are prefilled next."""
        full = [stream for stream in self.decoding if len(self.cache.tokens[stream.row]) == self.block_size]
        for stream in full:
            tokens = self.cache.tokens[stream.row]
            stream.context = [*tokens[len(tokens) - self.block_size // 2 :], stream.next_id]
            self.cache.tokens[stream.row] = []
            self.decoding.remove(stream)
        self.prefilling[:0] = full

    def _draw(self, streams: list[Stream], logits: Tensor) -> None:
        """Draw the next id of each text from logits (N, V) and deliver what it adds."""
        are_finite = [math.isfinite(largest) for largest in logits.amax(-1).tolist()]  # with NaN, the largest is NaN
        if not all(are_finite):  # zeros, so that drawing does not fail for the other rows
            logits = logits.masked_fill(~logits.amax(-1, keepdim=True).isfinite(), 0)
        tokens = draw_each(streams, logits)
        logprobs = self._logprobs(streams, logits, tokens)
        for number, (stream, is_finite) in enumerate(zip(streams, are_finite, strict=True)):
            if is_finite:
                stream.take(tokens[number], logprobs.get(number))
            else:
                stream.fail("the model's logits are not finite; its training may have diverged")
            if stream.is_finished:
                self.decoding.remove(stream)
                self._release(stream)

    def _logprobs(self, streams: list[Stream], logits: Tensor, tokens: list[int]) -> dict[int, TokenLogprob]:
        """The log probabilities of the drawn ids, for the texts that ask for them, by the number of the text."""
        asking = [number for number, stream in enumerate(streams) if stream.request.top_logprobs is not None]
        return {
            number: token_logprobs(
                logits[number : number + 1], [tokens[number]], streams[number].request.top_logprobs or 0
            )[0]
            for number in asking
        }


def draw_each(streams: Sequence[Stream], logits: Tensor) -> list[int]:
    """One id per row of logits (N, V), each by its own text's settings and generator.

    Rows with equal settings are drawn together, which is faster and gives the same ids: each has its own random number.
    """
    if any(stream.changes_logits for stream in streams):
        logits = torch.stack([stream.changed_logits(row) for stream, row in zip(streams, logits, strict=True)])
    tokens = [0] * len(streams)
    groups: dict[Sampling | None, list[int]] = {}
    for number, stream in enumerate(streams):
        groups.setdefault(None if stream.is_greedy else stream.request.sampling, []).append(number)
    for sampling, numbers in groups.items():
        scores = logits if len(numbers) == len(streams) else logits[numbers]
        if sampling is None:
            ids = scores.max(-1).indices
        else:
            uniform = [torch.rand(1, 1, generator=streams[n].generator, device=logits.device) for n in numbers]
            ids = draw(scores, sampling, torch.cat(uniform))
        for number, token in zip(numbers, ids.tolist(), strict=True):
            tokens[number] = token
    return tokens


def token_logprobs(logits: Tensor, tokens: Sequence[int], n_likeliest: int) -> list[TokenLogprob]:
    """The log probability of each token under its row of logits (N, V), and those of the likeliest ids."""
    logprobs = logits.log_softmax(-1)
    own = logprobs[range(len(tokens)), list(tokens)].tolist()
    values, ids = logprobs.topk(min(n_likeliest, logprobs.shape[-1]))
    return [
        TokenLogprob(token, logprob, tuple(zip(row_ids, row_values, strict=True)))
        for token, logprob, row_ids, row_values in zip(tokens, own, ids.tolist(), values.tolist(), strict=True)
    ]
