"""The parts of fast/ that generation uses: each computes what the plain layers and the plain step compute."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from common.cli import UserError
from fast import row_kernels, speed_up_generation
from fast.cuda_graphs import MAX_DRAWS, CapturedDecode
from fast.generation import WholeHeadGPT
from fast.packed_linear import Int8Linear, PackedLinear, RowLinear, is_exact, quantize_rows
from fast.row_kernels import RowProduct, attend, gelu
from generation.decoding import append, new_cache, prefill
from generation.sampling import Sampling, draw
from tests.tiny_gpt import CONFIG, brute_force, generated, generating_gpt, random_prompt, seeded

needs_int8 = pytest.mark.skipif(not is_exact(Int8Linear, torch.float32, 0.02), reason="no 8-bit kernel here")
needs_packed = pytest.mark.skipif(not is_exact(PackedLinear, torch.bfloat16, 0.02), reason="no packed kernel here")
needs_rows = pytest.mark.skipif(row_kernels.build() is None, reason="no C compiler, or a processor without AVX2")
FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
has_tiles = row_kernels.build() is not None and "amx_bf16" in FLAGS
needs_tiles = pytest.mark.skipif(not has_tiles, reason="no AMX")


# --- 8 bits ---


def test_quantized_rows_are_within_half_a_step():
    weight = torch.randn(20, 33, generator=seeded()) * torch.logspace(-3, 3, 20)[:, None]
    weight[4] = 0
    int8, scale = quantize_rows(weight)
    assert int8.dtype == torch.int8 and int8.abs().max() == 127 and scale.shape == (20,)
    assert ((int8 * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all()


@needs_int8
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 40])
def test_an_8_bit_layer_rounds_nothing_but_the_weights(rows):
    check_8_bit_layer(rows)


def check_8_bit_layer(rows):
    layer = torch.nn.Linear(70, 50).requires_grad_(False)
    int8, scale = quantize_rows(layer.weight)
    x, residual = torch.randn(rows, 70, generator=seeded()), torch.randn(rows, 50, generator=seeded())
    x[-1] = 0
    before = x.clone(), residual.clone()
    ours = Int8Linear(layer.weight, layer.bias)
    expected = F.linear(x.double(), int8.double() * scale.double()[:, None], layer.bias.double())
    torch.testing.assert_close(ours(x).double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.added_to(residual, x).double(), expected + residual, atol=1e-5, rtol=1e-5)
    curved = F.gelu(expected, approximate="tanh")
    torch.testing.assert_close(ours.with_gelu(x).double(), curved, atol=1e-5, rtol=1e-5)
    assert x.equal(before[0]) and residual.equal(before[1])


# --- the kernels in C ---


@needs_rows
@pytest.mark.parametrize("processor", ["native", "haswell"])  # AVX-512 where there is one, and AVX2
@pytest.mark.parametrize("shape", [(3, 64), (50, 70), (130, 1), (7, 200), (37, 160)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_product_is_the_product_summed_in_float32(processor, shape, rows, dtype):
    check_row_product(processor, shape, rows, dtype)


@needs_tiles
@pytest.mark.parametrize("shape", [(16, 32), (37, 160), (64, 256)])
@pytest.mark.parametrize("rows", [5, 11, 16])
def test_a_row_product_with_tiles_multiplies_up_to_16_rows(shape, rows):
    check_row_product("native", shape, rows, torch.bfloat16)


@needs_rows
def test_a_row_product_takes_more_than_4_rows_unless_other_products_are_faster():
    bias = torch.zeros(16)
    shapes = [((15, 32), bias[:15].bfloat16()), ((16, 33), bias.bfloat16())]
    max_rows = [RowProduct(torch.ones(shape).bfloat16(), bias=one).max_rows for shape, one in shapes]
    assert max_rows == ([4, 4] if "avx512f" in FLAGS else [16, 16]), "no tiles: oneDNN with AVX512"
    assert RowProduct(torch.ones(16, 32), bias=bias).max_rows == 16, "float32 is fastest here everywhere"
    assert RowProduct(torch.ones(16, 32).bfloat16(), processor="haswell").max_rows == 16
    int8, scale = torch.ones(16, 32, dtype=torch.int8), torch.ones(16)
    assert RowProduct(int8, scale).max_rows == 16, "otherwise every weight is widened"


def check_row_product(processor, shape, rows, dtype):
    generator = seeded()
    x, residual = torch.randn(rows, shape[1], generator=generator), torch.randn(rows, shape[0], generator=generator)
    scale, bias = torch.rand(shape[0], generator=generator), torch.randn(shape[0], generator=generator)
    x, residual, scale, bias = (one.to(dtype) for one in (x, residual, scale, bias))
    int8 = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
    product = RowProduct(int8, scale, bias, processor)
    assert rows <= product.max_rows
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-4}
    expected = (x.double() @ int8.double().T) * scale.double() + bias.double()
    before = x.clone()
    torch.testing.assert_close(product(x).double(), expected, **tolerance)
    found = product(x, residual)
    torch.testing.assert_close(found.double(), expected + residual.double(), **tolerance)
    curved = F.gelu(expected, approximate="tanh")
    torch.testing.assert_close(product(x, residual, gelu=True).double(), curved + residual.double(), **tolerance)
    assert found.dtype == dtype and x.equal(before)
    weight = torch.randn(shape, generator=generator).to(dtype)
    expected = x.double() @ weight.double().T
    if rows <= (unscaled := RowProduct(weight, processor=processor)).max_rows:
        torch.testing.assert_close(unscaled(x).double(), expected, **tolerance)


@needs_rows
def test_a_row_product_converts_inputs_of_another_precision():
    weight, x = torch.randn(16, 32, generator=seeded()), torch.randn(2, 32, generator=seeded()).bfloat16()
    found = RowProduct(weight)(x, torch.ones(2, 16).bfloat16())
    torch.testing.assert_close(found, x.float() @ weight.T + 1)


@needs_rows
def test_a_row_product_has_no_kernel_for_half_precision():
    with pytest.raises(NotImplementedError, match=r"no kernel for torch\.float16"):
        RowProduct(torch.ones(16, 32).half())
    assert not is_exact(RowLinear, torch.float16, 0.02)


@needs_rows
@pytest.mark.parametrize("processor", ["native", "haswell"])
@pytest.mark.parametrize(("heads", "size"), [(2, 16), (3, 32), (2, 48), (2, 64)])
@pytest.mark.parametrize(("rows", "position"), [(1, 0), (1, 39), (3, 18)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_of_a_new_token_is_that_of_float64(processor, heads, size, rows, position, dtype):
    generator = seeded()
    qkv = (2 * torch.randn(rows, 3 * heads * size, generator=generator)).to(dtype)
    keys_values = torch.randn(2, rows, heads, 40, size, generator=generator).to(dtype)
    expected_cache = keys_values.clone()
    keys_values[..., position:, :] = math.nan  # what the cache holds from there on must not count
    query, *new = qkv.view(rows, 3, heads, size).unbind(1)
    expected_cache[:, :, :, position] = torch.stack(new)
    found = attend(qkv, keys_values, slice(position, position + 1), processor=processor)
    assert keys_values[..., : position + 1, :].equal(expected_cache[..., : position + 1, :])
    keys, values = expected_cache[..., : position + 1, :].double()
    expected = F.scaled_dot_product_attention(query[:, :, None].double(), keys, values)
    rtol = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.double(), expected.flatten(1), rtol=rtol, atol=1e-5)


@needs_rows
def test_a_row_product_rounds_to_even_and_keeps_nan_and_infinity():
    weight = torch.tensor([[1.0], [1 + 2**-7], [math.nan], [math.inf], [3e38]]).bfloat16()
    values = torch.tensor([1 + 2**-8, 1 + 2**-7 + 2**-8, math.nan, math.inf, 3e38])
    bias = (values - weight.float()[:, 0]).bfloat16()  # half a step: to the even neighbour
    found = RowProduct(weight, None, bias)(torch.ones(1, 1).bfloat16())[0]
    assert found[:2].equal((weight.float()[:2, 0] + bias.float()[:2]).bfloat16())
    assert found[2:4].isnan().all() and found[4] == weight[4, 0]
    assert RowProduct(-weight)(torch.ones(1, 1).bfloat16())[0, 3] == -math.inf
    assert RowProduct(weight)(torch.full((1, 1), 2.0).bfloat16())[0, 4] == math.inf


def test_gelu_is_torchs():
    numbers = torch.linspace(-12, 12, 1003)  # not a multiple of the vectors' length
    special = torch.tensor([0.0, -0.0, math.inf, math.nan])
    for x in (numbers, numbers[::3], numbers.bfloat16(), special):
        expected = F.gelu(x.double(), approximate="tanh")
        tolerance = {"atol": 1e-6, "rtol": 1e-6} if x.dtype == torch.float32 else {"atol": 1e-2, "rtol": 1e-2}
        torch.testing.assert_close(gelu(x.clone()).double(), expected, equal_nan=True, **tolerance)
    assert gelu(torch.tensor([-1.0]).expand(9)).shape == (9,)


@needs_rows
def test_the_kernels_are_built_once():
    assert row_kernels.build() is row_kernels.build("native") is row_kernels.build(processor="native")


def test_without_a_compiler_the_kernels_of_torch_are_used(no_compiler):
    assert row_kernels.build() is None
    with pytest.raises(NotImplementedError, match="no C compiler"):
        RowLinear(torch.ones(2, 2).bfloat16(), None)
    if is_exact(PackedLinear, torch.bfloat16, 0.02):
        speedups = speed_up_generation(generating_gpt(dtype=torch.bfloat16))
        assert speedups.description == "weights packed for the processor"
    if is_exact(Int8Linear, torch.float32, 0.02):
        check_8_bit_layer(rows=1)


# --- whole models ---


@pytest.mark.parametrize(
    "streams, description",
    [
        pytest.param(1, "a kernel for few rows", marks=needs_rows),
        pytest.param(17, "weights packed for the processor", marks=needs_packed),
    ],
)
@torch.inference_mode()
def test_packed_bfloat16_generates_what_the_plain_layers_generate(streams, description):
    """Rows of different lengths, rows of one length (which the attention kernel takes), and prefills."""
    gpt = generating_gpt(dtype=torch.bfloat16)
    batches = [[random_prompt(3), random_prompt(9)], [random_prompt(5), random_prompt(5, seed=1)]]

    def logits() -> list[torch.Tensor]:
        found = []
        for prompts in batches:
            cache = new_cache(gpt, 2)
            found += [prefill(gpt, prompts, cache), append(gpt, torch.tensor([1, 2]), cache)]
        return found

    plain = logits()
    assert speed_up_generation(gpt, streams=streams).description == description
    for found, expected in zip(logits(), plain, strict=True):
        torch.testing.assert_close(found, expected, atol=0.05 * float(expected.std()), rtol=0.05)
    assert [len(row) for row in generated(gpt, batches[0], 30)] == [30, 30]


@needs_int8
@torch.inference_mode()
def test_8_bit_logits_are_close_to_the_plain_ones():
    prompt = [random_prompt(12)]
    gpt = generating_gpt()
    plain = prefill(gpt, prompt, new_cache(gpt))
    assert speed_up_generation(gpt, "int8").description == "8-bit weights"
    rounded = prefill(gpt, prompt, new_cache(gpt))
    assert 0 < (rounded - plain).square().mean().sqrt() < 0.05 * plain.std()


@needs_rows
@torch.inference_mode()
def test_float32_logits_of_the_kernels_are_the_plain_ones_but_for_rounding():
    prompts = [random_prompt(12), random_prompt(9, seed=2)]
    found = []
    for gpt in (generating_gpt(), generating_gpt()):
        if found:
            assert speed_up_generation(gpt, streams=2).description == "a kernel for few rows"
        cache = new_cache(gpt, 2)
        found.append(torch.stack([prefill(gpt, prompts, cache), append(gpt, torch.tensor([3, 5]), cache)]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert not found[1].equal(found[0])


def test_the_plain_layers_stay_where_packing_gains_nothing_or_has_no_kernel():
    gpt = generating_gpt(dtype=torch.float16)
    assert speed_up_generation(gpt).description == "plain layers" and "Packed" not in type(gpt).__name__

    def has_kernel(layer, dtype, tolerance):
        return False

    gpt = generating_gpt(dtype=torch.bfloat16)
    assert speed_up_generation(gpt, has_kernel=has_kernel).description == "plain layers"
    with pytest.raises(UserError, match="--quantize int8 has no kernel"):
        speed_up_generation(gpt, "int8", has_kernel=has_kernel)


# --- CUDA graphs ---


class StandInGraph:
    """Runs the step again where a CUDA graph would launch its kernels again."""

    def __init__(self, step, result):
        self.step, self.result = step, result

    def replay(self):
        self.result.copy_(self.step())


@torch.inference_mode()
def test_captured_steps_are_reused_for_a_stretch_of_context_and_per_cache():
    captures = []

    def capture(step, device):
        captures.append(device.type)
        result = step()
        return StandInGraph(step, result), result

    gpt, prompt = generating_gpt(), random_prompt(3)
    captured = CapturedDecode(context_step=6, capture=capture)
    caches = [new_cache(gpt), new_cache(gpt)]
    for cache in caches:
        captures.clear()
        assert generated(gpt, [prompt], 13, cache=cache, decode=captured) == [brute_force(gpt, prompt, 13)]
        assert captures == ["cpu"] * 3, "for contexts of up to 6, 12 and 16 ids"
    captures.clear()
    generated(gpt, [random_prompt(3, seed=1)], 30, cache=caches[0], decode=captured)
    assert captures == []


@torch.inference_mode()
def test_a_captured_step_serves_rows_of_different_lengths():
    def capture(step, device):
        result = step()
        return StandInGraph(step, result), result

    gpt, prompts = generating_gpt(), [random_prompt(3), random_prompt(7)]
    found = generated(gpt, prompts, 40, decode=CapturedDecode(capture=capture))
    assert found == [brute_force(gpt, prompt, 40) for prompt in prompts]
    assert CONFIG.block_size < 40


@torch.inference_mode()
def test_a_captured_steps_positions_are_right_after_a_cut_and_after_a_new_prompt():
    positions = []

    def capture(step, device):
        result = step()
        return StandInGraph(step, result), result

    gpt, captured = generating_gpt(), CapturedDecode(capture=capture)
    cache = new_cache(gpt)
    for length, steps in ((3, 20), (4, 2), (4, 2)):
        logits = prefill(gpt, [random_prompt(length, seed=length)], cache)
        for _ in range(steps):
            logits = append(gpt, logits.argmax(-1), cache, captured)
            positions.append(captured._graphs[cache].positions.tolist()[0] == len(cache.tokens[0]) - 1)
    assert len(positions) == 24 and all(positions)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.8, top_k=20),
        Sampling(temperature=0.5, top_k=50, top_p=0.9, min_p=0.02),
        Sampling(temperature=1.5, min_p=0.05),
        Sampling(top_k=30, repetition_penalty=1.3),
        Sampling(temperature=0),
        Sampling(top_p=0.8),
    ],
    ids=str,
)
@torch.inference_mode()
def test_captured_draws_give_the_ids_of_plain_draws(sampling):
    drawn = []

    def capture(step, device):
        result = step()
        if result.dtype == torch.long:
            drawn.append(result)
        return StandInGraph(step, result), result

    gpt, prompts = flat_gpt(), [random_prompt(3), random_prompt(7)]
    for seed in (1, 2):
        # Decoded by the same steps, so that the logits are the same and only the draws differ.
        only_steps = functools.partial(CapturedDecode(capture=capture))
        plain = generated(gpt, prompts, 30, sampling, generator=seeded(seed), decode=only_steps)
        captured = CapturedDecode(capture=capture)
        drawn.clear()
        found = generated(gpt, prompts, 30, sampling, generator=seeded(seed), decode=captured, stop_ids=[plain[0][20]])
        assert found == [row[: row.index(plain[0][20]) + 1] if plain[0][20] in row else row for row in plain]
        assert len(drawn) == (sampling.temperature > 0 and not sampling.reads_device), "captured once, for all steps"


@torch.inference_mode()
def test_the_graphs_of_draws_do_not_accumulate():
    captures = []

    def capture(step, device):
        captures.append(step)
        result = step()
        return StandInGraph(step, result), result

    captured, logits = CapturedDecode(capture=capture), torch.randn(1, 90, generator=seeded())
    settings = [Sampling(temperature=0.1 * number) for number in range(1, MAX_DRAWS + 2)]
    for sampling in (*settings, settings[-1]):
        uniform = torch.rand(1, 1, generator=seeded())
        assert captured.draw(logits, sampling, uniform).equal(draw(logits, sampling, uniform))
    assert len(captures) == MAX_DRAWS + 1 and len(captured._draws) == 1


def flat_gpt():
    """A random model of which no id is far likelier than all others, so that settings and seeds matter."""
    gpt = generating_gpt()
    gpt.wte.weight.mul_(0.1)
    return gpt


@torch.inference_mode()
def test_the_whole_head_has_the_logits_of_the_vocabulary():
    gpt = generating_gpt()
    hidden = torch.randn(3, CONFIG.n_embd, generator=seeded())
    expected = gpt.logits(hidden)
    gpt.__class__ = WholeHeadGPT
    assert gpt.logits(hidden).shape == (3, CONFIG.n_vocab) and CONFIG.n_vocab < CONFIG.vocab_size
    torch.testing.assert_close(gpt.logits(hidden), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_give_the_same_ids():
    gpt = generating_gpt().cuda()
    prompts = [random_prompt(3), random_prompt(7)]
    plain = generated(gpt, prompts, 40)
    speedups = speed_up_generation(gpt)
    assert speedups.description == "a kernel for attention, CUDA graphs"
    assert generated(gpt, prompts, 40, decode=speedups.decode) == plain
