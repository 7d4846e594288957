"""Records that prefer one answer to another, in the layouts that people publish, made into pairs or labelled answers.

A pair is a conversation whose last two messages are both the assistant's: the chosen answer, whose "preferred" is True,
and the rejected one, whose "preferred" is False. Everything before them is the prompt that they share. A labelled
answer is a pair whose other answer is empty: good if it is the chosen one, bad if it is the rejected one.

>>> records = [{"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}]
>>> [message["content"] for message in next(preferences(records))]
['Hi', 'Hello!', 'What?']
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import cycle, islice
from typing import Any

from data.counts import count_unknown
from data.layouts.feedback import latest_events, preferred_reply
from data.layouts.oasst import is_oasst_row, is_oasst_tree, oasst_answers, rows_of_tree, slim_row
from data.layouts.turn_lists import is_list_of_turns, list_of_turns, pair_of_turns
from data.layouts.turns import Message, first_present, usable_messages

NO_SHARED_PROMPT = "pair whose answers do not share a prompt"
EQUAL_ANSWERS = "pair of equal answers"
EQUAL_SCORES = "pair of answers with equal scores"
SINGLE_ANSWER = "record with a single scored answer"
SINGLE_LABEL = "label without an opposite one on the same prompt"
KNOWN_LAYOUTS = "a prompt with a chosen and a rejected answer, HH transcripts, scored completions, labels, OASST ranks"

# Fields with the chosen and the rejected answer.
_ANSWERS = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("preferred_output", "non_preferred_output"),
    ("response_j", "response_k"),
)
_PROMPTS = ("prompt", "question", "instruction", "query", "input")
_SYSTEMS = ("system", "system_prompt", "system_message")
_SCORES = ("overall_score", "score", "rating")  # of one of several completions
_HH_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")

Turns = list[Any]


def preferences(
    records: Iterable[Mapping], skipped: Counter | None = None, language: str | None = None
) -> Iterator[list[Message]]:
    """The pairs of records, whose layout is recognized record by record.

    Whatever gives no pair is counted by reason in `skipped`. Labels of single answers, and message rows of OASST, are
    in memory until the last record: labels are paired if one prompt has good and bad answers, and the best-ranked reply
    of OASST with each reply that is ranked worse. Of feedback on one reply, the last event counts. `language` selects
    OASST's trees.
    """
    skipped = Counter() if skipped is None else skipped
    labels = Labels()
    yield from _pairs_of_records(records, labels, skipped, language)
    yield from labels.pairs(skipped)


def labelled_answers(
    records: Iterable[Mapping], skipped: Counter | None = None, language: str | None = None
) -> Iterator[list[Message]]:
    """Every answer of the records that `preferences` reads, labelled good or bad, whether it has a counterpart or not.

    A pair gives two of them. The labels are in memory until the last record.
    """
    skipped = Counter() if skipped is None else skipped
    labels = Labels()
    for pair in _pairs_of_records(records, labels, skipped, language):
        for is_good, answer in ((True, pair[-2]), (False, pair[-1])):
            yield _labelled([*pair[:-2], answer], is_good)
    yield from labels.single()


def _pairs_of_records(
    records: Iterable[Mapping], labels: Labels, skipped: Counter, language: str | None
) -> Iterator[list[Message]]:
    """The pairs in records; those that label a single answer are added to `labels`."""
    oasst_rows: list[Mapping] = []
    for original in latest_events(records, skipped):
        record = {str(field).strip().lower(): value for field, value in original.items()}
        if is_oasst_row(record):
            oasst_rows.append(slim_row(record))
        elif is_oasst_tree(record):
            for chosen, rejected in oasst_answers(rows_of_tree(record["prompt"]), skipped, language):
                yield from _pair(chosen, rejected, skipped)
        elif (found := _label(record)) is not None:
            labels.add(*found, skipped)
        elif (pairs := _pairs(record, skipped)) is not None:
            for chosen, rejected in pairs:
                yield from _pair(chosen, rejected, skipped)
        else:
            count_unknown(original, skipped)
    for chosen, rejected in oasst_answers(oasst_rows, skipped, language):
        yield from _pair(chosen, rejected, skipped)


def differing_answers(messages: list[Message]) -> list[Message] | None:
    """A pass that drops a pair whose answers the passes before it have made equal or empty."""
    chosen, rejected = (message["content"] for message in messages[-2:])
    return messages if chosen != rejected and chosen and rejected else None


def nonempty_answer(messages: list[Message]) -> list[Message] | None:
    """A pass that drops a labelled answer that the passes before it have made empty."""
    return messages if any(message["content"] for message in messages[-2:]) else None


def _pair(chosen: Turns, rejected: Turns, skipped: Counter) -> Iterator[list[Message]]:
    """The pair of two conversations that differ in their last message; none, counted by reason, if it is unusable."""
    counts: tuple[Counter, Counter] = Counter(), Counter()
    found = usable_messages(chosen, counts[0])
    other = usable_messages(rejected, counts[1]) if found else None
    if found is None or other is None:
        skipped.update(counts[0] if found is None else counts[1])
        return
    prompt, prompt_of_other = (
        [(message["role"], message["content"].strip()) for message in messages[:-1]] for messages in (found, other)
    )
    if prompt != prompt_of_other:
        skipped[NO_SHARED_PROMPT] += 1
    elif found[-1]["content"].strip() == other[-1]["content"].strip():
        skipped[EQUAL_ANSWERS] += 1
    else:
        yield _joined(found, other[-1]["content"])


def _labelled(messages: list[Message], is_good: bool) -> list[Message]:
    """A conversation that ends with a labelled answer, as a pair whose other answer is empty."""
    if is_good:
        return _joined(messages, "")
    return _joined([*messages[:-1], {"role": "assistant", "content": ""}], messages[-1]["content"])


def _joined(chosen: list[Message], rejected: str) -> list[Message]:
    """A pair as one conversation."""
    prompt = [{"role": message["role"], "content": message["content"]} for message in chosen[:-1]]
    answers = ((chosen[-1]["content"], True), (rejected, False))
    return [*prompt, *({"role": "assistant", "content": text, "preferred": is_chosen} for text, is_chosen in answers)]


# --- a chosen and a rejected answer ---


def _pairs(record: Mapping, skipped: Counter) -> list[tuple[Turns, Turns]] | None:
    """The (chosen, rejected) conversations of a record; None if it contains none."""
    if isinstance(record.get("correction"), str) and is_list_of_turns(record.get("messages")):
        messages = list_of_turns(record["messages"])
        better = {"role": "assistant", "content": record["correction"]}
        return [([*messages[:-1], better], messages)]
    if (worse := preferred_reply(record)) is not None and is_list_of_turns(record.get("messages")):
        messages = list_of_turns(record["messages"])
        return [(messages, [*messages[:-1], {"role": "assistant", "content": worse}])]
    for chosen, rejected in _ANSWERS:
        if chosen in record and rejected in record:
            scores = record.get(f"score_{chosen}"), record.get(f"score_{rejected}")
            if scores[0] is not None and scores[0] == scores[1]:
                skipped[EQUAL_SCORES] += 1
                return []
            return [(_conversation(record, record[chosen]), _conversation(record, record[rejected]))]
    if isinstance(record.get("completions"), list):
        return _scored(record, skipped)
    return None


def _scored(record: Mapping, skipped: Counter) -> list[tuple[Turns, Turns]]:
    """UltraFeedback: the best of several completions against each that has a lower score."""
    found = [each for each in record["completions"] if isinstance(each, Mapping)]
    scored = [(_number(first_present(each, _SCORES)), first_present(each, ("response", "text"))) for each in found]
    ranked = sorted(
        ((score, answer) for score, answer in scored if score is not None), key=lambda each: each[0], reverse=True
    )
    worse = [answer for score, answer in ranked if score < ranked[0][0]]
    if not worse:
        skipped[EQUAL_SCORES if len(ranked) > 1 else SINGLE_ANSWER] += 1
    return [(_conversation(record, ranked[0][1]), _conversation(record, answer)) for answer in worse]


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if number == number else None


def _conversation(record: Mapping, answer: Any) -> Turns:
    """The turns of a record's prompt and one of its answers, which may be a whole conversation itself."""
    prompt = _prompt(record)
    if isinstance(answer, str) and (said := _transcript(answer)):
        return said
    turns = list_of_turns(answer) if isinstance(answer, (list, Mapping)) and is_list_of_turns(answer) else None
    if turns is None:
        turn = dict(answer) if isinstance(answer, Mapping) else {"content": answer}
        return [*prompt, {**turn, "role": "assistant"}]
    is_whole = any(isinstance(turn, Mapping) and turn.get("role", turn.get("from")) != "assistant" for turn in turns)
    systems = [turn for turn in prompt if turn["role"] == "system"] if is_whole and not _has_system(turns) else []
    return [*systems, *turns] if is_whole else [*prompt, *turns]


def _has_system(turns: Turns) -> bool:
    return bool(turns) and isinstance(turns[0], Mapping) and "system" in (turns[0].get("role"), turns[0].get("from"))


def _prompt(record: Mapping) -> Turns:
    """The turns before a record's answers; empty if the answers contain them."""
    field = next((name for name in _PROMPTS if record.get(name) is not None), "")
    prompt = record.get(field)
    if isinstance(prompt, Mapping) and "messages" in prompt:
        prompt = prompt["messages"]
    system = first_present(record, _SYSTEMS)
    turns: Turns = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
    if isinstance(prompt, str):
        addition = record.get("input") if field != "input" else None
        return turns + (_transcript(prompt) or pair_of_turns(prompt, "", addition)[:1])
    if is_list_of_turns(prompt):
        said = list_of_turns(prompt)
        return said if _has_system(said) else turns + said
    return turns


def _transcript(text: str) -> Turns | None:
    """Anthropic HH: "\\n\\nHuman: ...\\n\\nAssistant: ..." as turns, without a last one that is empty; None for others.

    >>> _transcript("\\n\\nHuman: Hi\\n\\nAssistant: Hello!")
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello!'}]
    """
    found = list(_HH_TURN.finditer(text))
    if not found or found[0].start() > 0 or found[0][1] != "Human":
        return None
    ends = [*(match.start() for match in found[1:]), len(text)]
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [
        {"role": roles[match[1]], "content": text[match.end() : end].strip()}
        for match, end in zip(found, ends, strict=True)
    ]
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


# --- labels of single answers ---


def _label(record: Mapping) -> tuple[Turns, bool] | None:
    """The conversation and the label of a record that labels one answer: KTO's layout, or feedback with a rating."""
    if isinstance(record.get("correction"), str) or preferred_reply(record) is not None:
        return None  # it says more than a rating
    if "rating" in record and is_list_of_turns(record.get("messages")):
        label: Any = {"good": True, "bad": False}.get(str(record["rating"]).strip().lower())
        conversation = list_of_turns(record["messages"])
    elif "label" in record and (answer := next((name for name in ("completion", "response") if name in record), None)):
        label = {"true": True, "1": True, "false": False, "0": False}.get(str(record["label"]).strip().lower())
        conversation = _conversation(record, record[answer])
    else:
        return None
    return None if label is None else (conversation, label)


class Labels:
    """Labelled answers by their prompt, so that good and bad ones on the same prompt can form pairs."""

    def __init__(self) -> None:
        self._answers: dict[str, dict[bool, list[list[Message]]]] = {}

    def add(self, conversation: Turns, label: bool, skipped: Counter) -> None:
        """Keep a labelled conversation; one that cannot be used is counted by reason."""
        if messages := usable_messages(conversation, skipped):
            prompt = json.dumps([(message["role"], message["content"].strip()) for message in messages[:-1]])
            self._answers.setdefault(prompt, {True: [], False: []})[label].append(messages)

    def single(self) -> Iterator[list[Message]]:
        """Each labelled answer by itself."""
        for answers in self._answers.values():
            for is_good, conversations in answers.items():
                for messages in conversations:
                    yield _labelled(messages, is_good)

    def pairs(self, skipped: Counter) -> Iterator[list[Message]]:
        """As many pairs per prompt as the more frequent of its two labels; the answers with the other one repeat."""
        for answers in self._answers.values():
            good, bad = answers[True], answers[False]
            if not good or not bad:
                skipped[SINGLE_LABEL] += len(good) + len(bad)
                continue
            length = max(len(good), len(bad))
            for chosen, rejected in zip(islice(cycle(good), length), islice(cycle(bad), length), strict=True):
                yield from _pair(chosen, rejected, skipped)
