"""Answers in OpenAI's layouts, whole and in chunks, for chats and for texts."""

from __future__ import annotations

import codecs
import secrets
import time
from collections.abc import Sequence

from generation.stream import Output, Request, TokenLogprob, first_of_each_prompt
from setup_tokenizer import Tokenizer


def token_string(token: int, tokenizer: Tokenizer) -> str:
    r"""A token as text; bytes that are not a whole character are escaped as \xe2."""
    return tokenizer.token_bytes(token).decode("utf-8", "backslashreplace")


class Answer:
    """What answers to chats and texts have in common; `n_dropped` is the number of messages left out of the window."""

    id_prefix = object_name = chunk_name = ""

    def __init__(self, model: str, requests: Sequence[Request], n_dropped: int | None = None):
        self.id = f"{self.id_prefix}-{secrets.token_hex(12)}"
        self.model, self.requests, self.n_dropped = model, requests, n_dropped
        self.created = int(time.time())
        self.digest: str | None = None  # of the weights that generate, once they do
        self.tokenizer = requests[0].tokenizer
        self.firsts = first_of_each_prompt(requests)
        self.n_tokens, self.n_cached = [0] * len(requests), [0] * len(requests)

    def usage(self) -> dict:
        """How many tokens were read and generated. A prompt counts once, however many texts continue it."""
        prompt_tokens = sum(len(self.requests[index].prompt) for index in self.firsts)
        cached_tokens, completion_tokens = sum(self.n_cached[index] for index in self.firsts), sum(self.n_tokens)
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        }
        return usage if self.n_dropped is None else {**usage, "dropped_messages": self.n_dropped}

    def take(self, index: int, output: Output) -> None:
        """Count what an output says about the tokens."""
        self.n_tokens[index], self.n_cached[index] = output.n_tokens, output.cached_tokens

    def envelope(self, object_name: str, choices: list[dict], **more: object) -> dict:
        head = {"id": self.id, "object": object_name, "created": self.created, "model": self.model}
        return {**head, "system_fingerprint": self.digest, "choices": choices, **more}

    def opening(self, index: int) -> dict | None:
        """The choice of a chunk to send before the first output, or None."""
        return None

    def chunk(self, index: int, output: Output) -> list[dict]:
        """The choices of the chunks for one output."""
        raise NotImplementedError

    def whole(self, outputs: list[list[Output]]) -> dict:
        """The answer without streaming, from the outputs of each choice."""
        raise NotImplementedError

    def usage_chunk(self) -> dict:
        return self.envelope(self.chunk_name, [], usage=self.usage())


class ChatAnswer(Answer):
    """The answer to POST /v1/chat/completions."""

    id_prefix, object_name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> dict | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk(self, index: int, output: Output) -> list[dict]:
        logprobs = {"content": _content(output.logprobs, self.tokenizer), "refusal": None} if output.logprobs else None
        choices: list[dict] = []
        if output.text or logprobs:
            delta = {"content": output.text}
            choices.append({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None})
        if output.finish_reason is not None:
            reason = output.finish_reason
            choices.append({"index": index, "delta": {}, "logprobs": None, "finish_reason": reason})
        return choices

    def whole(self, outputs: list[list[Output]]) -> dict:
        choices = []
        for index, parts in enumerate(outputs):
            entries = _content([one for part in parts for one in part.logprobs], self.tokenizer)
            asked = self.requests[index].top_logprobs is not None
            message = {"role": "assistant", "content": "".join(part.text for part in parts), "refusal": None}
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": {"content": entries, "refusal": None} if asked else None,
                    "finish_reason": parts[-1].finish_reason,
                }
            )
        return self.envelope(self.object_name, choices, usage=self.usage())


def _content(logprobs: Sequence[TokenLogprob], tokenizer: Tokenizer) -> list[dict]:
    """Tokens with their likeliest alternatives, in the layout of chats."""
    return [
        {
            **_token_entry(one.id, one.logprob, tokenizer),
            "top_logprobs": [_token_entry(*other, tokenizer) for other in one.likeliest],
        }
        for one in logprobs
    ]


def _token_entry(token: int, logprob: float, tokenizer: Tokenizer) -> dict:
    """A token in OpenAI's layout, extended by its id."""
    token_bytes = tokenizer.token_bytes(token)
    text = token_string(token, tokenizer)
    return {"token": text, "bytes": list(token_bytes), "logprob": logprob, "id": token}


class TextAnswer(Answer):
    """The answer to POST /v1/completions."""

    id_prefix, object_name, chunk_name = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, requests: Sequence[Request], echoed: Sequence[str] | None = None):
        super().__init__(model, requests)
        self.echoed = echoed  # the prompt of each choice, to be repeated
        self._offsets = [_Offsets(self.tokenizer) for _ in requests]

    def chunk(self, index: int, output: Output) -> list[dict]:
        is_first = self._offsets[index].is_first()
        text = (self.echoed[index] if self.echoed and is_first else "") + output.text
        logprobs = self._logprobs(index, [output])
        if not (text or logprobs or output.finish_reason):
            return []
        return [{"index": index, "text": text, "logprobs": logprobs, "finish_reason": output.finish_reason}]

    def whole(self, outputs: list[list[Output]]) -> dict:
        choices = []
        for index, parts in enumerate(outputs):
            text = (self.echoed[index] if self.echoed else "") + "".join(part.text for part in parts)
            logprobs = self._logprobs(index, parts)
            choices.append(
                {"index": index, "text": text, "logprobs": logprobs, "finish_reason": parts[-1].finish_reason}
            )
        return self.envelope(self.object_name, choices, usage=self.usage())

    def _logprobs(self, index: int, outputs: Sequence[Output]) -> dict | None:
        """OpenAI's legacy layout; `ids` and `top_ids` are the ids of `tokens` and of `top_logprobs`.

        `content` is the same in the layout of chats, for clients whose objects do not keep the order of keys like "7".
        """
        if self.requests[index].top_logprobs is None:
            return None
        entries = [one for output in outputs for one in (*output.prompt_logprobs, *output.logprobs)]
        if not entries and not outputs[-1].finish_reason:
            return None
        return {
            "tokens": [token_string(one.id, self.tokenizer) for one in entries],
            "token_logprobs": [one.logprob for one in entries],
            "top_logprobs": [
                {token_string(token, self.tokenizer): value for token, value in one.likeliest} for one in entries
            ],
            "text_offset": [self._offsets[index].of(one.id) for one in entries],
            "ids": [one.id for one in entries],
            "top_ids": [[token for token, _ in one.likeliest] for one in entries],
            "content": _content(entries, self.tokenizer),
        }


class _Offsets:
    """The number of characters before each token of a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._n_characters = 0
        self._has_begun = False

    def is_first(self) -> bool:
        """True on the first call."""
        had_begun, self._has_begun = self._has_begun, True
        return not had_begun

    def of(self, token: int) -> int:
        start = self._n_characters
        self._n_characters += len(self._decoder.decode(self._tokenizer.token_bytes(token)))
        return start
