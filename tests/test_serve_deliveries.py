"""serving/deliveries.py: tokens that follow each other quickly wake the event loop together, and none is lost."""

from __future__ import annotations

import asyncio
import json

import pytest

from generation.stream import Output
from serving.deliveries import Deliveries
from tests.live_server import LiveServer, post, read_all


class Loop:
    """Counts how often it is woken."""

    def __init__(self):
        self.n_woken = 0

    def call_soon_threadsafe(self, function, *arguments):
        self.n_woken += 1
        function(*arguments)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def taken(queue: asyncio.Queue) -> list[int]:
    """The numbers of tokens of all outputs in a queue."""
    return [queue.get_nowait().output.n_tokens for _ in range(queue.qsize())]


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def deliveries(clock):
    return Deliveries(0.025, clock)


def test_tokens_of_a_slow_model_are_delivered_after_each_step(deliveries, clock):
    loop, queues = Loop(), [asyncio.Queue(), asyncio.Queue()]
    for n in range(1, 5):
        clock.now += 0.2
        for queue in queues:  # the texts of a batch
            deliveries.put(loop, queue, 0, Output(n_tokens=n))
        deliveries.flush()
        assert [taken(queue) for queue in queues] == [[n], [n]]


def test_tokens_of_a_fast_model_are_delivered_together_and_in_order(deliveries, clock):
    loop, queue, found = Loop(), asyncio.Queue(), []
    for n in range(1, 101):  # 100 ms
        deliveries.put(loop, queue, 0, Output(n_tokens=n))
        deliveries.flush()
        clock.now += 0.001
        found += taken(queue)
    deliveries.put(loop, queue, 0, Output(n_tokens=101, finish_reason="stop"))
    assert found + taken(queue) == list(range(1, 102))
    assert loop.n_woken == 5  # at 0, 25, 50 and 75 ms and at the end


def test_first_and_last_outputs_are_delivered_at_once_with_all_others(deliveries, clock):
    loop, one, other = Loop(), asyncio.Queue(), asyncio.Queue()
    deliveries.put(loop, one, 0, Output(n_tokens=1))
    assert taken(one) == [1]
    deliveries.put(loop, one, 0, Output(n_tokens=2))
    deliveries.flush()
    assert taken(one) == []
    deliveries.put(loop, other, 0, Output(n_tokens=1))
    assert (taken(one), taken(other)) == ([2], [1])
    deliveries.put(loop, one, 0, Output(n_tokens=3))
    deliveries.put(loop, other, 0, Output(n_tokens=1, finish_reason="error", error="the model failed"))
    assert (taken(one), taken(other)) == ([3], [1])


def test_nothing_held_wakes_nobody(deliveries):
    deliveries.flush()


def test_the_time_of_a_delivery_is_when_it_was_computed(deliveries, clock):
    loop, queue = Loop(), asyncio.Queue()
    for n in (1, 2, 3):
        clock.now += 0.01
        deliveries.put(loop, queue, 0, Output(n_tokens=n))
    deliveries.put(loop, queue, 0, Output(n_tokens=4, finish_reason="length"))
    times = [queue.get_nowait().time_s for _ in range(4)]
    assert times == pytest.approx([100.01, 100.02, 100.03, 100.03])


def test_a_loop_that_has_been_closed_is_not_an_error(deliveries):
    loop = asyncio.new_event_loop()
    loop.close()
    deliveries.put(loop, asyncio.Queue(), 0, Output(n_tokens=1))


def test_a_stream_has_an_event_per_token_and_sends_several_at_a_time():
    body = {"model": "texty", "prompt": "Once", "max_tokens": 100, "stream": True, "temperature": 0, "logprobs": 0}
    with LiveServer() as server, server.connect() as connection:
        connection.sendall(post("/v1/completions", json.dumps(body).encode(), "Connection: close"))
        head, _, rest = read_all(connection).partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head.lower()
    sent = []
    while True:
        size, _, rest = rest.partition(b"\r\n")
        if not int(size, 16):
            break
        sent.append(rest[: int(size, 16)])
        rest = rest[int(size, 16) + 2 :]
    events = b"".join(sent).split(b"\n\n")[:-1]
    tokens = [json.loads(event[6:])["choices"][0]["logprobs"]["tokens"] for event in events[:-1]]
    assert sum(map(len, tokens)) == 100
    assert len(sent) < len(tokens)
    assert events[-1] == b"data: [DONE]"
