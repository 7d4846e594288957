"""serve.py --feedback: what is kept and refused, kill -9, several writers, half lines, a full disk."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import httpx2 as httpx
import pytest

from common.cli import UserError
from data.layouts.preferences import preferences
from data.readers.records import read_records
from serving.errors import ApiError
from serving.feedback import FeedbackFields, FeedbackFile
from tests.live_server import LiveServer

ROOT = Path(__file__).resolve().parent.parent
HI = {"role": "user", "content": "Hi"}
WHAT = {"role": "assistant", "content": "What?\u2028\n"}
DIGEST = "0123456789abcdef" * 4
EVENT = {"id": "reply-1", "model": "chatty", "digest": DIGEST, "messages": [HI, WHAT], "token_ids": [2061, 30]}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with LiveServer(feedback=str(tmp_path_factory.mktemp("kept") / "feedback.jsonl"), max_body_bytes=8192) as server:
        yield server


@pytest.fixture
def path(server):
    """The file of the server, empty."""
    path = Path(server.settings.feedback)
    path.write_bytes(b"")
    return path


def post(server, path: str, **content) -> httpx.Response:
    return httpx.post(server.url + path, timeout=120, **content)


def give(server, **fields) -> httpx.Response:
    return post(server, "/v1/feedback", json={**EVENT, **fields})


def test_an_event_is_kept_as_a_line_that_preferences_are_made_of(server, path):
    other = {"model": "texty", "content": "Go.", "token_ids": [5]}
    answers = [
        give(server, rating="good", correction="Hello!"),
        give(server, id="reply-2", rating="bad", unknown={"field": 1}),
        give(server, id="pair", preferred_over=other, digest=None, token_ids=None),
    ]
    assert [answer.status_code for answer in answers] == [200] * 3
    assert answers[0].json() == {"id": "reply-1", "object": "feedback"}
    lines = path.read_bytes().split(b"\n")
    assert lines.pop() == b"" and len(lines) == 3
    first, second, third = map(json.loads, lines)
    assert first.pop("time") <= second.pop("time") <= third.pop("time")
    assert first == {**EVENT, "rating": "good", "correction": "Hello!"}
    assert second == {**EVENT, "id": "reply-2", "rating": "bad"}
    assert third == {"id": "pair", "model": "chatty", "messages": [HI, WHAT], "preferred_over": other}
    pairs = [[message["content"] for message in pair] for pair in preferences(read_records(path))]
    assert pairs == [["Hi", "Hello!", WHAT["content"]], ["Hi", WHAT["content"], "Go."]]


def test_the_models_say_whether_feedback_is_kept_and_answers_the_digest(server):
    assert httpx.get(f"{server.url}/v1/models").json()["keeps_feedback"] is True
    body = {"messages": [HI], "max_tokens": 2}
    answer = post(server, "/v1/chat/completions", json=body).json()
    assert len(answer["system_fingerprint"]) == 64
    streamed = post(server, "/v1/chat/completions", json={**body, "stream": True}).text
    events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    assert events[-1]["system_fingerprint"] == answer["system_fingerprint"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({}, "rating"),
        ({"rating": "fine"}, "rating"),
        ({"correction": " \n"}, "correction"),
        ({"correction": ["Hello!"]}, "correction"),
        ({"rating": "good", "messages": [WHAT]}, "messages"),
        ({"rating": "good", "messages": [WHAT, HI]}, "messages"),
        ({"rating": "good", "messages": [WHAT, WHAT]}, "messages"),
        ({"rating": "good", "messages": [{**HI, "role": "tool"}, WHAT]}, "messages.0.role"),
        ({"rating": "good", "messages": [{**HI, "content": [{"type": "text", "text": "x"}]}, WHAT]}, None),
        ({"rating": "good", "messages": [HI] * 100 + [WHAT] * 2000}, None),
        ({"rating": "good", "token_ids": [-1]}, "token_ids.0"),
        ({"rating": "good", "token_ids": [1 << 16]}, "token_ids.0"),
        ({"rating": "good", "digest": "../../etc/passwd"}, "digest"),
        ({"rating": "good", "id": ""}, "id"),
        ({"rating": "good", "id": "x" * 201}, "id"),
        ({"rating": "good", "model": 3}, "model"),
        ({"preferred_over": {"content": ""}}, "preferred_over.content"),
    ],
)
def test_other_events_are_refused_and_leave_no_trace(server, path, change, param):
    refused = give(server, **change)
    assert refused.status_code in (400, 413) and path.read_bytes() == b""
    error = refused.json()["error"]
    assert error["message"] and (param is None or error["param"] == param)


def test_broken_bodies_are_refused(server, path):
    for body in (b"", b"{", b"[]", b'{"id": "\\ud800"}', b"\xff", b"{" + b" " * 8192 + b"}"):
        refused = post(server, "/v1/feedback", content=body)
        assert refused.status_code in (400, 413) and refused.json()["error"]["message"]
    assert httpx.get(f"{server.url}/v1/feedback").status_code == 405
    foreign = {"Origin": "https://evil.example"}
    refused = post(server, "/v1/feedback", json={**EVENT, "rating": "good"}, headers=foreign)
    assert refused.status_code == 403 and path.read_bytes() == b""


def test_without_the_option_nothing_is_kept():
    with LiveServer(formats={"models/chatty.pt": "chat"}) as server:
        assert httpx.get(f"{server.url}/v1/models").json()["keeps_feedback"] is False
        refused = give(server, rating="good")
        assert refused.status_code == 404 and "--feedback FILE" in refused.json()["error"]["message"]


def test_half_a_line_of_another_program_does_not_damage_the_next_event(server, path):
    path.write_bytes(b'{"half')
    assert give(server, rating="good").status_code == 200
    half, whole = path.read_bytes().splitlines()
    assert half == b'{"half' and json.loads(whole)["rating"] == "good"
    with pytest.raises(UserError, match="line 1: broken JSON"):
        list(read_records(path))


def test_a_file_that_is_moved_away_is_begun_again(server, path):
    assert give(server, rating="good").status_code == 200
    moved = path.rename(path.with_name("old.jsonl"))
    assert give(server, rating="bad").status_code == 200
    assert [json.loads(file.read_bytes())["rating"] for file in (moved, path)] == ["good", "bad"]
    assert path.stat().st_mode & 0o777 == 0o600 or os.name == "nt"


def test_many_clients_and_another_process_do_not_mix_their_lines(server, path):
    program = f"""
        import sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from serving.feedback import FeedbackFile
        file = FeedbackFile({str(path)!r})
        print("ready", flush=True)
        for number in range(40):
            time.sleep(0.01)
            file.append(b'{{"other": "' + b"x" * 6000 + b'"}}\\n')
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            numbers = range(40)
            answers = list(pool.map(lambda number: give(server, id=str(number), correction="y" * 5000), numbers))
        assert other.wait(60) == 0
    assert {answer.status_code for answer in answers} == {200}
    records = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert sum("other" in record for record in records) == 40
    assert {record["id"] for record in records if "id" in record} == set(map(str, numbers))


def test_a_lock_that_is_held_too_long_is_a_sentence(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    kept = FeedbackFile(tmp_path / "feedback.jsonl", wait_s=0.05)
    fields = FeedbackFields(**EVENT, rating="good")
    with kept.path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ApiError, match="another program is using the file") as refused:
            asyncio.run(kept.keep(fields))
    assert refused.value.status == 503 and kept.path.read_bytes() == b""
    asyncio.run(kept.keep(fields))
    assert kept.path.read_bytes().count(b"\n") == 1


def test_a_full_disk_is_a_sentence_and_leaves_no_half_line(tmp_path):
    """A limit on the size of files acts like a full disk: it also ends a write in the middle."""
    pytest.importorskip("resource")
    program = f"""
        import asyncio, resource, sys
        sys.path.insert(0, {str(ROOT)!r})
        from serving.errors import ApiError
        from serving.feedback import FeedbackFields, FeedbackFile
        file = FeedbackFile({str(tmp_path / "feedback.jsonl")!r})
        fields = FeedbackFields(**{EVENT!r}, correction="x" * 600)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        for _ in range(3):
            try:
                asyncio.run(file.keep(fields))
            except ApiError as error:
                print(error.status, error.message)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "507 the feedback was not saved: the server's disk is full\n"
    lines = (tmp_path / "feedback.jsonl").read_bytes().split(b"\n")
    assert len(lines) == 3 and lines[2] == b"" and all(json.loads(line)["id"] == "reply-1" for line in lines[:2])


def test_a_file_that_cannot_be_written_is_a_sentence_at_the_start(tmp_path):
    with pytest.raises(UserError, match="is a folder; name a file"):
        FeedbackFile(tmp_path)
    with pytest.raises(UserError, match="does not exist; run: mkdir -p"):
        FeedbackFile(tmp_path / "nowhere" / "feedback.jsonl")
    if os.name != "nt":
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(UserError, match="not a regular file"):
            FeedbackFile(tmp_path / "pipe")
    if hasattr(os, "geteuid") and os.geteuid() != 0:
        (tmp_path / "read-only.jsonl").touch(0o400)
        with pytest.raises(UserError, match="not written: Permission denied"):
            FeedbackFile(tmp_path / "read-only.jsonl")


def test_an_event_that_was_acknowledged_outlives_kill_9(tmp_path):
    """Here the writer is killed; tests/test_feedback_loop.py kills the server."""
    path = tmp_path / "feedback.jsonl"
    program = f"""
        import asyncio, itertools, sys
        sys.path.insert(0, {str(ROOT)!r})
        from serving.feedback import FeedbackFields, FeedbackFile
        file = FeedbackFile({str(path)!r})
        for number in itertools.count():
            asyncio.run(file.keep(FeedbackFields(**{{**{EVENT!r}, "id": str(number)}}, rating="good")))
            print(number, flush=True)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        acknowledged = [child.stdout.readline().strip() for _ in range(5)]
        child.kill()
    kept = [json.loads(line)["id"] for line in path.read_bytes().splitlines()[:5]]  # the last one may not be whole
    assert kept == acknowledged == list("01234")
