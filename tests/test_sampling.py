"""generation/sampling.py: ids are drawn as transformers would draw them, and in the right proportions."""

from __future__ import annotations

import pytest
import torch

from generation.sampling import (
    Sampling,
    candidates,
    penalize_repetition,
    sample,
    seen_ids,
)
from tests.tiny_gpt import CONFIG, generated, generating_gpt, seeded

FILTERS = [
    {"top_k": 5},
    {"top_k": 1000},
    {"top_p": 0.7},
    {"top_p": 1.0},
    {"top_p": 0.01},
    {"min_p": 0.2},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 30, "top_p": 0.9, "min_p": 0.1},
    {"top_p": 0.9, "min_p": 0.05},
]


def test_draws_follow_the_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]])
    for top_k in (None, 4):
        ids = sample(logits.expand(40_000, -1), Sampling(temperature=0.7, top_k=top_k), seeded())
        measured = ids.bincount(minlength=4) / len(ids)
        torch.testing.assert_close(measured, (logits[0] / 0.7).softmax(0), atol=0.01, rtol=0)
        assert measured[3] == 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_filters_keep_what_transformers_keeps(filters, temperature):
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = 3 * torch.randn(6, 200, generator=seeded(4))
    expected = process.TemperatureLogitsWarper(temperature)(None, logits)
    warpers = {
        "top_k": process.TopKLogitsWarper,
        "top_p": process.TopPLogitsWarper,
        "min_p": process.MinPLogitsWarper,
    }
    for name, value in filters.items():
        expected = warpers[name](value)(None, expected)
    probabilities, ids = candidates(logits, Sampling(temperature, **filters))
    if ids is not None:
        probabilities = torch.zeros_like(logits).scatter(1, ids, probabilities)
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    torch.testing.assert_close(probabilities, expected.softmax(-1), atol=1e-6, rtol=1e-4)


def test_temperature_0_and_one_too_small_to_divide_by_take_the_likeliest_id():
    logits = torch.randn(8, 50, generator=seeded())
    for temperature in (0, 1e-30):
        assert sample(logits, Sampling(temperature), seeded()).equal(logits.argmax(-1))


def test_the_repetition_penalty_is_that_of_transformers():
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(3, 50, generator=seeded())
    ids = torch.randint(0, 50, (3, 9), generator=seeded())
    expected = process.RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.clone())
    seen = seen_ids(ids.tolist(), 50, logits.device)
    torch.testing.assert_close(penalize_repetition(logits, seen, 1.7), expected)


def test_a_strong_repetition_penalty_prevents_repetition():
    ids = generated(generating_gpt(), [[5, 6]], 40, Sampling(temperature=0, repetition_penalty=1e6))[0]
    # The logits of seen ids are near 0 or far below: a repetition would need all other logits to be negative.
    assert len(set(ids[:20])) == 20 and not {5, 6} & set(ids[:20])


TINY = (5e-324, 1e-46, 1e-38)  # not a number of float32, or only just


@pytest.mark.parametrize("temperature", [0.0, -0.0, *TINY, 9.99e-7, 1e-6, 99.999])
@pytest.mark.parametrize("top_k", [None, 1, 10**30])
def test_every_accepted_setting_draws_an_id(temperature, top_k):
    logits = torch.cat([5 * torch.randn(3, 50, generator=seeded()), torch.zeros(1, 50)])
    for top_p in (None, *TINY, 1 - 1e-16, 1.0):
        for min_p in (None, 0.0, *TINY, 1.0):
            ids = sample(logits, Sampling(temperature, top_k, top_p, min_p), seeded())
            assert ((ids >= 0) & (ids < 50)).all(), (top_p, min_p)
            if temperature < 1e-5 or top_k == 1 or top_p in TINY or min_p == 1:
                assert (ids[:3] == logits[:3].argmax(-1)).all(), (top_p, min_p)


def test_padding_ids_are_never_drawn():
    gpt = generating_gpt()
    gpt.wte.weight.data[CONFIG.n_vocab :] = 100 * gpt.wte.weight[0]  # would be likeliest or least likely
    rows = generated(gpt, [[0]] * 50, 60, Sampling(temperature=5.0), generator=seeded())
    assert max(map(max, rows)) < CONFIG.n_vocab


def test_sampled_ids_depend_only_on_the_seed():
    gpt = generating_gpt()

    def draw(seed: int) -> list[list[int]]:
        return generated(gpt, [[3, 1, 4]] * 2, 20, Sampling(top_k=30), generator=seeded(seed))

    assert draw(1) == draw(1) != draw(2)
    assert draw(1)[0] != draw(1)[1]  # rows are drawn independently
