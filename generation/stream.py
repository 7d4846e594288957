"""One text that is generated in a batch with others: the request, its state, and its output."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from generation.sampling import MIN_TEMPERATURE, Sampling, penalize_repetition
from generation.text_stream import TextStream
from setup_tokenizer import GPT2, Tokenizer


@dataclasses.dataclass(frozen=True)
class Request:
    """What to continue, how to draw ids and when to stop.

    `frequency_penalty` times the number of times that an id was drawn, and `presence_penalty` once, are subtracted from
    its logit; ids of the prompt do not count. `logit_bias` is added to the logits of single ids. The last
    `n_prefix_ids` of the prompt are the beginning of the reply: a character that they leave incomplete is completed.
    """

    prompt: list[int]
    max_tokens: int
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    seed: int | None = None  # None: a new one
    stop_ids: tuple[int, ...] = ()
    stop_texts: tuple[str, ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    top_logprobs: int | None = None  # report each token's log probability, and those of this many likeliest tokens
    prompt_logprobs: bool = False  # the same for the prompt's tokens
    slides: bool = False  # when the window is full, drop its older half and continue, as gen.py does with text
    n_prefix_ids: int = 0
    tokenizer: Tokenizer = GPT2


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """A token's log probability (nats) by the model itself, before any setting changes it, and the likeliest tokens."""

    id: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Output:
    """What one step added to a text. `finish_reason` is None until the last one: "stop", "length" or "error"."""

    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    n_tokens: int = 0  # drawn so far, a stop token included
    cached_tokens: int = 0  # of the prompt, not computed again
    finish_reason: str | None = None
    error: str = ""


def first_of_each_prompt(requests: Sequence[Request]) -> set[int]:
    """The index of the first request for each prompt; texts that continue the same prompt share its list of ids."""
    firsts: dict[int, int] = {}
    for index, request in enumerate(requests):
        firsts.setdefault(id(request.prompt), index)
    return set(firsts.values())


class Stream:
    """The state of one text. Only the thread that runs the engine changes it; `cancel` may be called from any.

    `deliver` is called in that thread with each Output; it must not block.
    """

    def __init__(self, request: Request, deliver: Callable[[Output], None], device: torch.device | str = "cpu"):
        self.request, self.deliver = request, deliver
        self.generator = torch.Generator(device)
        self.generator.seed() if request.seed is None else self.generator.manual_seed(request.seed)
        self.context = list(request.prompt)  # what the cache's row will hold once it is prefilled
        self.next_id = -1  # the last id drawn, which is not yet in the cache
        self.row = -1
        self.limit = request.max_tokens
        self.cached_tokens: int | None = None
        self.prompt_logprobs: list[TokenLogprob] = []
        self.is_cancelled = self.is_finished = False
        self.n_tokens = 0
        prefix = request.prompt[len(request.prompt) - request.n_prefix_ids :]
        self._text = TextStream(request.tokenizer.enc, request.stop_texts, prefix)
        self._pending_logprobs: list[tuple[int, TokenLogprob]] = []  # with the number of bytes before the token
        self._n_bytes = self._n_released_bytes = 0
        self._seen: Tensor | None = None
        self._counts: Tensor | None = None
        self._bias: Tensor | None = None

    def cancel(self) -> None:
        """Stop at the next step; nothing more is delivered."""
        self.is_cancelled = True

    @property
    def is_greedy(self) -> bool:
        return self.request.sampling.temperature < MIN_TEMPERATURE

    @property
    def changes_logits(self) -> bool:
        """Whether the request asks for penalties or a bias."""
        request = self.request
        has_penalty = request.frequency_penalty or request.presence_penalty or request.sampling.repetition_penalty != 1
        return bool(has_penalty or request.logit_bias)

    def changed_logits(self, logits: Tensor) -> Tensor:
        """Logits (V,) after the penalties and the bias that the request asks for."""
        request, penalty = self.request, self.request.sampling.repetition_penalty
        if penalty != 1:
            if self._seen is None:
                self._seen = torch.zeros_like(logits, dtype=torch.bool)
                self._seen[request.prompt] = True
            logits = penalize_repetition(logits, self._seen, penalty)
        if request.frequency_penalty or request.presence_penalty:
            if self._counts is None:
                self._counts = torch.zeros_like(logits)
            logits = logits - request.frequency_penalty * self._counts - request.presence_penalty * (self._counts > 0)
        if request.logit_bias:
            if self._bias is None:
                ids, biases = list(request.logit_bias), list(request.logit_bias.values())
                self._bias = torch.zeros_like(logits)
                self._bias[ids] = torch.tensor(biases, dtype=logits.dtype, device=logits.device)
            logits = logits + self._bias
        return logits

    def take(self, token: int, logprob: TokenLogprob | None) -> str | None:
        """Take the next id and deliver what it adds to the text; returns the reason if it is the last one."""
        self.n_tokens += 1
        self.next_id = token
        if token in self.request.stop_ids:
            self._finish("stop", "")
            return "stop"
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1
        if logprob is not None:
            self._pending_logprobs.append((self._n_bytes, logprob))
        self._n_bytes += len(self._text.enc.decode_single_token_bytes(token))
        piece = self._text.feed(token)
        if self._text.stopped:
            self._finish("stop", piece)
            return "stop"
        if self.n_tokens >= self.limit:
            self._finish("length", piece)
            return "length"
        self.deliver(self._output(piece))
        return None

    def fail(self, message: str) -> None:
        """Deliver an error as the last output."""
        if not self.is_finished:
            self.is_finished = True
            self.deliver(dataclasses.replace(self._output(""), finish_reason="error", error=message))

    def finish_without_tokens(self) -> None:
        """Deliver the last output of a request for no new token."""
        self._finish("length", "")

    def _finish(self, reason: str, piece: str) -> None:
        self.is_finished = True
        stopped_by_text = self._text.stopped
        piece += self._text.finish()
        output = self._output(piece)
        held = () if stopped_by_text else tuple(logprob for _, logprob in self._pending_logprobs)
        self.deliver(dataclasses.replace(output, logprobs=output.logprobs + held, finish_reason=reason))

    def _output(self, piece: str) -> Output:
        """The next output, with the log probabilities of the tokens whose text has begun."""
        self._n_released_bytes += len(piece.encode("utf-8", "surrogatepass"))
        n_begun = sum(start < self._n_released_bytes for start, _ in self._pending_logprobs)
        begun, self._pending_logprobs = self._pending_logprobs[:n_begun], self._pending_logprobs[n_begun:]
        prompt_logprobs, self.prompt_logprobs = tuple(self.prompt_logprobs), []
        return Output(piece, tuple(one for _, one in begun), prompt_logprobs, self.n_tokens, self.cached_tokens or 0)
