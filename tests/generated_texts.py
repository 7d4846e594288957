"""Texts of every script for comparing tokenizers, the same ones in every run."""

from __future__ import annotations

import functools
import random
import sys
import unicodedata

from setup_tokenizer import SPECIAL_TOKENS

WORDS = (
    *("the", "The", " the", "don't", "DON'T", "I'll", "we'Ve", "o'clock", "naïve", "Straße", "İstanbul", "ſ's"),
    *("привет", " мир", "καλημέρα", "שלום", "مرحبا", "नमस्ते", "வணக்கம்", "สวัสดี", "ᎣᏏᏲ"),
    *("안녕하세요", "日本語", "漢字かな", "𠀋𠮷"),
    *("e\u0301", "\u0301", "❤️", "👩‍👩‍👧", "🇩🇪", "👍🏽", "\u200d", "\ufeff", "\x00", "\x1f"),
    *("\x85", "\xa0", "\u3000", "\u2028"),
    *(*"0123456789", "1234567", "3.14", "12,000", "٣٤٥٦", "１２３４", "²³", "Ⅻ", "½"),
    *(".", "...", "!?", " (", ")", "--", "==>", "{}", "\\n", "$", "€", "«", "„", "’s", "'", "''s"),
    *(" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \n ", "\n  ", "\t\t", "        ", "\x0b", "\u2003"),
    *(*SPECIAL_TOKENS, "<|im_", "end|>", "<|", "|>", "<|endoftext|", "user\n", "assistant\n"),
)


def generated_texts(count: int, seed: int) -> list[str]:
    """Texts of up to 30 parts: words of many scripts, white space, digits, signs, and any assigned characters."""
    assigned = assigned_characters()
    chosen = random.Random(seed)

    def part() -> str:
        if chosen.random() < 0.8:
            return chosen.choice(WORDS)
        return "".join(chosen.choices(assigned, k=chosen.randint(1, 4)))

    return ["".join(part() for _ in range(chosen.randint(0, 30))) for _ in range(count)]


@functools.cache
def assigned_characters() -> list[str]:
    """All characters that this Python knows; newer ones may be of another kind in one of the libraries."""
    characters = map(chr, range(sys.maxunicode + 1))
    return [character for character in characters if unicodedata.category(character) not in ("Cn", "Cs")]
