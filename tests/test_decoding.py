"""generation/decoding.py: the same ids as by a whole forward pass per id, for any lengths, cache and window."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from generation.decoding import append, decode_at, generate, new_cache, prefill
from generation.sampling import Sampling
from tests.tiny_gpt import CONFIG, GREEDY, brute_force, generated, generating_gpt, random_prompt


@pytest.mark.parametrize("length", range(1, CONFIG.block_size + 4))
def test_greedy_ids_equal_the_plain_forward_pass_also_after_the_window_is_full(length):
    gpt = generating_gpt()
    prompt = random_prompt(length, seed=length)
    assert generated(gpt, [prompt], 40) == [brute_force(gpt, prompt, 40)]


@pytest.mark.parametrize("block_size", [1, 2, 3, 5])
def test_the_window_slides_in_very_short_contexts(block_size):
    gpt = generating_gpt(block_size=block_size)
    for length in (1, block_size, block_size + 2):
        prompt = random_prompt(length)
        assert generated(gpt, [prompt], 12) == [brute_force(gpt, prompt, 12)]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=2, max_size=5))
def test_a_batch_of_different_lengths_equals_each_row_alone(lengths):
    gpt = generating_gpt()
    prompts = [random_prompt(length, seed=number) for number, length in enumerate(lengths)]
    assert generated(gpt, prompts, 30) == [brute_force(gpt, prompt, 30) for prompt in prompts]


def test_prompts_may_be_a_tensor():
    gpt = generating_gpt()
    prompts = [random_prompt(4, seed=1), random_prompt(4, seed=2)]
    assert generated(gpt, torch.tensor(prompts), 5) == generated(gpt, prompts, 5)


def test_observed_logits_are_those_of_the_plain_forward_pass():
    gpt = generating_gpt()
    seen: list[torch.Tensor] = []
    changed = Sampling(temperature=0, repetition_penalty=3.0)  # observed before any setting changes them
    ids = generated(gpt, [random_prompt(3)], 10, changed, observe=lambda logits: seen.append(logits.clone()))[0]
    plain = gpt(torch.tensor([random_prompt(3) + ids]))[0][0, 2:-1]
    torch.testing.assert_close(torch.cat(seen), plain, atol=1e-4, rtol=1e-4)


# --- cache ---


def test_a_reused_cache_changes_no_id_and_only_the_new_part_is_computed():
    gpt = generating_gpt()
    cache = new_cache(gpt)
    widths = []
    gpt.h[0].register_forward_pre_hook(lambda block, arguments: widths.append(arguments[0].shape[1]))
    prompt = random_prompt(4)
    for turn in range(3):  # 4, 7 and 10 ids, then 2 more each time
        widths.clear()
        ids = generated(gpt, [prompt], 2, cache=cache)[0]
        # The last id that was drawn is not in the cache yet: nothing had to be computed from it.
        assert widths == [4 if turn == 0 else 2, 1]
        assert ids == brute_force(gpt, prompt, 2)
        prompt = [*prompt, *ids, turn]
    changed = [prompt[0], *random_prompt(5, seed=9)]  # another history: only its beginning is shared
    assert generated(gpt, [changed], 3, cache=cache)[0] == brute_force(gpt, changed, 3)
    assert generated(gpt, [changed[:2]], 3, cache=cache)[0] == brute_force(gpt, changed[:2], 3)


def test_an_interrupted_step_leaves_the_cache_correct():
    gpt = generating_gpt()
    cache = new_cache(gpt)
    prompt = random_prompt(6)
    generated(gpt, [prompt], 2, cache=cache)
    interruption = gpt.h[1].register_forward_pre_hook(lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generated(gpt, [[*prompt[:2], *random_prompt(6, seed=3)]], 1, cache=cache)
    interruption.remove()
    assert generated(gpt, [prompt], 5, cache=cache)[0] == brute_force(gpt, prompt, 5)


def test_the_cache_is_allocated_once_in_the_precision_of_the_weights():
    gpt = generating_gpt(dtype=torch.bfloat16)
    cache = new_cache(gpt, 2)
    address = cache.keys_values.data_ptr()
    generated(gpt, [random_prompt(3), random_prompt(5)], 20, cache=cache)
    assert cache.keys_values.data_ptr() == address
    assert cache.keys_values.dtype == torch.bfloat16


@torch.inference_mode()
def test_a_step_for_rows_of_different_lengths_has_shapes_that_depend_only_on_its_end():
    """The step that fast/ captures as a CUDA graph: positions and mask come from tensors."""
    gpt = generating_gpt()
    cache = new_cache(gpt, 2)
    prompts = [random_prompt(3), random_prompt(5)]
    logits, rows = prefill(gpt, prompts, cache), [[], []]
    for step in range(8):
        ids = logits.argmax(-1)
        for row, token in zip(rows, ids.tolist(), strict=True):
            row.append(token)
        logits = decode_at(gpt, ids, torch.tensor([3 + step, 5 + step]), CONFIG.block_size, cache)
    assert rows == [brute_force(gpt, prompt, 8) for prompt in prompts]


@torch.inference_mode()
def test_another_decode_step_can_be_passed():
    gpt, calls = generating_gpt(), []

    def decode(model, ids, lengths, cache):
        calls.append(lengths)
        return decode_at(model, ids, torch.tensor(lengths), CONFIG.block_size, cache)

    prompt = random_prompt(3)
    assert generated(gpt, [prompt], 6, decode=decode) == [brute_force(gpt, prompt, 6)]
    assert calls == [[3], [4], [5], [6], [7]]
    cache = new_cache(gpt)
    prefill(gpt, [prompt], cache)
    append(gpt, torch.tensor([1]), cache)
    assert cache.tokens == [[*prompt, 1]]


# --- where generation ends, and errors ---


def test_a_row_that_stops_leaves_the_others_as_they_are():
    gpt = generating_gpt()
    prompts = [random_prompt(4, seed=1), random_prompt(6, seed=2)]
    whole = [brute_force(gpt, prompt, 25) for prompt in prompts]
    stop = next(token for token in whole[0] if token not in whole[1])
    rows = generated(gpt, prompts, 25, stop_ids=[stop])
    assert rows == [whole[0][: whole[0].index(stop) + 1], whole[1]]
    steps = list(generate(gpt, prompts[:1], None, GREEDY, stop_ids=[stop]))
    assert len(steps) == whole[0].index(stop) + 1  # endless otherwise


def test_generation_does_not_end_without_max_tokens():
    stream = generate(generating_gpt(), [random_prompt(2)], None, Sampling(temperature=1.5))
    assert len(list(itertools.islice(stream, 100))) == 100


def test_dropout_is_off_while_generating_and_on_again_afterwards():
    gpt = generating_gpt(dropout=0.5).train()
    first = generated(gpt, [random_prompt(3)], 10)
    assert gpt.training and generated(gpt, [random_prompt(3)], 10) == first


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []], [[CONFIG.n_vocab]], [[-1]]])
def test_empty_prompts_and_unknown_ids_are_refused(prompts):
    with pytest.raises(ValueError, match="prompt"):
        next(generate(generating_gpt(), prompts, 1))


def test_logits_that_are_not_finite_are_refused():
    gpt = generating_gpt()
    gpt.ln_f.weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        next(generate(gpt, [[1]], 1))
