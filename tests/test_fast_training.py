"""fast/training.py and fast/cpu_backward.py: each part computes what the plain module it replaces computes."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
import torch.nn.functional as F

from fast import compile_training, cpu_backward, speed_up_training
from fast.document_masks import dense_mask
from fast.training import FastLinear, FastMLP
from model import GPT, IGNORED, MLP
from tests.tiny_gpt import CONFIG, assert_same, gradients, plain_and_fast, random_ids, tiny_gpt

COMPILED = "aot_eager_decomp_partition"  # chooses what the backward pass keeps as inductor does, but compiles nothing
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 11, [0] * 16, [0] + [1] * 14 + [2]])


@pytest.fixture(autouse=True)
def _compiler(monkeypatch):
    """Start without compiled code, and leave the C library's allocator as it is."""
    torch._dynamo.reset()
    monkeypatch.setattr("fast.training.give_back_freed_memory", lambda: None)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = random_ids(3, 16)
    targets = ids.roll(-1, 1)
    targets[0, 3] = IGNORED
    return ids, targets


def compiled(gpt: GPT, ids: torch.Tensor | None = None, **settings) -> GPT:
    """`gpt` after compile_training with a step on `ids`, or on the ids of `batch`. Other shapes compile again."""
    ids = batch()[0] if ids is None else ids
    compile_training(gpt, lambda: gpt(ids, ids)[1].backward(), **{"backend": COMPILED, **settings})
    return gpt


# --- the whole model ---


def test_names_and_weights_stay_as_they_are():
    plain, fast = plain_and_fast()
    assert isinstance(fast, GPT) and fast.config == plain.config and fast.n_params() == plain.n_params()
    assert_same(fast.state_dict(), plain.state_dict(), atol=0, rtol=0)
    assert [name for name, _ in fast.named_parameters()] == [name for name, _ in plain.named_parameters()]
    plain.load_state_dict(fast.state_dict())
    before = list(plain.parameters())
    speed_up_training(plain)
    assert all(map(lambda one, other: one is other, plain.parameters(), before))


@pytest.mark.parametrize(
    ("way", "documents"),
    [
        ("eager", None),
        ("eager", DOCUMENTS),
        ("checkpointing", DOCUMENTS),
        ("compiled and checkpointing", DOCUMENTS),
        ("compiled as one piece", None),
        ("compiled as one piece", DOCUMENTS),
    ],
)
def test_loss_and_gradients_equal_those_of_the_plain_model(way, documents):
    plain, fast = plain_and_fast(activation_checkpointing="checkpointing" in way)
    if "compiled" in way:
        compiled(fast, scope="model" if "one piece" in way else "block")
    ids, targets = batch()
    expected, found = (gpt(ids, targets, documents=documents)[1] for gpt in (plain, fast))
    torch.testing.assert_close(found, expected)
    assert_same(gradients(fast, found), gradients(plain, expected))


@pytest.mark.parametrize("scope", ["block", "model"])
def test_an_evaluation_after_a_step_compiles_nothing(scope):
    _, fast = plain_and_fast()
    ids, targets = batch()
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    compiled(fast, backend=backend, scope=scope)
    before = len(compilations)
    assert before >= 2, "the blocks and the transposed head"
    # A block normalizes twice. As one piece, the graph contains all blocks and the final LayerNorm.
    norms = [sum("layer_norm" in str(node.target) for node in graph.graph.nodes) for graph in compilations]
    assert max(norms) == sum(norms) == (2 if scope == "block" else 2 * len(fast.h) + 1)
    with torch.no_grad():
        fast.eval()(ids, targets)
    fast.train()(ids, targets)[1].backward()
    assert len(compilations) == before


def test_a_given_number_of_targets_divides_the_loss():
    plain, fast = plain_and_fast()
    ids, targets = batch()
    n_targets = torch.tensor(100)
    expected, found = (gpt(ids, targets, n_targets)[1] for gpt in (plain, fast))
    torch.testing.assert_close(found, expected)
    assert_same(gradients(fast, found), gradients(plain, expected))


def test_a_batch_without_targets_has_the_loss_zero_and_no_nan():
    _, fast = plain_and_fast()
    ids = random_ids(2, 8)
    _, loss = fast(ids, torch.full_like(ids, IGNORED))
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(fast, loss).values())


@torch.no_grad()
def test_logits_and_the_loss_of_an_evaluation_equal_those_of_the_plain_model():
    plain, fast = (gpt.eval() for gpt in plain_and_fast())
    ids, targets = batch()
    for documents in (None, DOCUMENTS):
        torch.testing.assert_close(fast(ids, documents=documents)[0], plain(ids, documents=documents)[0])
        torch.testing.assert_close(fast(ids, targets, documents=documents), plain(ids, targets, documents=documents))


def test_an_input_that_is_too_long_is_refused():
    ids = random_ids(1, 17)
    with pytest.raises(ValueError, match=r"17 tokens exceed block_size \(16\)"):
        plain_and_fast()[1](ids, ids)


def test_several_steps_have_the_losses_of_plain_training():
    losses = []
    for gpt in plain_and_fast():
        optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-3)
        losses.append([])
        for step in range(8):
            ids = random_ids(3, 17, seed=step)
            loss = gpt(ids[:, :-1], ids[:, 1:], documents=DOCUMENTS if step % 2 else None)[1]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert len(set(losses[0])) == 8


def test_dropout_drops_what_the_plain_model_drops():
    plain, fast = plain_and_fast(dropout=0.3)
    found = []
    for gpt in (plain, fast):
        torch.manual_seed(3)
        found.append(gpt(*batch())[1])
    torch.testing.assert_close(*found)
    assert abs(found[0] - plain.eval()(*batch())[1]) > 1e-3


# --- torch.compile ---


def test_the_blocks_are_compiled_and_the_embedding_is_not(capsys):
    """On a CPU the compiled gradient of an embedding adds in varying order: compiled runs would not repeat."""
    calls: list[set[torch.dtype]] = []

    def backend(graph, inputs):
        def run(*arguments):
            calls.append({one.dtype for one in arguments if isinstance(one, torch.Tensor)})
            return graph(*arguments)

        return run

    plain, fast = plain_and_fast(n_layer=3)
    ids, targets = batch()
    compiled(fast, backend=backend)
    assert "torch.compile: ready after" in capsys.readouterr().out
    calls.clear()
    torch.testing.assert_close(fast(ids, targets)[1], plain(ids, targets)[1])
    assert calls == [{torch.float32}] * 4, "the transposed head and three blocks, none of which gets ids"
    with torch.no_grad():
        fast.eval()(ids)
    assert len(calls) == 4, "evaluation and generation, whose shapes vary, are not compiled"


def test_after_a_failed_compilation_the_blocks_run_eagerly(capsys):
    fast = plain_and_fast()[1]
    eager = fast(*batch())[1]

    def backend(graph, inputs):
        raise RuntimeError("no C++ compiler\nand many more lines")

    compiled(fast, backend=backend)
    printed = capsys.readouterr().out
    assert printed.startswith("warning: torch.compile failed (") and printed.count("\n") == 1
    assert torch.equal(fast(*batch())[1], eager)


def test_if_another_process_cannot_compile_this_one_does_not_either(capsys):
    fast = plain_and_fast()[1]
    compile_training(fast, lambda: None, any_failed=lambda failed: True)
    assert "torch.compile failed (in another process)" in capsys.readouterr().out
    assert not any(block.compiled for block in fast.h)
    compile_training(fast, lambda: None, any_failed=lambda failed: True, scope="model")
    assert fast.compiled_blocks is None and not fast.is_compiled()


def test_running_out_of_memory_while_compiling_is_raised():
    fast = plain_and_fast()[1]

    def trial_step():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        compile_training(fast, trial_step)


@pytest.fixture
def kept_bytes():
    """The sizes in bytes of the activations that backward passes keep while the test runs."""
    sizes: list[int] = []

    def keep(tensor):
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield sizes


def loss_and_gradients(gpt: GPT, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(3)  # of the dropout
    loss = gpt(ids[:, :-1], ids[:, 1:])[1]
    return loss.detach(), torch.autograd.grad(loss, list(gpt.parameters()))


def test_a_compiled_step_keeps_no_cheap_activation_and_has_the_plain_gradients(kept_bytes):
    plain, fast = plain_and_fast()
    ids = random_ids(8, 17)
    totals, found = [], [loss_and_gradients(plain, ids)[1]]
    for settings in ({"activation_budget": 1.0}, {}):
        torch._dynamo.reset()
        compiled(fast, ids[:, 1:], **settings)
        kept_bytes.clear()
        found.append(loss_and_gradients(fast, ids)[1])
        totals.append(sum(kept_bytes))
    assert totals[1] < 0.9 * totals[0], totals
    for expected, *others in zip(*found, strict=True):
        for gradient in others:
            torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)


# --- a residual stream in bfloat16 ---


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_residual_stream_in_bfloat16_is_rounded_in_every_block_and_keeps_less(kept_bytes, is_compiled):
    ids, targets = batch()
    totals, found = [], []
    for residual_dtype in ("float32", "bfloat16"):
        torch._dynamo.reset()
        fast = plain_and_fast(n_layer=4)[1]
        speed_up_training(fast, residual_dtype=residual_dtype)
        types: list[torch.dtype] = []
        for block in fast.h:
            block.register_forward_hook(lambda block, inputs, output, types=types: types.append(output.dtype))
        kept_bytes.clear()
        with torch.autocast("cpu", torch.bfloat16):
            loss = (compiled(fast) if is_compiled else fast)(ids, targets)[1]
        totals.append(sum(kept_bytes))
        found.append((loss, gradients(fast, loss)))
        assert set(types) == {getattr(torch, residual_dtype)}
    (loss, ours), (rounded_loss, rounded) = found
    torch.testing.assert_close(rounded_loss, loss, rtol=0.003, atol=0)
    assert rounded_loss != loss
    for name, gradient in rounded.items():
        assert F.cosine_similarity(gradient.flatten(), ours[name].flatten(), dim=0) > 0.99, name
        assert gradient.dtype == torch.float32
    assert totals[1] < totals[0]


def test_without_autocast_the_residual_stream_stays_as_it_is():
    plain, fast = plain_and_fast()
    speed_up_training(fast, residual_dtype="bfloat16")
    ids, _ = batch()
    with torch.no_grad():
        torch.testing.assert_close(fast.eval()(ids)[0], plain.eval()(ids)[0])


# --- activation checkpointing ---


def test_activation_checkpointing_changes_the_memory_and_not_the_gradients(kept_bytes):
    ids = random_ids(2, 17)
    totals, found = [], []
    for checkpointing in (False, True):
        deep = plain_and_fast(checkpointing, n_layer=8, dropout=0.3)[1]
        kept_bytes.clear()
        found.append(loss_and_gradients(deep, ids))
        totals.append(sum(kept_bytes))
    (loss, gradients), (loss_again, gradients_again) = found
    assert torch.equal(loss, loss_again) and all(map(torch.equal, gradients, gradients_again))
    assert totals[1] < totals[0] / 3
    with torch.no_grad():
        assert torch.equal(deep.eval()(ids[:, :-1])[0], deep(ids[:, :-1])[0])


def test_activation_checkpointing_draws_the_same_dropout_again_when_compiled():
    """The gradient's length is the slope of the loss along it; with other activations dropped it would not be."""
    ids = random_ids(4, 17)
    gpt = compiled(plain_and_fast(True, dropout=0.3)[1], ids[:, 1:], backend="aot_eager")
    _, gradients = loss_and_gradients(gpt, ids)
    length = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
    losses = []
    for step in (0.02, -0.02):
        with torch.no_grad():
            for weight, gradient in zip(gpt.parameters(), gradients, strict=True):
                weight.add_(gradient, alpha=step / length)
        losses.append(loss_and_gradients(gpt, ids)[0].item())
        with torch.no_grad():
            for weight, gradient in zip(gpt.parameters(), gradients, strict=True):
                weight.sub_(gradient, alpha=step / length)
    assert (losses[0] - losses[1]) / 0.04 == pytest.approx(length, rel=0.02)


# --- the parts ---


@pytest.mark.parametrize("length", [1, 5, 16, 19])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_for_compiled_training_has_the_output_and_gradients_of_torch(length, masked):
    torch.manual_seed(0)
    qkv = torch.randn(2, length, 3, 3, 4, requires_grad=True)
    documents = torch.arange(length).expand(2, -1) // torch.tensor([[4], [7]])
    mask = dense_mask(tiny_gpt().document_mask(documents), torch.float32) if masked else None
    outputs = [
        cpu_backward.attention(*qkv.permute(2, 0, 3, 1, 4), mask, key_block=8),
        F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), attn_mask=mask, is_causal=not masked),
    ]
    torch.testing.assert_close(*outputs)
    wanted = torch.randn_like(outputs[0])
    torch.testing.assert_close(*(torch.autograd.grad(y, qkv, wanted)[0] for y in outputs))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n_in", "n_out"), [(3, 5), (5, 3), (4, 4)])
def test_a_linear_layer_for_compiled_training_has_the_gradients_of_torch(n_in, n_out, bias):
    importlib.import_module("torch._inductor.inductor_prims")
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(n_in, n_out, bias=bias), torch.randn(2, 7, n_in, requires_grad=True)
    outputs = [cpu_backward.linear(x, layer.weight, layer.bias), F.linear(x, layer.weight, layer.bias)]
    assert torch.equal(*outputs)
    wanted, inputs = torch.randn_like(outputs[0]), (x, *layer.parameters())
    ours, theirs = (torch.autograd.grad(y, inputs, wanted) for y in outputs)
    for gradient, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected)
        assert gradient.is_contiguous()


def test_a_linear_layer_is_plain_except_in_compiled_low_precision_training(monkeypatch):
    layer, x = FastLinear(3, 5), torch.randn(2, 3)

    def is_fast() -> bool:
        return type(layer(x).grad_fn).__name__ == "_LinearBackward"

    with torch.autocast("cpu", torch.bfloat16):
        assert not is_fast()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not is_fast()
    with torch.autocast("cpu", torch.bfloat16):
        assert is_fast()
        layer.eval()
        assert not is_fast()


def test_a_compiled_step_in_low_precision_is_close_to_the_plain_one():
    plain, fast = plain_and_fast()
    ids, targets = batch()
    with torch.autocast("cpu", torch.bfloat16):
        found = compiled(fast)(ids, targets)[1]
    expected = plain(ids, targets)[1]
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0)
    ours, theirs = gradients(fast, found), gradients(plain, expected)
    for name, gradient in ours.items():
        assert F.cosine_similarity(gradient.flatten(), theirs[name].flatten(), dim=0) > 0.99, name
        assert gradient.dtype == torch.float32


def test_the_mlp_in_compiled_code_is_the_same_function(monkeypatch):
    torch.manual_seed(0)
    fast = FastMLP(CONFIG)
    plain = MLP(CONFIG)
    plain.load_state_dict(fast.state_dict())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    # Inputs from about -30 to 30 reach the GELU: far into both of its ends.
    x = torch.linspace(-300, 300, 601)[:, None].expand(-1, CONFIG.n_embd).requires_grad_()
    outputs = fast(x), plain(x)
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in outputs), atol=1e-5, rtol=1e-4)
