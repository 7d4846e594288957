"""exchange/choosing.py: which model is used if none is named, and what gen.py, /model and serve.py say about it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import serve
from common.checkpoint import save_checkpoint
from common.cli import UserError
from exchange.choosing import chat_models, chat_share, listing, named_model, names, newest_models
from tests.tiny_gpt import tiny_gpt

MILLION = 1_000_000


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, with an empty folder models/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    return tmp_path


def write(name: str, tokens_seen: float, iter_num: int = 100, **changes) -> None:
    """A checkpoint models/NAME.pt of a run over 100 iterations; each one is newer than those before."""
    config = {"max_iters": 100, "init_from": changes.pop("init_from", None)}
    info = {"dataset": "chitchat", "format": "chat", "data": {"format": "chat"}, "config": config}
    path = Path(f"models/{name}.pt")
    save_checkpoint(path, tiny_gpt(), {**info, "iter_num": iter_num, "tokens_seen": int(tokens_seen), **changes})
    n_before = len(list(path.parent.iterdir()))
    os.utime(path, (n_before, n_before))


def order(models) -> list[str]:
    return [model.name for model in models]


def test_the_best_trained_chat_model_comes_first(folder):
    write("long", 7 * MILLION)
    write("long-best", 9 * MILLION)
    write("long-iter00000100", 9 * MILLION)
    write("stopped", 8 * MILLION, iter_num=99)
    write("short", 4 * MILLION)
    write("short-lower-loss", 4 * MILLION, val_loss=0.1)
    write("tiny", 0.4 * MILLION)
    write("story", 90 * MILLION, format="text", data={"format": "text"})
    finished = ["long", "short-lower-loss", "short"]
    assert order(chat_models()) == [*finished, "long-best", "long-iter00000100", "stopped", "tiny"]
    assert order(newest_models()) == [
        *("story", "tiny", "short-lower-loss", "short", "stopped", "long-iter00000100", "long-best", "long")
    ]


def test_only_tokens_of_chat_data_count_and_those_of_the_model_it_started_from(folder):
    parts = [{"format": "text", "weight": 0.75}, {"format": "chat", "weight": 0.25}]
    write("mixed", 12 * MILLION, data={"parts": parts})
    write("base", 4 * MILLION)
    write("tuned", 0.2 * MILLION, init_from="models/base.pt")
    write("again", 0.1 * MILLION, init_from="models/again.pt")  # its source has been replaced by itself
    assert order(chat_models()) == ["tuned", "base", "mixed", "again"]
    assert [model.chat_tokens / MILLION for model in chat_models()] == pytest.approx([4.2, 4, 3, 0.1])
    assert chat_models()[0].description == "chitchat, 200,000 tokens, started from base"
    assert chat_share({"format": "text", "data": {}}) == 0 and chat_share({"format": "chat"}) == 1


def test_a_run_that_ended_with_its_best_checkpoint_is_one_model(folder):
    write("run", 4 * MILLION)
    os.link("models/run.pt", "models/run-best.pt")
    assert order(newest_models()) == order(chat_models()) == ["run"], "the same file is listed once"
    assert named_model("run-best", chat_models()).path == Path("models/run-best.pt")


def test_models_are_listed_with_data_tokens_and_validation_loss(folder):
    write("long", 6_963_200, val_loss=0.19185)
    write("stopped", 8 * MILLION, iter_num=40, val_loss=1.25)
    assert listing(chat_models(), "models/stopped.pt").splitlines() == [
        "  long     chitchat, 7.0 M tokens, validation loss 0.192",
        "* stopped  chitchat, 8.0 M tokens, validation loss 1.25, iteration 40 of 100",
    ]
    assert listing(chat_models()[:1], "gpt2").splitlines()[1:] == ["* gpt2"]  # a model from elsewhere
    assert names(chat_models()) == "long, stopped"
    assert names(chat_models() * 5) == "long, stopped, long, stopped, long, stopped, long, stopped, and 2 more"


def test_a_model_is_found_by_its_name_its_file_or_its_path(folder):
    write("one", MILLION)
    write("two", 2 * MILLION)
    for name in ("one", "one.pt", "models/one.pt"):
        assert named_model(name, chat_models()).path == Path("models/one.pt")
    Path("models/one.pt").rename("elsewhere.pt")
    assert named_model("elsewhere.pt", chat_models()).info["tokens_seen"] == MILLION
    write("three", 3 * MILLION)
    with pytest.raises(UserError, match=r"^there is no model four; choose one of three, two$"):
        named_model("four", chat_models())


def test_unreadable_files_are_skipped_and_an_empty_folder_is_an_error(folder, capsys):
    with pytest.raises(UserError, match=r"^no checkpoint in models; train one with: python train.py, or .*: make demo"):
        newest_models()
    Path("models/damaged.pt").write_bytes(b"no checkpoint")
    write("story", MILLION, format="text", data={"format": "text"})
    assert order(newest_models()) == ["story"]
    assert "skipped: models/damaged.pt is not a readable checkpoint" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"trained on chat data \(found: models/story.pt\); train one .*: make demo"):
        chat_models()


def test_serve_offers_the_chat_models_in_the_same_order(folder):
    write("short", 4 * MILLION)
    write("long", 7 * MILLION)
    write("story", 90 * MILLION, format="text", data={"format": "text"})
    assert serve.choose_checkpoints(serve.ServeOptions()) == ["models/long.pt", "models/short.pt"]
    named = ("models/story.pt", "models/long.pt", "models/story.pt")
    assert serve.choose_checkpoints(serve.ServeOptions(named)) == ["models/story.pt", "models/long.pt"]
