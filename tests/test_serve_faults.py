"""What goes wrong on a real day: odd bodies, clients that leave, many at once, a full disk, SIGTERM."""

from __future__ import annotations

import concurrent.futures
import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2 as httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import serve
from common.checkpoint import read_info, save_checkpoint
from generation.row_cache import decode_rows
from serving.models import ModelPool, model_cards
from serving.server import serve as serve_models
from serving.settings import ServerSettings
from tests.live_server import CONFIG, LiveServer, post, tiny_model, wait_until

HELLO = [{"role": "user", "content": "Hello!"}]
ENDLESS = {"messages": HELLO, "max_tokens": 100, "logit_bias": {"50256": -100, "50257": -100, "50258": -100}}
N_BODIES = int(os.environ.get("JOJO_BODIES", "200"))  # 5,000: JOJO_BODIES=5000 pytest tests/test_serve_faults.py
CHURN_S = float(os.environ.get("JOJO_CHURN_S", "3"))  # 120 for the two minutes of the issue


@pytest.fixture(scope="module")
def server():
    with LiveServer(max_rows=4, max_waiting=100) as server:
        yield server
        server.assert_free()


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=60) as http:
        yield http


# --- generated bodies ---

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "developer"]) | ANY_JSON, "content": st.text() | ANY_JSON}
)
SENSIBLE = {
    "model": st.sampled_from(["chatty", "texty"]),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(-2, 60000),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0, 3),
    "frequency_penalty": st.floats(-2, 2),
    "presence_penalty": st.floats(-2, 2),
    "logit_bias": st.dictionaries(st.integers(0, 50300).map(str), st.floats(-100, 100), max_size=3),
    "seed": st.integers(),
    "n": st.integers(0, 5),
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=4),
    "stream": st.booleans(),
    "stream_options": st.just({"include_usage": True}),
    "logprobs": st.booleans() | st.integers(0, 5),
    "top_logprobs": st.integers(0, 20),
    "echo": st.booleans(),
    "continue_final_message": st.booleans(),
    "assistant_prefix_ids": st.lists(st.integers(0, 50300), max_size=4),
    "prefix_ids": st.lists(st.integers(0, 50300), max_size=4),
    "max_completion_tokens": st.integers(0, 3),
}
FIELDS = st.fixed_dictionaries(
    {"max_tokens": st.integers(0, 3)},
    optional={name: strategy | ANY_JSON if name != "model" else strategy for name, strategy in SENSIBLE.items()},
)
CHATS = st.builds(
    lambda fields, messages: {**fields, "messages": messages}, FIELDS, st.lists(MESSAGE, max_size=4) | ANY_JSON
)
TEXTS = st.builds(
    lambda fields, prompt: {**fields, "prompt": prompt}, FIELDS, st.text() | st.lists(st.text(), max_size=3) | ANY_JSON
)
REQUESTS = (
    st.tuples(st.just("/v1/chat/completions"), CHATS.map(json.dumps).map(str.encode))
    | st.tuples(st.just("/v1/completions"), TEXTS.map(json.dumps).map(str.encode))
    | st.tuples(st.just("/v1/chat/completions"), st.binary(max_size=200))
)


@settings(max_examples=N_BODIES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(request=REQUESTS)
def test_no_body_gives_a_500_or_hangs(http, request):
    path, body = request
    answer = http.post(path, content=body)
    assert answer.status_code in (200, 400), answer.text
    if answer.headers["content-type"].startswith("text/event-stream"):
        assert answer.text.endswith("data: [DONE]\n\n") and '"error"' not in answer.text
    elif answer.status_code == 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


# --- clients that leave ---


def test_a_client_that_leaves_frees_its_row_before_the_next_step_but_one():
    with LiveServer(step_s=0.1, max_rows=2) as server:
        connection = server.connect()
        connection.sendall(post("/v1/chat/completions", json.dumps({**ENDLESS, "stream": True}).encode()))
        while b'"content"' not in connection.recv(1 << 16):
            pass
        wait_until(lambda: server.pool.rows_in_use == 1)
        steps = server.steps
        connection.close()
        wait_until(lambda: server.pool.rows_in_use == 0)
        assert server.steps <= steps + 2
        server.assert_free()


def test_clients_that_leave_while_waiting_or_without_a_stream():
    with LiveServer(step_s=0.02, max_rows=1) as server:
        connections = [server.connect() for _ in range(3)]
        for connection in connections:
            connection.sendall(post("/v1/chat/completions", json.dumps(ENDLESS).encode()))
        wait_until(lambda: server.pool.n_waiting == 2)
        for connection in reversed(connections):
            connection.close()
        server.assert_free()
        assert server.steps < 90


def test_clients_that_leave_at_random_moments(server):
    stop = time.monotonic() + CHURN_S
    failures: list[object] = []

    def churn(seed: int) -> None:
        numbers = random.Random(seed)
        while time.monotonic() < stop:
            body = json.dumps({**ENDLESS, "stream": numbers.random() < 0.7, "n": numbers.randrange(1, 3)}).encode()
            whole = post("/v1/chat/completions", body)
            try:
                with server.connect() as connection:
                    connection.sendall(whole[: numbers.choice([len(whole), numbers.randrange(1, len(whole))])])
                    connection.settimeout(numbers.random() * 0.2)
                    while connection.recv(1000):
                        pass
            except OSError:  # a timeout: leaves now
                continue
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=churn, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    server.assert_free()
    assert httpx.post(f"{server.url}/v1/chat/completions", json={"messages": HELLO, "max_tokens": 1}).status_code == 200


def test_a_client_that_stops_reading_is_disconnected():
    with LiveServer(stalled_s=0.3) as server, socket.socket() as connection:
        server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # small buffers, which fill soon
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        body = {"model": "texty", "prompt": "A", "max_tokens": 100_000, "stream": True, "logprobs": 20}
        connection.sendall(post("/v1/completions", json.dumps(body).encode()))
        wait_until(lambda: server.pool.rows_in_use == 1)
        server.assert_free()  # long before 100,000 tokens


def test_a_client_that_leaves_within_its_body_is_not_reported_as_a_bug(server, caplog):
    caplog.set_level(logging.INFO, "jojo")
    with server.connect() as connection:
        connection.sendall(post("/v1/chat/completions", b"{}")[:-1])
    wait_until(lambda: any(" 499 " in record.getMessage() for record in caplog.records))
    assert all(record.levelno == logging.INFO for record in caplog.records)


def test_a_bug_is_answered_like_any_other_error(caplog):
    class Broken(dict):
        def values(self):
            raise RuntimeError("broken on purpose")

    with LiveServer() as server:
        server.pool.cards = Broken(server.pool.cards)
        answer = httpx.get(f"{server.url}/v1/models")
        assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
        assert "broken on purpose" not in answer.text  # what happened is for the log


# --- many at once ---


def test_64_clients_are_all_served(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=120)

    def ask(number: int) -> str:
        message = [{"role": "user", "content": f"Number {number % 8}"}]
        answer = client.chat.completions.create(model="chatty", messages=message, max_tokens=5, temperature=0)
        return answer.choices[0].message.content

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        texts = list(pool.map(ask, range(64)))
    assert all(texts[number] == texts[number % 8] for number in range(64))  # greedy: whoever else is served
    server.assert_free()


def test_two_models_take_turns_in_memory():
    with LiveServer(max_models=1) as server:
        bodies = [{"model": name, "messages": HELLO, "max_tokens": 3} for name in ("chatty", "texty") * 4]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            url = f"{server.url}/v1/chat/completions"
            answers = list(pool.map(lambda body: httpx.post(url, json=body, timeout=60), bodies))
        assert [answer.status_code for answer in answers] == [200] * 8
        assert [answer.json()["model"] for answer in answers] == [body["model"] for body in bodies]
        assert len(server.pool.loaded) == len(server.pool.worker.engines) == 1
        server.assert_free()


def test_the_thread_that_loads_a_model_ends():
    """OpenMP's threads of a second thread that computes would slow the steps of the model down."""
    threads = []

    def load(path):
        threads.append(threading.current_thread())
        return tiny_model(0), decode_rows

    with LiveServer(load=load):
        assert len(threads) == 1 and threads[0] is not threading.main_thread()
        wait_until(lambda: not threads[0].is_alive())


def test_a_shutdown_ends_requests_that_wait_for_a_model_with_an_event():
    is_ending = threading.Event()

    def load(path):
        if "texty" in path:
            assert is_ending.wait(30)
        return tiny_model(0), decode_rows

    with LiveServer(load=load, grace_s=0.0) as server:
        body = {"model": "texty", "prompt": "A", "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as answer:
            wait_until(lambda: server.pool.n_waiting == 1)
            server.server.should_exit = True
            lines = [line for line in answer.iter_lines() if line.startswith("data:")]
        is_ending.set()
    assert "shutting down" in lines[0] and lines[1:] == ["data: [DONE]"]


def test_a_bug_while_a_model_is_loaded_ends_the_stream_with_an_event():
    def load(path):
        if "texty" in path:
            raise RuntimeError("broken on purpose")
        return tiny_model(0), decode_rows

    with LiveServer(load=load) as server:
        body = {"model": "texty", "prompt": "A", "stream": True}
        lines = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30).text.split("\n\n")
        assert json.loads(lines[0].removeprefix("data: "))["error"]["type"] == "server_error"
        assert lines[1:] == ["data: [DONE]", ""]
        server.assert_free()


def test_a_bug_while_the_first_model_is_loaded_ends_the_server_with_its_traceback():
    def load(path):
        raise RuntimeError("broken on purpose")

    pool = ModelPool(model_cards({"models/chatty.pt": {"model": CONFIG}}), load, ServerSettings())
    with pytest.raises(RuntimeError, match="broken on purpose"):
        serve_models(pool, ServerSettings(), 0, lambda address: None)


def test_memory_does_not_grow(http):
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")

    def resident_mib() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

    def some_requests(n: int) -> None:
        for _ in range(n):
            http.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 2, "logprobs": True})

    some_requests(30)
    before = resident_mib()
    some_requests(60)
    assert resident_mib() - before < 20


# --- the process ---


@pytest.fixture
def process(tmp_path):
    """serve.py as a program, with a checkpoint on the disk; yields (process, address, checkpoint)."""
    checkpoint = tmp_path / "small.pt"
    save_checkpoint(checkpoint, tiny_model(0), {"format": "chat", "dataset": "tiny"})
    started = []

    def start(*options: str):
        command = [
            sys.executable,
            serve.__file__,
            str(checkpoint),
            "--port",
            "0",
            "--device",
            "cpu",
            "--dtype",
            "float32",
        ]
        running = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(running)
        line = running.stdout.readline()
        assert line.startswith("serving small at http://127.0.0.1:"), running.stderr.read()
        address = line.split()[-1]
        wait_until(lambda: httpx.get(f"{address}/health").status_code == 200, 60)
        return running, address, checkpoint

    yield start
    for running in started:
        running.kill()
        running.wait()


def test_sigterm_ends_running_requests_and_exits_0(process, tmp_path):
    running, address, checkpoint = process("--grace", "1", "--log", str(tmp_path / "log"))
    checkpoint.write_bytes(b"overwritten while it is served")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0)
    short = client.chat.completions.create(model="small", messages=HELLO, max_tokens=3)
    assert short.usage.completion_tokens == 3
    body = {"model": "small", "prompt": "A", "max_tokens": 10**6, "temperature": 0}
    stream = client.completions.create(**body, stream=True, logit_bias={"50256": -100})
    next(iter(stream))
    running.send_signal(signal.SIGTERM)
    with pytest.raises(openai.APIError, match="shutting down"):  # an event, not a cut
        list(stream)
    assert running.wait(20) == 0
    assert "POST" in (tmp_path / "log").read_text()


def test_a_full_disk_under_the_log_stops_nothing(process):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    running, address, _ = process("--log", "/dev/full")
    answer = httpx.post(f"{address}/v1/chat/completions", json={"messages": HELLO, "max_tokens": 1}, timeout=30)
    assert answer.status_code == 200
    running.send_signal(signal.SIGINT)
    assert running.wait(20) == 0


def test_a_checkpoint_that_cannot_be_loaded_is_a_sentence(tmp_path):
    (tmp_path / "broken.pt").write_bytes(b"no checkpoint")
    done = subprocess.run(
        [sys.executable, serve.__file__, str(tmp_path / "broken.pt"), "--port", "0", "--device", "cpu"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr and "broken.pt" in done.stderr


def test_a_checkpoint_replaced_by_a_model_of_another_shape_is_not_loaded(tmp_path):
    path = str(tmp_path / "small.pt")
    save_checkpoint(path, tiny_model(0), {"format": "chat", "dataset": "tiny"})
    load, known = serve.model_loader(serve.ServeOptions(device="cpu", dtype="float32", plain=True)), read_info(path)
    assert load(path, known)[0].config.block_size == 128
    save_checkpoint(path, tiny_model(0, block_size=64), {"format": "chat", "dataset": "tiny"})
    with pytest.raises(serve.UserError, match=r"start serve\.py again"):
        load(path, known)


@pytest.fixture(autouse=True)
def quiet_log():
    logging.getLogger("jojo").setLevel(logging.CRITICAL)
