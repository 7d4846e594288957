"""Checkpoints: they load as saved, damage is detected, code is never run, files of other software are recognized."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import pickle
import random
import re
import stat
import zipfile

import numpy as np
import pytest
import torch

from common import checkpoint
from common.checkpoint import (
    build_model,
    copy_checkpoint,
    digest,
    keep_newest_files,
    load_weights,
    random_states,
    save_checkpoint,
    set_random_states,
)
from common.cli import UserError
from exchange.loading import load_checkpoint, load_model, read_info
from model import GPT, GPTConfig

TINY = GPTConfig(block_size=8, vocab_size=64, n_vocab=60, n_layer=2, n_head=2, n_embd=16)
INFO = {
    "iter_num": 7,
    "val_loss": 3.25,
    "train_loss": None,
    "record": {"iter_num": 7, "grad_norm": float("inf")},
    "config": {"dataset": "story", "keep": 0, "compile": False},
    "names": ["a", "b\n", "\u00e9"],
}
TRAINING = {
    "optimizers": [{"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.arange(6.0).view(2, 3)}}}],
    "position": {"epoch": 1, "row": 5},
    "random": {"torch": torch.get_rng_state(), "python": [3, [1, 2**32 - 1], None]},
    "scaler": {},
}


@pytest.fixture(scope="module")
def gpt():
    torch.manual_seed(0)
    return GPT(TINY)


@pytest.fixture
def path(tmp_path, gpt):
    save_checkpoint(tmp_path / "a.pt", gpt, INFO, TRAINING)
    return tmp_path / "a.pt"


def equal(ours, theirs) -> bool:
    """Whether two nested structures are the same, without the project's own digest."""
    if isinstance(ours, torch.Tensor):
        return isinstance(theirs, torch.Tensor) and ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return (
            isinstance(theirs, dict) and ours.keys() == theirs.keys() and all(equal(ours[k], theirs[k]) for k in ours)
        )
    if isinstance(ours, (list, tuple)):
        return isinstance(theirs, (list, tuple)) and len(ours) == len(theirs) and all(map(equal, ours, theirs))
    return type(ours) is type(theirs) and ours == theirs


def test_what_is_saved_is_loaded(path, gpt):
    saved = load_checkpoint(path)
    assert saved.keys() == {"info", "model", "training"}
    assert equal(saved["info"], {**INFO, "model": vars(TINY)})
    assert equal(saved["model"], dict(gpt.state_dict()))
    assert equal(saved["training"], TRAINING)
    assert equal(read_info(path), saved["info"])
    assert load_checkpoint(path, ("model",)).keys() == {"model"}


def test_the_model_comes_back(path, gpt):
    loaded, info = load_model(path)
    ids = torch.arange(8)[None]
    assert torch.equal(loaded(ids)[0], gpt.eval()(ids)[0])
    assert loaded.config == TINY and info["iter_num"] == 7
    assert not loaded.training and not any(weight.requires_grad for weight in loaded.parameters())
    assert load_model(path, dtype="bfloat16")[0].wte.weight.dtype == torch.bfloat16


def test_weights_alone_have_no_training(tmp_path, gpt):
    save_checkpoint(tmp_path / "w.pt", gpt, {"iter_num": 1})
    assert load_checkpoint(tmp_path / "w.pt")["training"] is None


def test_what_is_not_plain_is_refused_when_it_is_saved(tmp_path, gpt):
    with pytest.raises(TypeError, match="plain types and tensors, not ndarray"):
        save_checkpoint(tmp_path / "a.pt", gpt, {"array": np.zeros(2)})
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_permissions_are_those_that_the_umask_gives(tmp_path, gpt):
    before = os.umask(0o027)
    try:
        save_checkpoint(tmp_path / "a.pt", gpt, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.pt").stat().st_mode) == 0o640


def test_the_digest_sees_every_difference():
    parts = [
        *({}, {"a": 1}, {"b": 1}, {"a": 2}, {"a": 1.0}, {"a": True}, {"a": "1"}, {"a": None}, {"a": [1]}, {"a": [[1]]}),
        *({"a": [1, 2]}, {"a": [12]}, {"a": "x\n", "b": "y"}, {"a": "x", "b": "\ny"}, {1: "a"}, {"1": "a"}),
        *(
            torch.zeros(2),
            torch.zeros(3),
            torch.zeros(1, 2),
            torch.zeros(2, dtype=torch.int32),
            torch.tensor([0.0, -0.0]),
        ),
        *(torch.zeros(2, dtype=torch.bool), torch.zeros(0), torch.zeros(2, 0), 0.0, -0.0, 0, False, None, "", [], [[]]),
    ]
    assert len({digest(part) for part in parts}) == len(parts)
    strided = torch.arange(6).view(2, 3).t()
    assert digest(strided) == digest(strided.contiguous())
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


# Damage


class Bomb:
    """What an attacker would send: unpickling it makes a file."""

    def __reduce__(self):
        return (open, ("exploded", "w"))


def zipped(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def test_code_in_a_pickle_is_never_run(tmp_path, monkeypatch, gpt):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Bomb()))
    torch.save(Bomb(), tmp_path / "zip.pt")
    torch.save({"format": checkpoint.FORMAT, "model": Bomb()}, tmp_path / "ours.pt")
    torch.save({"model": {}, "model_args": Bomb()}, tmp_path / "nanogpt.pt")
    torch.save(gpt, tmp_path / "module.pt")
    torch.save(Bomb(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for path in tmp_path.glob("*.pt"):
        for load in (load_checkpoint, read_info, load_model):
            with pytest.raises(
                UserError, match=f"{path.name} (contains pickled code|is not a readable checkpoint)"
            ) as error:
                load(path)
            assert "\n" not in str(error.value)
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(UserError, match="contains pickled code and was not loaded"):
        load_checkpoint(tmp_path / "zip.pt")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a checkpoint at all",
        b"\x80\x04N.",
        zipped(readme=b"hello"),
        zipped(**{"archive/data.pkl": b"\x80\x02}q\x00.", "archive/version": b"3\n"}),
        json.dumps({"format": "jojo-1"}).encode(),
    ],
    ids=["empty", "text", "pickle", "zip", "zip-with-a-dict", "json"],
)
def test_files_of_another_kind_are_one_sentence(tmp_path, content):
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a.pt (is not a readable checkpoint|was written by other software)"):
        load_checkpoint(path)


def test_checkpoints_of_other_software_are_named_so(tmp_path):
    for number, content in enumerate([{"state_dict": {"w": torch.zeros(2)}}, [torch.zeros(2)], torch.zeros(2), None]):
        torch.save(content, tmp_path / f"{number}.pt")
        with pytest.raises(
            UserError, match=f"{number}.pt was written by other software; use a checkpoint made by train.py"
        ):
            load_checkpoint(tmp_path / f"{number}.pt")


def test_a_missing_file_names_those_that_are_there(path):
    with pytest.raises(UserError, match=r"b.pt not found; there are .*a.pt; make another with: python train.py"):
        load_checkpoint(path.with_name("b.pt"))
    with pytest.raises(UserError, match=r"not found; make one with: python train.py"):
        load_checkpoint(path.parent / "nowhere" / "b.pt")


def test_a_checkpoint_that_does_not_fit_itself_is_refused(tmp_path, gpt):
    class Other:
        config = GPTConfig(block_size=8, vocab_size=64, n_vocab=60, n_layer=1, n_head=2, n_embd=16)
        state_dict = gpt.state_dict

    save_checkpoint(tmp_path / "a.pt", Other(), {})
    with pytest.raises(UserError, match="does not fit its own configuration") as error:
        load_model(tmp_path / "a.pt")
    assert "\n" not in str(error.value)


# nanoGPT


def nanogpt(gpt: GPT, prefix: str) -> dict:
    """The same weights as nanoGPT's train.py saves them."""
    config = gpt.config
    state = {}
    for name, tensor in gpt.state_dict().items():
        state[f"{prefix}transformer.{name}"] = tensor
    state[f"{prefix}lm_head.weight"] = gpt.wte.weight.detach()
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    arguments = {name: getattr(config, name) for name in names}
    return {"model": state, "optimizer": {"state": {}}, "model_args": arguments, "iter_num": 9, "best_val_loss": 1.0}


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
def test_nanogpts_checkpoints_load_as_weights(tmp_path, prefix, bias):
    theirs = GPT(GPTConfig(block_size=8, vocab_size=50257, n_vocab=50257, n_layer=1, n_head=2, n_embd=8, bias=bias))
    torch.save(nanogpt(theirs, prefix), tmp_path / "ckpt.pt")
    loaded, info = load_model(tmp_path / "ckpt.pt")
    ids = torch.tensor([[1, 50256, 3]])
    assert torch.equal(loaded(ids)[0], theirs.eval()(ids)[0])
    assert loaded.config == theirs.config and info["format"] == "text"
    saved = load_checkpoint(tmp_path / "ckpt.pt")
    assert saved["training"] is None
    with pytest.raises(UserError, match="written by other software"):
        checkpoint.load_checkpoint(tmp_path / "ckpt.pt")

    wider = GPT(GPTConfig(block_size=8, n_layer=1, n_head=2, n_embd=8, bias=bias))
    fresh = wider.wte.weight.detach().clone()
    load_weights(wider, saved["model"], "ckpt.pt")
    assert torch.equal(wider.wte.weight[:50257], theirs.wte.weight)
    assert torch.equal(wider.wte.weight[50257:], fresh[50257:]), "ChatML's tokens start anew"


def test_a_damaged_nanogpt_checkpoint_is_refused(tmp_path):
    theirs = GPT(GPTConfig(block_size=8, vocab_size=50257, n_vocab=50257, n_layer=1, n_head=2, n_embd=8))
    content = nanogpt(theirs, "")
    path = tmp_path / "ckpt.pt"
    torch.save(content, path)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 4  # in the middle of a tensor
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"ckpt.pt is damaged"):
        load_checkpoint(path)
    for missing in ("n_head", "bias"):
        incomplete = {**content, "model_args": {k: v for k, v in content["model_args"].items() if k != missing}}
        torch.save(incomplete, path)
        with pytest.raises(UserError, match="is an incomplete nanoGPT checkpoint"):
            load_checkpoint(path)


def test_another_vocabulary_is_refused(gpt, path):
    larger = dataclasses.replace(TINY, vocab_size=128, n_vocab=100)
    with pytest.raises(UserError, match=r"a.pt has a vocabulary of 64 ids instead of the 100 of the data's tokenizer"):
        load_weights(GPT(larger), gpt.state_dict(), "a.pt")


# Names, copies, random states


def test_a_copy_stays_when_the_first_is_written_again(path, gpt):
    copy, before = path.with_name("copy.pt"), path.read_bytes()
    copy_checkpoint(path, copy)
    copy_checkpoint(path, copy)  # over a link to the same file
    save_checkpoint(path, gpt, {"iter_num": 8})
    assert copy.read_bytes() == before and read_info(path)["iter_num"] == 8
    copy_checkpoint(path, copy)
    assert read_info(copy)["iter_num"] == 8
    assert sorted(file.name for file in path.parent.iterdir()) == ["a.pt", "copy.pt"]


def test_a_copy_without_hard_links_and_on_a_full_disk(path, monkeypatch):
    def no_links(*arguments):
        raise OSError(errno.EOPNOTSUPP, "no links here")

    def full(*arguments):
        raise OSError(errno.ENOSPC, "full")

    copy = path.with_name("copy.pt")
    monkeypatch.setattr(os, "link", no_links)
    copy_checkpoint(path, copy)
    assert copy.read_bytes() == path.read_bytes()
    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(UserError, match=r"copy.pt not written: the disk is full"):
        copy_checkpoint(path, copy)
    monkeypatch.undo()
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"copy.pt not written: the disk is full"):
        copy_checkpoint(path, copy)
    assert sorted(file.name for file in path.parent.iterdir()) == ["a.pt", "copy.pt"]


def test_a_disk_that_fills_while_saving_leaves_the_old_checkpoint(path, gpt, monkeypatch):
    before = path.read_bytes()

    class FullDisk(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > 20_000:
                raise OSError(errno.ENOSPC, "full")
            return super().write(data)

    monkeypatch.setattr("builtins.open", FullDisk)
    with pytest.raises(UserError, match=r"a.pt not written: the disk is full; free some space"):
        save_checkpoint(path, gpt, INFO, TRAINING)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["a.pt"]


def test_the_youngest_are_kept(tmp_path):
    for age, name in enumerate(["x-iter3.pt", "x-iter1.pt", "x-iter2.pt", "other.pt"]):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, ns=(0, 10**9 * age))
    keep_newest_files(tmp_path, "x-iter*.pt", 5)
    assert len(list(tmp_path.iterdir())) == 4
    keep_newest_files(tmp_path, "x-iter*.pt", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.pt", "x-iter1.pt", "x-iter2.pt"]


def test_random_states_survive_a_checkpoint(tmp_path, gpt):
    def draw():
        return (random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist())

    draw()
    save_checkpoint(tmp_path / "a.pt", gpt, {}, {"random": random_states("cpu")})
    expected = [draw(), draw()]
    set_random_states(load_checkpoint(tmp_path / "a.pt")["training"]["random"], "cpu")
    assert [draw(), draw()] == expected


def test_the_size_is_estimated_well(path, tmp_path):
    big = GPT(GPTConfig(block_size=64, vocab_size=9000, n_vocab=9000, n_layer=2, n_head=2, n_embd=64))
    states = {name: [torch.zeros_like(weight)] * 1 for name, weight in big.named_parameters()}
    second = {name: torch.zeros_like(weight) for name, weight in big.named_parameters()}
    save_checkpoint(tmp_path / "big.pt", big, {}, {"first": states, "second": second})
    size = (tmp_path / "big.pt").stat().st_size
    assert size <= checkpoint.checkpoint_bytes(big) < 1.5 * size


def test_the_sentences_name_no_private_path(path):
    (path.parent / "b.pt").write_bytes(b"x")
    with pytest.raises(UserError) as error:
        load_checkpoint(path.parent / "b.pt")
    assert not re.search(r"site-packages|Traceback", str(error.value))


def test_the_model_is_built_without_copying(path):
    saved = load_checkpoint(path)
    built = build_model(path, saved)
    assert built.wte.weight.data_ptr() == saved["model"]["wte.weight"].data_ptr()
