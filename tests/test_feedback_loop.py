"""The whole loop through HTTP: talk, correct, prepare, train with DPO, and both models beside each other."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest

from common.checkpoint import digest, load_checkpoint, save_checkpoint
from setup_tokenizer import encode_text
from tests.live_server import wait_until
from tests.tiny import run
from tests.tiny_gpt import text_gpt

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = ("Hi", "Who are you?", "What is that?", "Tell me a story.", "Where is it?", "Why?", "And then?", "Bye")
BETTER = "Ahoy!"
TIMEOUT_S = 300
NO_CONTROL = {str(token): -100 for token in (50256, 50257, 50258)}


@contextlib.contextmanager
def served(folder: Path, *arguments: str) -> Iterator[httpx.Client]:
    """serve.py in `folder`, killed at the end."""
    command = [sys.executable, str(ROOT / "serve.py"), *arguments, "--port", "0", "--device", "cpu"]
    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen([*command, "--dtype", "float32"], cwd=folder, stdout=subprocess.PIPE, stderr=log)
    try:
        assert server.stdout is not None
        line = server.stdout.readline().decode()
        assert " at http" in line, (folder / "server.log").read_text()
        with httpx.Client(base_url=line.split()[-1], timeout=TIMEOUT_S) as http:
            wait_until(lambda: http.get("/health").status_code == 200, TIMEOUT_S)
            yield http
    finally:
        server.kill()
        server.wait()


def ask(http: httpx.Client, model: str, question: str, **settings) -> dict:
    """The whole answer, with log probabilities."""
    body = {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0, "logprobs": True}
    answer = http.post("/v1/chat/completions", json={**body, **settings})
    assert answer.status_code == 200, answer.text
    return answer.json()


def correct(http: httpx.Client, question: str) -> None:
    """Ask, and say the reply better, as the page does."""
    answer = ask(http, "base", question, max_tokens=6, logit_bias=NO_CONTROL)
    (choice,) = answer["choices"]
    said = {"role": "assistant", "content": choice["message"]["content"]}
    event = {
        **{"id": answer["id"], "model": answer["model"], "digest": answer["system_fingerprint"]},
        "messages": [{"role": "user", "content": question}, said],
        "token_ids": [token["id"] for token in choice["logprobs"]["content"]],
        "correction": BETTER,
    }
    assert http.post("/v1/feedback", json=event).status_code == 200


def log_prob(http: httpx.Client, model: str, question: str, ids: list[int]) -> float:
    """The log probability of a reply: each of its tokens is forced, and its log probability is the model's own."""
    total = 0.0
    for number, token in enumerate(ids):
        forced = {"logit_bias": {str(token): 100}, "assistant_prefix_ids": ids[:number], "max_tokens": 1}
        (found,) = ask(http, model, question, **forced)["choices"][0]["logprobs"]["content"]
        assert found["id"] == token
        total += found["logprob"]
    return total


@pytest.mark.usefixtures("one_thread", "quick_disk")
def test_corrections_make_a_model_that_prefers_them(tmp_path):
    info = {"dataset": "made", "format": "chat", "iter_num": 1, "config": {}, "data": {}}
    save_checkpoint(tmp_path / "base.pt", text_gpt(), info)
    with served(tmp_path, "base.pt", "--feedback", "feedback.jsonl") as http:
        for question in QUESTIONS:
            correct(http, question)
    events = [json.loads(line) for line in (tmp_path / "feedback.jsonl").read_bytes().splitlines()]
    assert [event["messages"][0]["content"] for event in events] == list(QUESTIONS)
    weights = load_checkpoint(tmp_path / "base.pt", ("model",))["model"]
    assert {event["digest"] for event in events} == {digest(weights)}

    command = [sys.executable, str(ROOT / "data/prepare-preferences.py"), "--input", "feedback.jsonl", "--name", "mine"]
    done = subprocess.run([*command, "--output_dir", ".", "--val_fraction", "0.2"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    shape = dict.fromkeys(("n_layer", "n_head", "n_embd"))
    settings = {"init_from": str(tmp_path / "base.pt"), "max_iters": 6, "learning_rate": 3e-3, "block_size": 64}
    assert run(tmp_path, tmp_path, dataset="mine", objective="dpo", **settings, **shape) == 0

    chosen = encode_text(BETTER)
    with served(tmp_path, "base.pt", "mine6.pt", "--max_models", "2") as http:
        for event in (events[0], events[-1]):
            question, rejected = event["messages"][0]["content"], event["token_ids"]
            base, tuned = (
                [log_prob(http, model, question, ids) for ids in (chosen, rejected)] for model in ("base", "mine6")
            )
            assert tuned[0] - tuned[1] > base[0] - base[1] + 0.1
            assert tuned[0] > base[0]
