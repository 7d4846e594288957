"""The rule of --preset auto, a pure function: what it chooses for a time and a data set."""

from __future__ import annotations

import itertools

import pytest
import torch

from common.flops import flops_per_token
from data.epochs import FITTING_EPOCHS
from model import GPT, PRESETS, GPTConfig, padded_vocab_size
from training.minutes import candidates
from training.options import TrainOptions
from training.shapes import (
    SHAPES,
    TOKENS_PER_ITER,
    Budget,
    Shape,
    choose_shape,
    effective_tokens,
    iters_within,
    n_evaluations,
    round_down,
    rows_per_iter,
)

FLOPS = [10.0 ** (11 + step / 8) for step in range(65)]  # from a second on a slow core to a day on a GPU
DATA = [(5e4, 512), (2.3e6, 4096), (2.3e6, 50259), (1e8, 16384), (1e11, 50259)]


def config_of(shape, n_vocab: int) -> GPTConfig:
    sizes = {"n_layer": shape.n_layer, "n_head": shape.n_head, "n_embd": shape.n_embd, "block_size": shape.block_size}
    return GPTConfig(**sizes, n_vocab=n_vocab, vocab_size=padded_vocab_size(n_vocab))


def test_the_shapes_are_models_of_growing_size_and_the_presets_are_among_them():
    for shape in SHAPES:
        config = config_of(shape, 4096)  # raises ValueError if the heads do not divide the width
        assert config.n_embd // config.n_head >= 32
        assert shape.block_size <= 4 * shape.n_embd
    assert all(a.weights() < b.weights() and a.block_size <= b.block_size for a, b in itertools.pairwise(SHAPES))
    sizes = {(shape.n_layer, shape.n_head, shape.n_embd) for shape in SHAPES}
    assert sizes >= {(PRESETS[name].n_layer, PRESETS[name].n_head, PRESETS[name].n_embd) for name in ("tiny", "small")}
    assert GPT(config_of(SHAPES[0], 512)).n_params() < 200_000  # 98,304 in the blocks, and the embeddings
    assert SHAPES[-1].weights() == 12 * 12 * 768**2


@pytest.mark.parametrize("n_vocab", [512, 4096, 50259])
def test_the_work_of_a_token_is_the_models(n_vocab):
    for shape in SHAPES[:6]:
        with torch.device("meta"):
            expected = GPT(config_of(shape, n_vocab)).flops_per_token()
        sizes = shape.n_layer, shape.n_embd, padded_vocab_size(n_vocab), shape.block_size
        assert shape.flops_per_token(n_vocab) == flops_per_token(*sizes) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("tokens", "n_vocab"), DATA)
def test_more_time_never_gives_a_smaller_model_or_less_to_learn(tokens, n_vocab):
    budgets = [Budget(flops, tokens, n_vocab) for flops in FLOPS]
    chosen = [choose_shape(budget, SHAPES) for budget in budgets]
    assert all(a.weights() <= b.weights() for a, b in itertools.pairwise(chosen))
    read = [budget.tokens_read(shape) for budget, shape in zip(budgets, chosen, strict=True)]
    work = [n * shape.flops_per_token(n_vocab) for n, shape in zip(read, chosen, strict=True)]
    assert all(a <= b * 1.0001 for a, b in itertools.pairwise(work))
    for budget, n, flops in zip(budgets, read, work, strict=True):
        assert n <= FITTING_EPOCHS * tokens and flops <= 1.0001 * budget.flops


def test_much_data_and_time_use_the_whole_table():
    shapes = candidates(TrainOptions(), 256)
    chosen = [choose_shape(Budget(flops, 1e11, 4096), shapes) for flops in FLOPS]
    assert list(dict.fromkeys(chosen)) == shapes and len(shapes) == len(SHAPES)


def test_few_data_get_a_small_model_however_long_it_may_train():
    assert choose_shape(Budget(1e19, 50_000, 512), SHAPES).weights() <= 12 * 4 * 128**2  # tiny's
    few = choose_shape(Budget(1e19, 2.3e6, 4096), SHAPES)
    assert 1e6 < few.weights() <= 2 * 2.3e6


def test_a_large_vocabulary_makes_each_token_more_expensive():
    small, large = (Budget(1e15, 1e9, n_vocab) for n_vocab in (1024, 50259))
    assert large.tokens_read(SHAPES[0]) < 0.1 * small.tokens_read(SHAPES[0])
    # Beside an expensive head, weights in the blocks cost little.
    assert choose_shape(large, SHAPES).weights() >= choose_shape(small, SHAPES).weights()


def test_what_does_not_fit_into_memory_is_not_chosen():
    budget = Budget(1e19, 1e11, 50259)
    assert choose_shape(budget, SHAPES, fits=lambda shape: shape.n_embd <= 384).n_embd == 384
    assert choose_shape(budget, SHAPES, fits=lambda shape: False) == SHAPES[0]


def test_repeated_tokens_are_worth_less_and_ever_less():
    values = [effective_tokens(epochs * 1000, 1000) for epochs in range(1, 100)]
    gains = [b - a for a, b in itertools.pairwise(values)]
    assert values[0] == 1000 and effective_tokens(500, 1000) == 500
    assert 1000 > gains[0] > 900 and all(a > b > 0 for a, b in itertools.pairwise(gains))
    assert values[-1] < 16_000  # 1 + 15 times the data, however often they are read


def test_longer_runs_have_larger_batches_and_more_iterations():
    tokens = [10.0 ** (5 + step / 8) for step in range(50)]
    for block_size in (256, 512, 1024):
        rows = [rows_per_iter(n, block_size) for n in tokens]
        assert all(a <= b for a, b in itertools.pairwise(rows)) and all(n & (n - 1) == 0 for n in rows)
        assert (rows[0] * block_size, rows[-1] * block_size) == TOKENS_PER_ITER
    assert 6.4e6 / (rows_per_iter(6.4e6, 256) * 256) == 1562.5  # 4,096 tokens per iteration


@pytest.mark.parametrize("eval_interval", [None, 100])
def test_iterations_and_evaluations_fit_into_the_time(eval_interval):
    previous = 0
    for seconds in range(60, 6000, 37):
        iters = iters_within(seconds, iter_s=0.5, eval_s=3.0, eval_interval=eval_interval)
        total = 0.5 * iters + 3.0 * n_evaluations(iters, eval_interval)
        assert 0.7 * seconds < total <= seconds and iters >= previous
        previous = iters


def test_evaluations_take_at_most_half_of_the_time_and_a_run_has_an_iteration():
    assert iters_within(100, iter_s=1, eval_s=1000) == 50
    assert iters_within(0.1, iter_s=1, eval_s=1) == 1
    assert [round_down(n) for n in (7, 999, 1239, 12_399)] == [7, 999, 1230, 12_300]


def test_given_numbers_replace_those_of_the_table():
    shapes = candidates(TrainOptions(n_layer=3, block_size=128), 256)
    assert {(shape.n_layer, shape.block_size) for shape in shapes} == {(3, 128)}
    assert {shape.n_embd for shape in shapes} == {shape.n_embd for shape in SHAPES}
    wide = candidates(TrainOptions(n_embd=100), 1024)
    assert {(shape.n_embd, shape.n_head) for shape in wide} == {(100, 2)}
    assert {shape.n_embd for shape in candidates(TrainOptions(n_head=5), 256)} == {320, 640}
    only = candidates(TrainOptions(n_layer=1, n_embd=64, n_head=2, block_size=64), 256)
    assert only == [Shape(1, 2, 64, 64)]
    # A shape of the table is the same if it is given.
    for shape in SHAPES:
        assert candidates(TrainOptions(n_layer=shape.n_layer, n_embd=shape.n_embd), 1024) == [shape]
