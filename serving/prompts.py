"""Convert a request's fields to what the engine needs: ids, limits and settings."""

from __future__ import annotations

import dataclasses

from generation.sampling import CHAT_SAMPLING, TEXT_SAMPLING
from generation.stream import Request
from generation.text_stream import TextStream
from generation.window import MessageTooLong, fit_window, room_for_reply
from serving.errors import ApiError
from serving.models import DEFAULT_MAX_TOKENS, ModelCard
from serving.openai_api import ChatFields, GenerationFields, TextFields, check_ids
from setup_tokenizer import Tokenizer


def chat_requests(fields: ChatFields, card: ModelCard, max_rows: int) -> tuple[list[Request], int]:
    """One request per choice, and how many of the oldest messages do not fit the window. Raises ApiError."""
    if not card.can_chat:
        raise ApiError(400, "this model has no ChatML tokens; use /v1/completions", param="model")
    messages = fields.plain_messages()
    tokenizer = card.tokenizer
    prefix = fields.assistant_prefix_ids or []
    check_ids(prefix, "assistant_prefix_ids", tokenizer.endoftext)
    if fields.continue_final_message:
        prefix = [*tokenizer.encode_text(messages.pop()["content"]), *prefix]
        if not messages:
            raise ApiError(400, "messages: there is no message before the assistant's", param="messages")
    block_size = card.config.block_size
    max_tokens = fields.max_completion_tokens or fields.max_tokens
    try:
        capacity = block_size - room_for_reply(block_size, max_tokens) - len(prefix)
        ids, n_dropped = fit_window(messages, capacity, tokenizer)
    except MessageTooLong as error:
        hint = f"; the reply so far has {len(prefix)} tokens" if prefix else ""
        raise ApiError(400, f"{error}{hint}", param="messages", code="context_length_exceeded") from None
    ids = [*ids, *prefix]
    room = block_size - len(ids)
    request = Request(
        ids,
        room if max_tokens is None else min(room, max_tokens),
        sampling=fields.sampling(CHAT_SAMPLING),
        stop_ids=(tokenizer.im_end, tokenizer.endoftext, tokenizer.im_start),
        top_logprobs=(fields.top_logprobs or 0) if fields.logprobs else None,
        n_prefix_ids=len(prefix),
        **shared_settings(fields, card),
    )
    return numbered([request], fields, max_rows), n_dropped


def text_requests(fields: TextFields, card: ModelCard, max_rows: int) -> list[Request]:
    """One request per prompt and choice. Raises ApiError."""
    prefix = fields.prefix_ids or []
    check_ids(prefix, "prefix_ids", card.tokenizer.endoftext)
    if not 1 <= len(fields.prompts) <= max_rows:
        raise ApiError(400, f"prompt: give 1 to {max_rows} prompts", param="prompt")
    requests = []
    for prompt in fields.prompts:
        ids = [card.tokenizer.endoftext, *card.tokenizer.encode_text(prompt), *prefix]
        if len(ids) > card.config.block_size:
            raise ApiError(
                400,
                f"the prompt has {len(ids) - 1} tokens and the model's window {card.config.block_size}; shorten it",
                param="prompt",
                code="context_length_exceeded",
            )
        requests.append(
            Request(
                ids,
                DEFAULT_MAX_TOKENS if fields.max_tokens is None else fields.max_tokens,
                sampling=fields.sampling(TEXT_SAMPLING),
                stop_ids=(card.tokenizer.endoftext,),
                top_logprobs=fields.logprobs,
                prompt_logprobs=bool(fields.echo) and fields.logprobs is not None,
                slides=True,
                n_prefix_ids=len(prefix),
                **shared_settings(fields, card),
            )
        )
    return numbered(requests, fields, max_rows)


def prefix_text(ids: list[int], tokenizer: Tokenizer) -> str:
    """The whole characters of the ids with which a continuation begins."""
    text = TextStream(tokenizer.enc)
    return "".join(map(text.feed, ids))


def shared_settings(fields: GenerationFields, card: ModelCard) -> dict:
    """The settings that chats and texts have in common."""
    return {
        "seed": fields.seed,
        "tokenizer": card.tokenizer,
        "stop_texts": fields.stop_texts,
        "frequency_penalty": fields.frequency_penalty or 0.0,
        "presence_penalty": fields.presence_penalty or 0.0,
        "logit_bias": fields.biases(card.config.n_vocab),
    }


def numbered(requests: list[Request], fields: GenerationFields, max_rows: int) -> list[Request]:
    """Each request `n` times; the seeds of the choices are seed, seed + 1, ..."""
    n = fields.n or 1
    if n * len(requests) > max_rows:
        raise ApiError(400, f"n: at most {max_rows} texts are generated per request", param="n")
    choices = [request for request in requests for _ in range(n)]
    if fields.seed is None:
        return choices
    return [
        dataclasses.replace(request, seed=(fields.seed + number % n) % 2**63) for number, request in enumerate(choices)
    ]
