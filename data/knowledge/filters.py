"""From answers to documents: what is removed from an answer, and which answers are left out and counted.

The filters are simple rules and know only English. They see the answers in the order of the plan, so what is kept does
not depend on the order in which the answers arrived.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections import Counter

import numpy as np

from data.dedup import NearDuplicates, band_keys
from data.documents import Document
from data.encoding import encode_documents
from data.knowledge.journal import Answer
from data.knowledge.plan import Request
from setup_tokenizer import render_chat

MIN_TEXT_WORDS = 20
MIN_WORDS_TO_JUDGE = 12  # a shorter text is not enough to tell its language
MIN_COMMON_SHARE = 0.15  # of English text 35 to 55 % are these words; of French, German or Spanish at most 5 %
MAX_FOREIGN_LETTERS = 0.05
COMMON_WORDS = frozenset(  # the most frequent words that French, German and Spanish do not have
    re.findall(
        r"\w+",
        "the of and to is that it for are with as you be this by have from or they not but at which when can there we "
        "their your will if how its into than what who these would has had were he she his her do does did about them "
        "because so some more other each many like one also where why our",
    )
)

REFUSAL = re.compile(
    r"\A(?:i['’]?m|i am) (?:very |so |really )?(?:sorry|afraid)\b[^.\n]{0,40}"
    r"\b(?:can['’]?t|cannot|can not|unable|not able)"
    r"|\bas an? (?:ai|artificial intelligence|(?:large )?language model)(?: language)?(?: model| assistant)?,? i\b"
    r"|\A(?:unfortunately,? |sorry,? (?:but )?)?i (?:can['’]?t|cannot|can not|won['’]?t|am unable to|am not able to)"
    r" (?:help|assist|provide|write|create|answer|comply|fulfil+|generate|continue|discuss|do (?:this|that)|produce)"
)
PREAMBLE = re.compile(
    r"\A(?:sure|certainly|of course|okay|ok|absolutely|here(?:['’]s| is| are))\b[^\n]{0,200}:\s*\n+", re.I
)
THOUGHTS = re.compile(r"\A\s*<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL)
CONTROL = re.compile(r"<\|(?:im_end|im_start|endoftext|eot_id|end)\|>|</s>")
FENCE = re.compile(r"\A```\w*\n(.*)\n```\Z", re.DOTALL)
TURN = re.compile(r"^[ \t]*[*_]{0,2}(student|teacher|user|assistant)[*_]{0,2}[ \t]*:[ \t]*[*_]{0,2}[ \t]*", re.I | re.M)
ROLES = {"student": "user", "user": "user", "teacher": "assistant", "assistant": "assistant"}


class Selection:
    """Decides which answers become documents; `counts` has the number of answers left out, by reason."""

    def __init__(self, any_language: bool = False):
        self.any_language = any_language
        self.counts: Counter[str] = Counter()
        self.kept: list[Request] = []
        self._seen: set[bytes] = set()
        self._near = NearDuplicates()

    def add(self, request: Request, answer: Answer) -> bool:
        """Judge one answer; answers must come in the order of the plan. Returns whether it is kept."""
        document = document_of(request, answer)
        reason = reason_against(document, answer, self.any_language) or self._repetition(document)
        if reason:
            self.counts[f"answers left out: {reason}"] += 1
        else:
            self.kept.append(dataclasses.replace(request, messages=()))  # the messages are not needed any more
        return not reason

    def _repetition(self, document: Document | None) -> str:
        assert document is not None
        words = " ".join(re.findall(r"\w+", text_of(document).casefold()))
        digest = hashlib.blake2b(words.encode(), digest_size=16).digest()
        if digest in self._seen:
            return "repeats"
        self._seen.add(digest)
        ids = encode_documents([document])
        if self._near.find(band_keys(ids, np.array([len(ids)])), np.ones(1, dtype=bool))[0]:
            return "near repeats"
        return ""


def document_of(request: Request, answer: Answer) -> Document | None:
    """The document that an answer contains; None if it should be a conversation but is not."""
    text = without_wrapping(answer.content)
    if not request.as_chat:
        return text
    if request.user_message is not None:
        return [{"role": "user", "content": request.user_message}, {"role": "assistant", "content": text}]
    return conversation_in(text)


def reason_against(document: Document | None, answer: Answer, any_language: bool = False) -> str:
    """Why an answer is left out, apart from repetition, or "" if it is not."""
    text = without_wrapping(answer.content)
    start = " ".join(text[:400].lower().split())
    if answer.refusal or answer.finish_reason == "content_filter" or REFUSAL.search(start):
        return "refusals"
    if answer.finish_reason == "length":
        return "cut off (--max_tokens)"
    if not text:
        return "empty"
    if document is None:
        return "no conversation"
    if not any_language and not is_english(text):
        return "other languages"
    if isinstance(document, str) and len(text.split()) < MIN_TEXT_WORDS:
        return "too short"
    return ""


def text_of(document: Document) -> str:
    return document if isinstance(document, str) else render_chat(document)


def without_wrapping(content: str) -> str:
    """An answer without what models put around it: thoughts, a sentence about the task, a code fence, control tokens.

    >>> without_wrapping("<think>Short.</think>Sure, here is the text:\\n\\nBees make honey.<|im_end|>")
    'Bees make honey.'
    """
    text = CONTROL.split(THOUGHTS.sub("", content).strip())[0].strip()
    text = PREAMBLE.sub("", text).strip()
    fence = FENCE.match(text)
    return fence[1].strip() if fence else text


def conversation_in(text: str) -> list[dict[str, str]] | None:
    """The conversation in lines "Student: ..." and "Teacher: ...", or None.

    It must start with the student and contain an answer. Turns of the same person in a row are joined, and a last turn
    without an answer is left out.

    >>> conversation_in("**Student:** Why?\\nTeacher: Because.\\nStudent: Oh!")
    [{'role': 'user', 'content': 'Why?'}, {'role': 'assistant', 'content': 'Because.'}]
    """
    parts = TURN.split(text)[1:]  # what comes before the first turn is a title
    messages: list[dict[str, str]] = []
    for name, content in zip(parts[::2], parts[1::2], strict=True):
        role, content = ROLES[name.lower()], content.strip()
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] = f"{messages[-1]['content']}\n\n{content}".strip()
        else:
            messages.append({"role": role, "content": content})
    if messages and messages[-1]["role"] == "user":
        messages.pop()
    is_conversation = len(messages) >= 2 and messages[0]["role"] == "user"
    return messages if is_conversation and all(message["content"] for message in messages) else None


def is_english(text: str) -> bool:
    """Whether a text seems to be English, by its letters and its most frequent words; a very short text counts as such.

    >>> is_english("Die Bienen sammeln Nektar aus den Blumen und machen daraus im Stock den Honig für den Winter")
    False
    """
    letters = [letter for letter in text if letter.isalpha()]
    n_foreign = sum(letter > "ɏ" for letter in letters)  # beyond the Latin letters of Unicode
    if n_foreign > MAX_FOREIGN_LETTERS * len(letters):
        return False
    words = re.findall(r"[^\W\d_]+", text.lower())
    return len(words) < MIN_WORDS_TO_JUDGE or sum(word in COMMON_WORDS for word in words) >= MIN_COMMON_SHARE * len(
        words
    )
