"""prepare-knowledge.py against a stand-in for a model's server, with faults of every kind, kills and interruptions."""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from hub_server import HubServer
from model_server import ModelServer, Reply, completion, digest, good_text, prompt_of, sentences, well_behaved

from common.cli import UserError
from data.dataset import read_info
from data.documents import read_prepared

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "data" / "prepare-knowledge.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_knowledge", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Run(NamedTuple):
    status: int
    output: str
    error: str


@pytest.fixture
def run(script, tmp_path, monkeypatch):
    """A function that runs the script in this process, with output_dir `out`, and waits of milliseconds."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)

    def run(server: ModelServer | None, *arguments: str, out: str = "out") -> Run:
        url = ["--api_url", server.api_url] if server else []
        words = [*url, "--workers", "1", "--output_dir", str(tmp_path / out), *arguments]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
        output, error = io.StringIO(), ""
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()):
            try:
                script.main(first_wait_s=0.001)
            except UserError as raised:
                error = str(raised)
        return Run(int(bool(error)), output.getvalue(), error)

    return run


def documents(folder: Path, name: str = "knowledge") -> list:
    info = read_info(folder, name)
    return [document for split in ("train", "val") for document in read_prepared(folder, info, split)]


def files(folder: Path) -> dict[str, bytes]:
    """The prepared files: everything but the journal and the locks."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if "answers" not in path.name and path.suffix}


FAULTS = (
    Reply({"error": {"message": "slow down"}}, 429, {"retry-after-ms": "3"}),
    Reply({"error": {"message": "slow down"}}, 429),
    Reply({"error": {"message": "oops"}}, 500),
    Reply("<html>bad gateway</html>", 502),
    Reply(completion("x" * 2000), cut=True),
    Reply('{"choices": ['),
    Reply({"choices": []}),
)
USELESS = {
    "refusals": Reply(completion("I'm sorry, but I can't help with that.")),
    "empty": Reply(completion("")),
    "cut off (--max_tokens)": Reply(completion(sentences("half", 3), "length")),
    "repeats": Reply(completion(sentences("always the same"))),
    "other languages": Reply(
        completion("Der Hund und die Katze sitzen auf der Bank und sehen den Vögeln im Garten zu.")
    ),
    "too short": Reply(completion("Yes.")),
}


def faulty(body: dict, n_before: int) -> Reply:
    """Each request fails once or twice, in one of many ways; of the answers every fourth is of no use."""
    number = digest(prompt_of(body))
    if n_before <= number % 2:
        return FAULTS[(number + n_before) % len(FAULTS)]
    if number // 2 % 4 == 0:
        return list(USELESS.values())[number // 8 % len(USELESS)]
    return Reply(completion(good_text(body)), delay_s=number % 5 / 1000)


def test_texts_are_collected_in_spite_of_faults_and_nothing_is_asked_twice(run, tmp_path):
    with ModelServer(faulty) as server:
        arguments = ("--model", "writer", "--documents", "60", "--concurrency", "8", "--price", "1,2")
        done = run(server, *arguments)
        assert not done.status, done.error
        found = documents(tmp_path / "out")
        assert len(found) == len(set(found)) == 60
        always = sentences("always the same")
        assert {sentences(prompt) for prompt in server.answered} >= set(found) - {always}
        report = read_info(tmp_path / "out", "knowledge").report
        left_out = {reason: report.get(f"answers left out: {reason}", 0) for reason in USELESS}
        answers = (tmp_path / "out" / "knowledge-answers.jsonl").read_bytes().count(b"\n")
        assert sum(left_out.values()) + 60 == answers == len(set(server.asked)), "nothing is left out uncounted"
        assert all(left_out.values()), left_out
        assert f"{answers} answers, {answers * 100:,} tokens in, {answers * 200:,} out" in done.output
        assert f"cost {answers * 5e-4:.4f}" in done.output
        assert server.most_at_once <= 8
        assert "next: python train.py --dataset knowledge --preset tiny --max_iters 100" in done.output

        asked = len(server.asked)
        again = run(server, *arguments)
        assert "already prepared" in again.output and "this run: 0 answers, 0 tokens" in again.output
        assert f"with earlier runs: {answers} answers, {answers * 100:,} tokens in" in again.output
        assert len(server.asked) == asked
        more = run(server, *arguments[:2], "--documents", "70")
        assert not more.status and set(documents(tmp_path / "out")) > set(found)
        counts = collections.Counter(
            prompt for prompt in server.asked if server.asked.count(prompt) > digest(prompt) % 2 + 2
        )
        assert not counts, "asked again although it was answered"


def test_the_files_and_the_requests_do_not_depend_on_concurrency_or_arrival(run, tmp_path):
    asked = {}
    for concurrency, slowest in ((1, 0), (16, 20)):

        def behave(body, n_before, slowest=slowest):
            reply = faulty(body, n_before)
            delay_s = digest(prompt_of(body) + "delay") % (slowest + 1) / 1000
            return Reply(reply.body, reply.status, reply.headers, delay_s, reply.cut)

        with ModelServer(behave) as server:
            arguments = ("--model", "writer", "--documents", "25", "--concurrency", str(concurrency))
            assert not run(server, *arguments, out=f"out{concurrency}").status
            asked[concurrency] = sorted(server.asked)
    assert asked[1] == asked[16]
    assert files(tmp_path / "out1") == files(tmp_path / "out16")


def start(server: ModelServer, folder: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), "--api_url", server.api_url, "--model", "writer", "--workers", "1"]
    return subprocess.Popen(
        [*command, "--output_dir", str(folder), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"NO_PROXY": "*"},
    )


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def slow(body: dict, n_before: int) -> Reply:
    return Reply(completion(good_text(body)), delay_s=0.02)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_run_continues_with_the_same_command_and_loses_nothing(run, tmp_path):
    journal = tmp_path / "out" / "knowledge-answers.jsonl"
    with ModelServer(slow) as server:
        process = start(server, tmp_path / "out", "--documents", "30", "--concurrency", "3")
        wait_for(lambda: len(server.answered) >= 12)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kept = journal.read_bytes()
        assert kept.count(b"\n") >= 12 - 3, "all but those under way were written down"
        journal.write_bytes(kept + b'{"key": "half wri')
        before = list(server.asked)
        done = run(server, "--model", "writer", "--documents", "30", "--concurrency", "3")
        assert not done.status, done.error
        assert len(set(server.asked)) == 30
        again = [prompt for prompt, count in collections.Counter(server.asked).items() if count > 1]
        assert len(again) <= 3 and set(again) <= set(before), "only what was under way is asked again"
        assert journal.read_bytes().startswith(kept) and b"half wri" not in journal.read_bytes()
        assert not run(server, "--model", "writer", "--documents", "30", out="whole").status
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.skipif(os.name == "nt", reason="needs SIGINT for one process")
def test_ctrl_c_finishes_what_is_under_way_and_the_same_command_continues(run, tmp_path):
    with ModelServer(lambda body, n_before: Reply(completion(good_text(body)), delay_s=0.1)) as server:
        process = start(server, tmp_path / "out", "--documents", "12", "--concurrency", "3")
        wait_for(lambda: len(server.asked) >= 4)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=20)
        assert process.returncode == 130, errors
        assert "the same command continues" in output and "Traceback" not in errors and errors.endswith("interrupted\n")
        n_asked = len(server.asked)
        assert n_asked < 12
        server.behave = well_behaved
        assert not run(server, "--model", "writer", "--documents", "12").status
        assert len(server.asked) == len(set(server.asked)) == 12, "answers under way were kept"


def test_conversations_about_topics_alternate(run, tmp_path):
    with ModelServer() as server:
        done = run(server, "--as", "chat", "--documents", "20", "--name", "lessons")
    assert not done.status, done.error
    assert "model: writer" in done.output, "the only model of the server is used"
    found = documents(tmp_path / "out", "lessons")
    assert len(found) == 20
    assert {tuple(message["role"] for message in talk) for talk in found} == {("user", "assistant") * 2}
    assert read_info(tmp_path / "out", "lessons").format == "chat"


@pytest.mark.parametrize("kind", ["txt", "jsonl", "squad.json"])
def test_questions_become_conversations(run, tmp_path, kind):
    questions = [f"Why is number {n} odd?" for n in range(1, 41, 2)]
    file = tmp_path / f"questions.{kind}"
    if kind == "txt":
        file.write_text("\n".join(questions))
    elif kind == "jsonl":
        file.write_text("".join(json.dumps({"question": text}) + "\n" for text in questions))
    else:
        paragraphs = [{"context": f"About {text}", "qas": [{"question": text}]} for text in questions]
        file.write_text(json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}))
    with ModelServer() as server:
        done = run(server, "--questions", str(file), "--as", "chat", "--documents", "20", "--licence", "CC0-1.0")
        assert not done.status, done.error
        assert all(("Use the facts" in prompt) == (kind == "squad.json") for prompt in server.asked)
    found = documents(tmp_path / "out")
    assert sorted(talk[0]["content"] for talk in found) == sorted(questions)
    assert read_info(tmp_path / "out", "knowledge").licence == "CC0-1.0"


def test_topics_of_ones_own_and_fewer_requests_than_documents(run, tmp_path):
    file, prompts = tmp_path / "topics.txt", tmp_path / "prompts.json"
    file.write_text("\n".join(f"topic number {n}" for n in range(30)))
    content = json.loads((ROOT / "data" / "knowledge-prompts.json").read_text("utf-8"))
    content |= {"styles": [], "readers": {"adult": "an adult"}, "topics as text": {"note": "A note on {topic} please"}}
    prompts.write_text(json.dumps(content))
    with ModelServer() as server:
        done = run(server, "--topics", str(file), "--prompts", str(prompts), "--documents", "100")
        assert not done.status, done.error
        assert sorted(server.asked) == sorted(f"A note on topic number {n} please" for n in range(30))
    assert "30 documents; there are no more answers" in done.output and len(documents(tmp_path / "out")) == 30


def test_keys_are_sent_but_not_written_down(run, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-of-mine")
    with ModelServer() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.api_url + "/")
        done = run(None, "--model", "writer", "--documents", "20")
        assert not done.status, done.error
        assert server.keys == {"Bearer secret-of-mine"}
        assert not run(server, "--api_key", "other-secret", "--documents", "21", "--model", "writer").status
    assert server.keys == {"Bearer secret-of-mine", "Bearer other-secret"}
    for name, content in files(tmp_path / "out").items():
        assert b"secret" not in content, name
    assert "secret" not in (tmp_path / "out" / "knowledge-answers.jsonl").read_text() + done.output


def test_a_server_that_fails_for_good_ends_the_run_and_the_answers_are_kept(run, tmp_path):
    def behave(body, n_before):
        return slow(body, n_before) if len(server.answered) < 20 else Reply({"error": {"message": "broken"}}, 500)

    with ModelServer(behave) as server:
        arguments = ("--model", "writer", "--documents", "40", "--retries", "1", "--concurrency", "2")
        done = run(server, *arguments)
        assert "10 requests in a row failed (HTTP 500: broken, 2 times)" in done.error and "continue" in done.error
        n_kept = (tmp_path / "out" / "knowledge-answers.jsonl").read_bytes().count(b"\n")
        assert n_kept >= 20 and not list(tmp_path.glob("out/*.bin"))
        offline = run(None, "--no-ask", "--model", "writer", "--documents", "40")
        assert not offline.status and len(documents(tmp_path / "out")) == n_kept
        server.behave = well_behaved
        assert not run(server, *arguments).status
        assert len(documents(tmp_path / "out")) == 40 and len(server.answered) == 40


def test_single_requests_that_fail_do_not_end_the_run(run, tmp_path):
    def behave(body, n_before):
        is_bad = digest(prompt_of(body)) % 5 == 0
        return Reply({"error": {"message": "policy"}}, 400) if is_bad else well_behaved(body, n_before)

    with ModelServer(behave) as server:
        done = run(server, "--model", "writer", "--documents", "30")
    assert not done.status and len(documents(tmp_path / "out")) == 30
    assert f"requests failed: HTTP 400: policy: {len(server.asked) - 30}" in done.output


def test_a_model_that_is_of_no_use_is_noticed_early(run):
    with ModelServer(lambda body, n_before: USELESS["refusals"]) as server:
        done = run(server, "--model", "writer", "--documents", "50")
    assert "50 of 50 answers are unusable (50 answers left out: refusals)" in done.error
    assert len(server.asked) == 50


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "m"), "no server given; for Ollama add: --api_url http://localhost:11434/v1"),
        (("--api_url", "localhost:11434", "--model", "m"), "is not an address"),
        (("--api_url", "http://127.0.0.1:9/v1", "--model", "m"), "no server answers at http://127.0.0.1:9/v1"),
        (("--input", "x.txt", "--model", "m"), "reads no --input"),
        (("--no-ask",), "--no-ask needs --model"),
        (("--no-ask", "--model", "m"), "no document in"),
        (("--topics", "missing.txt", "--dry_run"), "missing.txt not read"),
        (("--questions", "missing.txt", "--dry_run"), "missing.txt not found"),
    ],
)
def test_wrong_options_are_one_sentence(run, arguments, said):
    done = run(None, *arguments)
    assert said in done.error and "\n" not in done.error


@pytest.mark.parametrize(
    "arguments",
    [
        ("--price", "1"),
        ("--name", "../x"),
        ("--topics", "a", "--questions", "b"),
        ("--as", "song"),
        ("--documents", "0"),
    ],
)
def test_options_that_cannot_be_are_usage_errors(run, arguments):
    with pytest.raises(SystemExit, match="2"):
        run(None, "--model", "m", *arguments)


def test_several_models_are_listed(run):
    with ModelServer(models=("llama", "qwen")) as server:
        assert "(llama, qwen); name one with --model" in run(server).error


def test_a_dry_run_asks_nothing_and_shows_what_would_be_asked(run):
    with ModelServer() as server:
        done = run(server, "--dry_run", "--price", "1,10", "--documents", "1000")
    assert not server.asked and "2,016 topics" in done.output and "cost at most 10.00" in done.output
    assert not run(None, "--dry_run").status


def test_squad_is_read_from_the_hub(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = io.BytesIO()
    rows = [{"question": f"What is {n}?", "context": f"It is the number {n}."} for n in range(20)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    served = {"rajpurkar/squad": {"plain_text/train-00000-of-00001.parquet": table.getvalue()}}
    with HubServer(served) as hub, ModelServer() as server:
        process = subprocess.run(
            [
                *(sys.executable, str(SCRIPT), "--source", "squad", "--as", "chat", "--documents", "20"),
                *("--api_url", server.api_url, "--output_dir", str(tmp_path / "out"), "--workers", "1"),
            ],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env=os.environ | hub.environment(tmp_path / "cache"),
        )
    assert process.returncode == 0, process.stderr
    assert {talk[0]["content"] for talk in documents(tmp_path / "out")} == {row["question"] for row in rows}
    assert read_info(tmp_path / "out", "knowledge").source == "written by writer from SQuAD questions (rajpurkar/squad)"


def test_jojos_own_server_is_asked_like_every_other(run, tmp_path):
    live_server = pytest.importorskip("live_server")  # needs torch, the script does not
    load = lambda path: (live_server.tiny_model(0, block_size=1024), live_server.decode_rows)  # noqa: E731
    with live_server.LiveServer({"models/chatty.pt": "chat"}, load=load, max_waiting=64) as server:
        done = run(None, "--api_url", f"{server.url}/v1", "--documents", "10", "--max_tokens", "4")
    assert "model: chatty" in done.output, done
    answers = [json.loads(line) for line in (tmp_path / "out" / "knowledge-answers.jsonl").open()]
    assert answers and all(answer["prompt_tokens"] > 50 and answer["completion_tokens"] <= 4 for answer in answers)
    assert {answer["finish_reason"] for answer in answers} <= {"length", "stop"}
    assert "are unusable" in done.error, "a model of random weights writes nothing of use"
