"""How many parameters the presets for CPUs have with a small vocabulary and with GPT-2's."""

from __future__ import annotations

import pytest
import torch

from model import GPT
from tests.test_train_config import SMALL_VOCABULARY, TEXT, config_of
from training.initialization import model_config


@pytest.mark.parametrize(
    ("preset", "data", "n_params"),
    [
        # computed by hand as rows C + block_size C + n_layer (12 C^2 + 13 C) + 2 C, where C is n_embd; rows are 4,096
        # for a vocabulary of 4,096 ids and 50,304 for GPT-2's
        ("tiny", SMALL_VOCABULARY, 1_350_400),
        ("small", SMALL_VOCABULARY, 4_273_664),
        ("tiny", TEXT, 7_265_024),
        ("small", TEXT, 16_102_912),
    ],
)
def test_the_data_sets_vocabulary_decides_the_size_of_a_preset(preset, data, n_params):
    with torch.device("meta"):
        assert GPT(model_config(vars(config_of(data, preset=preset)))).n_params() == n_params
