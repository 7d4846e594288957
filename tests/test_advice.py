"""The advice at the end of a preparation: commands that train.py accepts, and what is warned of."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest

from common.checkpoint import save_checkpoint
from common.cli import parse_options
from common.flops import flops_per_token
from common.numbers import duration_in_words
from common.token_patterns import GPT2_PATTERN
from common.tokenizer_json import Vocabulary
from data.advice import BFLOAT16_GAINS, SHAPES, advise, numpy_flops, print_advice, seconds_per_token
from data.dataset import DatasetInfo, FileInfo, SplitInfo, info_bytes
from model import GPT, PRESETS, padded_vocab_size
from setup_tokenizer import GPT2, Tokenizer
from tests.tiny_gpt import text_gpt
from training.options import TrainOptions


def info_of(tokens: int, kind: str = "text", n_val: int = 1000, name: str = "mine", documents: int = 30) -> DatasetInfo:
    sizes = {"train": tokens, "val": n_val}
    splits = {
        split: SplitInfo(size, (FileInfo(f"{name}-{split}.bin", "ab"),), documents) for split, size in sizes.items()
    }
    return DatasetInfo(name, kind, splits=splits)


@pytest.mark.parametrize(
    ("tokens", "command"),
    [
        (300, "--dataset mine --preset tiny --max_iters 100"),
        (50_000, "--dataset mine --preset tiny --max_iters 100"),
        (400_000, "--dataset mine --preset tiny --max_iters 790"),
        (4_484_963, "--dataset mine --preset tiny --max_iters 5000"),
        (540_000_000, "--dataset mine --max_iters 5000"),
    ],
)
def test_the_command_fits_the_number_of_tokens(tokens, command, tmp_path):
    found = advise(info_of(tokens), None, tmp_path)
    assert shlex.join(found.arguments) == command
    options = parse_options(TrainOptions, "", found.arguments)
    assert (options.dataset, options.max_iters) == ("mine", found.iters)
    assert bool(found.warnings) == (tokens < 20_000)


def test_few_data_are_warned_of_with_what_to_do(tmp_path):
    few, short = advise(info_of(2_500, n_val=60), None, tmp_path).warnings
    assert few.startswith(
        "there are only 2,500 tokens: the model reads them 160 times and mostly repeats them; add text"
    )
    assert "--init_from" in few
    assert short == (
        "validation holds only 60 tokens, too few for a row of 256, so its loss is a rough estimate; add documents, or "
        "use a larger --val_fraction"
    )
    (few,) = advise(info_of(1_500, "chat"), None, tmp_path).warnings
    assert few.startswith("from so few conversations (30), a new model learns these sentences, not how to chat; to add")
    assert "python train.py --dataset chitchat=0.8,mine=0.2 --init_from models/chitchat1500.pt" in few


TALES = Tokenizer.from_vocabulary("tales", Vocabulary(GPT2_PATTERN, tuple(bytes([byte]) for byte in range(256))))


def save_model(path: Path, tokenizer: Tokenizer = GPT2) -> None:
    save_checkpoint(path, text_gpt(), {"tokenizer": tokenizer.to_info()})


def test_few_conversations_are_added_to_a_model_that_chats(tmp_path):
    for name in ("story5000.pt", "chitchat900-best.pt", "chitchat+mine100.pt"):
        save_model(tmp_path / name)
    (tmp_path / "chitchat50.pt").touch()  # damaged
    chitchat = info_of(900_000, "chat", name="chitchat")
    (tmp_path / "chitchat.json").write_bytes(info_bytes(chitchat))
    folder = str(tmp_path)
    assert "--init_from" not in advise(info_of(1_500, "chat"), folder, tmp_path).arguments
    base = tmp_path / "chitchat900.pt"
    save_model(base)
    found = advise(info_of(1_500, "chat"), folder, tmp_path)
    expected = f"--dataset chitchat=0.8,mine=0.2 --init_from {base} --max_iters 300 --data_dir {folder}"
    assert shlex.join(found.arguments) == expected and not found.warnings
    assert found.epochs == 40  # 300 * 4 rows, a fifth of them from 6 rows
    other_ids = dataclasses.replace(info_of(1_500, "chat"), tokenizer="tales", tokenizer_digest=TALES.digest)
    for other in (info_of(1_500), info_of(1_500, "chat", name="chitchat"), info_of(900_000, "chat"), other_ids):
        assert "--init_from" not in advise(other, folder, tmp_path).arguments
    demo = dataclasses.replace(chitchat, tokenizer="tales", tokenizer_digest=TALES.digest)
    (tmp_path / "chitchat.json").write_bytes(info_bytes(demo))
    assert "--init_from" not in advise(other_ids, folder, tmp_path).arguments  # the model has GPT-2's vocabulary
    save_model(base, TALES)
    assert shlex.join(advise(other_ids, folder, tmp_path).arguments) == expected
    assert "--init_from" not in advise(info_of(1_500, "chat"), folder, tmp_path).arguments
    (tmp_path / "chitchat.json").unlink()
    assert "--init_from" not in advise(info_of(1_500, "chat"), folder, tmp_path).arguments


def test_another_folder_is_part_of_the_command(tmp_path, capsys):
    print_advice(info_of(50_000), "my data", tmp_path)
    training, command = capsys.readouterr().out.splitlines()
    assert training.startswith("training: 100 iterations, 8.2 epochs, ") and training.endswith(" on this CPU")
    assert command == "next: python train.py --dataset mine --preset tiny --max_iters 100 --data_dir 'my data'"


def test_the_work_of_a_token_is_that_of_the_presets():
    for preset, shape in SHAPES.items():
        config = PRESETS[preset]
        assert (config.n_layer, config.n_embd) == shape
        for n_vocab in (50259, 4096):
            small = dataclasses.replace(config, n_vocab=n_vocab, vocab_size=padded_vocab_size(n_vocab))
            assert flops_per_token(*shape, n_vocab, config.block_size) == pytest.approx(
                GPT(small).flops_per_token(), rel=0.01
            )


def test_the_speed_is_that_of_a_computer():
    assert 1e8 < numpy_flops() < 1e14


@pytest.mark.parametrize(
    ("flags", "gains"),
    [({"avx2"}, (1, 1)), ({"avx512_bf16"}, (2.5, 2.5)), ({"avx512_bf16", "amx_bf16"}, BFLOAT16_GAINS["amx_bf16"])],
)
def test_blocks_and_head_gain_differently_from_bfloat16_in_hardware(flags, gains):
    in_blocks, in_head = 6 * 12 * 4 * 128**2 + 12 * 4 * 128 * 256, 6 * 4096 * 128
    found = seconds_per_token((4, 128, 4096, 256), 1e11, flags)
    assert found == pytest.approx((in_blocks / gains[0] + in_head / gains[1]) / (0.7 * 1e11))


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (20, "less than a minute"),
        (70, "about a minute"),
        (200, "about 3 minutes"),
        (2_500, "about 40 minutes"),
        (9_000, "about 2.5 hours"),
        (40_000, "about 11 hours"),
    ],
)
def test_a_duration_is_rough(seconds, words):
    assert duration_in_words(seconds) == words
