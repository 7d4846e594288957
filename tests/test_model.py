"""The network is GPT-2: same logits, same loss, causal, with the published sizes. (Generation: test_decoding.py.)"""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from model import GPT, IGNORED, PRESETS, GPTConfig, KVCache
from tests.tiny_gpt import CONFIG, assert_same, gradients, random_ids, tiny_gpt

PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}
DOCUMENT_LENGTHS = [(5, 1, 4, 1, 1, 4), (16,), (1, 14, 1)]  # of each row


@pytest.fixture(scope="module")
def gpt():
    return tiny_gpt()


def test_logits_equal_those_of_transformers_with_the_same_weights(gpt):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        **{"vocab_size": CONFIG.vocab_size, "n_positions": CONFIG.block_size, "n_embd": CONFIG.n_embd},
        **{"n_layer": CONFIG.n_layer, "n_head": CONFIG.n_head, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    linear = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # stored transposed there
    state = {}
    for name, weight in gpt.state_dict().items():
        transposed = name.endswith(".weight") and name.removesuffix(".weight").endswith(linear)
        state[f"transformer.{name}"] = weight.t() if transposed else weight
    missing = theirs.load_state_dict({**state, "lm_head.weight": gpt.wte.weight}, strict=False)
    assert not missing.unexpected_keys and not missing.missing_keys
    ids = random_ids(3, CONFIG.block_size)
    with torch.no_grad():
        ours, _ = gpt.eval()(ids)
        assert ours.abs().max() > 1 and ours.shape == (3, CONFIG.block_size, CONFIG.n_vocab)
        torch.testing.assert_close(ours, theirs(ids).logits[..., : CONFIG.n_vocab], atol=1e-4, rtol=0)
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
    logits = gpt.eval().logits(gpt.transform(embedded))
    for position in range(10):
        loss = F.cross_entropy(logits[:, position], ids[:, position])
        (gradient,) = torch.autograd.grad(loss, embedded, retain_graph=True)
        reach = gradient[0].abs().sum(-1) > 0
        assert reach.tolist() == [True] * (position + 1) + [False] * (9 - position)


def test_rows_do_not_see_each_other(gpt):
    ids = random_ids(2, 12)
    both, alone = gpt.eval()(ids)[0], gpt(ids[:1])[0]
    torch.testing.assert_close(both[:1], alone)


# --- loss ---


@pytest.mark.parametrize("ignored", [0.0, 0.6])
def test_loss_and_gradients_equal_the_cross_entropy_of_the_logits(gpt, ignored):
    """Over the whole vocab_size: training also makes the ids that pad the vocabulary unlikely."""
    ids, targets = random_ids(4, 16), random_ids(4, 16).flip(0)
    targets[torch.rand(4, 16, generator=torch.Generator().manual_seed(3)) < ignored] = IGNORED
    logits, loss = gpt.train()(ids, targets)
    assert logits is None
    expected = F.cross_entropy((gpt.hidden(ids) @ gpt.wte.weight.T).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected)
    assert_same(gradients(gpt, loss), gradients(gpt, expected))


def test_a_batch_without_targets_has_the_loss_zero_and_no_nan(gpt):
    ids = random_ids(2, 8)
    _, loss = gpt.train()(ids, torch.full_like(ids, IGNORED))
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(gpt, loss).values())


def test_micro_batches_add_up_to_one_large_batch(gpt):
    ids, targets = random_ids(4, 16), random_ids(4, 16).flip(1)
    targets[0, :13] = IGNORED  # the halves have different numbers of targets
    whole = gradients(gpt.train(), gpt(ids, targets)[1])
    n_targets = (targets != IGNORED).sum()
    losses = [gpt(ids[half], targets[half], n_targets)[1] for half in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(sum(losses), gpt(ids, targets)[1])
    assert_same(gradients(gpt, sum(losses)), whole)


def test_the_ignored_target_is_the_one_of_torch():
    assert torch.nn.CrossEntropyLoss().ignore_index == IGNORED


# --- documents ---


def documents() -> torch.Tensor:
    return torch.stack([torch.repeat_interleave(torch.tensor(lengths)) for lengths in DOCUMENT_LENGTHS])


def test_loss_and_gradients_are_those_of_each_document_by_itself(gpt):
    ids = random_ids(3, 16)
    targets = ids.roll(-1, 1)
    targets[0, 3] = IGNORED
    total = torch.zeros(())
    for row, lengths in enumerate(DOCUMENT_LENGTHS):
        ends = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        for start, end in pairwise(ends):
            alone = gpt.train().hidden(ids[row : row + 1, start:end], positions=torch.arange(start, end))
            logits = F.linear(alone[0], gpt.wte.weight)
            total = total + F.cross_entropy(logits, targets[row, start:end], ignore_index=IGNORED, reduction="sum")
    _, loss = gpt(ids, targets, documents=documents())
    expected = total / (targets != IGNORED).sum()
    torch.testing.assert_close(loss, expected)
    assert_same(gradients(gpt, loss), gradients(gpt, expected))
    assert abs(gpt(ids, targets)[1] - loss) > 1e-3, "without the mask the loss differs"


def test_a_row_of_one_document_is_not_masked_further(gpt):
    ids = random_ids(3, 16)
    torch.testing.assert_close(gpt(ids, documents=torch.zeros_like(ids))[0], gpt(ids)[0])


def test_nothing_leaks_from_one_document_into_another(gpt):
    ids = random_ids(3, 16)
    changed = ids.clone()
    changed[0, :5] = (changed[0, :5] + 1) % CONFIG.n_vocab
    before, after = (gpt.eval()(x, documents=documents())[0] for x in (ids, changed))
    assert torch.equal(before[0, 5:], after[0, 5:]) and torch.equal(before[1:], after[1:])
    assert not torch.equal(before[0, :5], after[0, :5])
    assert not torch.equal(gpt(ids)[0][0, 5:], gpt(changed)[0][0, 5:]), "without the mask it does"


class OnCuda(torch.Tensor):
    """A tensor that says it is on CUDA."""

    is_cuda = True


def test_a_mask_on_cuda_turns_off_cudnn_whose_backward_pass_gives_nan(gpt, monkeypatch):
    allowed = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", allowed.append)
    gpt.document_mask(documents())
    assert allowed == []
    gpt.document_mask(documents().as_subclass(OnCuda))
    assert allowed == [False]


# --- key-value cache ---


def test_hidden_states_in_pieces_with_a_cache_equal_those_of_the_whole_row(gpt):
    ids = random_ids(2, 12)
    cache = KVCache(CONFIG, 2, ids.device, torch.float32)
    with torch.no_grad():
        whole, pieces = gpt.eval().hidden(ids), []
        for start, end in ((0, 5), (5, 6), (6, 12)):
            positions = torch.arange(start, end)
            cache.select(slice(start, end), end)
            mask = torch.arange(end) <= positions[:, None] if start else None
            pieces.append(gpt.hidden(ids[:, start:end], cache, positions, mask))
    torch.testing.assert_close(torch.cat(pieces, 1), whole)


def test_rows_of_different_lengths_share_a_cache(gpt):
    ids, lengths = random_ids(2, 12), torch.tensor([4, 9])
    cache = KVCache(CONFIG, 2, ids.device, torch.float32)
    with torch.no_grad():
        cache.select(slice(0, 9), 9)
        gpt.eval().hidden(ids[:, :9], cache)  # what the shorter row holds from position 4 on is padding
        cache.select(lengths, 10)
        mask = torch.arange(10) <= lengths[:, None, None, None]
        new = ids[[0, 1], lengths][:, None]
        found = gpt.hidden(new, cache, lengths[:, None], mask)[:, 0]
        expected = torch.stack([gpt.hidden(ids[row : row + 1, : n + 1])[0, n] for row, n in enumerate([4, 9])])
    torch.testing.assert_close(found, expected)


def test_some_rows_of_a_cache_can_be_written_alone(gpt):
    ids = random_ids(3, 6)
    cache = KVCache(CONFIG, 3, ids.device, torch.float32)
    with torch.no_grad():
        cache.select(slice(0, 6), 6, rows=slice(1, 2))
        found = gpt.eval().hidden(ids[1:2], cache)
    torch.testing.assert_close(found, gpt.hidden(ids)[1:2])
    assert not cache.keys_values[:, :, [0, 2]].any() and cache.keys_values[:, :, 1, :, :6].all()


# --- initialization, dropout, sizes, errors ---


def test_the_initial_weights_are_drawn_as_in_gpt2():
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


def test_a_model_can_have_no_biases():
    names = [name for name, _ in GPT(dataclasses.replace(CONFIG, bias=False)).named_parameters()]
    assert names and not any("bias" in name for name in names)


def test_dropout_acts_only_in_training():
    gpt = tiny_gpt(dropout=0.3)
    ids = random_ids(2, 16)
    assert not torch.equal(gpt.train()(ids, ids)[1], gpt(ids, ids)[1])
    assert torch.equal(gpt.eval()(ids, ids)[1], gpt(ids, ids)[1])


def test_flops_are_six_per_weight_and_those_of_attention():
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
def test_numbers_that_do_not_fit_together_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(CONFIG, **changes)


def test_an_input_that_is_too_long_is_refused(gpt):
    with pytest.raises(ValueError, match=r"17 tokens exceed block_size \(16\)"):
        gpt(random_ids(1, 17))


def test_the_model_learns_a_pattern_by_heart():
    torch.manual_seed(0)
    gpt = GPT(dataclasses.replace(CONFIG, n_layer=1))
    ids = torch.arange(17).repeat(4, 1)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-2)
    for _ in range(60):
        _, loss = gpt(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1
