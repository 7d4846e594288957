"""Cleaning passes, by hand-written cases: mojibake repaired and nothing else, DailyDialog's spacing undone."""

from __future__ import annotations

import pickle

import pytest

from data.cleaning import (
    CHAT_PASSES,
    DAILYDIALOG_PASSES,
    TEXT_PASSES,
    EachMessage,
    fix_mojibake,
    normalise,
    replace_surrogates,
    undo_spacing,
)


@pytest.mark.parametrize(
    ("broken", "mended"),
    [
        ("He said â€œHi.â€ Then he left.", "He said “Hi.” Then he left."),
        ("â€œMe too!â€\n\nâ€œGood,â€ said Jackâ€™s mom.", "“Me too!”\n\n“Good,” said Jack’s mom."),
        ("strange â€“ very strangeâ€”yes", "strange – very strange—yes"),
        ("wait â€¦ itâ€˜s", "wait … it‘s"),
        ("a cafÃ© in MÃ¼nchen", "a café in München"),
        ("“correct” beside â€œbrokenâ€", "“correct” beside “broken”"),
        ("one line â€œ\nand another cafÃ©", "one line “\nand another café"),
    ],
)
def test_mojibake_is_repaired(broken, mended):
    assert fix_mojibake(broken) == mended


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "“quoted” – ‘so’ …",
        "naïve café, Ångström, £5",
        "日本語のテキスト",
        "Привет",
        "ÂNGELA and É",
        "50 €",
        "😀\0",
    ],
)
def test_correct_text_stays(text):
    assert fix_mojibake(text) == text


@pytest.mark.parametrize("character", "“”‘’–—…•€éüñçàßÉ")
def test_every_character_survives_the_round_through_windows_1252(character):
    broken = "".join(bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in f"x{character}y".encode())
    assert fix_mojibake(f"It was {broken} then.") == f"It was x{character}y then."


def test_normalise():
    assert normalise("\ufeff a\r\nb\rc \n") == "a\nb\nc"
    assert normalise("e\u0301") == "é"
    assert normalise(" \r\n\t") == ""


def test_only_unpaired_surrogates_are_replaced():
    assert replace_surrogates("a\ud800b\ud83d\ude00 \udc00é") == "a\ufffdb😀 \ufffdé"
    text = "a😀é"
    assert replace_surrogates(text) is text


@pytest.mark.parametrize(
    ("spaced", "text"),
    [
        # apostrophes: straight, curly, back-tick, prime
        ("I don ' t know .", "I don't know."),
        ("I don ’ t know .", "I don't know."),
        ("I don ` t know .", "I don't know."),
        ("That ′ s the one .", "That's the one."),
        ("I ‘ d rather not .", "I'd rather not."),
        ("You ' Ve got it , I ’ Ve not .", "You've got it, I've not."),
        ("I ‘ l l pick you up at 6 o ’ clock .", "I'll pick you up at 6 o'clock."),
        ("it's , don't , I'm", "it's, don't, I'm"),
        ("it won \\ ' t be hot", "it won't be hot"),
        ("Yes , ma ' am , Mr . O ' Connell .", "Yes, ma'am, Mr. O'Connell."),
        ("my parents ' house", "my parents' house"),
        ("ten minutes ' walk from here", "ten minutes' walk from here"),
        ("Rip ‘ em open !", "Rip 'em open!"),
        ("rock ' n ' roll", "rock 'n' roll"),
        ("by the mid-50 ' s", "by the mid-50's"),
        # quotations keep their quotes
        ("I watched ' Titanic ' on Monday .", "I watched 'Titanic' on Monday."),
        ("' Romeo and Juliet ' .", "'Romeo and Juliet'."),
        ("It says ' Wet paint ! '", "It says 'Wet paint!'"),
        ("It's called ' The Power of One ' .", "It's called 'The Power of One'."),
        ('We sing " Happy Birthday " at the party .', 'We sing "Happy Birthday" at the party.'),
        ("You mean “ if ” they catch him .", "You mean “if” they catch him."),
        ("It says , “ Mail . ”", "It says, “Mail.”"),
        ("a place called ” Wild Things ” ? !", "a place called “Wild Things”?!"),
        ("He said , “ I don ’ t know . ” Then he left .", "He said, “I don't know.” Then he left."),
        # sentences
        ("Good.Let ' s go now .", "Good. Let's go now."),
        ("OK.Thank you , Mr.Li .", "OK. Thank you, Mr. Li."),
        ("I see.how old is she ?", "I see. how old is she?"),
        ("Yes ,sir .Go on .", "Yes, sir. Go on."),
        ("He is an acrobat 。", "He is an acrobat."),
        ("Look at Stars.com , www.yahoo.com or a@yahoo.com .", "Look at Stars.com, www.yahoo.com or a@yahoo.com."),
        # ellipses
        ("Let me see ... What ?", "Let me see... What?"),
        ("see . . . you ' re late", "see... you're late"),
        ("Er ...", "Er..."),
        # numbers, times, money
        ("a grade of 3.7 or 824 . 71", "a grade of 3.7 or 824.71"),
        ("from 6:30 to 9: 00 , or 3 : 30 p . m .", "from 6:30 to 9:00, or 3:30 p.m."),
        ("$ 20 or £ 4.50 or ¥ 2 , 000", "$20 or £4.50 or ¥2,000"),
        ("15 , 000 yuan , 50 % now", "15,000 yuan, 50% now"),
        ("Line 3 , 4 , and 1,000 more", "Line 3, 4, and 1,000 more"),
        ("Flight No . 5 leaves at 8 a . m . tomorrow", "Flight No. 5 leaves at 8 a.m. tomorrow"),
        ("It is 37 ° C .", "It is 37°C."),
        ("a 24 - hour clock", "a 24-hour clock"),
        # initials
        ("in the U . S .", "in the U.S."),
        ("the U . S . , D . C . and a Ph.D .", "the U.S., D.C. and a Ph.D."),
        ("O . K . I ' ll go .", "O.K. I'll go."),
        ("It was plan B . I think so .", "It was plan B. I think so."),
        ("spelled H - U - A - N - G .", "spelled H-U-A-N-G."),
        ("by L / C , R & D and D / A", "by L/C, R&D and D/A"),
        # brackets
        ("( Pointing ) This one .", "(Pointing) This one."),
        ("Really ? ! No ; yes : so !", "Really?! No; yes: so!"),
        ("a job — anything", "a job — anything"),
        ("", ""),
    ],
)
def test_dailydialog_spacing_is_undone(spaced, text):
    assert undo_spacing(spaced) == text
    assert undo_spacing(text) == text, "what is clean stays"


def test_each_message_keeps_roles_and_the_original():
    messages = [{"role": "user", "content": "Hi ."}, {"role": "assistant", "content": "I ' m here ."}]
    cleaned = EachMessage(undo_spacing)(messages)
    assert cleaned == [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "I'm here."}]
    assert messages[0]["content"] == "Hi ."
    assert EachMessage(undo_spacing).__name__ == "undo_spacing"


def test_passes_reach_worker_processes():
    for passes in (TEXT_PASSES, CHAT_PASSES, DAILYDIALOG_PASSES):
        assert pickle.loads(pickle.dumps(passes)) == passes
