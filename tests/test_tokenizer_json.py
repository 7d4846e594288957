"""Tokenizer files: tokenizers and tiktoken give the same ids, and a file for which they would not is refused."""

from __future__ import annotations

import copy
import itertools
import json
import random

import pytest
import tiktoken
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from common.cli import UserError
from common.token_patterns import GPT2_PATTERN, PATTERNS
from common.tokenizer_json import (
    Vocabulary,
    byte_characters,
    merge_pairs,
    parse_tokenizer_json,
    printable_token,
    tokenizer_json,
)
from data.tokenizer_training import learn
from setup_tokenizer import SPECIAL_TOKENS, get_base_tokenizer
from tests.generated_texts import generated_texts

LLAMA3_PATTERN = (  # as in Hugging Face's files; (?i:...) and \s+ differ from ours
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
GPT2_AS_PUBLISHED = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PATTERNS_OF_OTHERS = {"gpt2 as published": GPT2_AS_PUBLISHED, "llama 3": LLAMA3_PATTERN}
BYTES = tuple(bytes([byte]) for byte in range(256))
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.fixture(scope="module", params=[*PATTERNS.items(), *PATTERNS_OF_OTHERS.items()], ids=lambda item: item[0])
def vocabulary(request) -> Vocabulary:
    """A vocabulary learned from generated texts with each pattern."""
    return learn(generated_texts(3000, seed=1), request.param[1], 1500)


@pytest.fixture(scope="module")
def small() -> Vocabulary:
    return learn(generated_texts(300, seed=2), GPT2_PATTERN, 300)


def control_tokens(vocabulary: Vocabulary) -> dict[str, int]:
    return {token: len(vocabulary.tokens) + index for index, token in enumerate(SPECIAL_TOKENS)}


def in_tiktoken(vocabulary: Vocabulary) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        "test",
        pat_str=vocabulary.pattern,
        mergeable_ranks=vocabulary.ranks(),
        special_tokens=control_tokens(vocabulary),
    )


def in_tokenizers(content: dict) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def ids_of(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


def parsed(content: dict) -> Vocabulary:
    return parse_tokenizer_json(json.dumps(content), "their.json")


def refusal(content: object) -> str:
    """The sentence with which a file is refused."""
    with pytest.raises(UserError) as caught:
        parse_tokenizer_json(content if isinstance(content, str) else json.dumps(content), "their.json")
    assert str(caught.value).startswith("their.json ") and "\n" not in str(caught.value)
    assert "python data/train-tokenizer.py" in str(caught.value)
    return str(caught.value)


def changed(content: dict, path: str, value: object) -> dict:
    """A copy of a file's content with another value at a path such as model.type."""
    content = copy.deepcopy(content)
    *parents, last = path.split(".")
    place = content
    for name in parents:
        place = place[int(name)] if isinstance(place, list) else place[name]
    place[last] = value
    return content


# --- the same ids ---


def test_ten_thousand_texts_have_the_ids_of_tokenizers(vocabulary):
    texts = generated_texts(10_000, seed=3)
    assert max(map(len, vocabulary.tokens)) > 4, "something was learned"
    plain, enc = in_tokenizers(tokenizer_json(vocabulary, {})), in_tiktoken(vocabulary)
    ours = [enc.encode_ordinary(text) for text in texts]
    assert ours == ids_of(plain, texts)
    assert [enc.decode(ids) for ids in ours] == texts
    with_controls = in_tokenizers(tokenizer_json(vocabulary, control_tokens(vocabulary)))
    assert [enc.encode(text, allowed_special="all") for text in texts] == ids_of(with_controls, texts)


def test_a_file_gives_back_its_vocabulary(vocabulary):
    content = tokenizer_json(vocabulary, control_tokens(vocabulary), {"name": "test"})
    assert parsed(content) == vocabulary
    assert parse_tokenizer_json(in_tokenizers(content).to_str(), "saved by tokenizers") == vocabulary


def test_gpt2_exported_is_gpt2():
    from exchange.tokenizer_files import tokenizer_json as exported

    enc = get_base_tokenizer()
    tokens = sorted(enc._mergeable_ranks, key=enc._mergeable_ranks.__getitem__)
    assert parsed(exported(50259)) == Vocabulary(enc._pat_str, tuple(tokens))


def test_the_digest_is_that_of_pattern_and_tokens_alone(small):
    content = tokenizer_json(small, control_tokens(small), {"name": "one"})
    again = parse_tokenizer_json(json.dumps(tokenizer_json(small, {}), indent=3, ensure_ascii=True), "again.json")
    assert parsed(content).digest == again.digest == small.digest
    swapped = (*small.tokens[:254], small.tokens[255], small.tokens[254], *small.tokens[256:])
    others = {Vocabulary(small.pattern, tokens).digest for tokens in (swapped, small.tokens[:-1])}
    others.add(Vocabulary(PATTERNS["multilingual"], small.tokens).digest)
    assert len(others | {small.digest}) == 4


def test_merges_are_those_that_were_learned(small):
    content = json.loads(in_tokenizers(tokenizer_json(small, {})).to_str())
    pairs = [[printable_token(left), printable_token(right)] for left, right in merge_pairs(small)]
    assert pairs == [merge.split(" ") if isinstance(merge, str) else merge for merge in content["model"]["merges"]]
    with pytest.raises(ValueError, match="not made of two tokens"):
        merge_pairs(Vocabulary(GPT2_PATTERN, (*BYTES, b"abc")))


# --- files of others ---


def trained_by_others(pre_tokenizer, special_tokens: list[str]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(generated_texts(500, seed=4), trainer)
    return tokenizer


def split_and_bytes(pattern: object, behavior: str = "isolated", invert: bool = False):
    split = pre_tokenizers.Split(pattern, behavior, invert)
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@pytest.mark.parametrize("special_tokens", [[], ["<s>", "<pad>", "<|im_end|>"]])
@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        BYTE_LEVEL,
        *(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual), BYTE_LEVEL]) for individual in (True, False)),
        *(split_and_bytes(tokenizers.Regex(pattern)) for pattern in PATTERNS_OF_OTHERS.values()),
    ],
)
def test_a_file_of_tokenizers_is_accepted_with_ids_from_0(pre_tokenizer, special_tokens):
    theirs = trained_by_others(pre_tokenizer, special_tokens)
    ours = parse_tokenizer_json(theirs.to_str(), "their.json")
    assert len(ours.tokens) == 800 - len(special_tokens)
    assert sorted(ours.tokens[:256]) == list(BYTES)
    texts = [text for text in generated_texts(500, seed=5) if not any(token in text for token in special_tokens)]
    enc = in_tiktoken(ours)
    tokens = [[printable_token(ours.tokens[id_]) for id_ in enc.encode_ordinary(text)] for text in texts]
    assert tokens == [encoding.tokens for encoding in theirs.encode_batch(texts, add_special_tokens=False)]


def test_early_files_and_converted_ones_are_accepted(vocabulary):
    content = tokenizer_json(vocabulary, control_tokens(vocabulary))
    early = changed(content, "model.merges", [" ".join(pair) for pair in content["model"]["merges"]])
    for name in ("type", "fuse_unk", "byte_fallback"):
        del early["model"][name]
    assert parsed(early) == vocabulary
    # Converters from tiktoken's format write every pair of tokens that forms a token.
    names = set(content["model"]["vocab"])
    converted = [
        [token[:cut], token[cut:]]
        for token in map(printable_token, vocabulary.tokens[256:])
        for cut in range(1, len(token))
        if {token[:cut], token[cut:]} <= names
    ]
    assert len(converted) > len(vocabulary.tokens) - 256
    assert parsed(changed(content, "model.merges", converted)) == vocabulary


@pytest.mark.parametrize("seed", range(3))
def test_an_accepted_order_of_merges_gives_the_same_ids_in_both(seed):
    """Random merges of a, b and c: those that tiktoken would not follow are refused, and only those may differ."""
    chosen = random.Random(seed)
    texts = ["".join(letters) for n in range(1, 7) for letters in itertools.product("abc", repeat=n)]
    n_accepted = n_different = 0
    for _ in range(100):
        content = random_merges(chosen)
        theirs = ids_of(in_tokenizers(content), texts)
        vocab = content["model"]["vocab"]
        ranks = {bytes([byte]): vocab[character] for byte, character in byte_characters().items()}
        ranks |= {token.encode(): id_ for token, id_ in vocab.items() if len(token) > 1}
        enc = tiktoken.Encoding("test", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
        differ = theirs != [enc.encode_ordinary(text) for text in texts]
        try:
            ours = parsed(content)
        except UserError as error:
            assert "in an order that tiktoken does not follow" in str(error)
            n_different += differ
        else:
            assert not differ
            assert ours.ranks() == ranks
            n_accepted += 1
    assert n_accepted > 5 and n_different > 5


def random_merges(chosen: random.Random) -> dict:
    content = tokenizer_json(Vocabulary(GPT2_PATTERN, BYTES), {})
    vocab, merges, known = content["model"]["vocab"], content["model"]["merges"], ["a", "b", "c"]
    for _ in range(chosen.randint(3, 8)):
        pair = [chosen.choice(known), chosen.choice(known)]
        if pair not in merges:
            merges.append(pair)
            if "".join(pair) not in vocab:
                vocab["".join(pair)] = len(vocab)
                known.append("".join(pair))
    return content


# --- other kinds ---


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), "a tokenizer of the kind 'WordPiece'"),
        (models.Unigram([("a", -1.0)]), "a tokenizer of the kind 'Unigram'"),
        (models.WordLevel({"a": 0}, unk_token="a"), "a tokenizer of the kind 'WordLevel'"),
        (models.BPE({"a": 0}, [], byte_fallback=True), "BPE in SentencePiece's style (byte_fallback)"),
        (models.BPE({"a": 0}, [], dropout=0.1), "uses dropout 0.1"),
        (models.BPE({"a": 0}, [], unk_token="a"), "uses unk_token 'a'"),
        (models.BPE({"a": 0}, [], continuing_subword_prefix="##"), "uses continuing_subword_prefix '##'"),
        (models.BPE({"a": 0}, [], end_of_word_suffix="</w>"), "uses end_of_word_suffix '</w>'"),
        (models.BPE({"a": 0}, []), "lacks 255 of the 256 bytes"),
    ],
)
def test_another_kind_of_model_is_refused_by_its_name(model, named):
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert named in refusal(tokenizer.to_str())


@pytest.mark.parametrize(
    ("pre_tokenizer", "named"),
    [
        (None, "its pre_tokenizer is not an object"),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), "a space in front of every text (add_prefix_space)"),
        (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), "use_regex"),
        (pre_tokenizers.Whitespace(), "cuts text with ['Whitespace']"),
        (pre_tokenizers.Metaspace(), "cuts text with ['Metaspace']"),
        (pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), BYTE_LEVEL]), "'Punctuation', 'ByteLevel'"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(False, use_regex=False)]), "twice"),
        (split_and_bytes(" "), "at a fixed string"),
        (split_and_bytes(tokenizers.Regex(r"\s"), "removed"), "'Removed' or inverted"),
        (split_and_bytes(tokenizers.Regex(r"\S+|\s+"), invert=True), "'Isolated' or inverted"),
        (split_and_bytes(tokenizers.Regex(r"\p{N}{1,3}+|\P{N}+")), "read differently (}+)"),
        (split_and_bytes(tokenizers.Regex(r"\w+|\W+")), r"read differently (\w)"),
        (split_and_bytes(tokenizers.Regex(r"[\w]+|[^\w]+")), "read differently ([)"),
        (split_and_bytes(tokenizers.Regex(r"[[:alpha:]]+|[^a]")), "read differently ([)"),
        (split_and_bytes(tokenizers.Regex(r"\S+$|\s+|\S")), "read differently ($)"),
        (split_and_bytes(tokenizers.Regex(r"\S+|\n")), "does not match every character"),
        (split_and_bytes(tokenizers.Regex(r"\S*|\s+")), "matches nothing at all"),
    ],
)
def test_another_way_to_cut_text_is_refused_by_its_name(small, pre_tokenizer, named):
    tokenizer = in_tokenizers(tokenizer_json(small, {}))
    tokenizer.pre_tokenizer = pre_tokenizer
    assert named in refusal(tokenizer.to_str())


@pytest.mark.parametrize("pattern", ["(", "(?<x>", "\ud800", r"(?:(?:\S+)+)+(?!\1)|\s", "a" * 10**7])
def test_a_pattern_that_cannot_be_used_is_refused(small, pattern):
    content = tokenizer_json(Vocabulary(".", small.tokens), {})
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
    assert "cuts text by a pattern that" in refusal(content)


def test_a_normalizer_is_refused_by_its_name(small):
    tokenizer = in_tokenizers(tokenizer_json(small, {}))
    tokenizer.normalizer = normalizers.NFC()
    assert "normalizer 'NFC'" in refusal(tokenizer.to_str())


# --- damaged and hostile files ---


NOT_OBJECTS = ["", "{", "\0", "#version: 0.2\nĠ t\n", "[" * 100_000, "1" * 10_000, "NaN", "[]", '"x"', "null"]


@pytest.mark.parametrize("text", NOT_OBJECTS, ids=lambda text: ascii(text[:8]))
def test_what_is_no_object_is_refused(text):
    refusal(text)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *(("model", value) for value in (None, [], "BPE", {})),
        *(("model.type", value) for value in (None, 1, [], "bpe", "x" * 1000)),
        *(("model.vocab", value) for value in (None, [], {}, {"a": "1"}, {"a": None})),
        *(("model.merges", value) for value in (None, {}, "a b", [1], ["ab"], ["a b c"])),
        *(("model.merges", value) for value in ([["a"]], [["a", 1]], [["", "a"]])),
        *(("model.merges", value) for value in ([["a", "b"]], [["a", "\ud800"]], [["x" * 10**6, "y"]])),
        *(("model.vocab.a", value) for value in (True, 1.5, "1", None, [], 7)),
        ("normalizer", "NFC"),
        ("pre_tokenizer", []),
        ("pre_tokenizer", {"type": "Sequence"}),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [1]}),
        ("pre_tokenizer", {"type": ["ByteLevel"]}),
        ("added_tokens", 1),
        ("added_tokens", ["<s>"]),
    ],
)
def test_wrong_types_and_missing_tokens_are_refused(small, path, value):
    refusal(changed(tokenizer_json(small, {}), path, value))


@pytest.mark.parametrize("seed", range(5))
def test_a_file_with_random_damage_is_read_or_refused_in_one_sentence(small, seed):
    chosen = random.Random(seed)
    for _ in range(40):
        content = copy.deepcopy(tokenizer_json(small, control_tokens(small), {"name": "x"}))
        for _ in range(chosen.randint(1, 3)):
            damage(content, chosen)
        try:
            assert len(parsed(content).tokens) >= 256
        except UserError as error:
            assert str(error).startswith("their.json ") and len(str(error)) < 400


def damage(content: dict, chosen: random.Random) -> None:
    """Replace or remove one value at a random depth."""
    inner: dict | list = content
    while True:
        key = chosen.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        if not inner[key] or not isinstance(inner[key], dict | list) or chosen.random() < 0.2:
            break
        inner = inner[key]
    if chosen.random() < 0.3:
        del inner[key]
    else:
        values = [None, True, 0, -1, 1e300, "", "a", "ĠĠ", "\ud800", [], [[]], {}, {"type": "BPE"}, [1]]
        inner[key] = chosen.choice(values)


def test_tokens_that_no_merge_makes_are_left_out_or_refused(small):
    content = tokenizer_json(small, {})
    content["model"]["vocab"]["zzz"] = len(content["model"]["vocab"])
    assert parsed(content) == small
    assert ids_of(in_tokenizers(content), ["zzz"]) == ids_of(in_tokenizers(tokenizer_json(small, {})), ["zzz"])
    assert "no merge makes, such as 'zzz'" in refusal(changed(content, "model.ignore_merges", True))


def test_repeated_merges_and_endless_tokens_are_refused(small):
    content = tokenizer_json(small, {})
    merges = content["model"]["merges"]
    assert "the same merge twice" in refusal(changed(content, "model.merges", [*merges, merges[0]]))
    name = "x"
    for _ in range(16):
        content["model"]["merges"].append([name, name])
        name += name
        content["model"]["vocab"][name] = len(content["model"]["vocab"])
    assert "more than 1,024" in refusal(content)
