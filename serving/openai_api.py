"""What the bodies of requests may contain: OpenAI's names, and a few of llama.cpp's and vLLM's.

Unknown fields are ignored. Fields of OpenAI's API whose effect is not supported are rejected, with their name in the
error.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from generation.sampling import Sampling
from serving.errors import ApiError

MAX_STOPS = 16
MAX_LOGPROBS = 20
Fields = TypeVar("Fields", bound=BaseModel)

StopText = Annotated[str, Field(max_length=200)]
TokenId = Annotated[int, Field(ge=0)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None


class GenerationFields(BaseModel):
    """The fields that chats and texts have in common. None: the default."""

    model_config = ConfigDict(strict=True)

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1)  # 0 and -1: from all ids
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, allow_inf_nan=False)
    frequency_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    presence_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int | None = Field(None, ge=1)
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stop_texts(self) -> tuple[str, ...]:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in stop if text)

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk that holds the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, default: Sampling) -> Sampling:
        """How ids are drawn: as gen.py does unless the request says otherwise."""
        top_k = default.top_k if self.top_k is None else self.top_k
        return Sampling(
            temperature=default.temperature if self.temperature is None else self.temperature,
            top_k=top_k if top_k and top_k > 0 else None,
            top_p=None if self.top_p in (None, 1) else self.top_p,
            min_p=self.min_p or None,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
        )

    def biases(self, n_vocab: int) -> dict[int, float]:
        """The values of logit_bias by token id. Raises ApiError for a key that is not an id of this model."""
        biases = {}
        for name, bias in (self.logit_bias or {}).items():
            if not (name.isascii() and name.isdecimal() and len(name) < 7 and int(name) < n_vocab):
                raise ApiError(400, f"logit_bias: keys must be token ids from 0 to {n_vocab - 1}", param="logit_bias")
            biases[int(name)] = bias
        return biases


class Message(BaseModel):
    model_config = ConfigDict(strict=True)

    role: str
    content: str | list[dict[str, Any]] | None = None
    tool_calls: Any = None
    function_call: Any = None


class ChatFields(GenerationFields):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    continue_final_message: bool | None = None  # the last message is the beginning of the reply
    assistant_prefix_ids: list[TokenId] | None = None  # the same in ids, of which a character may be incomplete

    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None
    web_search_options: Any = None

    def check(self) -> None:
        """Raise ApiError for what is not supported, and for fields that contradict each other."""
        for name in ("tools", "functions", "audio", "web_search_options"):
            if getattr(self, name):
                raise unsupported(name)
        for name, harmless in (("tool_choice", ("none", "auto")), ("function_call", ("none", "auto"))):
            if getattr(self, name) not in (None, *harmless):
                raise unsupported(name)
        if self.response_format not in (None, {"type": "text"}):
            raise unsupported("response_format", "only text is")
        if self.modalities not in (None, ["text"]):
            raise unsupported("modalities", "only text is")
        check_stream_options(self)
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise ApiError(
                400,
                "continue_final_message needs a last message of the assistant",
                param="continue_final_message",
            )

    def plain_messages(self) -> list[dict[str, str]]:
        """The messages in the form `encode_chat` expects. Raises ApiError for unsupported roles and parts."""
        return [
            {"role": role_of(message, index), "content": text_of(message, index)}
            for index, message in enumerate(self.messages)
        ]


class TextFields(GenerationFields):
    """The body of POST /v1/completions."""

    prompt: str | list[str] | None = None  # None: nothing, the model begins a text
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None
    prefix_ids: list[TokenId] | None = None  # the beginning of the continuation

    suffix: Any = None
    best_of: Any = None

    def check(self) -> None:
        """Raise ApiError for what is not supported, and for fields that contradict each other."""
        if self.suffix:
            raise unsupported("suffix")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise unsupported("best_of", "only the value of n is")
        check_stream_options(self)

    @property
    def prompts(self) -> list[str]:
        return self.prompt if isinstance(self.prompt, list) else [self.prompt or ""]


def parse_body(fields: type[Fields], body: bytes) -> Fields:
    """The fields of a JSON body. Raises ApiError 400 that names the first field that is wrong."""
    try:
        return fields.model_validate_json(body or b"{}")
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        location = [str(part) for part in first["loc"] if not _is_type_name(part)]
        param = ".".join(location)[:100] or None
        message = first["msg"].removeprefix("Value error, ")
        raise ApiError(400, f"{param}: {message}" if param else message, param=param) from None


def _is_type_name(part: int | str) -> bool:
    """Whether part of an error's location is the name of an alternative of a union, not of a field."""
    return isinstance(part, str) and (part in ("str", "int", "float") or not part.isidentifier())


def check_stream_options(fields: GenerationFields) -> None:
    if fields.stream_options is not None and not fields.stream:
        raise ApiError(400, "stream_options needs stream: true", param="stream_options")


def check_ids(ids: list[int], name: str, endoftext: int) -> None:
    """Raise ApiError unless all ids are those of ordinary tokens: clients must not send control tokens."""
    if ids and max(ids) >= endoftext:
        raise ApiError(400, f"{name}: ids must be from 0 to {endoftext - 1}", param=name)


def unsupported(name: str, but: str = "") -> ApiError:
    return ApiError(400, f"{name} is not supported by this server{f'; {but}' if but else ''}", param=name)


def role_of(message: Message, index: int) -> str:
    role = "system" if message.role == "developer" else message.role
    if role not in ("system", "user", "assistant"):
        name = f"messages.{index}.role"
        raise ApiError(400, f"{name} must be system, user or assistant; tools are not supported", param=name)
    return role


def text_of(message: Message, index: int) -> str:
    for field in ("tool_calls", "function_call"):
        if getattr(message, field):
            raise unsupported(f"messages.{index}.{field}")
    name = f"messages.{index}.content"
    if message.content is None:
        raise ApiError(400, f"{name} is missing; tool calls are not supported", param=name)
    if isinstance(message.content, str):
        return message.content
    texts = []
    for part in message.content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ApiError(400, f"{name}: only parts of type text are supported, not images or audio", param=name)
        texts.append(part["text"])
    return "".join(texts)
