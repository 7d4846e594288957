"""Draw the next id from a model's logits.

ids = sample(logits, Sampling(temperature=0.8, top_k=200), generator)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The settings of `sample`; by default ids are drawn from the model's own distribution.

    The logits are divided by `temperature`; 0 takes the likeliest id. Then the filters are applied, one after another:
    `top_k` keeps the k likeliest ids; `top_p` the smallest set of likeliest ids whose probabilities add up to at least
    it ("nucleus sampling", Holtzman et al. 2020, section 3.1); `min_p` the ids at least that many times as likely as
    the likeliest ("min-p", Nguyen et al. 2024, section 3). A `repetition_penalty` above 1 makes ids that occurred
    before less likely (see `penalize_repetition`).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    @property
    def reads_device(self) -> bool:
        """Whether `draw` waits for a number from the device: `top_p` alone looks up how many ids it has to sort."""
        return self.top_p is not None and self.top_k is None


# What gen.py, the samples during training, evaluation and the tools use unless an option says otherwise.
TEXT_SAMPLING = Sampling(temperature=0.8, top_k=200)
CHAT_SAMPLING = Sampling(temperature=0.5, top_k=50)  # more focused: small models need that for sensible replies
PREVIEW_SAMPLING = Sampling(temperature=0.8, top_k=50)  # the samples that train.py prints of an unfinished model
GREEDY = Sampling(temperature=0)  # always the likeliest id, so that runs can be compared
MIN_TEMPERATURE = 1e-6  # below it, dividing by the temperature overflows float32; the result is the same as for 0


def draw(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """The ids (B,) that numbers `uniform` (B, 1) in [0, 1) choose from logits (B, V)."""
    probabilities, ids = candidates(logits, sampling)
    exact = torch.float32 if logits.device.type == "mps" else torch.float64  # MPS has no float64
    cumulative = probabilities.to(exact).cumsum(-1)
    # 1 - uniform is in (0, 1], so that the first position to reach it never has probability 0.
    choice = torch.searchsorted(cumulative, (1 - uniform) * cumulative[:, -1:])
    return (choice if ids is None else ids.gather(1, choice))[:, 0]


def sample(
    logits: Tensor,
    sampling: Sampling = TEXT_SAMPLING,
    generator: torch.Generator | None = None,
    fast_draw: Callable[[Tensor, Sampling, Tensor], Tensor] | None = None,
) -> Tensor:
    """Draw one id per row, (B,), from logits (B, V). `fast_draw` replaces `draw` and gets the same random numbers."""
    if sampling.temperature < MIN_TEMPERATURE:
        return logits.max(-1).indices  # on a CPU in a third of argmax's time
    uniform = torch.rand(len(logits), 1, generator=generator, device=logits.device)
    return (fast_draw or draw)(logits, sampling, uniform)


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """What can be drawn: unnormalized probabilities (B, N) and their ids (B, N), or None for all ids 0 to V - 1."""
    scores = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    probabilities, ids = scores.softmax(-1), None
    if sampling.top_k is not None:
        probabilities, ids = probabilities.topk(min(sampling.top_k, probabilities.shape[-1]))  # likeliest first
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    if sampling.top_p is not None:
        if ids is None:
            # All ids rarer than (1 - top_p) / V add up to less than 1 - top_p, so none of them is in the nucleus.
            may_stay = probabilities >= (1 - sampling.top_p) / probabilities.shape[-1]
            probabilities, ids = probabilities.topk(int(may_stay.sum(-1).max()))
        likelier = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(likelier >= sampling.top_p, 0)
    if sampling.min_p is not None:
        lowest = sampling.min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < lowest, 0)
    return probabilities, ids


def seen_ids(prompts: list[list[int]], n_vocab: int, device: torch.device) -> Tensor:
    """True (B, n_vocab) for the ids that occur in each prompt."""
    seen = torch.zeros(len(prompts), n_vocab, dtype=torch.bool, device=device)
    for row, prompt in zip(seen, prompts, strict=True):
        row[prompt] = True
    return seen


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (B, V) in which the ids that `seen` (B, V) marks are less likely.

    Positive logits are divided by `penalty` ("CTRL", Keskar et al. 2019, section 4.1); negative ones are multiplied by
    it, so that they too become less likely.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
