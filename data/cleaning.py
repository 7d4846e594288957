"""Cleaning passes: pure functions from text to text, which the prepare scripts pass to `pipeline.prepare`.

>>> fix_mojibake("Itâ€™s late")
'It’s late'
>>> undo_spacing("Good.Let ' s go , it ' s 3 : 30 !")
"Good. Let's go, it's 3:30!"
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class EachMessage:
    """A text pass applied to the content of every message of a conversation.

    >>> EachMessage(normalise)([{"role": "user", "content": " Hi "}])
    [{'role': 'user', 'content': 'Hi'}]
    """

    text_pass: Callable[[str], str]

    @property
    def __name__(self) -> str:  # the name under which the report counts the changed documents
        return self.text_pass.__name__

    def __call__(self, messages: list[dict]) -> list[dict]:
        return [{**message, "content": self.text_pass(message["content"])} for message in messages]


def normalise(text: str) -> str:
    """Text in Unicode NFC with line feeds as line endings, and no byte order mark or surrounding white space."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.isascii():
        text = unicodedata.normalize("NFC", text.lstrip("\ufeff"))
    return text.strip()


_SURROGATE = re.compile("[\ud800-\udfff]")


def replace_surrogates(text: str) -> str:
    """Text in which U+FFFD replaces unpaired surrogates, as in tiktoken; JSON can contain them, UTF-8 cannot.

    Text without them is returned as it is, the same object.
    """
    if text.isascii() or not _SURROGATE.search(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# --- mojibake: UTF-8 that was decoded as Windows-1252 ---

# The characters that Windows-1252 shows for the bytes 0x80 to 0xBF, which continue a character in UTF-8.
_CONTINUATIONS = "".join(bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in range(0x80, 0xC0))
_PUNCTUATION = re.compile(f"â€([{re.escape(_CONTINUATIONS)}]?)")
# The letter of a lead byte before a continuation; the same quotes decoded as Windows-1251 and as Mac Roman.
_SUSPICIOUS = re.compile(f"[Â-ô][{re.escape(_CONTINUATIONS)}]|вЂ|‚Ä")


def fix_mojibake(text: str) -> str:
    """Repair text that was decoded with the wrong encoding; correct text around it is unchanged.

    TinyStories' closing quotation mark `â€` lost its third character (0x9D is undefined in Windows-1252), and ftfy
    takes the space after it for that character; so the `â€` family is fixed here, and the rest by ftfy.
    """
    if text.isascii() or not _SUSPICIOUS.search(text):
        return text
    text = _PUNCTUATION.sub(_fix_punctuation, text)
    if not _SUSPICIOUS.search(text):
        return text
    import ftfy

    return "\n".join(
        ftfy.fix_encoding(line) if _SUSPICIOUS.search(line) else line for line in text.split("\n")
    )  # ftfy guesses one encoding per call


def _fix_punctuation(match: re.Match) -> str:
    third = match[1]
    if not third:
        return "”"
    byte = third.encode("cp1252", "ignore") or third.encode("latin-1")
    return (b"\xe2\x80" + byte).decode()


# --- DailyDialog: spaces between all words and punctuation marks ---

_CHARACTERS = str.maketrans({**dict.fromkeys("’‘`´′", "'"), "。": " . ", "、": " , ", "\x7f": None, "\u3000": " "})

_DOMAIN_ENDS = "com|net|org|edu|gov|info|biz|cn|uk|tw|jp|us|html?|asp|php|m"
_UNITS = "inch|foot|mile|second|minute|hour|day|week|month|year|cent|dollar|percent|page|star|room|bedroom|story"
_STEPS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\s+", " "),
        (r"\\ (?=')", ""),
        # don ' t, I ' Ve, I ' l l
        (
            r"(?<=[A-Za-z0-9]) ?' ?(s|t|m|d|re|ll|ve|Re|Ll|Ve|l l)\b(?! ')",
            lambda m: "'" + m[1].replace(" ", "").lower(),
        ),
        (r"\b([Oo]) ?' ?clock\b", r"\1'clock"),
        (r"\b([Mm]a) ?' ?am\b", r"\1'am"),
        (r"\bO ' (?=[A-Z][a-z])", "O'"),
        (r"(?<=\w) ' ?n ?' (?=\w)", " 'n' "),
        (r"(?<!\S)' (?=(?:em|til|till|cause|bout|cos)\b|\d0 ?s\b)", "'"),
        # U . S . A ., but not the sentence that starts with I or A in: Plan B . I think
        (r"\b[A-Z](?: \. [A-Z]\b)+(?: \.)?", lambda m: _join_initials(m[0])),
        (r"\b([AaPp]) \. ([Mm])\b(?: \.)?", r"\1.\2."),
        (r"\b(i \. e|e \. g|o \. k|t \. v)\b(?: \.)?", lambda m: m[1].replace(" ", "") + "."),
        # 3 : 30, 1 . 5, 15 , 000, $ 2 , 500, 37 ° C
        (r"(?<=\d) ?: ?(?=(?:\d\d|O\d|OO)(?![\d]))", ":"),
        (r"(?<=\d) \. (?=\d)", "."),
        (r"(?<![\d,])(\d{1,3}) , (?=000\b)", r"\1,"),
        (r"([$£¥€] ?\d{1,3}) , (?=\d{3}\b)", r"\1,"),
        (r"(?<=\d) ?° ?(?=[CF]\b)", "°"),
        # H - U - A - N - G, 24 - hour, L / C, R & D
        (r"\b[A-Z](?: - [A-Z])+\b", lambda m: m[0].replace(" ", "")),
        (rf"(?<=\d) - (?=(?:{_UNITS})\b)", "-"),
        (r"(?<=\w) ?/ ?(?=\w)", "/"),
        (r"\b([A-Z]) & (?=[A-Z]\b)", r"\1&"),
    )
]
_PUNCTUATION_STEPS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<!\.)\.{1,2}(?: \.{1,2})+(?!\.)", lambda m: m[0].replace(" ", "")),  # . . .
        (r" +(?=[,!?;:%)\]}])", ""),
        (r"(?<![ .]) +(?=\.(?!\d))", ""),
        (r"(?<=[(\[{]) +", ""),
        (r"(?<=[$£¥€]) +(?=[\d.])", ""),
        # Good.Let, OK.Thank, birthday.how, but not Stars.com, U.S.A or Ph.D
        (r"(?<=[a-z0-9][.?!])(?<!Ph\.)(?=[A-Z])", " "),
        (r"(?<=[A-Z][A-Z][.?!])(?=[A-Z][a-z])", " "),
        (r"(?<=\bI[.?!])(?=[A-Z][a-z'])", " "),
        (r"(?<=[A-Z]\.[A-Z]\.)(?=[A-Z][a-z])", " "),
        (rf"(?<![\w.@/])((?!www\b)[A-Za-z']{{2,}})\.(?!(?:{_DOMAIN_ENDS})\b)(?=[a-z]+\b(?!\.[a-z]))", r"\1. "),
        (r"(?<=[A-Za-z0-9][,;?!])(?=[A-Za-z])", " "),
        (r" {2,}", " "),
    )
]


def undo_spacing(text: str) -> str:
    """A DailyDialog turn in normal spacing, with straight apostrophes; quotation marks are kept.

    >>> undo_spacing("He said , “ I don ’ t know Mr . Li . ”")
    "He said, “I don't know Mr. Li.”"
    """
    text = text.translate(_CHARACTERS)
    for pattern, replacement in _STEPS:
        text = pattern.sub(replacement, text)
    text = _attach_quotes(text.strip(), _DOUBLE_QUOTE, _opens_double)
    text = _attach_quotes(text, _SINGLE_QUOTE, _opens_single)
    for pattern, replacement in _PUNCTUATION_STEPS:
        text = pattern.sub(replacement, text)
    return text.strip()


def _join_initials(chain: str) -> str:
    """`U . S .` as `U.S.`; a last I or A that is not part of an abbreviation starts the next sentence."""
    sentence = re.fullmatch(r"(.*) \. ([IA])", chain)
    if sentence and (chain.count(".") == 1 or sentence[2] == "I"):
        return f"{sentence[1].replace(' ', '')}. {sentence[2]}"
    return chain.replace(" ", "")


_DOUBLE_QUOTE = re.compile(r'["“”]')
_SINGLE_QUOTE = re.compile(r"(?<!\S)'(?!\S)")
_NOT_PLURAL = re.compile(r"\b(?:says|is|was|as|this|does|means|goes|sings|needs|plus|us|yes|thus|its|his|has)$", re.I)


def _attach_quotes(text: str, mark: re.Pattern, opens: Callable[[str, str, str, int], bool]) -> str:
    """The text with opening quotation marks attached to the next word, and closing ones to the previous word."""
    marks = list(mark.finditer(text))
    if not marks:
        return text
    parts, end, is_open = [], 0, False
    for index, match in enumerate(marks):
        before, after = text[end : match.start()], text[match.end() :]
        if before and not before[-1].isspace():
            opening = False
        elif after and not after[0].isspace():
            opening = True
        elif is_open and match[0] != "“":
            opening = False
        else:
            opening = opens(match[0], text[: match.start()].rstrip(), after.lstrip(), len(marks) - index)
        is_open = opening
        end = match.end()
        symbol = "“" if opening and match[0] == "”" else match[0]
        parts += [before if opening else before.rstrip(), symbol]
        if opening and after.startswith(" "):
            end += 1
    return "".join(parts) + text[end:]


def _opens_double(mark: str, before: str, after: str, n_left: int) -> bool:
    if mark == "“" or not before:
        return True
    if mark == "”" and before[-1] in ".?!":
        return False
    return n_left > 1 or before[-1] in ",:"


def _opens_single(mark: str, before: str, after: str, n_left: int) -> bool:
    if before.endswith("s") and not _NOT_PLURAL.search(before) and (n_left % 2 or after[:1].islower()):
        return False  # the parents ' house
    return not before or n_left > 1 or before[-1] in ",:"


TEXT_PASSES = (fix_mojibake, normalise)
CHAT_PASSES = (EachMessage(fix_mojibake), EachMessage(normalise))
DAILYDIALOG_PASSES = (EachMessage(undo_spacing), EachMessage(normalise))
