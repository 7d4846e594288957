"""The extended tokenizer in the formats of other programs: vocabulary, merges, tokenizer.json, chat template.

>>> vocabulary()[15496], merges()[0]
('Hello', ('Ġ', 't'))
"""

from __future__ import annotations

import tiktoken

from common import tokenizer_json as layout
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


def vocabulary(enc: tiktoken.Encoding | None = None) -> list[str]:
    """All tokens in the order of their ids, as text: bytes in GPT-2's characters, control tokens as they are."""
    enc = enc or get_extended_tokenizer()
    tokens = {rank: layout.printable_token(token) for token, rank in enc._mergeable_ranks.items()}
    tokens |= {id_: token for token, id_ in enc._special_tokens.items()}
    return [tokens[id_] for id_ in range(enc.n_vocab)]


def merges(enc: tiktoken.Encoding | None = None) -> list[tuple[str, str]]:
    """The two parts that each token of more than one byte is merged from, in the order of the merges.

    tiktoken stores only the merged tokens; see `common.tokenizer_json.merge_pairs`.
    """
    pairs = layout.merge_pairs(_base_vocabulary(enc or get_extended_tokenizer()))
    return [(layout.printable_token(left), layout.printable_token(right)) for left, right in pairs]


def _base_vocabulary(enc: tiktoken.Encoding) -> layout.Vocabulary:
    return layout.Vocabulary(enc._pat_str, tuple(sorted(enc._mergeable_ranks, key=enc._mergeable_ranks.__getitem__)))


def tokenizer_json(n_vocab: int) -> dict:
    """tokenizer.json for Hugging Face's tokenizers, with the control tokens whose ids are below `n_vocab`."""
    controls = {token: id_ for token, id_ in SPECIAL_TOKENS.items() if id_ < n_vocab}
    return layout.tokenizer_json(_base_vocabulary(get_extended_tokenizer()), controls)


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
