"""fast/block_kernel.py: the kernels compute what Block computes, no less exactly than torch under autocast."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from common.lora import Adapter, adapt
from fast import block_kernel, speed_up_training
from fast.block_kernel import block_with_kernel, layers
from fast.c_library import build_library
from fast.document_attention import first_keys
from fast.tile_kernels import tile_kernels
from model import GPT, Block, GPTConfig
from tests.tiny_gpt import seeded, tiny_gpt
from training.config import KERNEL_WIDTH

has_kernel = tile_kernels() is not None
needs_kernel = pytest.mark.skipif(not has_kernel, reason="no C compiler, or a processor without AMX")
SHAPES = [(128, 4, 3, 96), (64, 2, 2, 80), (192, 6, 5, 64), (256, 4, 1, 32)]  # width, heads, rows, tokens


def autocast() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def random_block(width: int, n_head: int, bias: bool = True) -> Block:
    """A block whose weights, biases too, are large enough that every part matters."""
    config = GPTConfig(vocab_size=64, n_vocab=64, n_layer=1, n_head=n_head, n_embd=width, bias=bias)
    block = Block(config, 0)
    generator = seeded(width)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.normal_(0, 0.1 if parameter.dim() == 2 else 0.3, generator=generator)
            if name.startswith("ln") and name.endswith("weight"):
                parameter.add_(1)
    return block


def documents_of(rows: int, tokens: int) -> Tensor:
    """Two documents in each row, except in the first one."""
    numbers = (torch.arange(tokens) > tokens // 3).long().repeat(rows, 1)
    numbers[0] = 0
    return numbers


def results(way: str, block: Block, x: Tensor, documents: Tensor, out_grad: Tensor) -> dict[str, Tensor]:
    """The output and all gradients of a copy of the block, in float64."""
    block, x = copy.deepcopy(block), x.clone().requires_grad_()
    causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    mask = ((documents[:, :, None] == documents[:, None, :]) & causal)[:, None]
    if way == "kernel":
        with autocast():
            assert block_kernel.supports(block, x, first_keys(documents))
            out = block_with_kernel(block, x, first_keys(documents))
    elif way == "autocast":
        with autocast():
            out = block(x, mask=mask)
    else:
        out = block.double()(x.double(), mask=mask)
    (out * out_grad.to(out.dtype)).sum().backward()
    grads = {name: parameter.grad for name, parameter in block.named_parameters()}
    return {name: tensor.detach().double() for name, tensor in {"out": out, "x": x.grad, **grads}.items()}


@needs_kernel
@pytest.mark.parametrize(("width", "n_head", "rows", "tokens"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_at_least_as_exact_as_those_of_torch(width, n_head, rows, tokens, bias):
    """The oracle is the plain block in float64. 288 and 320 tokens are no multiple of what a thread takes at a time."""
    block = random_block(width, n_head, bias)
    x, out_grad = (torch.randn(rows, tokens, width, generator=seeded(seed)) for seed in (1, 2))
    given = block, x, documents_of(rows, tokens), out_grad
    expected, torch_made, made = (results(way, *given) for way in ("float64", "autocast", "kernel"))
    assert made.keys() == expected.keys()
    for name, right in expected.items():
        error, torch_error = ((found[name] - right).norm() / right.norm() for found in (made, torch_made))
        assert error < max(1.2 * torch_error, 1e-6), f"{name}: {error:.1e}, torch {torch_error:.1e}"


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_computes_the_same(threads):
    """Five threads are more than there are chunks of tokens. Twice the same threads give the same bits."""
    block = random_block(64, 2)
    x, out_grad = (torch.randn(4, 128, 64, generator=seeded(seed)) for seed in (1, 2))
    given = "kernel", block, x, documents_of(4, 128), out_grad
    expected, before = results(*given), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found, again = results(*given), results(*given)
    finally:
        torch.set_num_threads(before)
    for name, right in expected.items():
        assert torch.equal(found[name], again[name]), name
        torch.testing.assert_close(found[name], right, atol=1e-4, rtol=1e-4)


@needs_kernel
def test_far_ends_of_gelu_and_what_is_not_a_number():
    """Activations of ± 300 neither overflow nor become slow subnormal numbers, and a NaN is not lost."""
    block = random_block(64, 2)
    with torch.no_grad():
        block.mlp.c_fc.bias.copy_(torch.linspace(-300, 300, 256))
    x, out_grad = (torch.randn(2, 64, 64, generator=seeded(seed)) for seed in (1, 2))
    given = block, x, documents_of(2, 64), out_grad
    expected, made = results("float64", *given), results("kernel", *given)
    for name, right in expected.items():
        assert made[name].isfinite().all() and (made[name] - right).norm() < 0.02 * right.norm(), name
    x[1, 63, 5] = torch.nan
    out = results("kernel", *given)["out"]
    assert out[1, 63].isnan().all() and out[0].isfinite().all()


@needs_kernel
def test_the_operands_may_have_any_layout():
    block = random_block(64, 2)
    x, out_grad = (torch.randn(2, 64, 64, generator=seeded(seed)) for seed in (1, 2))
    documents = documents_of(2, 64)
    expected = results("kernel", block, x, documents, out_grad)
    found = results("kernel", block, x.mT.contiguous().mT, documents, out_grad.mT.contiguous().mT)
    assert all(torch.equal(found[name], right) for name, right in expected.items())


# --- the model ---

CONFIG = {"block_size": 128, "n_layer": 2, "n_head": 2, "n_embd": 64}


def fast_gpt(**settings) -> GPT:
    gpt = tiny_gpt(**CONFIG).train()
    speed_up_training(gpt, **settings)
    return gpt


def loss_and_gradients(gpt: GPT, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    with autocast():
        loss = gpt(ids, ids.roll(-1, 1), documents=documents_of(*ids.shape))[1]
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in gpt.named_parameters()}


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(90, (8, 128), generator=seeded(3))


@pytest.fixture
def calls(monkeypatch) -> list[Block]:
    """The blocks that run in kernels."""
    made: list[Block] = []

    def counted(block: Block, x: Tensor, mask: Tensor) -> Tensor:
        made.append(block)
        return block_with_kernel(block, x, mask)

    monkeypatch.setattr(block_kernel, "block_with_kernel", counted)
    return made


@needs_kernel
def test_a_step_runs_in_kernels_and_has_the_loss_of_the_plain_model(ids, calls):
    expected = loss_and_gradients(tiny_gpt(**CONFIG).train(), ids)
    found = loss_and_gradients(gpt := fast_gpt(), ids)
    assert calls == list(gpt.h)
    torch.testing.assert_close(found[0], expected[0], atol=5e-3, rtol=5e-3)
    for name, right in expected[1].items():
        assert (found[1][name] - right).norm() < 0.05 * right.norm(), name
    with torch.no_grad(), autocast():
        loss = gpt.eval()(ids, ids.roll(-1, 1), documents=documents_of(*ids.shape))[1]
    assert torch.equal(loss, found[0]) and len(calls) == 4, "evaluation, too"


@needs_kernel
def test_activation_checkpointing_gives_the_same_gradients(ids, calls):
    expected, found = (loss_and_gradients(fast_gpt(activation_checkpointing=way), ids) for way in (False, True))
    assert len(calls) == 2 + 4
    assert all(torch.equal(found[1][name], right) for name, right in expected[1].items())


@needs_kernel
@pytest.mark.parametrize("reason", ["float32", "residual", "adapter", "frozen layer", "few tokens", "odd tokens"])
def test_other_blocks_run_without_the_kernels(reason, ids, calls):
    gpt = tiny_gpt(**CONFIG).train()
    if reason == "adapter":
        adapt(gpt, Adapter(rank=2))
    if reason == "frozen layer":
        gpt.h[0].mlp.c_fc.weight.requires_grad_(False)
        gpt.h[1].ln_1.bias.requires_grad_(False)
    speed_up_training(gpt, residual_dtype="bfloat16" if reason == "residual" else "float32")
    ids = {"few tokens": ids[:7], "odd tokens": torch.cat([ids, ids])[:9, :127]}.get(reason, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=reason != "float32"):
        gpt(ids, ids)[1].backward()
    assert calls == []


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("low weights", lambda block: block.mlp.bfloat16()),
        (
            "a transposed weight",
            lambda block: setattr(block.attn.c_proj.weight, "data", block.attn.c_proj.weight.data.T),
        ),
        ("another eps", lambda block: setattr(block.ln_2, "eps", 1e-6)),
    ],
)
def test_blocks_that_the_kernels_would_get_wrong_are_refused(name, change):
    x, keys = torch.zeros(1, 32, 64), torch.zeros(1, 32, dtype=torch.int32)
    block = random_block(64, 2)
    with autocast():
        assert block_kernel.supports(block, x, keys) == has_kernel
        change(block)
        assert not block_kernel.supports(block, x, keys), name


def test_the_defaults_of_a_run_know_the_widths_of_the_kernels():
    assert KERNEL_WIDTH == block_kernel.MAX_WIDTH


@needs_kernel
def test_the_gradients_of_two_steps_add_up(ids):
    gpt = fast_gpt()
    once = loss_and_gradients(gpt, ids)[1]
    twice = loss_and_gradients(gpt, ids)[1]
    for name, gradient in once.items():
        torch.testing.assert_close(twice[name], 2 * gradient)


@pytest.mark.parametrize("processor", ["haswell", "skylake-avx512", "cooperlake"])
def test_the_files_build_for_processors_without_amx(processor):
    """There they have no kernels: `has_tiles` says so, and no other function is called."""
    library = build_library(("block_tiles.c", "head_tiles.c", "muon_tiles.c"), processor)
    assert library is None or library.has_tiles() == 0


def test_without_a_compiler_the_loss_is_the_same(ids, no_compiler):
    expected, found = (loss_and_gradients(gpt, ids)[0] for gpt in (tiny_gpt(**CONFIG).train(), fast_gpt()))
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=5e-3)


@needs_kernel
def test_the_kernels_take_the_layers_in_the_order_of_the_block():
    block = random_block(64, 2)
    assert [name for layer in layers(block) for name, other in block.named_modules() if other is layer] == [
        name for name, layer in block.named_modules() if list(layer.parameters(recurse=False))
    ]
