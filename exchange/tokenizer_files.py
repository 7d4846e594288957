"""The extended tokenizer in the formats of other programs: vocabulary, merges, tokenizer.json, chat template.

>>> vocabulary()[15496], merges()[0]
('Hello', ('Ġ', 't'))
"""

from __future__ import annotations

from common import tokenizer_json as layout
from setup_tokenizer import ENDOFTEXT, GPT2, IM_END, IM_START, Tokenizer

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


def vocabulary(tokenizer: Tokenizer = GPT2) -> list[str]:
    """All tokens in the order of their ids, as text: bytes in GPT-2's characters, control tokens as they are."""
    tokens = map(layout.printable_token, base_vocabulary(tokenizer).tokens)
    return [*tokens, *tokenizer.special_tokens]


def merges(tokenizer: Tokenizer = GPT2) -> list[tuple[str, str]]:
    """The two parts that each token of more than one byte is merged from, in the order of the merges.

    tiktoken stores only the merged tokens; see `common.tokenizer_json.merge_pairs`.
    """
    pairs = layout.merge_pairs(base_vocabulary(tokenizer))
    return [(layout.printable_token(left), layout.printable_token(right)) for left, right in pairs]


def base_vocabulary(tokenizer: Tokenizer) -> layout.Vocabulary:
    """The vocabulary without control tokens; GPT-2's is not stored with its Tokenizer."""
    if tokenizer.vocabulary is not None:
        return tokenizer.vocabulary
    ranks = tokenizer.enc._mergeable_ranks
    return layout.Vocabulary(tokenizer.enc._pat_str, tuple(sorted(ranks, key=ranks.__getitem__)))


def tokenizer_json(n_vocab: int, tokenizer: Tokenizer = GPT2) -> dict:
    """tokenizer.json for Hugging Face's tokenizers, with its name and the control tokens below `n_vocab`."""
    controls = {token: id_ for token, id_ in tokenizer.special_tokens.items() if id_ < n_vocab}
    return layout.tokenizer_json(base_vocabulary(tokenizer), controls, {"name": tokenizer.name})


def tokenizer_config(n_vocab: int, block_size: int, is_chat: bool, tokenizer: Tokenizer = GPT2) -> dict:
    """tokenizer_config.json: the control token that ends a turn (chat) or a text, and the chat template."""
    chatml = [token for token in (IM_START, IM_END) if tokenizer.special_tokens[token] < n_vocab]
    config = {
        # The class of GPT-2 builds GPT-2's pattern itself; the other one reads the pattern of tokenizer.json.
        "tokenizer_class": "GPT2Tokenizer" if tokenizer == GPT2 else "PreTrainedTokenizerFast",
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
