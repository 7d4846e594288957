"""The extended tokenizer in the formats of other programs: vocabulary, merges, tokenizer.json, chat template.

>>> vocabulary()[15496], merges()[0]
('Hello', ('Ġ', 't'))
"""

from __future__ import annotations

import functools
import itertools

import tiktoken

from setup_tokenizer import ENDOFTEXT, IM_END, IM_START, SPECIAL_TOKENS, get_extended_tokenizer

# The layout that encode_chat writes, as a Jinja template for llama.cpp.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    f"{{{{ '{IM_START}' + message['role'] + '\\n' + message['content'] + '{IM_END}' + '\\n' }}}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{IM_START}assistant\\n' }}}}{{% endif %}}"
)
# The same text, for transformers. {% generation %} is an addition of theirs, which plain Jinja refuses: it marks what
# the assistant says, so that other trainers (with assistant_only_loss, for example) learn from these tokens alone.
TRAINING_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    f"{{{{ '{IM_START}' + message['role'] + '\\n' }}}}"
    "{% if message['role'] == 'assistant' %}"
    f"{{% generation %}}{{{{ message['content'] + '{IM_END}' }}}}{{% endgeneration %}}"
    f"{{% else %}}{{{{ message['content'] + '{IM_END}' }}}}{{% endif %}}"
    "{{ '\\n' }}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{IM_START}assistant\\n' }}}}{{% endif %}}"
)


@functools.cache
def byte_characters() -> dict[int, str]:
    """The printable character that GPT-2 writes for each byte: the byte's own in Latin-1, or one from U+0100 up.

    As in the code released with "Language Models are Unsupervised Multitask Learners" (Radford et al. 2019).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + n) for n, byte in enumerate(others)}


def _printable(token: bytes) -> str:
    return "".join(byte_characters()[byte] for byte in token)


def vocabulary(enc: tiktoken.Encoding | None = None) -> list[str]:
    """All tokens in the order of their ids, as text: bytes through `byte_characters`, control tokens as they are."""
    enc = enc or get_extended_tokenizer()
    tokens = {rank: _printable(token) for token, rank in enc._mergeable_ranks.items()}
    tokens |= {id_: token for token, id_ in enc._special_tokens.items()}
    return [tokens[id_] for id_ in range(enc.n_vocab)]


def merges(enc: tiktoken.Encoding | None = None) -> list[tuple[str, str]]:
    """The two parts that each token of more than one byte is merged from, in the order of the merges.

    tiktoken stores only the merged tokens. The parts of a token are what byte pair encoding gets one merge earlier.
    """
    ranks = (enc or get_extended_tokenizer())._mergeable_ranks
    tokens = sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__)
    pairs = (_last_merge(token, ranks) for token in tokens)
    return [(_printable(left), _printable(right)) for left, right in pairs]


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    parts = [token[index : index + 1] for index in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in itertools.pairwise(parts)]
        first = pairs.index(min(pairs))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts


def tokenizer_json(n_vocab: int) -> dict:
    """tokenizer.json for Hugging Face's tokenizers, with the control tokens whose ids are below `n_vocab`."""
    tokens = vocabulary()
    control = [token for token, id_ in SPECIAL_TOKENS.items() if id_ < n_vocab]
    settings = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": SPECIAL_TOKENS[token], "content": token, **settings} for token in control],
        "normalizer": None,
        "pre_tokenizer": byte_level,
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
            "vocab": {token: id_ for id_, token in enumerate(tokens[:n_vocab])},
            "merges": [list(pair) for pair in merges()],
        },
    }


def tokenizer_config(n_vocab: int, block_size: int, is_chat: bool) -> dict:
    """tokenizer_config.json: the control token that ends a turn (chat) or a text, and the chat template."""
    chatml = [token for token in (IM_START, IM_END) if SPECIAL_TOKENS[token] < n_vocab]
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": block_size,
        "add_prefix_space": False,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "bos_token": ENDOFTEXT,
        "eos_token": IM_END if is_chat else ENDOFTEXT,
        "pad_token": ENDOFTEXT,
        "unk_token": ENDOFTEXT,
        "additional_special_tokens": chatml,
    }
    return config | ({"chat_template": TRAINING_CHAT_TEMPLATE} if is_chat else {})
