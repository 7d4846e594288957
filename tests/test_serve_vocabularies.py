"""The API of a server whose models have different vocabularies: each one reads and writes ids of its own.

The oracle for ids is Hugging Face's tokenizers, with the same tokenizer.json.
"""

from __future__ import annotations

import codecs
import itertools
import json

import httpx2 as httpx
import pytest
import tokenizers
import torch

from common.tokenizer_json import byte_characters
from data.vocabularies import open_tokenizer
from generation.row_cache import decode_rows
from serving.models import model_cards
from setup_tokenizer import encode_chat, encode_text
from tests.live_server import CONFIG, LiveServer, tiny_model
from tests.test_own_tokenizer import train_vocabulary

ENDOFTEXT, IM_START, IM_END, N_VOCAB = 400, 401, 402, 403  # of the vocabulary "tales"
SHAPE = {"n_vocab": N_VOCAB, "vocab_size": 448}
CAT = [{"role": "user", "content": "the naïve cat sat 😀"}]
PROMPT = "Once, the dog 漢字"


class Oracle:
    """What `tokenizers` and a plain pass of the model say."""

    def __init__(self, path):
        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self._bytes = {character: byte for byte, character in byte_characters().items()}

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def chat(self, text: str) -> list[int]:
        """The ids of a user's message and of the assistant's header."""
        user, header = self.encode(f"user\n{text}"), self.encode("assistant\n")
        return [IM_START, *user, IM_END, *self.encode("\n"), IM_START, *header]

    def bytes_of(self, token: int) -> bytes:
        return bytes(self._bytes[character] for character in self._tokenizer.id_to_token(token))

    def entry(self, token: int) -> tuple[int, str, list[int]]:
        """A token's id, text and bytes, as log probabilities contain them."""
        own = self.bytes_of(token)
        return token, own.decode("utf-8", "backslashreplace"), list(own)

    def text(self, ids, after=()) -> str:
        """The text of ids that follow others; a character that those leave incomplete belongs to it."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(b"".join(map(self.bytes_of, after)))
        return decoder.decode(b"".join(map(self.bytes_of, ids)), final=True)

    def offsets(self, ids) -> list[int]:
        """The number of characters that are complete before each token."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        lengths = [len(decoder.decode(self.bytes_of(token))) for token in ids]
        return list(itertools.accumulate(lengths, initial=0))[:-1]

    def greedy(self, prompt: list[int], n: int) -> list[int]:
        """The likeliest continuation; ordinary tokens only, so that nothing ends it."""
        ids = list(prompt)
        for _ in range(n):
            ids.append(likeliest(ids, 1)[0])
        assert max(ids[len(prompt) :]) < ENDOFTEXT
        return ids[len(prompt) :]


def likeliest(ids: list[int], n: int) -> list[int]:
    with torch.no_grad():
        return tiny_model(2, **SHAPE)(torch.tensor([ids]))[0][0, -1].topk(n).indices.tolist()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return train_vocabulary(tmp_path_factory.mktemp("vocabulary") / "tales-tokenizer.json", "gpt2")


@pytest.fixture(scope="module")
def tales(path):
    return open_tokenizer("tales", path.parent)


@pytest.fixture(scope="module")
def oracle(path):
    return Oracle(path)


@pytest.fixture(scope="module")
def server(tales):
    """The models "plain", with GPT-2's vocabulary, and "tales", with one of its own."""

    def load(path: str):
        return tiny_model(2, **SHAPE) if path == "models/tales.pt" else tiny_model(0), decode_rows

    server = LiveServer({"models/plain.pt": "chat"}, load=load, max_models=2)
    info = {"model": {**CONFIG, **SHAPE}, "format": "chat", "tokenizer": tales.to_info()}
    server.pool.cards.update(model_cards({"models/tales.pt": info}))
    with server:
        yield server


@pytest.fixture
def ask(server):
    """The answer to a request; without a prompt, it is one for a chat."""

    def post(model: str = "tales", **fields) -> dict:
        path = "completions" if "prompt" in fields else "chat/completions"
        body = {"model": model, "temperature": 0, **({} if "prompt" in fields else {"messages": CAT}), **fields}
        return httpx.post(f"{server.url}/v1/{path}", json=body).json()

    return post


@pytest.fixture
def stream(server):
    """The choices of the events that answer a request."""

    def post(**fields) -> list[dict]:
        path = "completions" if "prompt" in fields else "chat/completions"
        body = {"model": "tales", "temperature": 0, "stream": True, **fields}
        lines = httpx.post(f"{server.url}/v1/{path}", json=body).text.splitlines()
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        return [event["choices"][0] for event in events]

    return post


def said(answer: dict) -> str:
    return answer["choices"][0]["message"]["content"]


def entries(content: list[dict]) -> list[tuple]:
    return [(one["id"], one["token"], one["bytes"]) for one in content]


def test_each_model_names_its_vocabulary(server, tales):
    listed = {model["id"]: model for model in httpx.get(f"{server.url}/v1/models").json()["data"]}
    assert listed["plain"]["tokenizer"] == {"name": "gpt2_chatml", "digest": None}
    assert listed["tales"]["tokenizer"] == {"name": "tales", "digest": tales.digest}
    assert httpx.get(f"{server.url}/v1/models/tales").json() == listed["tales"]
    assert listed["plain"]["can_chat"] and listed["tales"]["can_chat"]


def test_a_chat_has_the_ids_and_texts_of_the_models_vocabulary(ask, stream, oracle):
    prompt = oracle.chat(CAT[0]["content"])
    ids = oracle.greedy(prompt, 12)
    fields = {"max_tokens": 12, "logprobs": True, "top_logprobs": 3}
    answer = ask(**fields)
    content = answer["choices"][0]["logprobs"]["content"]
    assert said(answer) == oracle.text(ids)
    assert entries(content) == [oracle.entry(token) for token in ids]
    for n, one in enumerate(content):
        others = likeliest([*prompt, *ids[:n]], 3)
        assert [other["id"] for other in one["top_logprobs"]] == others
        ordinary = [other for other in one["top_logprobs"] if other["id"] < ENDOFTEXT]
        assert entries(ordinary) == [oracle.entry(other) for other in others if other < ENDOFTEXT]
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(prompt), 12)
    choices = stream(messages=CAT, **fields)
    assert "".join(choice["delta"].get("content", "") for choice in choices) == said(answer)
    streamed = [one for choice in choices if choice["logprobs"] for one in choice["logprobs"]["content"]]
    assert entries(streamed) == entries(content)
    assert ask("plain", max_tokens=2)["usage"]["prompt_tokens"] == len(encode_chat(CAT, add_generation_prompt=True))


def test_a_chat_is_continued_from_ids_and_text_of_the_models_vocabulary(ask, oracle):
    prompt = oracle.chat(CAT[0]["content"])
    ids = oracle.greedy(prompt, 10)
    for n in range(1, 6):
        answer = ask(max_tokens=10 - n, assistant_prefix_ids=ids[:n])
        assert said(answer) == oracle.text(ids[n:], after=ids[:n])
        assert answer["usage"]["prompt_tokens"] == len(prompt) + n
    begun = {"messages": [*CAT, {"role": "assistant", "content": "the dog"}], "continue_final_message": True}
    prompt += oracle.encode("the dog")
    ids = oracle.greedy(prompt, 8)
    answer = ask(max_tokens=8, **begun)
    assert said(answer) == oracle.text(ids) and answer["usage"]["prompt_tokens"] == len(prompt)
    answer = ask(max_tokens=5, assistant_prefix_ids=ids[:3], **begun)  # ids that follow the text
    assert said(answer) == oracle.text(ids[3:], after=ids[:3])
    assert answer["usage"]["prompt_tokens"] == len(prompt) + 3


def test_the_length_of_a_message_is_that_in_the_models_vocabulary(ask, oracle):
    text = "the cat sat " * 60
    error = ask(messages=[{"role": "user", "content": text}])["error"]
    assert error["message"].startswith(f"the message has {len(oracle.encode(text))} tokens and the window")


def test_a_text_has_the_ids_and_texts_of_the_models_vocabulary(ask, stream, oracle):
    prompt = [ENDOFTEXT, *oracle.encode(PROMPT)]
    ids = [*prompt[1:], *oracle.greedy(prompt, 8)]
    whole = {"prompt": PROMPT, "max_tokens": 8}
    begun = {"prompt": PROMPT, "max_tokens": 5, "prefix_ids": ids[-8:-5]}
    for fields in (whole, begun):
        fields.update(echo=True, logprobs=2)
        answer = ask(**fields)
        (choice,) = answer["choices"]
        logprobs = choice["logprobs"]
        assert choice["text"] == oracle.text(ids)
        assert logprobs["ids"] == ids and logprobs["text_offset"] == oracle.offsets(ids)
        assert logprobs["tokens"] == [oracle.entry(token)[1] for token in ids]
        assert entries(logprobs["content"]) == [oracle.entry(token) for token in ids]
        for n, (top, top_ids) in enumerate(zip(logprobs["top_logprobs"], logprobs["top_ids"], strict=True)):
            assert top_ids == likeliest([ENDOFTEXT, *ids[:n]], 2)
            assert {oracle.entry(token)[1] for token in top_ids if token < ENDOFTEXT} <= set(top)
        n_tokens = (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"])
        assert n_tokens == (1 + len(ids) - fields["max_tokens"], fields["max_tokens"])
        choices = stream(**fields)
        assert "".join(choice["text"] for choice in choices) == choice["text"]
        assert [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["ids"]] == ids
    plain = ask("plain", prompt=PROMPT, max_tokens=1)
    assert plain["usage"]["prompt_tokens"] == 1 + len(encode_text(PROMPT))


@pytest.mark.parametrize("token", [ENDOFTEXT, IM_START, IM_END])
def test_the_models_own_control_tokens_end_a_reply_and_cannot_be_sent(ask, token):
    ended = ask(logit_bias={str(token): 100}, max_tokens=4)
    assert said(ended) == "" and ended["choices"][0]["finish_reason"] == "stop"
    if token == ENDOFTEXT:
        ended = ask(prompt=PROMPT, logit_bias={str(token): 100}, max_tokens=4)
        assert ended["choices"][0]["text"] == "" and ended["choices"][0]["finish_reason"] == "stop"
    for name, fields in (("assistant_prefix_ids", {}), ("prefix_ids", {"prompt": PROMPT})):
        error = ask(**fields, **{name: [5, token]})["error"]
        assert error["param"] == name and error["message"].endswith("ids must be from 0 to 399")
        assert "error" not in ask("plain", **fields, **{name: [5, token]}, max_tokens=1)


def test_a_bias_has_the_ids_of_the_models_vocabulary(ask, oracle):
    (token,) = oracle.encode("the")
    assert said(ask(logit_bias={str(token): 100}, max_tokens=3)) == "thethethe"
    assert ask(logit_bias={str(N_VOCAB): 1})["error"]["param"] == "logit_bias"
    assert "error" not in ask("plain", logit_bias={str(N_VOCAB): 1}, max_tokens=1)
