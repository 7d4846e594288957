"""Make feedback on a model's replies without a person, for experiments: pirate corrections, or short replies preferred.

    python testing_tools/make_preferences.py models/chitchat1500.pt --style pirate --output pirate.jsonl
    python testing_tools/make_preferences.py models/chitchat1500.pt --style short --output short.jsonl

- pirate: the model's likeliest reply to a greeting, a thanks, a farewell or "How are you?" from chitchat's generator is
  corrected into what a pirate would say, by the rules of PIRATE.
- short: of several sampled replies to the first message of a conversation of chitchat's training split, the shortest
  corrects the longest. With --first_sentence, the shortest is cut after its first sentence.

The seed draws the prompts. None of them is an opener of chat_eval.py or a held-out prompt of measure_teaching.py.

Each line has the layout of the chat page's feedback: `messages` up to and including the reply, and `correction`. Then:

    python data/prepare-preferences.py --input pirate.jsonl --name pirate-pairs --tokenizer talk         # for DPO
    python prepare_with_extended_tokenizer.py --input pirate.jsonl --name pirate --tokenizer talk        # fine-tuning
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from chat_scores import form_fault, load_questions, openers, user_says

from common.cli import UserError, option, parse_options, run_script
from common.device import choose_device, choose_dtype, device_option, dtype_option
from common.files import atomic_write
from data.chitchat.talks import Talk
from data.dataset import open_dataset
from data.documents import read_prepared

if TYPE_CHECKING:
    import torch

    from generation.sampling import Sampling
    from model import GPT
    from setup_tokenizer import Tokenizer

TOPICS = ("greeting", "how_are_you", "thanks", "farewell")
COUNTS = {"pirate": 30, "short": 200}
HELD_OUT_PROMPTS = 100
PROMPTS_AT_ONCE = 16
MAX_REPLY_TOKENS = 100

# What a pirate says instead, in this order; then "Arr, " comes first.
PIRATE = (
    (r"\b(hello|hi|hey)( there)?\b", "ahoy"),
    (r"\byou are\b|\byou're\b", "ye be"),
    (r"\bI am\b|\bI'm\b", "I be"),
    (r"\bis\b", "be"),
    (r"\bgoodbye\b", "fair winds"),
    (r"\byour\b", "yer"),
    (r"\byou\b", "ye"),
    (r"\bmy\b", "me"),
    (r"\bfriend\b", "matey"),
)
# A reply is in the style if it contains one of these words.
PIRATE_WORDS = frozenset(("arr", "ahoy", "ye", "yer", "matey"))

Answer = Callable[[Sequence[str]], list[list[int]]]  # from prompts to the ids of a reply to each


@dataclasses.dataclass(frozen=True)
class MakeOptions:
    checkpoint: str = option(None, "the model whose replies are corrected", positional=True, nargs=None)
    style: str = option("pirate", "what the corrections prefer", choices=tuple(COUNTS))
    count: int | None = option(None, "number of corrections (default: 30, or 200 short ones)", at_least=1, metavar="N")
    output: str | None = option(None, "file to write (default: STYLE.jsonl)", metavar="FILE")
    data_dir: str = option("data", "folder of the prepared data", metavar="DIR")
    samples: int = option(8, "short: replies to each prompt", at_least=2, metavar="N")
    first_sentence: bool = option(False, "short: cut the shortest reply after its first sentence")
    temperature: float = option(0.7, "short: temperature of the replies", above=0, metavar="X")
    seed: int = option(1337, "seed of the prompts and of the sampled replies", at_least=0, below=2**63, metavar="N")
    device: str | None = device_option(None)
    dtype: str | None = dtype_option(None)


# --- prompts ---


def first_messages(data_dir: str | Path, split: str) -> list[str]:
    """The distinct first messages of chitchat's conversations without a system prompt, in the order of the file.

    Raises UserError if chitchat is not prepared.
    """
    _, info = open_dataset(Path(data_dir), "chitchat")
    conversations = (document for document in read_prepared(Path(data_dir), info, split) if isinstance(document, list))
    return list(dict.fromkeys(messages[0]["content"] for messages in conversations if messages[0]["role"] == "user"))


def held_out_prompts(data_dir: str | Path) -> list[str]:
    """The first messages of the validation split on which the length of replies is measured."""
    return first_messages(data_dir, "val")[:HELD_OUT_PROMPTS]


def measured_prompts(data_dir: str | Path) -> set[str]:
    """The openers of chat_eval.py and the held-out prompts, in small letters."""
    held_out = (*held_out_prompts(data_dir), *(text for _, text, _ in openers(load_questions())))
    return {text.casefold() for text in held_out}


def training_prompts(data_dir: str | Path, seed: int) -> list[str]:
    """First messages of the training split in the order of the seed, without those that are measured."""
    measured = measured_prompts(data_dir)
    prompts = [text for text in first_messages(data_dir, "train") if text.casefold() not in measured]
    random.Random(seed).shuffle(prompts)
    return prompts


def opening_prompts(data_dir: str | Path, seed: int, count: int) -> list[str]:
    """Opening messages from chitchat's generator, TOPICS in turn: distinct, and without those that are measured."""
    rng = random.Random(seed)
    taken = measured_prompts(data_dir)
    found: list[str] = []
    for topic in itertools.cycle(TOPICS):
        if len(found) == count:
            return found
        talk = Talk(rng)
        talk.play(topic)
        text = talk.messages[0]["content"]
        if text.casefold() not in taken:
            taken.add(text.casefold())
            found.append(text)
    raise AssertionError("a cycle has no end")


# --- replies ---


def replies(
    model: GPT,
    tokenizer: Tokenizer,
    sampling: Sampling,
    generator: torch.Generator | None,
    prompts: Sequence[str],
) -> list[list[int]]:
    """The ids of a reply to each prompt, with its `<|im_end|>` unless it reached MAX_REPLY_TOKENS."""
    from generation.decoding import ENDED, generate

    rows = [tokenizer.encode_chat([user_says(prompt)], add_generation_prompt=True) for prompt in prompts]
    stop_ids = (tokenizer.im_end, tokenizer.endoftext)
    steps = generate(model, rows, MAX_REPLY_TOKENS, sampling, generator=generator, stop_ids=stop_ids)
    columns = [ids.tolist() for ids in steps]
    return [[token for token in row if token != ENDED] for row in zip(*columns, strict=True)]


def as_pirate(reply: str) -> str:
    """A reply in a pirate's words.

    >>> as_pirate("Hello! How are you, my friend?")
    'Arr, ahoy! How are ye, me matey?'
    """
    for pattern, word in PIRATE:
        reply = re.sub(pattern, functools.partial(_cased, word), reply, flags=re.IGNORECASE)
    begins_with_i = re.match(r"I\b", reply) is not None
    return f"Arr, {reply if begins_with_i else reply[:1].lower() + reply[1:]}"


def _cased(word: str, match: re.Match[str]) -> str:
    """`word` with a capital if what it replaces has one."""
    return word[0].upper() + word[1:] if match[0][0].isupper() else word


def has_style(reply: str) -> bool:
    """Whether a reply contains one of PIRATE_WORDS."""
    return not PIRATE_WORDS.isdisjoint(re.findall(r"[a-z]+", reply.lower()))


# --- feedback ---


def pirate_corrections(answer: Answer, tokenizer: Tokenizer, prompts: Sequence[str]) -> Iterator[dict]:
    """A correction of the reply to each prompt; prompts without a proper reply are left out."""
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        asked = prompts[start : start + PROMPTS_AT_ONCE]
        for prompt, ids in zip(asked, answer(asked), strict=True):
            if (reply := proper_text(tokenizer, ids)) is not None:
                yield event(prompt, reply, as_pirate(reply))


def short_corrections(
    answer: Answer, tokenizer: Tokenizer, prompts: Sequence[str], samples: int, first_sentence: bool = False
) -> Iterator[dict]:
    """The shortest of several replies to each prompt as the correction of the longest; only of different lengths.

    With `first_sentence`, the shortest reply is cut after its first sentence.
    """
    for prompt in prompts:
        drawn = answer([prompt] * samples)
        texts = {text: len(ids) for ids in drawn if (text := proper_text(tokenizer, ids)) is not None}
        if not texts:
            continue
        longest, shortest = max(texts, key=texts.__getitem__), min(texts, key=texts.__getitem__)
        better = re.split(r"(?<=[.!?]) ", shortest)[0] if first_sentence else shortest
        if better != longest and texts[shortest] < texts[longest] + first_sentence:
            yield event(prompt, longest, better)


def proper_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str | None:
    """The text of a reply, or None if it has no end or another fault of form."""
    text = tokenizer.enc.decode(list(ids))
    return None if form_fault(text) else text.removesuffix("<|im_end|>")


def event(prompt: str, reply: str, correction: str) -> dict:
    """A correction in the layout of the chat page's feedback."""
    return {"messages": [user_says(prompt), {"role": "assistant", "content": reply}], "correction": correction}


def take(corrections: Iterator[dict], count: int) -> list[dict]:
    """The first `count` corrections. Raises UserError if there are fewer."""
    found = [correction for _, correction in zip(range(count), corrections, strict=False)]
    if len(found) < count:
        raise UserError(f"only {len(found)} of {count} replies could be corrected; use a smaller --count")
    return found


def main() -> None:
    options = parse_options(MakeOptions, __doc__)
    import torch

    from exchange.loading import load_model, tokenizer_of
    from generation.sampling import GREEDY, Sampling

    device = choose_device(options.device)
    model, info = load_model(options.checkpoint, device, choose_dtype(options.dtype, device))
    tokenizer = tokenizer_of(options.checkpoint, info, model)
    count = options.count or COUNTS[options.style]
    if options.style == "pirate":
        answer = functools.partial(replies, model, tokenizer, GREEDY, None)
        corrections = pirate_corrections(answer, tokenizer, opening_prompts(options.data_dir, options.seed, 2 * count))
    else:
        generator = torch.Generator(device).manual_seed(options.seed)
        answer = functools.partial(replies, model, tokenizer, Sampling(options.temperature), generator)
        prompts = training_prompts(options.data_dir, options.seed)
        corrections = short_corrections(answer, tokenizer, prompts, options.samples, options.first_sentence)
    output = options.output or f"{options.style}.jsonl"
    found = take(corrections, count)
    with atomic_write(output, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(each, ensure_ascii=False) + "\n" for each in found)
    for each in found[:5]:
        asked, said = (message["content"] for message in each["messages"])
        print(f"{asked}\n  - {said}\n  + {each['correction']}")
    print(f"{len(found)} corrections in {output}")


if __name__ == "__main__":
    run_script(main)
