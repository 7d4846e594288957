"""A byte-level BPE vocabulary, and the tokenizer.json layout of Hugging Face's tokenizers that stores it.

>>> toy = Vocabulary(GPT2_PATTERN, (*(bytes([byte]) for byte in range(256)), b"th", b"the"))
>>> merge_pairs(toy)
[(b't', b'h'), (b'th', b'e')]
>>> parse_tokenizer_json(json.dumps(tokenizer_json(toy, {"<|endoftext|>": 258})), "toy.json") == toy
True

The package tokenizers merges in the order of the file's list of pairs, tiktoken by the ranks of the merged tokens. A
file is accepted only if both give the same ids for every text, except for the added tokens of the file and for runs of
100,000 white-space characters (see `encode_text`).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.cli import UserError
from common.token_patterns import GPT2_PATTERN, pattern_after_digits, problem_of_pattern

MAX_TOKEN_BYTES = 1024  # GPT-2's longest token has 128; the check of a token takes time quadratic in its length
_N_BYTES = 256
METADATA = "jojo"  # the entry of the model that describes where a tokenizer comes from


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a byte-level BPE and the pattern that cuts text into pieces before merging.

    `pattern` is a regular expression in the form that tiktoken understands. `tokens` are in the order of their ids:
    the 256 bytes in any order, then one token per merge.
    """

    pattern: str
    tokens: tuple[bytes, ...]

    def ranks(self) -> dict[bytes, int]:
        """The id of each token, as tiktoken.Encoding's `mergeable_ranks`."""
        return {token: rank for rank, token in enumerate(self.tokens)}

    @property
    def digest(self) -> str:
        """The sha256 (hexadecimal) of the pattern and the tokens; the layout and metadata of a file do not matter."""
        parts = (self.pattern.encode(), *self.tokens)
        return hashlib.sha256(b"".join(len(part).to_bytes(4, "big") + part for part in parts)).hexdigest()


@functools.cache
def byte_characters() -> dict[int, str]:
    """The printable character that GPT-2 writes for each byte: the byte's own in Latin-1, or one from U+0100 up.

    As in the code released with "Language Models are Unsupervised Multitask Learners" (Radford et al. 2019).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(_N_BYTES) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + n) for n, byte in enumerate(others)}


def printable_token(token: bytes) -> str:
    """A token in the characters of `byte_characters`."""
    return "".join(byte_characters()[byte] for byte in token)


def merge_pairs(vocabulary: Vocabulary) -> list[tuple[bytes, bytes]]:
    """The two parts that each token after the bytes is merged from, in the order of the merges.

    A vocabulary stores only the merged tokens. The parts of a token are what byte pair encoding makes of it one merge
    earlier. Raises ValueError for a token that cannot be merged.
    """
    pairs = []
    lower = {token: rank for rank, token in enumerate(vocabulary.tokens[:_N_BYTES])}
    for token in vocabulary.tokens[_N_BYTES:]:
        parts = _merged(token, lower)
        if len(parts) != 2:
            raise ValueError(f"{token!r} is not made of two tokens of lower rank")
        pairs.append((parts[0], parts[1]))
        lower[token] = len(lower)
    return pairs


def _merged(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """The parts into which byte pair encoding splits a token, by `ranks`, which does not contain the token itself."""
    parts = [token[index : index + 1] for index in range(len(token))]
    while len(parts) > 1:
        pair_ranks = [ranks.get(left + right, len(ranks)) for left, right in itertools.pairwise(parts)]
        lowest = min(pair_ranks)
        if lowest == len(ranks):
            break
        first = pair_ranks.index(lowest)
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts


# --- writing ---


def tokenizer_json(
    vocabulary: Vocabulary, control_tokens: Mapping[str, int], metadata: Mapping[str, Any] | None = None
) -> dict:
    """The content of a tokenizer.json: bytes and merges as BPE, and the control tokens as single ids.

    Ids are those of the vocabulary and those that `control_tokens` gives. `metadata` is stored within the model, where
    tokenizers ignores unknown entries; at the top level of the file, it would reject them. Raises ValueError for a
    token that cannot be merged.
    """
    settings = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    controls = sorted(control_tokens.items(), key=lambda item: item[1])
    ids = {printable_token(token): rank for rank, token in enumerate(vocabulary.tokens)}
    pairs = [[printable_token(left), printable_token(right)] for left, right in merge_pairs(vocabulary)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id_, "content": token, **settings} for token, id_ in controls],
        "normalizer": None,
        "pre_tokenizer": _pre_tokenizer(vocabulary.pattern, byte_level),
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            **({} if metadata is None else {METADATA: dict(metadata)}),
            "vocab": ids | dict(controls),
            "merges": pairs,
        },
    }


def stored_name(content: Mapping) -> str | None:
    """The name stored in a tokenizer.json; None without a name, or if it cannot be part of a file name."""
    model = content.get("model")
    metadata = model.get(METADATA) if isinstance(model, dict) else None
    name = metadata.get("name") if isinstance(metadata, dict) else None
    return name if isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) else None


def _pre_tokenizer(pattern: str, byte_level: Mapping[str, Any]) -> Mapping:
    """ByteLevel, which cuts text by GPT-2's pattern; for other patterns a Split before it."""
    if pattern == GPT2_PATTERN:
        return byte_level
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {**byte_level, "use_regex": False}]}


# --- reading ---


def parse_tokenizer_json(text: str, where: str) -> Vocabulary:
    """The vocabulary in the text of a tokenizer.json; `where` names the file in errors.

    New ids are assigned, whatever they are in the file: first the bytes in the order of their ids in the file, then the
    merges in their order. Added tokens, such as control tokens, are left out, and so are tokens that no merge makes,
    which the file's own tokenizer never returns. Raises UserError for anything but byte-level BPE without a
    normalizer, dropout, unknown token, prefix or suffix, for damaged files, and for merges or a pattern that tiktoken
    would not follow exactly.
    """
    content = _content(text, where)
    model = _object(content.get("model"), "model", where)
    _require_plain_bpe(content, model, where)
    pattern = _pattern_of(content.get("pre_tokenizer"), where)
    vocab, merges = _typed_vocab(model, where), _typed_merges(model, where)
    others = set(vocab) - set(byte_characters().values()) - set(merges) - _added_tokens(content, where)
    if others and model.get("ignore_merges"):
        raise _refusal(where, f"has tokens that no merge makes, such as {_short(min(others))}")
    tokens = _ordered_tokens(vocab, merges, where)
    if problem := problem_of_pattern(pattern):
        raise _refusal(where, f"cuts text by a pattern that {problem}")
    return Vocabulary(pattern, tokens)


def _refusal(where: str, what: str) -> UserError:
    return UserError(
        f"{where} {what}; Jojo reads byte-level BPE in the tokenizer.json layout; train such a tokenizer with: "
        "python data/train-tokenizer.py --input FILES --name NAME"
    )


def _short(value: Any) -> str:
    """A value from a file, for an error message: at most 60 characters."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _content(text: str, where: str) -> dict:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _refusal(where, f"is not JSON ({_short(str(error))})") from error
    return _object(content, "content", where)


def _object(value: Any, name: str, where: str) -> dict:
    if not isinstance(value, dict):
        raise _refusal(where, f"is not a tokenizer.json: its {name} is not an object")
    return value


def _require_plain_bpe(content: Mapping, model: Mapping, where: str) -> None:
    kind = model.get("type", "BPE" if "merges" in model else None)  # older files do not name the type
    if kind != "BPE":
        raise _refusal(where, f"is a tokenizer of the kind {_short(kind)}")
    if model.get("byte_fallback"):
        raise _refusal(where, "is a BPE in SentencePiece's style (byte_fallback)")
    if content.get("normalizer") is not None:
        kind = _object(content["normalizer"], "normalizer", where).get("type")
        raise _refusal(where, f"changes the text before it encodes it (normalizer {_short(kind)})")
    for name in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise _refusal(where, f"uses {name} {_short(model[name])}")


def _pattern_of(pre_tokenizer: Any, where: str) -> str:
    """The pattern by which a pre-tokenizer cuts text: ByteLevel, perhaps in a Sequence after Split or Digits."""
    step = _object(pre_tokenizer, "pre_tokenizer", where)
    steps = step.get("pretokenizers") if step.get("type") == "Sequence" else [step]
    if not isinstance(steps, list):
        raise _refusal(where, "is not a tokenizer.json: its pretokenizers are not a list")
    steps = [_object(each, "pre_tokenizer", where) for each in steps]
    kinds = [each.get("type") for each in steps]
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"], ["Digits", "ByteLevel"]):
        raise _refusal(where, f"cuts text with {_short(kinds)} instead of ByteLevel, perhaps after Split or Digits")
    if steps[-1].get("add_prefix_space", True):  # what tokenizers assumes where a file does not say
        raise _refusal(where, "puts a space in front of every text (add_prefix_space)")
    if steps[-1].get("use_regex", True) == (kinds[0] == "Split"):
        raise _refusal(where, "cuts text twice or not at all (ByteLevel's use_regex)")
    if kinds[0] == "Split":
        return _split_pattern(steps[0], where)
    return GPT2_PATTERN if len(steps) == 1 else pattern_after_digits(bool(steps[0].get("individual_digits")))


def _split_pattern(split: Mapping, where: str) -> str:
    pattern = _object(split.get("pattern"), "pattern", where).get("Regex")
    if not isinstance(pattern, str):
        raise _refusal(where, "cuts text at a fixed string instead of a regular expression (Split)")
    if split.get("behavior") != "Isolated" or split.get("invert"):
        raise _refusal(where, f"cuts text with a Split that is {_short(split.get('behavior'))} or inverted")
    return pattern


def _typed_vocab(model: Mapping, where: str) -> dict[str, int]:
    vocab = _object(model.get("vocab"), "vocab", where)
    if not all(type(id_) is int for id_ in vocab.values()):
        raise _refusal(where, "is not a tokenizer.json: an id in its vocab is not a number")
    if len(set(vocab.values())) != len(vocab):
        raise _refusal(where, "gives several tokens the same id")
    missing = [character for character in byte_characters().values() if character not in vocab]
    if missing:
        raise _refusal(where, f"lacks {len(missing)} of the 256 bytes, so it cannot encode every text")
    return vocab


def _typed_merges(model: Mapping, where: str) -> dict[str, dict[tuple[str, str], int]]:
    """The merges as {token: {pair: position}}, in the order of the first merge that makes a token."""
    merges, vocab = model.get("merges"), model["vocab"]
    if not isinstance(merges, list):
        raise _refusal(where, "is not a tokenizer.json: its merges are not a list")
    positions: dict[str, dict[tuple[str, str], int]] = {}
    for position, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not _is_pair(pair) or not vocab.keys() >= {*pair, "".join(pair)}:
            raise _refusal(where, f"has a merge that is not a pair of its tokens: {_short(merge)}")
        token_merges = positions.setdefault("".join(pair), {})
        if token_merges.setdefault((pair[0], pair[1]), position) != position:
            raise _refusal(where, f"has the same merge twice: {_short(merge)}")
    return positions


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) and part for part in pair)


def _added_tokens(content: Mapping, where: str) -> set[str]:
    added = content.get("added_tokens") or []
    if not isinstance(added, list):
        raise _refusal(where, "is not a tokenizer.json: its added_tokens are not a list")
    return {str(_object(token, "added token", where).get("content")) for token in added}


def _ordered_tokens(
    vocab: Mapping[str, int], merges: Mapping[str, Mapping[tuple[str, str], int]], where: str
) -> tuple[bytes, ...]:
    """The 256 bytes in the order of their ids, then the tokens of the merges.

    Raises UserError unless merging by rank gives the ids that the merges give. This is checked token by token: the
    parts into which byte pair encoding with only the lower ranks splits a token must be the pair of one of its merges,
    and these merges must be in the order of the tokens. That suffices. As long as no merge crosses the boundaries of
    a span, the span merges as it does alone, because what is outside cannot change which of its pairs is next. So
    whenever a text contains two neighbours that form a token, they are the parts that the token alone would have at
    this point, which is the pair that the check has found. So both programs choose the same pair at each step,
    and further merges of the same token (converters from tiktoken's format write all of them) are never used.
    """
    byte_of = {character: bytes([byte]) for byte, character in byte_characters().items()}
    ranks = {byte_of[character]: rank for rank, character in enumerate(sorted(byte_of, key=vocab.__getitem__))}
    last = -1
    for name, positions in merges.items():
        if not byte_of.keys() >= set(name):
            raise _refusal(where, f"has a token that is not spelled in the characters of bytes: {_short(name)}")
        if len(name) > MAX_TOKEN_BYTES:
            raise _refusal(where, f"has a token of {len(name):,} bytes ({_short(name)}), more than {MAX_TOKEN_BYTES:,}")
        token = b"".join(map(byte_of.__getitem__, name))
        position = positions.get(_pair_of_names(_merged(token, ranks)), -1)
        if position <= last:
            raise _refusal(where, f"merges {_short(name)} in an order that tiktoken does not follow")
        ranks[token] = len(ranks)
        last = position
    return tuple(ranks)


def _pair_of_names(parts: Sequence[bytes]) -> tuple[str, str]:
    return (printable_token(parts[0]), printable_token(parts[1])) if len(parts) == 2 else ("", "")
