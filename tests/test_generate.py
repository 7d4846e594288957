"""The generating half of model.py, and packed_linear.py: exactness against brute force, sampling against oracles."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from generation.cuda_decode import CapturedDecode
from generation.packed_linear import Int8Linear, PackedLinear, RowLinear, is_exact, pack_linears, quantize_rows
from generation.row_kernels import RowProduct, attend
from hypothesis import given, settings
from hypothesis import strategies as st

from common.cli import UserError
from generation import cuda_decode, packed_linear, row_kernels
from model import (
    ENDED,
    GPT,
    GPTConfig,
    candidates,
    penalise_repetition,
    sample,
)

CONFIG = GPTConfig(block_size=16, vocab_size=64, n_vocab=61, n_layer=2, n_head=2, n_embd=32)


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> GPT:
    """A random model whose logits are far enough apart that the likeliest id is no matter of rounding."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**CONFIG.__dict__, **changes})).to(dtype)
    for parameter in model.parameters():
        parameter.data.mul_(4).add_(0.05 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def random_prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, CONFIG.n_vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def brute_force(model: GPT, prompt: list[int], max_tokens: int) -> list[int]:
    """Greedy ids by the plain forward over the documented context, a whole forward for each id."""
    block_size = model.config.block_size
    context, ids = prompt[-block_size:], []
    for _ in range(max_tokens):
        logits = model(torch.tensor([context]))[0][0, -1, : model.config.n_vocab]
        ids.append(int(logits.argmax()))
        if len(context) == block_size:
            context = context[block_size - block_size // 2 :]
        context = [*context, ids[-1]]
    return ids


def generated(model: GPT, prompts, max_tokens: int, **settings) -> list[list[int]]:
    """Each row's ids."""
    settings = {"temperature": 0, **settings}
    steps = [ids.tolist() for ids in model.generate(prompts, max_tokens, **settings)]
    return [[token for token in row if token != ENDED] for row in zip(*steps, strict=True)]


@pytest.mark.parametrize("length", range(1, CONFIG.block_size + 4))
def test_greedy_ids_equal_the_plain_forward_also_past_the_context(length):
    model = tiny_model()
    prompt = random_prompt(length, seed=length)
    assert generated(model, [prompt], 40) == [brute_force(model, prompt, 40)]


@pytest.mark.parametrize("block_size", [1, 2, 3, 5])
def test_the_window_slides_in_very_short_contexts(block_size):
    model = tiny_model(block_size=block_size)
    for length in (1, block_size, block_size + 2):
        prompt = random_prompt(length)
        assert generated(model, [prompt], 12) == [brute_force(model, prompt, 12)]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=2, max_size=5))
def test_a_batch_of_different_lengths_equals_each_row_alone(lengths):
    model = tiny_model()
    prompts = [random_prompt(length, seed=number) for number, length in enumerate(lengths)]
    assert generated(model, prompts, 30) == [brute_force(model, prompt, 30) for prompt in prompts]


def test_the_logits_with_the_cache_are_those_of_the_plain_forward():
    model = tiny_model()
    seen: list[torch.Tensor] = []
    ids = generated(model, [random_prompt(3)], 10, observe=lambda logits: seen.append(logits.clone()))[0]
    plain = model(torch.tensor([random_prompt(3) + ids]))[0][0, 2:-1, : CONFIG.n_vocab]
    torch.testing.assert_close(torch.cat(seen), plain, atol=1e-4, rtol=1e-4)


def test_a_kept_cache_changes_no_id_and_computes_the_new_part_alone(monkeypatch):
    model = tiny_model()
    cache = model.new_cache()
    widths = []
    hidden = GPT.hidden

    def counted(self, idx, *rest, **more):
        widths.append(idx.shape[1])
        return hidden(self, idx, *rest, **more)

    monkeypatch.setattr(GPT, "hidden", counted)
    prompt = random_prompt(4)
    for turn in range(3):  # 4, 7 and 10 ids, then 2 more each time
        widths.clear()
        ids = generated(model, [prompt], 2, cache=cache)[0]
        # The last id that was drawn is not in the cache yet: nothing had to be computed from it.
        assert widths == [4 if turn == 0 else 2, 1]
        assert ids == brute_force(model, prompt, 2)
        prompt = [*prompt, *ids, turn]
    changed = [prompt[0], *random_prompt(5, seed=9)]  # another history: only its beginning is shared
    assert generated(model, [changed], 3, cache=cache)[0] == brute_force(model, changed, 3)
    assert generated(model, [changed[:2]], 3, cache=cache)[0] == brute_force(model, changed[:2], 3)


def test_an_interrupted_step_leaves_a_cache_that_is_right(monkeypatch):
    model = tiny_model()
    cache = model.new_cache()
    prompt = random_prompt(6)
    generated(model, [prompt], 2, cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr(type(model.h[1]), "forward", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generated(model, [[*prompt[:2], *random_prompt(6, seed=3)]], 1, cache=cache)
    assert generated(model, [prompt], 5, cache=cache)[0] == brute_force(model, prompt, 5)


def test_the_cache_is_allocated_once_in_the_precision_of_the_weights():
    model = tiny_model(dtype=torch.bfloat16)
    cache = model.new_cache(2)
    place = cache.keys_values.data_ptr()
    generated(model, [random_prompt(3), random_prompt(5)], 20, cache=cache)
    assert cache.keys_values.data_ptr() == place
    assert cache.keys_values.dtype == torch.bfloat16


def test_the_step_that_cuda_captures_equals_the_others():
    # The step itself, without the capture: static shapes, places and mask from tensors.
    model = tiny_model()
    cache = model.new_cache(2)
    prompts = [random_prompt(3), random_prompt(5)]
    with torch.inference_mode():
        logits = model.prefill(prompts, cache)
        rows = [[], []]
        for step in range(8):
            ids = logits.argmax(-1)
            for row, token in zip(rows, ids.tolist(), strict=True):
                row.append(token)
            logits = model.decode_at(ids, torch.tensor([3 + step, 5 + step]), CONFIG.block_size, cache)
    assert rows == [brute_force(model, prompt, 8) for prompt in prompts]


def test_captured_steps_are_reused_for_a_stretch_of_context(monkeypatch):
    monkeypatch.setattr(cuda_decode, "GRAPH_CONTEXT", 6)
    model = tiny_model()
    cache = model.new_cache(1)
    captures = []

    class Replay:
        def __init__(self, step):
            self.step, self.logits = step, step()

        def replay(self):
            self.logits.copy_(self.step())

    def capture(self, end):
        captures.append(end)
        replay = Replay(lambda: model.decode_at(self.ids, self.positions, end, cache))
        return replay, replay.logits

    monkeypatch.setattr(CapturedDecode, "_capture", capture)
    prompt = random_prompt(3)
    captured = CapturedDecode(model, cache)
    with torch.inference_mode():
        logits, ids = model.prefill([prompt], cache), []
        for place in range(3, CONFIG.block_size):
            ids.append(int(logits.argmax()))
            logits = captured(torch.tensor(ids[-1:]), [place])
    assert ids == brute_force(model, prompt, len(ids))
    assert captures == [6, 12, 16]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_give_the_same_ids():
    model = tiny_model().cuda()
    prompts = [random_prompt(3), random_prompt(7)]
    assert generated(model, prompts, 40, cuda_graph=True) == generated(model, prompts, 40)


def test_a_row_that_stops_leaves_the_others_as_they_are():
    model = tiny_model()
    prompts = [random_prompt(4, seed=1), random_prompt(6, seed=2)]
    whole = [brute_force(model, prompt, 25) for prompt in prompts]
    stop = next(token for token in whole[0] if token not in whole[1])
    rows = generated(model, prompts, 25, stop_ids=[stop])
    assert rows == [whole[0][: whole[0].index(stop) + 1], whole[1]]
    steps = list(model.generate(prompts[:1], None, temperature=0, stop_ids=[stop]))
    assert len(steps) == whole[0].index(stop) + 1  # endless otherwise


def test_generation_has_no_end_without_max_tokens():
    stream = tiny_model().generate([random_prompt(2)], None, temperature=1.5)
    assert len(list(itertools.islice(stream, 100))) == 100


def test_dropout_is_off_while_generating_and_training_goes_on_after_it():
    model = tiny_model(dropout=0.5).train()
    first = generated(model, [random_prompt(3)], 10)
    assert model.training and generated(model, [random_prompt(3)], 10) == first


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []], [[CONFIG.n_vocab]], [[-1]]])
def test_prompts_that_are_none_are_refused(prompts):
    with pytest.raises(ValueError, match="prompt"):
        next(tiny_model().generate(prompts, 1))


def test_logits_that_are_no_numbers_are_refused():
    model = tiny_model()
    model.ln_f.weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        next(model.generate([[1]], 1))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_padding_ids_are_never_drawn():
    model = tiny_model()
    model.wte.weight.data[CONFIG.n_vocab :] = 100 * model.wte.weight[0]  # would be likeliest or least likely
    steps = model.generate([[0]] * 50, 60, temperature=5.0, generator=seeded())
    assert max(int(ids.max()) for ids in steps) < CONFIG.n_vocab


def test_sampled_ids_depend_on_the_seed_alone():
    model = tiny_model()

    def draw(seed):
        return generated(model, [random_prompt(3)] * 2, 20, temperature=1.0, top_k=30, generator=seeded(seed))

    assert draw(1) == draw(1) != draw(2)
    assert draw(1)[0] != draw(1)[1]  # rows are drawn independently


def test_draws_follow_the_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]])
    for top_k in (None, 4):
        ids = sample(logits.expand(40_000, -1), temperature=0.7, top_k=top_k, generator=seeded())
        measured = ids.bincount(minlength=4) / len(ids)
        torch.testing.assert_close(measured, (logits[0] / 0.7).softmax(0), atol=0.01, rtol=0)
        assert measured[3] == 0


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
    everything = {"top_k": None, "top_p": None, "min_p": None, **filters}
    probabilities, ids = candidates(logits, temperature, **everything)
    if ids is not None:
        probabilities = torch.zeros_like(logits).scatter(1, ids, probabilities)
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    torch.testing.assert_close(probabilities, expected.softmax(-1), atol=1e-6, rtol=1e-4)


def test_a_tiny_temperature_is_nearly_greedy_and_no_division_by_zero():
    logits = torch.randn(8, 50, generator=seeded())
    assert sample(logits, temperature=1e-30, generator=seeded()).equal(logits.argmax(-1))


def test_the_repetition_penalty_is_that_of_transformers():
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(3, 50, generator=seeded())
    ids = torch.randint(0, 50, (3, 9), generator=seeded())
    expected = process.RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.clone())
    seen = torch.zeros(3, 50, dtype=torch.bool).scatter(1, ids, True)
    torch.testing.assert_close(penalise_repetition(logits, seen, 1.7), expected)


def test_a_strong_repetition_penalty_repeats_nothing():
    ids = generated(tiny_model(), [[5, 6]], 40, repetition_penalty=1e6)[0]
    # All logits of seen ids are about 0 or far below: a repeat would need every other logit to be negative.
    assert len(set(ids[:20])) == 20 and not {5, 6} & set(ids[:20])


# ---- packed_linear.py ----

needs_int8 = pytest.mark.skipif(not is_exact(Int8Linear, torch.float32, 0.02), reason="no 8-bit kernel here")
needs_packed = pytest.mark.skipif(not is_exact(PackedLinear, torch.bfloat16, 0.02), reason="no packed kernel here")
needs_rows = pytest.mark.skipif(row_kernels.build() is None, reason="no C compiler, or a processor without AVX2")
has_tiles = row_kernels.build() is not None and RowProduct(torch.ones(16, 32).bfloat16()).most_rows == 16
needs_tiles = pytest.mark.skipif(not has_tiles, reason="no AMX")


def test_quantised_rows_are_within_half_a_step():
    weight = torch.randn(20, 33, generator=seeded()) * torch.logspace(-3, 3, 20)[:, None]
    weight[4] = 0
    int8, scale = quantize_rows(weight)
    assert int8.dtype == torch.int8 and int8.abs().max() == 127 and scale.shape == (20,)
    assert ((int8 * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all()


@needs_rows
@pytest.mark.parametrize("processor", ["native", "haswell"])  # AVX-512 where there is one, and AVX2
@pytest.mark.parametrize("shape", [(3, 64), (50, 70), (130, 1), (7, 200), (37, 160)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_product_is_the_product_summed_in_float32(processor, shape, rows, dtype):
    check_row_product(processor, shape, rows, dtype)


@needs_tiles
@pytest.mark.parametrize("shape", [(16, 32), (37, 160), (64, 256)])
@pytest.mark.parametrize("rows", [5, 11, 16])
def test_so_is_that_of_up_to_16_rows(shape, rows):
    check_row_product("native", shape, rows, torch.bfloat16)


@needs_rows
def test_more_than_4_rows_are_taken_where_whole_tiles_of_bfloat16_can_be_made():
    bias = torch.zeros(16)
    shapes = [((15, 32), bias[:15].bfloat16()), ((16, 33), bias.bfloat16()), ((16, 32), bias)]
    assert [RowProduct(torch.ones(shape).bfloat16(), bias=one).most_rows for shape, one in shapes] == [4, 4, 4]
    assert RowProduct(torch.ones(16, 32).bfloat16(), processor="haswell").most_rows == 4


def check_row_product(processor, shape, rows, dtype):
    generator = seeded()
    x, residual = torch.randn(rows, shape[1], generator=generator), torch.randn(rows, shape[0], generator=generator)
    scale, bias = torch.rand(shape[0], generator=generator), torch.randn(shape[0], generator=generator)
    x, residual, scale, bias = (one.to(dtype) for one in (x, residual, scale, bias))
    int8 = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
    product = RowProduct(int8, scale, bias, processor)
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-4}
    expected = (x.double() @ int8.double().T) * scale.double() + bias.double()
    before = x.clone()
    torch.testing.assert_close(product(x).double(), expected, **tolerance)
    found = product(x, residual)
    torch.testing.assert_close(found.double(), expected + residual.double(), **tolerance)
    curved = torch.nn.functional.gelu(expected, approximate="tanh")
    torch.testing.assert_close(product(x, residual, gelu=True).double(), curved + residual.double(), **tolerance)
    assert found.dtype == dtype and x.equal(before)
    if dtype == torch.bfloat16:
        weight = torch.randn(shape, generator=generator).to(dtype)
        expected = x.double() @ weight.double().T
        torch.testing.assert_close(RowProduct(weight, processor=processor)(x).double(), expected, **tolerance)


@needs_rows
@pytest.mark.parametrize("processor", ["native", "haswell"])
@pytest.mark.parametrize(("heads", "size"), [(2, 16), (3, 32), (2, 48), (2, 64)])
@pytest.mark.parametrize(("rows", "place"), [(1, 0), (1, 39), (3, 18)])
def test_attention_of_a_new_token_is_that_of_float64(processor, heads, size, rows, place):
    generator = seeded()
    qkv = (2 * torch.randn(rows, 3 * heads * size, generator=generator)).bfloat16()
    keys_values = torch.randn(2, rows, heads, 40, size, generator=generator).bfloat16()
    expected_cache = keys_values.clone()
    keys_values[..., place:, :] = math.nan  # what stands there before has no part
    query, *new = qkv.view(rows, 3, heads, size).unbind(1)
    expected_cache[:, :, :, place] = torch.stack(new)
    found = attend(qkv, keys_values, place, processor)
    assert keys_values[..., : place + 1, :].equal(expected_cache[..., : place + 1, :])
    keys, values = expected_cache[..., : place + 1, :].double()
    expected = torch.nn.functional.scaled_dot_product_attention(query[:, :, None].double(), keys, values)
    torch.testing.assert_close(found.double(), expected.flatten(1), rtol=2**-8, atol=1e-5)


@needs_rows
def test_a_row_product_rounds_to_even_and_keeps_what_is_no_number():
    weight = torch.tensor([[1.0], [1 + 2**-7], [math.nan], [math.inf], [3e38]]).bfloat16()
    values = torch.tensor([1 + 2**-8, 1 + 2**-7 + 2**-8, math.nan, math.inf, 3e38])
    bias = (values - weight.float()[:, 0]).bfloat16()  # half a step: to the even neighbour
    found = RowProduct(weight, None, bias)(torch.ones(1, 1).bfloat16())[0]
    assert found[:2].equal((weight.float()[:2, 0] + bias.float()[:2]).bfloat16())
    assert found[2:4].isnan().all() and found[4] == weight[4, 0]
    assert RowProduct(-weight)(torch.ones(1, 1).bfloat16())[0, 3] == -math.inf
    assert RowProduct(weight)(torch.full((1, 1), 2.0).bfloat16())[0, 4] == math.inf


@needs_rows
def test_the_kernels_are_built_once():
    assert row_kernels.build() is row_kernels.build("native") is row_kernels.build(processor="native")


def test_without_a_compiler_the_kernels_are_torchs(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(row_kernels, "_build", row_kernels._build.__wrapped__)
    assert row_kernels.build() is None
    with pytest.raises(NotImplementedError, match="no C compiler"):
        RowLinear(torch.ones(2, 2).bfloat16(), None)
    if is_exact(PackedLinear, torch.bfloat16, 0.02):
        assert pack_linears(tiny_model(dtype=torch.bfloat16)) == "weights packed for the processor"
    if is_exact(Int8Linear, torch.float32, 0.02):
        check_8_bit_layer(rows=1)


@needs_int8
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 40])
def test_8_bit_weights_are_the_only_thing_rounded(rows):
    check_8_bit_layer(rows)


def check_8_bit_layer(rows):
    layer = torch.nn.Linear(70, 50).requires_grad_(False)
    int8, scale = quantize_rows(layer.weight)
    x, residual = torch.randn(rows, 70, generator=seeded()), torch.randn(rows, 50, generator=seeded())
    x[-1] = 0
    before = x.clone(), residual.clone()
    ours = Int8Linear(layer.weight, layer.bias)
    expected = torch.nn.functional.linear(x.double(), int8.double() * scale.double()[:, None], layer.bias.double())
    torch.testing.assert_close(ours(x).double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.added_to(residual, x).double(), expected + residual, atol=1e-5, rtol=1e-5)
    assert x.equal(before[0]) and residual.equal(before[1])


@pytest.mark.parametrize(
    "streams, description",
    [
        pytest.param(1, "a kernel for few rows", marks=needs_rows),
        pytest.param(17, "weights packed for the processor", marks=needs_packed),
    ],
)
def test_packed_bfloat16_generates_what_the_plain_layers_would(streams, description):
    prompts = [random_prompt(3), random_prompt(9)]
    model = tiny_model(dtype=torch.bfloat16)
    with torch.inference_mode():
        plain = model.prefill(prompts, cache := model.new_cache(2))
        plain_next = model.decode_one(torch.tensor([1, 2]), cache)
        assert pack_linears(model, streams=streams) == description
        packed = model.prefill(prompts, cache := model.new_cache(2))
        packed_next = model.decode_one(torch.tensor([1, 2]), cache)
    for found, expected in ((packed, plain), (packed_next, plain_next)):
        torch.testing.assert_close(found, expected, atol=0.05 * float(expected.std()), rtol=0.05)
    assert [len(row) for row in generated(model, prompts, 30)] == [30, 30]


@needs_int8
def test_8_bit_logits_are_near_the_plain_ones():
    prompt = [random_prompt(12)]
    model = tiny_model()
    with torch.inference_mode():
        plain = model.prefill(prompt, model.new_cache())
        assert pack_linears(model, "int8") == "8-bit weights"
        rounded = model.prefill(prompt, model.new_cache())
    assert 0 < (rounded - plain).square().mean().sqrt() < 0.05 * plain.std()


def test_plain_layers_stay_where_packing_does_not_pay_and_8_bits_are_refused_without_a_kernel(monkeypatch):
    model = tiny_model()
    assert pack_linears(model) == "plain layers" and model.packed_head is None
    monkeypatch.setattr(packed_linear, "is_exact", lambda *arguments, **settings: False)
    assert pack_linears(tiny_model(dtype=torch.bfloat16)) == "plain layers"
    with pytest.raises(UserError, match="--quantize int8 has no kernel"):
        pack_linears(model, "int8")
