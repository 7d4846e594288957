"""common/numbers.py: as many digits as a number means, and progress lines that use them."""

from __future__ import annotations

import pytest

from common.numbers import count_in_words, significant
from tests.tiny_gpt import tiny_gpt
from training.progress import Clock


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [(1620595.6, 4, "1,621,000"), (28.43, 3, "28.4"), (0.5, 3, "0.500"), (0, 3, "0.00"), (0.001234, 2, "0.0012")],
)
def test_significant_digits(value, digits, shown):
    assert significant(value, digits) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0"),
        (999, "999"),
        (4096, "4,100"),
        (409_600, "410,000"),
        (6_963_200, "7.0 M"),
        (20_480_000, "20.5 M"),
        (1_310_720_000, "1,310 M"),
    ],
)
def test_counts_in_words(count, shown):
    assert count_in_words(count) == shown


class Config:
    """The fields of a RunConfig that a Clock reads."""

    tokens_per_iter, device, max_iters, dataset = 4096, "cpu", 100, "mine"
    batch_size, gradient_accumulation_steps, block_size = 16, 1, 256


def test_a_progress_line_has_three_digits_of_the_speed_and_mfu_only_where_the_peak_is_known(capsys):
    facts = {"name": "mine", "format": "text", "splits": {"train": {"tokens": 409_600}}}
    clock = Clock(tiny_gpt(), Config(), facts, Config.tokens_per_iter, iter_num=0)
    tokens_per_s = clock.log(50, 1.5, 1e-3, 0.5, 0)
    line = capsys.readouterr().out
    assert f"norm 0.50, {significant(tokens_per_s, 3)} tokens/s, 0:00 left\n" in line
    assert line.startswith("iter  50/100 (epoch 0.5) [##########..........] loss 1.5000, lr 1.00e-03, ")
    clock.peak_flops = 1e12
    clock.log(100, 1.5, 1e-3, 0.5, 0)
    assert "tokens/s, mfu " in capsys.readouterr().out
