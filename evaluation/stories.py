"""Let a model write short stories; measure how varied they are and how much is copied from the training data.

    model, info = load_model("models/story5000.pt")
    stories = write_stories(model, seed=1337, max_tokens=STORY_TOKENS)
    judge_stories(stories, open_dataset(Path("data"), "story")[0])

If no more is copied than in real, unseen stories, the model writes rather than recites.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from common.ngrams import hash_ngrams
from data.token_stream import TokenStream
from generation.decoding import DecodeStep, decode_step, generate
from generation.sampling import TEXT_SAMPLING
from model import GPT
from setup_tokenizer import GPT2, Tokenizer

N_COPIED = 8  # a run of this many tokens counts as copied
SCAN_TOKENS = 1 << 20  # tokens of the training data in memory at a time
FILTER_BITS = 20

STORY_TOKENS = 200  # the longest story
STORY_PROMPTS = (
    "Once upon a time, there was a little girl named Mia. She had a red kite",
    "Once upon a time, in a quiet village, there lived an old baker who",
    "Tom had a small blue boat. One morning he took it to the pond and",
    "The little dog was hungry. He looked under the table and saw",
    "Anna and Ben were playing in the garden when they heard a strange noise.",
    "One day, a bird with a broken wing landed on Sam's window.",
    "It was raining, so Lucy could not go to the park. She was sad until",
    "Deep in the forest there was a tree that could talk. The tree said,",
    '"Please share your cookies with me," said the mouse. But the cat',
    "Max wanted to climb the tallest hill. His mother told him",
    'Grandma gave Lily a tiny box and said, "Do not open it until',
    "The moon was bright and the owl could not sleep. She flew to",
    "Ben found a shiny key in the sand. He wondered what",
    "There once was a frog who was afraid of water.",
    "Sara built a big tower with her blocks. Then her brother came and",
    "A brave ant wanted to see the sea. She packed",
    "The snowman was lonely because all the children were inside. He decided",
    "Leo lost his favourite teddy bear on the bus.",
    "At school, the teacher showed the class a big jar. Inside the jar was",
    "The truck was stuck in the mud. All the animals came to help.",
)


def write_stories(
    model: GPT,
    seed: int,
    max_tokens: int = STORY_TOKENS,
    decode: DecodeStep = decode_step,
    tokenizer: Tokenizer = GPT2,
) -> list[list[int]]:
    """The ids that `model` writes after each of STORY_PROMPTS, without the prompt, up to the end of the document.

    They are drawn with gen.py's default settings for text.
    """
    stop_ids = (tokenizer.endoftext, tokenizer.im_end)
    prompts = [[tokenizer.endoftext, *tokenizer.encode_text(prompt)] for prompt in STORY_PROMPTS]
    generator = torch.Generator(model.wte.weight.device).manual_seed(seed)
    steps = generate(model, prompts, max_tokens, TEXT_SAMPLING, generator=generator, stop_ids=stop_ids, decode=decode)
    rows = torch.stack(list(steps), 1).tolist()
    return [[i for i in row if i >= 0 and i not in stop_ids] for row in rows]


def ngrams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """All runs of n consecutive ids.

    >>> ngrams([1, 2, 3], 2)
    [(1, 2), (2, 3)]
    """
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


def distinct(texts: Iterable[Sequence[int]], n: int) -> float:
    """The number of distinct n-grams divided by the number of all n-grams: distinct-n, Li et al. 2016.

    "A Diversity-Promoting Objective Function for Neural Conversation Models", section 5.
    """
    grams = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(grams)) / max(1, len(grams))


def repetition(texts: Iterable[Sequence[int]], n: int = 4) -> float:
    """The share of a text's n-grams that occur earlier in it, averaged over the texts.

    seq-rep-4 of "Neural Text Generation with Unlikelihood Training" (Welleck et al. 2020, section 6.1).
    """
    shares = [1 - len(set(grams)) / len(grams) for text in texts if (grams := ngrams(text, n))]
    return sum(shares) / max(1, len(shares))


def ngrams_found_in(
    stream: TokenStream, wanted: set[tuple[int, ...]], n: int, scan_tokens: int = SCAN_TOKENS
) -> set[tuple[int, ...]]:
    """The `wanted` n-grams that occur in a stream, which is read `scan_tokens` ids at a time.

    Every position of the stream is looked up by its hash. A hit is compared id by id, so a collision does not count.
    """
    by_hash = {hash_ngrams(np.array(gram), n)[0].item(): gram for gram in wanted}
    keys = np.array(sorted(by_hash), dtype=np.uint64)
    # A table of the hashes' highest bits rules out nearly all positions, much faster than np.isin.
    is_candidate = np.zeros(1 << FILTER_BITS, dtype=bool)
    is_candidate[_high_bits(keys)] = True
    found: set[tuple[int, ...]] = set()
    for start in range(0, len(stream) - n + 1, scan_tokens):
        ids = stream.read(start, min(start + scan_tokens + n - 1, len(stream)))
        hashes = hash_ngrams(ids, n)
        positions = np.flatnonzero(is_candidate[_high_bits(hashes)])
        positions = positions[np.isin(hashes[positions], keys)]
        for key, first in zip(*np.unique(hashes[positions], return_index=True), strict=True):
            position = positions[first]
            if tuple(ids[position : position + n].tolist()) == by_hash[int(key)]:
                found.add(by_hash[int(key)])
    return found


def _high_bits(hashes: np.ndarray) -> np.ndarray:
    return (hashes >> np.uint64(64 - FILTER_BITS)).astype(np.int64)


def judge_stories(stories: list[list[int]], streams: dict[str, TokenStream], tokenizer: Tokenizer = GPT2) -> dict:
    """How varied the stories are, and how much of them occurs in the training data, compared with real text.

    The real text is the same number of documents from all over the validation split, each cut to STORY_TOKENS ids.
    Stories in the ids of a `tokenizer` other than the data's are re-encoded.
    """
    if tokenizer != streams["train"].tokenizer:
        stories = [streams["train"].tokenizer.encode_text(tokenizer.enc.decode(story)) for story in stories]
    real = real_texts(streams["val"], len(stories))
    grams = [[gram for text in texts for gram in ngrams(text, N_COPIED)] for texts in (stories, real)]
    known = ngrams_found_in(streams["train"], {gram for group in grams for gram in group}, N_COPIED)
    copied, copied_real = (sum(gram in known for gram in group) / max(1, len(group)) for group in grams)
    return {
        "tokens": sum(map(len, stories)),
        **{f"distinct_{n}": distinct(stories, n) for n in (1, 2, 3)},
        "repetition_4": repetition(stories),
        f"copied_{N_COPIED}": copied,
        f"copied_{N_COPIED}_of_real_text": copied_real,
    }


def real_texts(stream: TokenStream, n_texts: int) -> list[list[int]]:
    """The beginnings of `n_texts` documents, evenly spread over a stream (fewer if it has fewer)."""
    endoftext = stream.tokenizer.endoftext
    starts = np.concatenate([[0], stream.positions_of(endoftext) + 1])
    starts = starts[starts < len(stream)]
    chosen = starts[np.unique(np.linspace(0, len(starts) - 1, n_texts).astype(int))]
    texts = [stream.read(start, start + STORY_TOKENS).tolist() for start in chosen.tolist()]
    return [text[: text.index(endoftext)] if endoftext in text else text for text in texts]


def readable_stories(stories: list[list[int]], tokenizer: Tokenizer = GPT2) -> list[dict]:
    """Prompts and stories as text."""
    return [
        {"prompt": prompt, "story": tokenizer.enc.decode(story)}
        for prompt, story in zip(STORY_PROMPTS, stories, strict=True)
    ]
