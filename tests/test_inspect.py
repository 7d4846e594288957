"""The pictures are true: attention maps, token losses, colours, and the curves of runs."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.checkpoint import save_checkpoint
from common.cli import UserError
from generation.decoding import generate
from generation.sampling import Sampling
from model import GPT, GPTConfig
from setup_tokenizer import ENDOFTEXT_ID, IM_START_ID, encode_chat, encode_text, token_text
from training.metrics import draw_curves

ROOT = Path(__file__).resolve().parent.parent
PNG = b"\x89PNG\r\n\x1a\n"


def load(name: str):
    """A tool as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "testing_tools" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sys.path.insert(0, str(ROOT / "testing_tools"))
inspect_model = load("inspect_model")
sys.path.remove(str(ROOT / "testing_tools"))
token_page = sys.modules["token_page"]
plot_runs = load("plot_runs")


def tiny_model() -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, n_layer=2, n_head=4, n_embd=32)).eval().requires_grad_(False)
    for weight in model.parameters():  # far from uniform attention
        weight.mul_(8)
    return model


def greedy(model: GPT, ids: list[int], n: int):
    return generate(model, [ids], n, Sampling(temperature=0))


def write_checkpoint(folder: Path, kind: str = "text") -> Path:
    path = folder / f"{kind}9.pt"
    save_checkpoint(path, tiny_model(), {"dataset": kind, "format": kind, "config": {}})
    return path


class Page(HTMLParser):
    """The text's tokens of a page, (style, tooltip, text) each, and its tags as they open and close."""

    def __init__(self, source: str):
        super().__init__()
        self.tokens, self.open, self.tags, self.legend, self.cells = [], [], set(), [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        attributes = dict(attributes)
        if tag not in ("meta", "br"):
            self.open.append((tag, attributes.get("class")))
        if tag == "span":
            target = self.tokens if ("div", "text") in self.open else self.legend
            target.append([attributes.get("style"), attributes.get("title"), ""])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "span":
            (self.tokens if ("div", "text") in self.open else self.legend)[-1][2] += data
        elif self.open and self.open[-1][0] == "td":
            self.cells.append(data)


def test_the_maps_are_the_attention_that_the_model_uses():
    model, ids = tiny_model(), [ENDOFTEXT_ID, *encode_text("A small cat sat on the mat and ate")]
    seen = []  # (input, output) of each layer's attention
    for block in model.h:
        block.attn.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    log_probabilities, maps = inspect_model.look(model, ids)
    T = len(ids)
    assert maps.shape == (2, 4, T, T)
    assert torch.equal(maps, maps.tril()) and torch.allclose(maps.sum(-1), torch.ones(2, 4, T))
    assert maps.std(-1).max() > 0.2  # no trivial maps
    for layer, (block, (x, y)) in enumerate(zip(model.h, seen, strict=True)):
        values = block.attn.c_attn(x).view(T, 3, 4, 8)[:, 2].transpose(0, 1)  # (H, T, D)
        again = block.attn.c_proj((maps[layer] @ values).transpose(0, 1).reshape(T, 32))
        torch.testing.assert_close(again, y[0], atol=1e-4, rtol=1e-4)
    expected = model(torch.tensor([ids]))[0][0, :, : model.config.n_vocab].log_softmax(-1)
    torch.testing.assert_close(log_probabilities, expected, atol=1e-4, rtol=1e-4)
    assert not any(block.attn.c_attn._forward_hooks for block in model.h)


def test_token_losses_and_ranks_are_those_of_the_logits():
    model, ids = tiny_model(), [ENDOFTEXT_ID, *encode_text("The cat sat.")]
    log_probabilities, _ = inspect_model.look(model, ids)
    seen = token_page.token_losses(ids, log_probabilities)
    logits = model(torch.tensor([ids]))[0][0, :-1, : model.config.n_vocab]
    expected = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
    np.testing.assert_allclose([token.loss for token in seen], expected, atol=1e-3)
    order = logits.argsort(-1, descending=True)
    for position, token in enumerate(seen):
        assert order[position, token.rank - 1] == token.token_id == ids[position + 1]
        assert token.probability == pytest.approx(math.exp(-token.loss))


def test_every_background_leaves_its_text_readable():
    previous = math.inf
    for hundredths in range(1001):
        background = token_page.loss_colour(hundredths / 100)
        light, text = (token_page.luminance(c) for c in (background, token_page.text_colour(background)))
        assert (max(light, text) + 0.05) / (min(light, text) + 0.05) >= 4.5
        assert light <= previous + 1e-9  # a larger loss is never lighter
        previous = light
    assert token_page.loss_colour(99) == token_page.loss_colour(token_page.TOP_LOSS)
    assert token_page.luminance((255, 255, 255)) == pytest.approx(1)


def test_the_page_shows_any_text_and_runs_none_of_it():
    text = '<script>alert("1")</script> & "quoted" \'single\' {brace}\n\nna\u00efve \U0001f600 </span>'
    ids = [ENDOFTEXT_ID, *encode_text(text)]
    seen = [token_page.TokenLoss(i, token_text(i), 0.25, 3, 1.386) for i in ids[1:]]
    page = Page(token_page.losses_page("<b>model</b>", ids, seen, n_prompt=len(ids)))
    assert not page.tags & {"script", "b", "img", "link"}
    assert [token[2] for token in page.tokens] == ["<|endoftext|>", *(token.text for token in seen)]
    assert page.tokens[0][:2] == [None, None]
    for (style, tooltip, _), token in zip(page.tokens[1:], seen, strict=True):
        assert style == token_page.style(1.386)
        assert tooltip == f"{token.text}: probability 25.00%, rank 3, loss 1.39 nats"
    assert page.cells[:6] == ["1", str(ids[1]), "25.00%", "3", "1.386", seen[0].text]
    legend = ["0100%", "137%", "214%", "35%", "41.8%", "50.67%", "60.25%", "70.091%", "8+0.034%"]
    assert [label for _, _, label in page.legend] == legend  # the loss, and exp(-loss)


def test_the_prompt_is_what_gen_gives_the_model():
    assert inspect_model.prompt_ids("A <|im_end|>", False) == [ENDOFTEXT_ID, *encode_text("A <|im_end|>")]
    assert inspect_model.prompt_ids("", False) == [ENDOFTEXT_ID]
    assert inspect_model.prompt_ids("Hi", True) == encode_chat([{"role": "user", "content": "Hi"}], True)


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_inspecting_a_checkpoint_writes_a_picture_and_a_page(tmp_path, capsys, kind):
    options = inspect_model.InspectOptions(
        str(write_checkpoint(tmp_path, kind)), "A $5 cat", max_tokens=5, top_k=3, device="cpu"
    )
    picture, page = inspect_model.inspect(options)
    assert picture.name == f"{kind}9-attention.png" and picture.read_bytes().startswith(PNG)
    tokens = Page(page.read_text(encoding="utf-8")).tokens
    ids = inspect_model.prompt_ids("A $5 cat", kind == "chat")
    reply = [token.tolist()[0] for token in greedy(tiny_model(), ids, 5)]
    assert [token[2] for token in tokens] == [token_text(i) for i in [*ids, *reply]]
    assert (ids[0] == IM_START_ID) == (kind == "chat")
    printed = capsys.readouterr().out.splitlines()
    probabilities = inspect_model.look(tiny_model(), ids)[0][-1].exp()
    top = probabilities.topk(3)
    shown = [line.split()[1] for line in printed if line.strip()[0].isdigit()]
    assert shown == [str(i) for i in top.indices.tolist()]
    assert token_page.percent(top.values[0].item()) in "\n".join(printed)


def test_long_prompts_and_one_layer(tmp_path, capsys):
    path = write_checkpoint(tmp_path)
    options = inspect_model.InspectOptions(str(path), "word " * 50, layer=1, device="cpu")
    _, page = inspect_model.inspect(options)
    assert len(Page(page.read_text(encoding="utf-8")).tokens) == 32
    assert "only the last 32 are used" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layer": 2}, "--layer 2 does not exist; .* has the layers 0 to 1"),
        ({"output_dir": "missing"}, "--output_dir missing does not exist"),
        ({"checkpoint": "missing.pt"}, "missing.pt not found"),
    ],
)
def test_what_cannot_be_inspected_is_said(tmp_path, monkeypatch, settings, words):
    monkeypatch.chdir(tmp_path)
    given = {"checkpoint": str(write_checkpoint(tmp_path)), "prompt": "A", "device": "cpu", **settings}
    with pytest.raises(UserError, match=words):
        inspect_model.inspect(inspect_model.InspectOptions(**given))
    assert not list(tmp_path.glob("*.png")) and not list(tmp_path.glob("*.html"))


def test_axis_labels_are_short_and_in_the_pictures_font():
    labels = [inspect_model.axis_label(token_text(token_id)) for token_id in range(50259)]
    assert max(map(len, labels)) <= 14 + 2
    assert all(label.strip() and all(ord(c) < 0x250 or c == "\u2026" for c in label) for label in labels)


RECORDS = [
    {"iter_num": 0, "val_loss": 10.8},
    {"iter_num": 1, "loss": 10.0, "learning_rate": 1e-3, "grad_norm": 3.0, "tokens_seen": 2000000, "elapsed_s": 30.0},
    {"iter_num": 5, "loss": 4.0, "val_loss": 4.5, "grad_norm": 0.4, "tokens_seen": 4000000, "elapsed_s": 90.0},
]


def test_runs_are_placed_by_iteration_tokens_or_time():
    assert plot_runs.points(RECORDS, "loss", "iter") == ([1, 5], [10.0, 4.0])
    assert plot_runs.points(RECORDS, "loss", "tokens") == ([2, 4], [10.0, 4.0])
    assert plot_runs.points(RECORDS, "val_loss", "time") == ([0, 1.5], [10.8, 4.5])


def test_smoothing_keeps_short_logs_and_constants_and_calms_noise():
    assert plot_runs.smooth([3.0, 1.0, 2.0]) == [3.0, 1.0, 2.0]
    assert plot_runs.smooth([2.0] * 500) == pytest.approx([2.0] * 500)
    noise = np.random.default_rng(0).normal(2, 1, 2000).tolist()
    assert np.std(plot_runs.smooth(noise)[100:]) < 0.3
    assert plot_runs.smooth([]) == []


def test_runs_are_drawn_into_one_picture(tmp_path):
    paths = []
    for name in ("one/story9", "two/story9", "chat9"):
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].parent.mkdir(exist_ok=True)
        paths[-1].write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    assert list(plot_runs.read_runs([str(p) for p in paths])) == [
        str(tmp_path / "one/story9"),
        str(tmp_path / "two/story9"),
        "chat9",
    ]
    script = ROOT / "testing_tools" / "plot_runs.py"
    done = subprocess.run(
        [sys.executable, script, *paths, "--by", "tokens"], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "one" / "runs.png").read_bytes().startswith(PNG)
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"iter_num": 1}\n')
    for argument, words in ((empty, "contains no loss"), (tmp_path / "x.jsonl", "not found")):
        done = subprocess.run([sys.executable, script, argument], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("last", [1, 2, 3])
def test_a_runs_curves_are_drawn_from_its_first_record_on(tmp_path, last):
    assert draw_curves(tmp_path / "run.png", RECORDS[:last], "run")
    assert (tmp_path / "run.png").read_bytes().startswith(PNG)
