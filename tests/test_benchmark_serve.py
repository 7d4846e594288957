"""The benchmark of serve.py: what its figures mean, and that it measures a real server."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
from pathlib import Path

import pytest

from common.cli import UserError
from tests.live_server import LiveServer

sys.path.append(str(Path(__file__).parent.parent / "testing_tools"))
import benchmark_serve

Reply = benchmark_serve.Reply
# Two replies: the first one begins after 1 s, when both had been asked for, and the second one after 2 s.
EARLY, LATE = Reply(0.0, [1.0, 2.0, 2.5, 3.0]), Reply(0.5, [2.0, 2.5, 3.0, 5.0])


def options(**changes):
    return benchmark_serve.ServeBenchmarkOptions(**changes)


def test_the_speed_counts_from_the_first_request_and_the_steady_one_while_all_stream():
    assert benchmark_serve.speed([EARLY, LATE]) == 8 / 5.0
    assert benchmark_serve.steady_speed([EARLY, LATE]) == 4 / 1.0, "two tokens each from 2 to 3 s"
    assert benchmark_serve.steady_speed([EARLY, Reply(0.0, [3.5, 4.0])]) is None
    assert (LATE.first_s, LATE.step_s) == (1.5, 1.0)


def test_replies_of_a_server_are_measured():
    with LiveServer(step_s=0.01) as server:
        target = benchmark_serve.Target("ours", server.url, "chatty")
        found = benchmark_serve.measure_clients([target], 3, options(rounds=2, max_tokens=6, prompt_words=5))
        server.assert_free()
    row = found["ours"]
    assert 0 < row["first_token_s"] <= row["last_first_token_s"]
    assert row["step_s"] >= 0.009
    assert 0 < row["tokens_per_s"] < 300, "three tokens per step at most"
    assert json.dumps(found)


def test_a_server_that_answers_with_an_error_is_named():
    with LiveServer() as server:
        target = benchmark_serve.Target("peer", server.url, "no-such-model")
        with pytest.raises(UserError, match=r"peer answered 404.*check --peer_url"):
            benchmark_serve.ask(target, "Hello", 3)


def test_a_server_that_is_not_running_is_named():
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(UserError, match=rf"peer at http://127.0.0.1:{port}: .*refused; start it or check --peer_url"):
        benchmark_serve.ask(benchmark_serve.Target("peer", f"http://127.0.0.1:{port}", "random"), "Hello", 3)


def test_the_table_names_every_figure():
    row = {"tokens_per_s": 67.74, "steady_tokens_per_s": None, "first_token_s": 2.6, "last_first_token_s": 5.1}
    newcomer = {"alone_s": 0.27, "among_others_s": 0.32, "step_s": 0.06, "allowed_s": 0.465, "others": 15}
    found = {"gen_tokens_per_s": 36.3, "clients": {16: {"ours": row}}, "newcomer": newcomer, "memory_mib": [1916, 1945]}
    assert benchmark_serve.table(found) == [
        "gen.py: 36.3 tokens/s",
        " 16 clients, ours: 67.7 tokens/s, first token 2.60 s, at the latest 5.10 s",
        "first token alone 0.27 s, while 15 others stream 0.32 s (1.5 x alone + a step of 60 ms: 0.47 s)",
        "memory: [1916, 1945] MiB before and after",
    ]
