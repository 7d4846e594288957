"""generation/engine.py: caches are reused, and log probabilities are those of the plain model."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from generation.chat import ChatSession, chat_ids
from generation.engine import Settings, TextEngine
from generation.sampling import Sampling
from setup_tokenizer import ENDOFTEXT_ID, IM_END_ID, N_VOCAB, encode_text, get_extended_tokenizer
from tests.tiny_gpt import text_gpt


def test_the_cache_is_reused_between_turns():
    gpt = text_gpt(256)
    engine = TextEngine(gpt, Settings(Sampling(temperature=0), stop_ids=(IM_END_ID,)))
    session = ChatSession(engine, max_tokens=6)
    widths = []
    gpt.h[0].register_forward_pre_hook(lambda block, arguments: widths.append(arguments[0].shape[1]))
    "".join(session.reply("Hello there"))
    first = len(chat_ids([{"role": "user", "content": "Hello there"}]))
    assert widths[0] == first and set(widths[1:]) == {1}
    widths.clear()
    "".join(session.reply("And again"))
    # The cache lacks what followed the last id computed, the second message and the assistant's header.
    whole = len(chat_ids(session.messages[:3]))
    assert widths[0] <= whole - first - 4 and set(widths[1:]) == {1}


def test_several_samples_share_a_cache_that_is_allocated_once():
    engine = TextEngine(text_gpt(), Settings(seed=1, stop_ids=()))
    prompt = [ENDOFTEXT_ID, *encode_text("Once upon")]

    def texts() -> list[list[str]]:
        engine.generator.manual_seed(1)
        pieces = list(engine.stream_samples(prompt, 8, 3))
        return [[piece for row, piece in pieces if row == number] for number in range(3)]

    first, cache = texts(), engine.caches[3]
    "".join(engine.stream(prompt, 4))
    assert texts() == first and engine.caches[3] is cache and set(engine.caches) == {1, 3}


@pytest.mark.parametrize("n_samples", [1, 3])
def test_the_speed_is_that_of_the_tokens_after_the_first_step(n_samples):
    engine = TextEngine(text_gpt(), Settings(seed=1, stop_ids=()))
    list(engine.stream_samples([ENDOFTEXT_ID], 5, n_samples))
    engine.later_s = 2.0
    assert f"last: {5 * n_samples} tokens, " in engine.statistics()
    assert f"then {2 * n_samples:#.3g} tokens/s" in engine.statistics()


def test_logprobs_are_those_of_the_plain_model():
    gpt = text_gpt()
    engine = TextEngine(gpt, Settings(Sampling(temperature=1.5, top_k=3), seed=1, logprobs=True))
    prompt = [ENDOFTEXT_ID, *encode_text("Once upon")]
    "".join(engine.stream(prompt, 5))
    ids = [facts["id"] for facts in engine.logprobs]
    plain = gpt(torch.tensor([prompt + ids]))[0][0, :, :N_VOCAB].log_softmax(-1)
    for step, facts in enumerate(engine.logprobs):
        row = plain[len(prompt) - 1 + step]
        assert facts["logprob"] == pytest.approx(float(row[facts["id"]]), abs=1e-4)
        assert [other["id"] for other in facts["likeliest"]] == row.topk(5).indices.tolist()
        assert facts["step"] == step and facts["id"] in [other["id"] for other in facts["likeliest"][:3]]


def test_hidden_ids_are_left_out_of_the_text_alone():
    prompt = [ENDOFTEXT_ID, *encode_text("Once upon")]
    settings = Settings(seed=1, stop_ids=(), logprobs=True)
    shown, hiding = TextEngine(text_gpt(), settings), TextEngine(text_gpt(), settings)
    list(shown.stream(prompt, 8))
    hidden = (shown.logprobs[2]["id"], shown.logprobs[7]["id"])
    hiding.settings = dataclasses.replace(settings, hidden_ids=hidden)
    text = "".join(hiding.stream(prompt, 8))
    ids = [facts["id"] for facts in hiding.logprobs]
    assert ids == [facts["id"] for facts in shown.logprobs]
    assert text == get_extended_tokenizer().decode([token for token in ids if token not in hidden])
