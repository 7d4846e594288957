"""The network is GPT-2: same logits, same loss, causal, with the published sizes. (Generation: test_generate.py.)"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from training.tied_head import TiedHead

import model
from model import GPT, IGNORED, PRESETS, GPTConfig
from training import batches, cpu_backward, tied_head

TINY = GPTConfig(block_size=16, vocab_size=96, n_vocab=90, n_layer=3, n_head=4, n_embd=32)
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


@pytest.fixture(scope="module")
def gpt():
    torch.manual_seed(1)
    made = GPT(TINY)
    with torch.no_grad():
        for weight in made.parameters():  # larger than at the start, biases too, so that every part matters
            weight.add_(0.1 * torch.randn_like(weight))
    return made


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, TINY.n_vocab, shape, generator=torch.Generator().manual_seed(2))


def test_logits_equal_those_of_transformers_with_the_same_weights(gpt):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        **{"vocab_size": TINY.vocab_size, "n_positions": TINY.block_size, "n_embd": TINY.n_embd},
        **{"n_layer": TINY.n_layer, "n_head": TINY.n_head, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    linear = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # stored transposed there
    state = {}
    for name, weight in gpt.state_dict().items():
        transposed = name.endswith(".weight") and name.removesuffix(".weight").endswith(linear)
        state[f"transformer.{name}"] = weight.t() if transposed else weight
    missing = theirs.load_state_dict({**state, "lm_head.weight": gpt.wte.weight}, strict=False)
    assert not missing.unexpected_keys and not missing.missing_keys
    ids = random_ids(3, TINY.block_size)
    with torch.no_grad():
        ours, _ = gpt.eval()(ids)
        assert ours.abs().max() > 1
        torch.testing.assert_close(ours, theirs(ids).logits, atol=1e-4, rtol=0)
        loss = gpt(ids, torch.cat([ids[:, 1:], torch.full((3, 1), IGNORED)], dim=1))[1]
        torch.testing.assert_close(loss, theirs(ids, labels=ids).loss, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_sizes_have_the_published_parameters(name):
    with torch.device("meta"):
        gpt = GPT(dataclasses.replace(PRESETS[name], vocab_size=50257, n_vocab=50257))
    assert gpt.n_params() == PUBLISHED[name]


def test_a_loss_does_not_depend_on_later_tokens(gpt):
    ids = random_ids(1, 10)
    embedded = gpt.wte(ids).detach().requires_grad_()
    x = embedded + gpt.wpe(torch.arange(10))
    for block in gpt.eval().h:
        x = block(x)
    logits = F.linear(gpt.ln_f(x), gpt.wte.weight)
    for place in range(10):
        loss = F.cross_entropy(logits[:, place], ids[:, place])
        (gradient,) = torch.autograd.grad(loss, embedded, retain_graph=True)
        reach = gradient[0].abs().sum(-1) > 0
        assert reach.tolist() == [True] * (place + 1) + [False] * (9 - place)


def test_rows_do_not_see_each_other(gpt):
    ids = random_ids(2, 12)
    both, alone = gpt.eval()(ids)[0], gpt(ids[:1])[0]
    torch.testing.assert_close(both[:1], alone)


def gradients(gpt, loss) -> dict:
    gpt.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in gpt.named_parameters()}


@pytest.mark.parametrize("chunk", [4, 1024])
@pytest.mark.parametrize("ignored", [0.0, 0.6])
def test_loss_and_gradients_equal_cross_entropy(gpt, monkeypatch, chunk, ignored):
    monkeypatch.setattr(tied_head, "HEAD_CHUNK", chunk)
    ids, targets = random_ids(4, 16), random_ids(4, 16).flip(0)
    targets[torch.rand(4, 16, generator=torch.Generator().manual_seed(3)) < ignored] = IGNORED
    gpt.train()
    _, loss = gpt(ids, targets)
    expected = F.cross_entropy(gpt(ids)[0].flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected)
    ours, theirs = gradients(gpt, loss), gradients(gpt, expected)
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], atol=1e-6, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_no_target_at_all_gives_zero_and_no_nan(gpt):
    ids = random_ids(2, 8)
    _, loss = gpt.train()(ids, torch.full_like(ids, IGNORED))
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(gpt, loss).values())


def test_micro_batches_add_up(gpt):
    ids, targets = random_ids(4, 16), random_ids(4, 16).flip(1)
    targets[0, :13] = IGNORED  # the halves have different numbers of targets
    whole = gradients(gpt.train(), gpt(ids, targets)[1])
    count = (targets != IGNORED).sum()
    gpt.zero_grad()
    losses = [gpt(ids[half], targets[half], count)[1] for half in (slice(0, 2), slice(2, 4))]
    summed = gradients(gpt, sum(losses))
    torch.testing.assert_close(sum(losses), gpt(ids, targets)[1])
    for name in whole:
        torch.testing.assert_close(summed[name], whole[name], atol=1e-6, rtol=1e-4)


def head_loss(hidden, weight, targets, n_targets, dtype=torch.float32):
    return TiedHead(weight, targets, dtype).loss(hidden, torch.tensor(float(n_targets)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [3, 16, 64])
def test_the_head_takes_slices_where_counting_rows_would_wait(monkeypatch, chunk, dtype):
    """As on CUDA: rows without a target take part with weight 0, and the gradient lies as the weight does."""

    class NotOnCpu(TiedHead):
        def __init__(self, weight, targets, dtype):
            super().__init__(weight.to("meta"), targets.to("meta"), dtype)
            self.weight, self.targets = weight, targets.flatten()
            self.counts = self.targets != IGNORED
            self.low_weight, self.logits = weight.detach().to(dtype).T, torch.empty(self.logits.shape, dtype=dtype)

    monkeypatch.setattr(tied_head, "HEAD_CHUNK", chunk)
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 5, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    idx, targets = torch.randint(30, (4, 5)), torch.randint(30, (4, 5))
    targets[1:3] = targets[0, 2] = IGNORED
    found = []
    for kind in (TiedHead, NotOnCpu):
        head = kind(weight, targets, dtype)
        assert head.on_cpu == (kind is TiedHead)
        loss = head.loss(hidden + head.embed(idx), torch.tensor(9.0))
        found.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
        assert found[-1][2].is_contiguous()
    tolerance = {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-3, "rtol": 0.03}
    for ours, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, expected, **tolerance)
    assert not found[1][1][1:3].any()


def test_a_target_that_does_not_count_has_one_number():
    assert IGNORED == batches.IGNORED == torch.nn.CrossEntropyLoss().ignore_index


def test_the_loss_in_low_precision_is_near():
    hidden, weight = torch.randn(20, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    targets = torch.randint(0, 30, (20,))
    exact = F.cross_entropy(hidden @ weight.T, targets)
    loss = head_loss(hidden, weight, targets, 20, torch.bfloat16)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, atol=0.05, rtol=0)
    ours, theirs = torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(exact, (hidden, weight))
    for gradient, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected, atol=0.02, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_and_gradients_of_a_chunk_keep_the_small_numbers(dtype):
    """A token that is all but certain, one that is all but impossible, one between."""
    logits = torch.tensor([[9.0, 0, 0], [9.0, 0, 0], [0.5, 0, -0.5]]).to(dtype)
    targets = torch.tensor([0, 1, 0])
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    expected.sum().backward()
    found = tied_head.losses_and_gradient_(logits, targets)
    tolerance = 1e-5 if dtype == torch.float32 else 0.01
    torch.testing.assert_close(found.double(), expected.detach(), rtol=tolerance, atol=0)
    torch.testing.assert_close(logits.double(), exact.grad, rtol=tolerance, atol=0)


@contextlib.contextmanager
def count_products():
    """The names of the matrix products that run in the block."""
    names = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), settings=None):
            if ".mm" in str(function):
                names.append(str(function))
            return function(*arguments, **(settings or {}))

    with Mode():
        yield names


def test_the_loss_alone_makes_no_gradient():
    hidden, weight = torch.randn(20, 8), torch.randn(30, 8, requires_grad=True)
    targets = torch.randint(0, 30, (20,))
    with torch.no_grad(), count_products() as products:
        head_loss(hidden, weight, targets, 20)
    assert products == ["aten.mm.out"]


@pytest.fixture
def one_thread():
    """Each thread of torch's kernels takes some memory of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_head_takes_little_more_than_logits_in_low_precision_and_a_copy_of_its_weight(tmp_path, one_thread):
    """With its gradients, 8 + 8 MiB; the logits, or the weight's gradient, in float32 would be 16 each."""
    hidden, weight = torch.randn(256, 256, requires_grad=True), torch.randn(16384, 256, requires_grad=True)
    targets = torch.randint(0, 16384, (256,))
    recording = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with recording as profiler:
        loss = head_loss(hidden, weight, targets, 256, torch.bfloat16)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    events = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    now, most = 0, 0
    for event in events:
        now += event["args"]["Bytes"]
        most = max(most, now)
    assert 16 < most / 2**20 < 18
    assert loss.requires_grad


def test_huge_logits_give_a_finite_loss():
    hidden, weight = torch.full((2, 4), 1e4, requires_grad=True), torch.randn(10, 4, requires_grad=True)
    targets = torch.tensor([0, 9])
    loss = head_loss(hidden, weight, targets, 2)
    exact = F.cross_entropy(hidden @ weight.T, targets)
    assert 40 < loss.item() < min(110, exact.item())  # see losses_and_gradient_
    ours, theirs = torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(exact, (hidden, weight))
    for gradient, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("length", [1, 5, 16, 19])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_for_compiled_training_has_torchs_output_and_gradients(monkeypatch, length, masked):
    monkeypatch.setattr(cpu_backward, "KEY_BLOCK", 8)
    torch.manual_seed(0)
    qkv = torch.randn(2, length, 3, 3, 4, requires_grad=True)
    documents = torch.arange(length).expand(2, -1) // torch.tensor([[4], [7]])
    mask = model.dense_mask(documents, torch.float32) if masked else None
    outputs = [
        cpu_backward.attention(*qkv.permute(2, 0, 3, 1, 4), mask),
        F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), attn_mask=mask, is_causal=not masked),
    ]
    torch.testing.assert_close(*outputs)
    wanted = torch.randn_like(outputs[0])
    torch.testing.assert_close(*(torch.autograd.grad(y, qkv, wanted)[0] for y in outputs))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n_in", "n_out"), [(3, 5), (5, 3), (4, 4)])
def test_a_linear_layer_for_compiled_training_has_torchs_gradients(n_in, n_out, bias):
    importlib.import_module("torch._inductor.inductor_prims")
    torch.manual_seed(0)
    layer, x = model.Linear(n_in, n_out, bias=bias), torch.randn(2, 7, n_in, requires_grad=True)
    outputs = [cpu_backward.linear(x, layer.weight, layer.bias), F.linear(x, layer.weight, layer.bias)]
    assert torch.equal(*outputs)
    wanted, inputs = torch.randn_like(outputs[0]), (x, *layer.parameters())
    ours, theirs = (torch.autograd.grad(y, inputs, wanted) for y in outputs)
    for gradient, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected)
        assert gradient.is_contiguous()


def test_a_linear_layer_is_plain_but_in_compiled_low_precision_training(monkeypatch):
    layer, x = model.Linear(3, 5), torch.randn(2, 3)

    def is_ours() -> bool:
        return type(layer(x).grad_fn).__name__ == "_LinearBackward"

    with torch.autocast("cpu", torch.bfloat16):
        assert not is_ours()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not is_ours()
    with torch.autocast("cpu", torch.bfloat16):
        assert is_ours()
        layer.eval()
        assert not is_ours()


def test_gelu_in_compiled_code_is_the_same_function(monkeypatch):
    x = torch.linspace(-30, 30, 6001, requires_grad=True)
    plain = model.gelu(x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(model.gelu(x), plain)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (model.gelu(x), plain)))


def test_the_start_is_gpt2s():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(block_size=64, vocab_size=512, n_vocab=512, n_layer=8, n_head=4, n_embd=128))
    for name, weight in gpt.named_parameters():
        if name.endswith("c_proj.weight"):
            assert weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.05)
        elif weight.dim() == 2:
            assert weight.std().item() == pytest.approx(0.02, rel=0.05)
        else:
            assert (weight == (name.endswith("weight"))).all()
    ids = torch.randint(0, 512, (4, 64))
    assert gpt(ids, ids.flip(0))[1].item() == pytest.approx(math.log(512), abs=0.1)


def test_the_head_is_tied_and_counted_once(gpt):
    assert sum(weight.numel() for weight in gpt.parameters()) == gpt.n_params()
    assert not any("lm_head" in name for name in gpt.state_dict())


def test_without_bias_there_is_none():
    names = [name for name, _ in GPT(dataclasses.replace(TINY, bias=False)).named_parameters()]
    assert names and not any("bias" in name for name in names)


def test_dropout_acts_in_training_alone():
    torch.manual_seed(0)
    gpt = GPT(dataclasses.replace(TINY, dropout=0.3))
    ids = random_ids(2, 16)
    assert not torch.equal(gpt.train()(ids, ids)[1], gpt(ids, ids)[1])
    assert torch.equal(gpt.eval()(ids, ids)[1], gpt(ids, ids)[1])


def test_flops_are_six_a_weight_and_attention():
    with torch.device("meta"):
        gpt = GPT(dataclasses.replace(PRESETS["gpt2"], vocab_size=50257, n_vocab=50257))
    weights = PUBLISHED["gpt2"] - 1024 * 768
    assert gpt.flops_per_token() == 6 * weights + 12 * 12 * 768 * 1024


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"n_head": 5}, r"n_embd \(32\) must be a multiple of n_head \(5\)"),
        ({"n_layer": 0}, "n_layer must be at least 1, not 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"n_vocab": 97}, r"n_vocab \(97\) must not exceed vocab_size \(96\)"),
    ],
)
def test_numbers_that_do_not_fit_are_sentences(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(TINY, **changes)


def test_too_long_an_input_is_a_sentence(gpt):
    with pytest.raises(ValueError, match=r"17 tokens exceed block_size \(16\)"):
        gpt(random_ids(1, 17))


def test_the_model_learns_a_pattern_by_heart():
    torch.manual_seed(0)
    gpt = GPT(dataclasses.replace(TINY, n_layer=1))
    ids = torch.arange(17).repeat(4, 1)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-2)
    for _ in range(60):
        _, loss = gpt(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1


def note_compiled_calls(monkeypatch) -> list[tuple[str, torch.dtype]]:
    """Let torch.compile leave functions as they are; notes the name and the first argument's dtype of each call."""
    seen = []

    def compile_(function, **settings):
        def compiled(*arguments):
            seen.append((function.__name__, arguments[0].dtype))
            return function(*arguments)

        return compiled

    monkeypatch.setattr(torch, "compile", compile_)
    return seen


def test_the_compiled_parts_are_the_blocks_one_by_one_without_the_embedding(monkeypatch):
    """On a CPU the compiled gradient of an embedding adds in varying order: compiled runs would not repeat."""
    seen = note_compiled_calls(monkeypatch)
    gpt = GPT(GPTConfig(block_size=8, vocab_size=64, n_vocab=60, n_layer=3, n_head=1, n_embd=8))
    idx = torch.zeros(1, 8, dtype=torch.long)
    plain = gpt(idx, idx)[1]
    gpt.compile_training()
    assert torch.equal(gpt(idx, idx)[1], plain)
    assert [name for name, _ in seen] == ["transposed"] + ["residuals"] * 3
    assert {dtype for _, dtype in seen} == {torch.float32}
    with torch.no_grad():
        gpt.eval()(idx)
    gpt.uncompile()
    assert torch.equal(gpt.train()(idx, idx)[1], plain) and len(seen) == 4


def loss_and_gradients(gpt: GPT, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(3)  # of the dropout
    loss = gpt(ids[:, :-1], ids[:, 1:])[1]
    return loss.detach(), torch.autograd.grad(loss, list(gpt.parameters()))


@pytest.fixture
def kept_bytes():
    """A list to which the bytes of each activation that a backward pass keeps are added while the test runs."""
    sizes: list[int] = []

    def keep(tensor):
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield sizes


def test_a_compiled_step_keeps_no_cheap_activation(monkeypatch, kept_bytes):
    compile_ = torch.compile
    partition = "aot_eager_decomp_partition"  # what is kept is chosen as for compiled code
    monkeypatch.setattr(torch, "compile", lambda function, **settings: compile_(function, backend=partition))
    gpt = GPT(dataclasses.replace(TINY, n_layer=4))
    ids = random_ids(8, 17)
    totals, gradients = [], []
    for budget in (1.0, model.ACTIVATION_BUDGET):
        monkeypatch.setattr(model, "ACTIVATION_BUDGET", budget)
        torch._dynamo.reset()
        gpt.compile_training()
        kept_bytes.clear()
        gradients.append(loss_and_gradients(gpt, ids)[1])
        totals.append(sum(kept_bytes))
    assert totals[1] < 0.8 * totals[0], totals
    assert all(map(torch.allclose, *gradients))


def test_activation_checkpointing_changes_the_memory_and_not_the_gradients(kept_bytes):
    deep = GPT(dataclasses.replace(TINY, n_layer=8, dropout=0.3))
    ids = random_ids(2, 17)
    totals, found = [], []
    for checkpointing in (False, True):
        deep.activation_checkpointing = checkpointing
        kept_bytes.clear()
        found.append(loss_and_gradients(deep, ids))
        totals.append(sum(kept_bytes))
    (loss, gradients), (loss_again, gradients_again) = found
    assert torch.equal(loss, loss_again) and all(map(torch.equal, gradients, gradients_again))
    assert totals[1] < totals[0] / 3
    with torch.no_grad():
        assert torch.equal(deep.eval()(ids[:, :-1])[0], deep(ids[:, :-1])[0])


def test_activation_checkpointing_draws_the_same_dropout_again_when_compiled(monkeypatch):
    """The gradient's length is the slope of the loss along it: not so if other activations were dropped."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **settings: compile_(function, backend="aot_eager"))
    torch.manual_seed(1)
    gpt = GPT(dataclasses.replace(TINY, dropout=0.3))
    gpt.activation_checkpointing = True
    gpt.compile_training()
    ids = random_ids(4, 17)
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
