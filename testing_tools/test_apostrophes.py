"""Test how the project's cleaning treats apostrophes and quotation marks: `undo_spacing` of data/cleaning.py.

    python testing_tools/test_apostrophes.py
    python -m pytest testing_tools/test_apostrophes.py

DailyDialog writes `don ' t`, `don ’ t` and `don't`, even in the same text. Prints one line per group.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.cleaning import normalise, undo_spacing

# As the corpus writes it, and as it should be.
CONTRACTIONS = {
    "I don ' t know .": "I don't know.",
    "I don ’ t know .": "I don't know.",
    "I don ‘ t know .": "I don't know.",
    "I don ` t know .": "I don't know.",
    "I don ´ t know .": "I don't know.",
    "I don't know .": "I don't know.",
    "I don’t know .": "I don't know.",
    "It ' s late , isn ' t it ?": "It's late, isn't it?",
    "We ' re sure they ' ll come , I ' ve asked .": "We're sure they'll come, I've asked.",
    "I ' m here . He ' d like it .": "I'm here. He'd like it.",
    "I'm sure you're right .": "I'm sure you're right.",
    "YOU CAN ' t": "YOU CAN't",
}
POSSESSIVES = {
    "Tom ' s book": "Tom's book",
    "my boss ' s office": "my boss's office",
    "the children ’ s room .": "the children's room.",
    "my parents ' house": "my parents' house",
    "the students ’ books": "the students' books",
}
INSIDE_WORDS = {
    "It ' s nine o ' clock .": "It's nine o'clock.",
    "It's 9 o'clock .": "It's 9 o'clock.",
    "rock ' n ' roll": "rock 'n' roll",
    "rock 'n' roll": "rock 'n' roll",
    "Yes , ma ' am .": "Yes, ma'am.",
    "Mr . O ' Brien": "Mr. O'Brien",
}
QUOTATIONS = {
    "He said , “ I don ’ t know . ”": "He said, “I don't know.”",
    'He said , " I don \' t know . "': 'He said, "I don\'t know."',
    "“ Come in ! ” she said .": "“Come in!” she said.",
    "I read ' Hamlet ' twice .": "I read 'Hamlet' twice.",
    "I'm reading ' Gone with the Wind ' .": "I'm reading 'Gone with the Wind'.",
}
GROUPS = {
    "contractions": CONTRACTIONS,
    "possessives": POSSESSIVES,
    "inside words": INSIDE_WORDS,
    "quotations": QUOTATIONS,
}


def check(examples: dict[str, str]) -> None:
    for written, expected in examples.items():
        found = undo_spacing(written)
        assert found == expected, f"{written!r} became {found!r}, expected {expected!r}"


def test_contractions_are_closed_up():
    check(CONTRACTIONS)


def test_possessives_keep_their_apostrophe_on_the_right_side():
    check(POSSESSIVES)


def test_apostrophes_inside_words_are_kept():
    check(INSIDE_WORDS)


def test_quotations_keep_their_marks():
    check(QUOTATIONS)


def test_clean_text_is_left_alone():
    for examples in GROUPS.values():
        for clean in examples.values():
            assert undo_spacing(clean) == clean, clean


def test_other_text_keeps_its_apostrophes():
    for text in ("don't", "don’t", "rock ’n’ roll", "the ‘best’ one", "5 ' 10", "`code`"):
        assert normalise(text) == text, text  # only DailyDialog's spacing is undone, other data sets keep theirs


def main() -> None:
    for name, test in sorted(globals().items()):
        if name.startswith("test_"):
            test()
            print(f"ok  {name.removeprefix('test_').replace('_', ' ')}")
    print(f"{sum(map(len, GROUPS.values()))} examples are cleaned correctly")


if __name__ == "__main__":
    main()
