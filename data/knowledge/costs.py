"""What the answers cost: tokens, and money if the price is given."""

from __future__ import annotations

from dataclasses import dataclass

from data.knowledge.journal import Answer


@dataclass
class Costs:
    """The tokens of the answers added so far."""

    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0

    def add(self, answer: Answer) -> None:
        self.answers += 1
        self.prompt_tokens += answer.prompt_tokens or 0
        self.completion_tokens += answer.completion_tokens or 0
        self.uncounted += answer.prompt_tokens is None or answer.completion_tokens is None

    def in_words(self, price: tuple[float, float] | None) -> str:
        """For example "3 answers, 450 tokens in, 900 out, cost 0.0014"; `price` is per million tokens in and out."""
        words = f"{self.answers:,} answers, {self.prompt_tokens:,} tokens in, {self.completion_tokens:,} out"
        if self.uncounted:
            words += f" ({self.uncounted:,} answers without token counts)"
        return f"{words}, cost {self.money(price):.4f}" if price else words

    def money(self, price: tuple[float, float]) -> float:
        return (self.prompt_tokens * price[0] + self.completion_tokens * price[1]) / 1e6


def parse_price(text: str) -> tuple[float, float]:
    """The price of a million tokens in and out. Raises ValueError unless `text` is two numbers of at least 0.

    >>> parse_price("0.15,0.60")
    (0.15, 0.6)
    """
    words = text.split(",")
    try:
        price = (float(words[0]), float(words[1]))
    except (ValueError, IndexError):
        price = (-1.0, -1.0)
    if len(words) != 2 or not all(0 <= part < float("inf") for part in price):
        raise ValueError(f"--price must be IN,OUT per million tokens, such as 0.15,0.60, not {text!r}")
    return price
