"""Damaged checkpoints are refused, or load exactly what was saved."""

from __future__ import annotations

import pickle
import random

import pytest
import torch

from common.cli import UserError
from exchange.loading import load_checkpoint
from tests.test_checkpoint import equal, gpt, path  # noqa: F401


def check_damaged(path, content: bytes, expected: dict) -> bool:
    """Load a damaged file: a clear refusal (False) or exactly what was saved (True)."""
    path.write_bytes(content)
    try:
        saved = load_checkpoint(path)
    except UserError as error:
        sentence = str(error)
        assert str(path) in sentence and "\n" not in sentence and "; " in sentence
        return False
    assert equal(saved, expected), "a wrong model in silence"
    return True


def test_every_truncation_is_refused(path):
    content, expected = path.read_bytes(), load_checkpoint(path)
    expected = pickle.loads(pickle.dumps(expected))  # a copy: the loaded tensors are views into the file
    draw = random.Random(1)
    sizes = {0, 1, 2, 100, len(content) - 1, len(content) - 22, *(draw.randrange(len(content)) for _ in range(100))}
    damaged = path.with_name("damaged.pt")
    assert not any(check_damaged(damaged, content[:size], expected) for size in sizes)


def test_a_bit_flip_is_refused_or_harmless(path):
    content = path.read_bytes()
    expected = pickle.loads(pickle.dumps(load_checkpoint(path)))
    draw = random.Random(2)
    damaged = path.with_name("damaged.pt")
    refused = 0
    # Half of the flips go where the structure is: the pickle at the start and the zip's directory at the end.
    positions = [draw.randrange(len(content)) for _ in range(200)]
    positions += [draw.randrange(4000) for _ in range(150)] + [
        len(content) - 1 - draw.randrange(3000) for _ in range(100)
    ]
    for position in positions:
        flipped = bytearray(content)
        flipped[position] ^= 1 << draw.randrange(8)
        refused += not check_damaged(damaged, bytes(flipped), expected)
    assert 150 < refused < len(positions)  # some flips hit padding, the zip's dates and the like


def test_a_block_of_zeros_or_of_another_file_is_refused_or_harmless(path):
    content = path.read_bytes()
    expected = pickle.loads(pickle.dumps(load_checkpoint(path)))
    draw = random.Random(3)
    damaged = path.with_name("damaged.pt")
    for _ in range(60):
        start, length = draw.randrange(len(content)), draw.choice([1, 16, 512, 4096])
        block = draw.choice([bytes(length), draw.randbytes(length), content[:length]])
        check_damaged(damaged, content[:start] + block + content[start + length :], expected)


def test_every_value_of_every_tensor_is_covered_by_the_digest(path):
    saved = torch.load(path, weights_only=True)
    for name in saved["model"]:
        changed = torch.load(path, weights_only=True)
        changed["model"][name].view(-1)[-1] += 1
        torch.save(changed, path.with_name("changed.pt"))
        with pytest.raises(UserError, match=r"is damaged .its model part does not match its digest"):
            load_checkpoint(path.with_name("changed.pt"))
    for part in ("info", "training"):
        changed = torch.load(path, weights_only=True)
        changed[part]["more"] = 1
        torch.save(changed, path.with_name("changed.pt"))
        with pytest.raises(UserError, match=f"its {part} part"):
            load_checkpoint(path.with_name("changed.pt"))


# Other files
