"""The engine: each text is what it would be alone, whoever else is served; rows, prefixes, limits."""

from __future__ import annotations

import copy
import random

import pytest
import torch

import gen
import serve
from common.checkpoint import save_checkpoint
from fast import speed_up_generation
from fast.row_kernels import attend, build
from generation.batching import BatchEngine, QueueFull, draw_each, token_logprobs
from generation.decoding import generate, prefill
from generation.row_cache import RowCache, decode_each, decode_rows, prefill_chunk
from generation.sampling import Sampling
from generation.stream import Request, Stream
from generation.window import MessageTooLong, fit_window
from model import GPT, GPTConfig, KVCache
from setup_tokenizer import encode_chat, encode_text, get_extended_tokenizer
from tests.live_server import tiny_model

GREEDY = Sampling(temperature=0)
WARM = Sampling(temperature=0.9, top_k=20)


@pytest.fixture(scope="module")
def model():
    return tiny_model(0, block_size=64)


class Texts:
    """Streams and what they delivered."""

    def __init__(self, *requests: Request):
        self.outputs = [[] for _ in requests]
        pairs = zip(requests, self.outputs, strict=True)
        self.streams = [Stream(request, outputs.append) for request, outputs in pairs]

    def text(self, number: int) -> str:
        return "".join(output.text for output in self.outputs[number])

    def ids(self, number: int) -> list[int]:
        return [one.id for output in self.outputs[number] for one in output.logprobs]

    def reason(self, number: int) -> str | None:
        return self.outputs[number][-1].finish_reason


def run(engine: BatchEngine, *requests: Request) -> Texts:
    texts = Texts(*requests)
    engine.submit(texts.streams)
    while engine.step():
        pass
    assert engine.rows_in_use == 0
    return texts


def random_prompts(n: int, longest: int, seed: int = 1) -> list[list[int]]:
    numbers = random.Random(seed)
    return [[numbers.randrange(50256) for _ in range(numbers.randrange(1, longest))] for _ in range(n)]


def alone(model, request: Request) -> list[int]:
    """What gen.py generates: the plain decode loop with one row."""
    generator = torch.Generator().manual_seed(request.seed)
    limits = {"generator": generator, "stop_ids": request.stop_ids}
    ids = [int(row) for row in generate(model, [request.prompt], request.max_tokens, request.sampling, **limits)]
    return [token for token in ids if token not in request.stop_ids]


def test_every_text_is_the_same_as_alone_while_others_come_and_go(model):
    penalized = Sampling(temperature=0, repetition_penalty=1.3)
    nucleus = Sampling(temperature=1.1, top_p=0.9, min_p=0.01)
    requests = [
        Request(
            prompt,
            40,
            (GREEDY, WARM, penalized, nucleus)[n % 4],
            seed=n,
            stop_ids=(50256,),
            top_logprobs=0,
            slides=True,
        )
        for n, prompt in enumerate(random_prompts(16, 60))
    ]
    engine = BatchEngine(model, max_rows=5)
    texts = Texts(*requests)
    for start in range(0, len(requests), 4):  # arrive in groups, some steps apart
        engine.submit(texts.streams[start : start + 4])
        for _ in range(7):
            engine.step()
    while engine.step():
        pass
    enc = get_extended_tokenizer()
    for number, request in enumerate(requests):
        assert texts.ids(number) == alone(model, request), number
        assert texts.text(number) == enc.decode(texts.ids(number))


def test_a_batched_step_computes_the_logits_of_single_rows(model):
    prompts = random_prompts(6, 50, seed=3)
    cache = RowCache(model.config, 8, torch.device("cpu"), torch.float32)
    rows = [6, 0, 3, 7, 1, 4]
    expected = []
    with torch.inference_mode():
        for row, prompt in zip(rows, prompts, strict=True):
            single = KVCache(model.config, 1, torch.device("cpu"), torch.float32)
            expected.append(prefill(model, [[*prompt, 11]], single))
            prefill(model, [prompt], single)
            cache.keys_values[:, :, row] = single.keys_values[:, :, 0]
            cache.tokens[row] = prompt
        lengths = [len(prompt) for prompt in prompts]
        logits = decode_rows(model, torch.full((6,), 11), rows, lengths, cache)
    torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-4, atol=1e-4)


def keep_logprobs(logprobs: list[torch.Tensor]):
    """An observer for `generate` that appends each step's log probabilities."""
    return lambda logits: logprobs.append(logits[0].log_softmax(-1))


def test_in_exact_mode_numbers_are_equal_to_the_bit(model):
    requests = [Request(prompt, 20, WARM, seed=n, top_logprobs=2) for n, prompt in enumerate(random_prompts(6, 40, 4))]
    exact = {"decode": decode_each, "chunk_tokens": 64, "keep_prefixes": False}
    together = run(BatchEngine(model, 4, **exact), *requests)
    for number, request in enumerate(requests):
        by_itself = run(BatchEngine(model, 1, **exact), request)
        found = [one for output in together.outputs[number] for one in output.logprobs]
        assert found == [one for output in by_itself.outputs[0] for one in output.logprobs]
        logprobs: list[torch.Tensor] = []
        limits = {"generator": torch.Generator().manual_seed(number), "observe": keep_logprobs(logprobs)}
        for _ in generate(model, [request.prompt], len(found), WARM, **limits):
            pass
        assert [one.logprob for one in found] == [float(row[one.id]) for one, row in zip(found, logprobs, strict=True)]


def test_a_conversation_keeps_its_prefix_and_others_do_not_lose_theirs(model):
    engine = BatchEngine(model, max_rows=3)
    first, second = random_prompts(1, 40, seed=5)[0][:20], [9, 8, 7]
    first = (first * 20)[:20]
    texts = run(engine, Request(first, 6, GREEDY, top_logprobs=0), Request(second, 6, GREEDY, top_logprobs=0))
    reply = texts.ids(0)
    turn = [*first, *reply, 17, 18]
    again = run(engine, Request(turn, 4, GREEDY, top_logprobs=0))
    assert again.outputs[0][0].cached_tokens == len(first) + len(reply) - 1  # the last id drawn is never in the cache
    assert again.ids(0) == alone(model, Request(turn, 4, GREEDY, seed=0))
    other = run(engine, Request([*second, *texts.ids(1), 5], 2, GREEDY))
    assert other.outputs[0][0].cached_tokens == len(second) + 5


def test_the_row_used_the_longest_ago_is_given_away(model):
    engine = BatchEngine(model, max_rows=2)
    for start in (100, 200, 300):  # the third takes the first one's row
        run(engine, Request([start + n for n in range(10)], 2, GREEDY))
    kept = run(engine, Request([200 + n for n in range(12)], 2, GREEDY))
    lost = run(engine, Request([100 + n for n in range(12)], 2, GREEDY))
    assert kept.outputs[0][0].cached_tokens == 10 and lost.outputs[0][0].cached_tokens == 0


def test_several_texts_of_one_prompt_compute_it_once(model):
    prompt = list(range(1000, 1030))
    texts = run(BatchEngine(model, max_rows=4), *[Request(prompt, 5, WARM, seed=n, top_logprobs=0) for n in range(4)])
    assert [outputs[0].cached_tokens for outputs in texts.outputs] == [0, 29, 29, 29]
    for number in range(4):
        assert texts.ids(number) == alone(model, Request(prompt, 5, WARM, seed=number))


def test_long_prompts_are_prefilled_in_pieces_while_others_continue():
    model = tiny_model(0)
    ticks = iter(range(10**6)).__next__  # each look at the clock takes a second
    engine = BatchEngine(model, max_rows=2, chunk_tokens=16, clock=ticks)
    running, long = Texts(Request([1, 2, 3], 60, GREEDY)), Texts(Request(list(range(100)), 3, GREEDY, top_logprobs=0))
    engine.submit(running.streams)
    for _ in range(3):
        engine.step()
    engine.submit(long.streams)
    seen = []
    while not long.outputs[0]:
        engine.step()
        seen.append(len(running.outputs[0]))
    assert len(seen) >= 3 and seen == list(range(seen[0], seen[0] + len(seen)))  # one id in every step
    while engine.step():
        pass
    assert long.ids(0) == alone(model, Request(list(range(100)), 3, GREEDY, seed=0))


def test_first_come_first_served_and_a_full_queue(model):
    engine = BatchEngine(model, max_rows=2, max_waiting=3)
    texts = Texts(*[Request([n + 1], 4, GREEDY) for n in range(6)])
    engine.submit(texts.streams[:5])
    with pytest.raises(QueueFull):
        engine.submit(texts.streams[5:])
    ended = []
    while engine.step():
        ended += [n for n in range(5) if texts.outputs[n] and texts.reason(n) and n not in ended]
    assert ended == sorted(ended) or ended[-1] == 4
    engine.submit(texts.streams[5:])


def test_a_cancelled_text_frees_its_row_before_the_next_step(model):
    engine = BatchEngine(model, max_rows=1)
    texts = Texts(Request([1], 50, GREEDY), Request([2], 2, GREEDY))
    engine.submit(texts.streams)
    for _ in range(3):
        engine.step()
    n_outputs = len(texts.outputs[0])
    texts.streams[0].cancel()
    engine.step()
    assert len(texts.outputs[0]) == n_outputs and texts.outputs[1]
    texts.streams[1].cancel()
    assert engine.step() is False and engine.rows_in_use == 0


def test_a_reply_ends_at_the_window_and_a_text_slides_on(model):
    prompt = list(range(60))
    reply = run(BatchEngine(model, 1), Request(prompt, 100, GREEDY, top_logprobs=0))
    assert len(reply.ids(0)) == 4 and reply.reason(0) == "length"
    text = run(BatchEngine(model, 1), Request(prompt, 100, GREEDY, top_logprobs=0, slides=True))
    assert text.ids(0) == alone(model, Request(prompt, 100, GREEDY, seed=0))


def test_logprobs_of_prompt_and_reply_are_the_models_own(model):
    prompt = random_prompts(1, 40, seed=8)[0]
    request = Request(prompt, 6, WARM, seed=2, top_logprobs=3, prompt_logprobs=True, logit_bias={5: 3.0})
    texts = run(BatchEngine(model, 2), request)
    found = [one for output in texts.outputs[0] for one in (*output.prompt_logprobs, *output.logprobs)]
    ids = [*prompt, *texts.ids(0)]
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0][0].double().log_softmax(-1)  # one plain pass over the whole text
    assert [one.id for one in found] == ids[1:]
    for position, one in enumerate(found):
        assert one.logprob == pytest.approx(float(expected[position, one.id]), abs=1e-4)
        values, likeliest = expected[position].topk(3)
        assert [other for other, _ in one.likeliest] == likeliest.tolist()
        assert [value for _, value in one.likeliest] == pytest.approx(values.tolist(), abs=1e-4)


def test_penalties_and_bias_change_the_logits_as_documented():
    logits = torch.tensor([1.0, 2.0, -1.0, 0.5])
    request = Request(
        [3], 9, Sampling(repetition_penalty=2.0), frequency_penalty=0.25, presence_penalty=0.5, logit_bias={0: 7}
    )
    stream = Stream(request, lambda output: None)
    stream.changed_logits(logits)  # nothing has been drawn yet
    for token in (1, 1, 2):
        stream.take(token, None)
    expected = [1.0 + 7, 2.0 / 2 - 2 * 0.25 - 0.5, -1.0 * 2 - 0.25 - 0.5, 0.5 / 2]
    assert stream.changed_logits(logits).tolist() == pytest.approx(expected)


def test_rows_of_equal_and_different_settings_are_drawn_by_their_own_seed(model):
    logits = torch.randn(6, 1000, generator=torch.Generator().manual_seed(1))
    settings = (WARM, GREEDY, WARM, Sampling(top_p=0.5), WARM, GREEDY)

    def streams():
        return [Stream(Request([1], 5, one, seed=n), lambda output: None) for n, one in enumerate(settings)]

    together = draw_each(streams(), logits)
    assert together == [draw_each([stream], logits[n : n + 1])[0] for n, stream in enumerate(streams())]


def test_stop_texts_end_a_text_and_hold_back_their_beginning(model):
    prompt = [40, 41, 42]
    whole = run(BatchEngine(model, 1), Request(prompt, 12, GREEDY, top_logprobs=0))
    text = whole.text(0)
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    stopped = run(BatchEngine(model, 1), Request(prompt, 12, GREEDY, stop_texts=(stop,), top_logprobs=0))
    assert stopped.text(0) == text[: text.find(stop)] and stopped.reason(0) == "stop"
    kept = get_extended_tokenizer().decode(stopped.ids(0))
    assert kept.startswith(stopped.text(0)) and stop not in kept[: len(stopped.text(0)) + len(stop) - 1]


def test_a_character_begun_in_the_prefix_is_completed():
    enc = get_extended_tokenizer()
    first, *rest = enc.encode_ordinary("😀😀")
    stream = Stream(Request([first], 10, n_prefix_ids=1), (outputs := []).append)
    for token in rest:
        stream.take(token, None)
    assert "".join(output.text for output in outputs) == "😀😀"


def test_logits_that_are_not_finite_end_only_their_own_text(model):
    def broken_for_row_1(model, ids, rows, lengths, cache):
        logits = decode_rows(model, ids, rows, lengths, cache)
        logits[[row == 1 for row in rows]] = float("nan")
        return logits

    engine = BatchEngine(model, 3, decode=broken_for_row_1)
    texts = run(engine, *[Request([n + 1], 5, WARM, seed=n, top_logprobs=0) for n in range(3)])
    assert [texts.reason(n) for n in range(3)] == ["length", "error", "length"]
    assert texts.ids(2) == alone(model, Request([3], 5, WARM, seed=2))


def test_token_logprobs_of_no_alternatives():
    (one,) = token_logprobs(torch.zeros(1, 4), [2], 0)
    assert one.logprob == pytest.approx(-1.3862944) and one.likeliest == ()


def test_the_window_keeps_the_system_message_and_drops_whole_exchanges():
    system = {"role": "system", "content": "Be kind."}
    exchanges = [
        [{"role": "user", "content": f"Question {n}"}, {"role": "assistant", "content": "Yes. " * n}] for n in range(9)
    ]
    newest = {"role": "user", "content": "And now?"}
    messages = [system, *[message for exchange in exchanges for message in exchange], newest]
    ids, n_dropped = fit_window(messages, 120)
    assert ids == encode_chat([system, *messages[1 + n_dropped :]], add_generation_prompt=True)
    assert n_dropped % 2 == 0 and n_dropped > 0 and len(ids) <= 120
    longer = encode_chat([system, *messages[n_dropped - 1 :]], add_generation_prompt=True)
    assert len(longer) > 120  # no more would have fitted
    with pytest.raises(
        MessageTooLong, match=r"has 400 tokens and the window has room for \d+; shorten it or the system"
    ):
        fit_window([*messages, {"role": "user", "content": " word" * 400}], 120)
    assert len(encode_text(" word" * 400)) == 400


def test_exact_mode_has_the_layers_of_gen(tmp_path):
    """Which layers are fastest in bfloat16 depends on the number of texts."""
    torch.manual_seed(0)
    gpt, path = GPT(GPTConfig(block_size=32, n_layer=1, n_head=2, n_embd=32)), str(tmp_path / "model.pt")
    save_checkpoint(path, gpt, {"format": "chat", "dataset": "random"})
    loaded = {}
    for exact in (False, True):
        options = serve.ServeOptions(device="cpu", dtype="bfloat16", max_rows=17, exact=exact)
        loaded[exact] = serve.model_loader(options)(path)[0]
    alone = gen.CurrentModel(gen.GenOptions(path, device="cpu", dtype="bfloat16")).engine.model
    ids = torch.arange(5)[None]
    assert layers(loaded[True]) == layers(alone) and loaded[True](ids)[0].equal(alone(ids)[0])
    if build():
        assert layers(loaded[False]) != layers(alone), "else this test could not fail"


def layers(model: GPT) -> set[type]:
    """The types of a model's layers."""
    return {type(module) for module in model.modules()}


@pytest.mark.skipif(build() is None, reason="no C compiler, or a processor without AVX2")
def test_attention_converts_inputs_to_the_precision_of_the_cache():
    qkv, cache = torch.randn(2, 3 * 32).bfloat16(), torch.randn(2, 2, 1, 8, 32)
    found = attend(qkv, cache.clone(), slice(3, 4))
    assert found.dtype == torch.float32 and found.equal(attend(qkv.float(), cache, slice(3, 4)))


@pytest.mark.parametrize("rows", [[3], [5, 1, 6], [7, 2, 3, 0]], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float32, 1e-4)], ids=str)
def test_the_packed_layers_decode_any_rows_like_the_plain_ones(rows, dtype, tolerance):
    torch.manual_seed(0)
    plain = GPT(GPTConfig(block_size=128, n_layer=2, n_head=4, n_embd=128)).to(dtype).eval().requires_grad_(False)
    packed = copy.deepcopy(plain)
    if speed_up_generation(packed, None, 16).description == "plain layers":
        pytest.skip("this processor has no kernels for packed layers")
    found = []
    for model in (plain, packed):
        cache = RowCache(model.config, 8, torch.device("cpu"), dtype)
        with torch.inference_mode():
            for row in rows:
                prefill_chunk(model, cache, row, list(range(9 * (row + 1))))
            lengths = [len(cache.tokens[row]) for row in rows]
            found.append(decode_rows(model, torch.arange(len(rows)), rows, lengths, cache))
    torch.testing.assert_close(found[1], found[0], rtol=tolerance, atol=tolerance)
