"""evaluate.py against brute force: every token once, in the right context, and honest comparisons."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
from common.checkpoint import save_checkpoint
from common.cli import UserError
from common.files import sha256_file
from common.speedups import load_speedups
from data.dataset import open_dataset
from evaluate import EvaluateOptions, measure
from evaluation import stories
from evaluation.bootstrap import NATS_PER_TOKEN, Scored, margin, paired_bootstrap
from evaluation.printing import digits_of, print_report, verdict_line
from evaluation.scoring import score, summarize, windows
from evaluation.splits import read_split
from fast.packed_linear import Int8Linear, is_exact
from model import GPT, GPTConfig
from setup_tokenizer import ENDOFTEXT_ID, encode_chat, encode_document
from training.mixture import mixture_facts, parse_mixture
from training.targets import assistant_targets

BLOCK_SIZE = 16
DOCUMENTS = [
    "Once upon a time there was a na\u00efve \U0001f600 fox. It ran and ran and ran.",
    "A cat sat.",
    "The end of the day came, and <|im_end|> was only text.\n\n",
]
CONVERSATIONS = [
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi! Who are you, and what do you like to do all day long?"},
        {"role": "assistant", "content": "I am Jojo \U0001f600 and I like stories about small cats."},
    ],
    [{"role": "user", "content": "\n\nHm"}, {"role": "assistant", "content": "<|im_end|> is text"}],
    [{"role": "user", "content": ""}, {"role": "assistant", "content": "Hello, Ana!"}],
]


def write_dataset(folder: Path, name: str, documents: list, shards: int = 1, **facts) -> Path:
    """A prepared data set whose two splits hold the same documents."""
    is_chat = not isinstance(documents[0], str)
    encoded = [encode_chat(d, end_of_conversation=True) if is_chat else encode_document(d) for d in documents]
    ids = np.array([i for document in encoded for i in document], dtype="<u2")
    splits = {}
    for split in ("train", "val"):
        paths = [folder / f"{name}-{split}{f'-{n:05d}' if shards > 1 else ''}.bin" for n in range(shards)]
        for path, part in zip(paths, np.array_split(ids, shards), strict=True):
            part.tofile(path)
        files = [{"file": path.name, "tokens": path.stat().st_size // 2, "sha256": sha256_file(path)} for path in paths]
        splits[split] = {"documents": len(documents), "tokens": len(ids), "files": files}
    content = {"name": name, "format": "chat" if is_chat else "text", "tokenizer": "gpt2_chatml", "n_vocab": 50259}
    (folder / f"{name}.json").write_text(json.dumps({**content, "splits": splits, **facts}))
    return folder


def tiny_model(seed: int = 0, **settings) -> GPT:
    torch.manual_seed(seed)
    config = GPTConfig(**{"block_size": BLOCK_SIZE, "n_layer": 2, "n_head": 2, "n_embd": 32, **settings})
    model = GPT(config).eval().requires_grad_(False)
    for weight in model.parameters():  # far from uniform, so that each id of context matters
        weight.mul_(5)
    return model


def write_checkpoint(path: Path, model: GPT, dataset: str, **info) -> str:
    tokenizer = {"name": "gpt2_chatml", "n_vocab": 50259}
    save_checkpoint(path, model, {"dataset": dataset, "format": "text", "tokenizer": tokenizer, "config": {}, **info})
    return str(path)


def val_split(folder: Path, name: str, limit: int | None = None):
    streams, facts = open_dataset(folder, name)
    return read_split(name, streams["val"], facts.format == "chat", limit)


def brute_force(model: GPT, context_start: int, ids: list[int], position: int) -> tuple[float, bool]:
    """Loss and correctness of one id from one forward pass over exactly its context."""
    logits = model(torch.tensor([ids[context_start:position]]))[0][0, -1, : model.config.n_vocab].double()
    return -logits.log_softmax(-1)[ids[position]].item(), int(logits.argmax()) == ids[position]


def context_start(span_start: int, position: int, stride: int) -> int:
    """Where the context of `position` begins: the first window, starting every `stride`, that reaches to it."""
    window = max(0, math.ceil((position - span_start - BLOCK_SIZE + 1) / stride))
    return span_start + window * stride - 1


@pytest.mark.parametrize("stride", [1, 5, 8, BLOCK_SIZE])
@pytest.mark.parametrize("shards", [1, 3])
def test_text_is_scored_as_brute_force_does(tmp_path, stride, shards):
    write_dataset(tmp_path, "story", DOCUMENTS, shards)
    split, model = val_split(tmp_path, "story"), tiny_model()
    losses, is_right = score(model, split, stride, batch_size=3)
    ids = [ENDOFTEXT_ID, *(i for document in DOCUMENTS for i in encode_document(document))]
    expected = [
        brute_force(model, context_start(1, position, stride), ids, position) for position in range(1, len(ids))
    ]
    assert math.isnan(losses[0])
    np.testing.assert_allclose(losses[1:], [loss for loss, _ in expected], atol=2e-4)
    assert is_right[1:].tolist() == [right for _, right in expected]
    numbers = summarize(split, "all", losses, is_right)
    nats = math.fsum(loss for loss, _ in expected)
    text_bytes = sum(len(document.encode()) for document in DOCUMENTS)
    assert numbers["tokens"] == len(ids) - 1 and numbers["text_bytes"] == text_bytes
    assert numbers["loss"] == pytest.approx(nats / (len(ids) - 1), abs=1e-4)
    assert numbers["perplexity"] == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-3)
    assert numbers["bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-4)


@pytest.mark.parametrize("n_left_out", [0, 2])
def test_with_a_document_mask_each_document_is_scored_alone(tmp_path, capsys, n_left_out):
    write_dataset(tmp_path, "story", DOCUMENTS)
    model, stride, expected = tiny_model(), 4, []
    documents = [[ENDOFTEXT_ID, *encode_document(document)] for document in DOCUMENTS]
    documents[-1] = documents[-1][: len(documents[-1]) - n_left_out]
    for ids in documents:
        expected += [brute_force(model, context_start(1, n, stride), ids, n)[0] for n in range(1, len(ids))]
    paths = [
        write_checkpoint(tmp_path / f"{masked}.pt", model, "story", config={"document_mask": masked})
        for masked in (True, False)
    ]
    options = EvaluateOptions(paths, data_dir=str(tmp_path), device="cpu", dtype="float32", stride=stride)
    report = measure(dataclasses.replace(options, limit=len(expected)))
    by_document, stream = report["datasets"]["story"]["results"]
    assert by_document["all"]["loss"] == pytest.approx(np.mean(expected), rel=1e-4)
    assert by_document["all"]["tokens"] == stream["all"]["tokens"] == len(expected)
    assert abs(stream["all"]["loss"] - by_document["all"]["loss"]) > 0.01
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert notes == [
        f"note: {paths[0]} was trained with --document_mask, so each document of story is scored separately"
    ]


def test_models_are_compared_token_by_token_with_a_document_mask_and_without(tmp_path):
    write_dataset(tmp_path, "story", DOCUMENTS * 20)
    paths = [
        write_checkpoint(tmp_path / f"{n}.pt", tiny_model(seed=n), "story", config={"document_mask": n < 2})
        for n in range(3)
    ]
    options = EvaluateOptions(paths, data_dir=str(tmp_path), device="cpu", dtype="float32")
    report = measure(options)["datasets"]["story"]
    bootstraps = [comparison["bootstrap"] for comparison in report["comparisons"]]
    assert {found["measure"] for found in bootstraps} == {NATS_PER_TOKEN}
    losses = [result["all"]["loss"] for result in report["results"]]
    differences = [found["difference"] for found in bootstraps]
    assert differences == pytest.approx([loss - losses[0] for loss in losses[1:]], abs=1e-5)


def test_a_chat_model_reads_text_as_one_stream(tmp_path, capsys):
    """Chat models are trained with the mask by default; on text they are compared with the models they come from."""
    write_dataset(tmp_path, "story", DOCUMENTS)
    path = write_checkpoint(tmp_path / "a.pt", tiny_model(), "story", format="chat", config={"document_mask": True})
    split = val_split(tmp_path, "story")
    found = measure(EvaluateOptions((path,), data_dir=str(tmp_path), device="cpu", dtype="float32"))
    losses = score(tiny_model(), split, BLOCK_SIZE // 2)[0]
    result = found["datasets"]["story"]["results"][0]
    assert result["all"]["loss"] == pytest.approx(np.nanmean(losses), rel=1e-4)
    assert "note" not in capsys.readouterr().out


def test_documents_without_text_are_one_position_each(tmp_path):
    write_dataset(tmp_path, "story", DOCUMENTS)
    split = dataclasses.replace(val_split(tmp_path, "story"), ids=np.array([9, 1, 2, 9, 9, 3, 9]))
    assert split.by_document().spans == [(1, 4), (4, 5), (5, 7)]
    unended = dataclasses.replace(split, ids=np.array([9, 1, 9, 2, 3]))
    assert unended.by_document().spans == [(1, 3), (3, 5)]
    assert dataclasses.replace(split, ids=np.array([9, 1, 2])).by_document().spans == [(1, 3)]


def test_each_conversation_is_scored_alone(tmp_path):
    write_dataset(tmp_path, "chat", CONVERSATIONS)
    split, model, stride = val_split(tmp_path, "chat"), tiny_model(), 4
    losses, is_right = score(model, split, stride, batch_size=2)
    expected, said, position = [], [], 1
    for conversation in CONVERSATIONS:
        ids = encode_chat(conversation, end_of_conversation=True)
        assert len(ids) > BLOCK_SIZE or conversation is not CONVERSATIONS[0]
        assert math.isnan(losses[position])  # <|im_start|> is given
        expected += [brute_force(model, context_start(1, n, stride), ids, n)[0] for n in range(1, len(ids))]
        said += assistant_targets(np.array(ids))[1:].tolist()
        position += len(ids)
    scored = losses[~np.isnan(losses)]
    np.testing.assert_allclose(scored, expected, atol=2e-4)
    everything, assistant = (summarize(split, scope, losses, is_right) for scope in ("all", "assistant"))
    contents = [(m["role"], len(m["content"].encode())) for c in CONVERSATIONS for m in c]
    assert everything["text_bytes"] == sum(size for _, size in contents)
    assert assistant["text_bytes"] == sum(size for role, size in contents if role == "assistant")
    assert everything["loss"] == pytest.approx(np.mean(expected), abs=1e-4)
    assert assistant["tokens"] == sum(said)
    assert assistant["loss"] == pytest.approx(np.mean(np.array(expected)[said]), abs=1e-4)


def test_chat_is_not_influenced_by_its_neighbours(tmp_path):
    alone = write_dataset(tmp_path, "alone", CONVERSATIONS[1:2])
    write_dataset(tmp_path, "all", CONVERSATIONS)
    model = tiny_model()
    first, _ = score(model, val_split(alone, "alone"), 8)
    second, _ = score(model, val_split(tmp_path, "all"), 8)
    start = len(encode_chat(CONVERSATIONS[0], end_of_conversation=True))
    np.testing.assert_allclose(second[start + 2 : start + len(first)], first[2:], atol=1e-5)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 30, 31])
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_windows_score_each_place_once_with_enough_context(length, stride):
    scored = []
    for begin, stop, first in windows(5, 5 + length, 8, stride):
        assert stop - begin <= 8
        assert begin == 5 or first - begin >= 8 - stride
        scored += range(first, stop)
    assert scored == list(range(5, 5 + length))


def test_the_prepared_bytes_are_the_counted_ones(tmp_path):
    """What the preparation writes into the .json and what evaluate.py counts from the ids is the same number."""
    from data import pipeline

    for name, documents in (("story", DOCUMENTS * 30), ("chat", CONVERSATIONS * 30)):
        kind = "text" if name == "story" else "chat"
        options = pipeline.PrepareOptions(output_dir=str(tmp_path), workers=1)
        numbered = [f"{n} {d}" for n, d in enumerate(documents)]
        if kind == "chat":
            numbered = [[{**m, "content": f"{m['content']} {n}"} for m in d] for n, d in enumerate(documents)]
        dataset = pipeline.Dataset(name, kind, "the test", "none")
        info = pipeline.prepare(dataset, options, pipeline.Corpus(iter(numbered[10:]), iter(numbered[:10])))
        assert val_split(tmp_path, name).counted["all"][1] == info.splits["val"].text_bytes


def test_limit_takes_the_beginning_and_whole_conversations(tmp_path):
    write_dataset(tmp_path, "story", DOCUMENTS)
    write_dataset(tmp_path, "chat", CONVERSATIONS)
    assert len(val_split(tmp_path, "story", 7).ids) == 1 + 7
    lengths = [len(encode_chat(conversation, end_of_conversation=True)) for conversation in CONVERSATIONS]
    assert len(val_split(tmp_path, "chat", sum(lengths[:2]) + 3).ids) == 1 + sum(lengths[:2])
    with pytest.raises(UserError, match="--limit 5"):
        val_split(tmp_path, "chat", 5)


def test_the_bootstrap_sees_a_real_difference_and_no_false_one(tmp_path):
    documents = [f"{word} story number {n}." for n in range(30) for word in ("A", "The", "One")]
    split = val_split(write_dataset(tmp_path, "story", documents), "story")
    rng = np.random.default_rng(1)
    first = rng.normal(3, 1, len(split.ids)).astype(np.float32)
    noise = rng.normal(0, 1, len(split.ids)).astype(np.float32)
    noise -= noise[1:].mean()
    same, better = (bootstrap(split, first, first + shift + noise) for shift in (0.0, -0.5))
    assert not same["excludes_zero"] and same["interval"][0] < 0 < same["interval"][1]
    assert better["excludes_zero"] and better["interval"][1] < 0
    assert better["difference"] == pytest.approx(-0.5, abs=1e-3)
    assert same["units"] == "90 documents"
    # Against the textbook's standard error of a mean of independent values.
    error = 1.96 / math.sqrt(len(split.ids) - 1)
    assert (same["interval"][1] - same["interval"][0]) / 2 == pytest.approx(error, rel=0.25)
    assert better == bootstrap(split, first, first - np.float32(0.5) + noise)
    assert margin(split, "all", first) == pytest.approx(error, rel=0.25)


def test_the_margin_of_a_loss_counts_documents_not_tokens(tmp_path):
    split = val_split(write_dataset(tmp_path, "story", [f"{n} word" + " word" * 39 for n in range(60)]), "story")
    of_document = np.random.default_rng(1).normal(3, 1, split.unit.max() + 1)
    losses = of_document[split.unit].astype(np.float32)  # all tokens of a document have the same loss
    own = losses[split.counted["all"][0]]
    assert margin(split, "all", losses) == pytest.approx(1.96 * own.std() / math.sqrt(60), rel=0.1)
    short = val_split(write_dataset(tmp_path, "short", ["A word. " * 600]), "short")
    assert margin(short, "all", np.ones(len(short.ids))) is None


def test_a_number_has_the_digits_that_its_margin_allows():
    numbers = {"loss": 2.187, "bits_per_byte": 1.0108}
    for loss_margin, digits in ((0.006, (3, 3, 3)), (0.12, (2, 3, 2)), (1.2, (1, 2, 2)), (None, (2, 2, 2))):
        assert digits_of({**numbers, "loss_margin": loss_margin}) == digits


def bootstrap(split, first: np.ndarray, second: np.ndarray) -> dict | None:
    return paired_bootstrap("all", Scored("a.pt", split, first), Scored("b.pt", split, second))


def test_few_documents_are_resampled_in_blocks(tmp_path):
    split = val_split(write_dataset(tmp_path, "book", ["word " * 2600]), "book")
    found = bootstrap(split, np.ones(len(split.ids)), np.ones(len(split.ids)))
    assert found["units"] == "11 blocks of 256 tokens" and not found["excludes_zero"]
    short = val_split(write_dataset(tmp_path, "short", ["A word. " * 600]), "short")
    assert bootstrap(short, np.ones(len(short.ids)), np.ones(len(short.ids))) is None


def test_a_verdict_claims_no_more_than_the_interval_allows():
    verdict = {"scope": "all", "best": "b.pt", "second": "a.pt"}
    clear = {"difference": 0.12345, "interval": [0.1, 0.15], "excludes_zero": True, "units": "90 documents"}
    clear["measure"] = NATS_PER_TOKEN
    line = verdict_line("story", {**verdict, "bootstrap": clear})
    assert "b.pt is better than a.pt by 0.123 nats per token (95 % interval 0.100 to 0.150)" in line
    assert line.endswith("its perplexity is 12 % lower")  # 1 - exp(-0.12345) is 0.1161
    large = {**clear, "difference": 7.78, "interval": [7.54, 8.03]}  # exp(7.78) is 2392
    line = verdict_line("story", {**verdict, "bootstrap": large})
    assert line.endswith("(95 % interval 7.54 to 8.03); the other's perplexity is 2,400 times as high")
    unclear = {**clear, "interval": [-0.01, 0.2], "excludes_zero": False}
    assert "no clear difference between b.pt and a.pt (0.12 nats" in verdict_line(
        "story", {**verdict, "bootstrap": unclear}
    )
    assert "too short to tell" in verdict_line("story", {**verdict, "bootstrap": None})


def test_two_checkpoints_on_their_own_data_sets(tmp_path, capsys, monkeypatch):
    write_dataset(tmp_path, "story", [f"Story {n}." for n in range(50)])
    write_dataset(tmp_path, "chat", [[*CONVERSATIONS[2], {"role": "user", "content": str(n)}] for n in range(50)])
    one = write_checkpoint(tmp_path / "one.pt", tiny_model(), "story")
    two = write_checkpoint(tmp_path / "two.pt", tiny_model(1, block_size=12), "chat")
    out = tmp_path / "report.json"
    arguments = [one, two, "--data_dir", str(tmp_path), "--device", "cpu", "--dtype", "float32", "--json", str(out)]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *arguments])
    evaluate.main()
    report, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert list(report["datasets"]) == ["story", "chat"]
    for name, scopes in (("story", ["all"]), ("chat", ["assistant", "all"])):
        results = report["datasets"][name]["results"]
        assert [(r["checkpoint"], r["block_size"], r["stride"]) for r in results] == [(one, 16, 8), (two, 12, 6)]
        for comparison, scope in zip(report["datasets"][name]["comparisons"], scopes, strict=True):
            assert comparison["scope"] == scope and comparison["baseline"] == one
            difference = results[1][scope]["loss"] - results[0][scope]["loss"]
            assert comparison["bootstrap"]["difference"] == pytest.approx(difference, abs=1e-5)
            line = next(line for line in printed.splitlines() if line.startswith(f"{two} - {one}: "))
            assert "nats per token, 95 % interval" in line
        means = {result["checkpoint"]: result[scopes[0]]["loss"] for result in results}
        verdict = report["datasets"][name]["verdict"]
        assert verdict["scope"] == scopes[0] and [verdict["best"], verdict["second"]] == sorted(means, key=means.get)
        assert verdict["bootstrap"]["difference"] == pytest.approx(abs(means[one] - means[two]), abs=1e-5)
        assert verdict_line(name, verdict) in printed
        decimals = max(digits_of(result["all"])[0] for result in results)
        assert f" {results[0]['all']['loss']:.{decimals}f} " in printed
    lines = printed.splitlines()
    assert lines[-1].startswith("Verdict on chat (what the assistant says): ")
    tables = [line.partition(":")[0] for line in lines if "bytes of text" in line]
    assert tables == ["all tokens", "what the assistant says", "all tokens"], "for chat, the assistant comes first"
    options = EvaluateOptions((one, two), data_dir=str(tmp_path), device="cpu", dtype="float32")
    again = measure(options)
    for name in ("story", "chat"):
        assert again["datasets"][name]["comparisons"] == report["datasets"][name]["comparisons"]


@pytest.mark.skipif(not is_exact(Int8Linear, torch.float32, 0.02), reason="no 8-bit kernel here")
def test_8_bit_weights_cost_a_little_and_not_nothing(tmp_path, monkeypatch, capsys):
    write_dataset(tmp_path, "story", DOCUMENTS * 3)
    checkpoint = write_checkpoint(tmp_path / "one.pt", tiny_model(), "story")
    arguments = ["evaluate.py", checkpoint, "--data_dir", str(tmp_path), "--device", "cpu", "--dtype", "float32"]
    losses = []
    for more in ([], ["--quantize", "int8"]):
        monkeypatch.setattr("sys.argv", [*arguments, *more, "--json", str(tmp_path / "report.json")])
        evaluate.main()
        report = json.loads((tmp_path / "report.json").read_text())
        losses.append(report["datasets"]["story"]["results"][0]["all"]["loss"])
        assert ("8-bit weights" in capsys.readouterr().out) == bool(more)
    assert 0 < abs(losses[1] - losses[0]) < 0.005


@pytest.mark.parametrize(
    ("model", "info", "settings", "words"),
    [
        ({}, {"dataset": "nowhere"}, {}, "nowhere-train.bin not found; run: "),
        ({}, {"dataset": "unknown"}, {}, "name a data set with --dataset"),
        ({}, {"tokenizer": {"name": "char"}}, {}, "lacks its tokenizer char"),
        ({"n_vocab": 50257, "vocab_size": 50257}, {"dataset": "chat"}, {}, "the model has 50257 ids"),
        ({}, {}, {"stride": BLOCK_SIZE + 1}, "exceeds the block size 16"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_sentence(tmp_path, model, info, settings, words):
    write_dataset(tmp_path, "story", DOCUMENTS)
    write_dataset(tmp_path, "chat", CONVERSATIONS)
    path = write_checkpoint(tmp_path / "x.pt", tiny_model(**model), **{"dataset": "story", **info})
    with pytest.raises(UserError, match=words):
        measure(EvaluateOptions((path,), data_dir=str(tmp_path), device="cpu", **settings))


def test_a_broken_model_is_refused_and_changed_data_is_mentioned(tmp_path, capsys):
    write_dataset(tmp_path, "story", DOCUMENTS)
    _, facts = open_dataset(tmp_path, "story")
    model = tiny_model()
    model.wte.weight[11] = math.nan
    path = write_checkpoint(tmp_path / "x.pt", model, "story", data=facts.to_json())
    write_dataset(tmp_path, "story", DOCUMENTS[::-1])
    with pytest.raises(UserError, match="not finite"):
        measure(EvaluateOptions((path,), data_dir=str(tmp_path), device="cpu", dtype="float32"))
    assert "story has changed since" in capsys.readouterr().out


def test_a_mixtures_parts_are_measured_each_on_its_own(tmp_path, capsys):
    write_dataset(tmp_path, "talk", CONVERSATIONS)
    write_dataset(tmp_path, "story", DOCUMENTS)
    facts = {name: open_dataset(tmp_path, name)[1].to_json() for name in ("talk", "story")}
    data = mixture_facts(facts, parse_mixture("talk=0.3,story=0.7"))
    mixed = write_checkpoint(tmp_path / "talk+story1.pt", tiny_model(), "talk+story", format="chat", data=data)
    write_dataset(tmp_path, "story", DOCUMENTS[::-1])
    options = EvaluateOptions((mixed,), data_dir=str(tmp_path), device="cpu", dtype="float32", samples=True)
    report = measure(options, story_tokens=4)
    assert list(report["datasets"]) == ["talk", "story"]
    assert "assistant" in report["datasets"]["talk"]["results"][0]
    assert report["samples"][0]["dataset"] == "story", "stories are compared with the text among the parts"
    output = capsys.readouterr().out
    assert "note: story has changed since" in output and "talk has changed" not in output


def test_samples_are_the_models_own_and_repeat_themselves(tmp_path, capsys):
    write_dataset(tmp_path, "story", DOCUMENTS)
    path = write_checkpoint(tmp_path / "x.pt", tiny_model(block_size=64), "story")
    options = EvaluateOptions((path,), data_dir=str(tmp_path), device="cpu", dtype="float32", samples=True)
    first, second = (measure(options, story_tokens=12)["samples"] for _ in range(2))
    assert first == second and len(first[0]["stories"]) == len(stories.STORY_PROMPTS)
    assert 0 < first[0]["tokens"] <= 12 * len(stories.STORY_PROMPTS)
    print_report({"datasets": {}, "samples": first, "limit": None, "quantize": None})
    printed = capsys.readouterr().out
    assert all(f"> {prompt}\n" in printed for prompt in stories.STORY_PROMPTS)
    assert "8-grams that occur in the training split of story" in printed


def test_options_are_checked():
    for name in ("stride", "batch_size", "limit"):
        with pytest.raises(ValueError, match=f"--{name} must be at least 1"):
            EvaluateOptions(("x.pt",), **{name: 0})
    with pytest.raises(ValueError, match="--plain leaves out"):
        EvaluateOptions(("x.pt",), plain=True, quantize="int8")


def test_plain_gives_the_same_numbers_and_8_bit_weights_need_the_fast_parts(tmp_path):
    write_dataset(tmp_path, "story", DOCUMENTS)
    path = write_checkpoint(tmp_path / "x.pt", tiny_model(), "story")
    settings = {"data_dir": str(tmp_path), "device": "cpu", "dtype": "float32"}
    plain, fast = (measure(EvaluateOptions((path,), **settings), module) for module in (None, load_speedups(False)))
    losses = [report["datasets"]["story"]["results"][0]["all"]["loss"] for report in (plain, fast)]
    assert losses[0] == losses[1]
    with pytest.raises(UserError, match="needs the folder fast/"):
        measure(EvaluateOptions((path,), quantize="int8", **settings), None)
