"""Learn a byte-level BPE vocabulary in plain Python and print what each merge makes: a lesson, not a fast tool.

    python testing_tools/learn_bpe.py --verbose
    python testing_tools/learn_bpe.py --input stories.txt --merges 200

Byte pair encoding (Sennrich et al. 2016, section 3.2) starts with the 256 bytes as tokens. It repeatedly counts all
pairs of neighbouring tokens and makes the most frequent pair a new token. data/train-tokenizer.py learns the same
merges, only faster. `--verbose` also shows how the first line of the text is divided after each merge.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import regex  # tiktoken depends on it; Python's own re does not support \p{L}

from common.cli import UserError, check_options, option, parse_options, run_script
from common.token_patterns import GPT2_PATTERN
from common.tokenizer_json import byte_characters
from data.readers.text import read_text_documents

EXAMPLE = """low lower newest widest
low lower newest widest
low low low newest newest newest newest widest"""

Piece = tuple[int, ...]
Pair = tuple[int, int]


@dataclass(frozen=True)
class LearnOptions:
    input: str | None = option(None, "a text file to learn from (default: a built-in example)", metavar="FILE")
    merges: int = option(10, "number of merges to learn", at_least=1)
    verbose: bool = option(False, "show how the first line of the text is divided after each merge")

    def __post_init__(self) -> None:
        check_options(self)


class Merge(NamedTuple):
    """The pair that became the token `new`, its frequency, and how many tokens the text has afterwards."""

    pair: Pair
    new: int
    frequency: int
    n_tokens: int


def byte_ids() -> dict[int, int]:
    """The id of each byte. GPT-2 numbers first the bytes that are printable, and this decides ties between pairs."""
    in_order = sorted(byte_characters().items(), key=lambda item: item[1])
    return {byte: id_ for id_, (byte, _) in enumerate(in_order)}


def pieces_of(text: str, pattern: str = GPT2_PATTERN) -> list[Piece]:
    """The words, numbers, punctuation and spaces of a text, each as the ids of its bytes. No merge crosses them."""
    ids = byte_ids()
    return [tuple(ids[byte] for byte in piece.encode()) for piece in regex.findall(pattern, text)]


def learn(texts: Iterable[str], n_merges: int, pattern: str = GPT2_PATTERN) -> Iterator[Merge]:
    """The merges of the texts, one after another; it stops early when no pair occurs twice."""
    counts = Counter(piece for text in texts for piece in pieces_of(text, pattern))  # equal pieces get equal merges
    for new in range(256, 256 + n_merges):
        pair_counts: Counter[Pair] = Counter()
        for piece, count in counts.items():
            for pair in itertools.pairwise(piece):
                pair_counts[pair] += count
        # Of equally frequent pairs, the one with the lowest ids: first by the left id, then by the right.
        best = min(pair_counts, key=lambda pair: (-pair_counts[pair], pair), default=None)
        if best is None or pair_counts[best] < 2:
            return
        counts = Counter({merge(piece, best, new): count for piece, count in counts.items()})
        yield Merge(best, new, pair_counts[best], sum(len(piece) * count for piece, count in counts.items()))


def merge(piece: Piece, pair: Pair, new: int) -> Piece:
    """The piece with every occurrence of the pair, from left to right, replaced by the new id.

    >>> merge((1, 1, 1, 2), (1, 1), 256)
    (256, 1, 2)
    """
    result, index = [], 0
    while index < len(piece):
        is_pair = piece[index : index + 2] == pair
        result.append(new if is_pair else piece[index])
        index += 2 if is_pair else 1
    return tuple(result)


def encode(text: str, merges: Mapping[Pair, int], pattern: str = GPT2_PATTERN) -> list[int]:
    """The ids of a text: in each piece, the merges are applied in the order in which they were learned."""
    ids: list[int] = []
    for piece in pieces_of(text, pattern):
        while pairs := [pair for pair in itertools.pairwise(piece) if pair in merges]:
            first = min(pairs, key=merges.__getitem__)  # the one that was learned first
            piece = merge(piece, first, merges[first])
        ids += piece
    return ids


def main() -> None:
    options = parse_options(LearnOptions, __doc__)
    texts = list(read_text_documents(options.input)) if options.input else [EXAMPLE]
    if not texts:
        raise UserError(f"{options.input} contains no text; use --input with a file that contains some")
    line = texts[0].strip().split("\n")[0]
    tokens = {id_: bytes([byte]) for byte, id_ in byte_ids().items()}
    merges: dict[Pair, int] = {}
    n_bytes = sum(len(piece) for text in texts for piece in pieces_of(text))
    print(f"{n_bytes:,} tokens before the first merge, each a byte")
    for number, (pair, new, frequency, n_tokens) in enumerate(learn(texts, options.merges), 1):
        merges[pair] = new
        tokens[new] = tokens[pair[0]] + tokens[pair[1]]
        left, right, token = (tokens[id_].decode("utf-8", "backslashreplace") for id_ in (*pair, new))
        print(f"{number:>4}: {left!r} + {right!r} -> {token!r}, id {new}, {frequency:,} times; {n_tokens:,} tokens now")
        if options.verbose:
            parts = (tokens[id_].decode("utf-8", "backslashreplace") for id_ in encode(line, merges))
            print(f"      {'|'.join(parts)}")
    if len(merges) < options.merges:
        print("no pair occurs twice any more")


if __name__ == "__main__":
    run_script(main)
