"""What data/knowledge leaves out of the answers of a model, and what they cost."""

from __future__ import annotations

import pytest
from model_server import sentences

from data.knowledge.costs import Costs, parse_price
from data.knowledge.filters import Selection, conversation_in, is_english, reason_against, without_wrapping
from tests.test_knowledge import answer, request

# --- filters ---

ENGLISH = sentences("a text")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (ENGLISH, ""),
        ("", "empty"),
        ("<think>hm, what about", "empty"),
        ("I'm sorry, but I can't help with that request because it is about something else.", "refusals"),
        ("I’m very sorry, I am unable to write this text for the reader that you describe.", "refusals"),
        (f"As an AI language model, I have no childhood. {ENGLISH}", "refusals"),
        ("I cannot write about this topic. " + ENGLISH, "refusals"),
        (f'"I am sorry," said Tom to the duck. {ENGLISH}', ""),
        (f"As an AI researcher, Ada works with the robots. {ENGLISH}", ""),
        ("Bees make honey.", "too short"),
        ("Die Bienen fliegen von Blume zu Blume und sammeln dort den Nektar, aus dem im Stock Honig wird. " * 2,
         "other languages"),
        ("Las abejas vuelan de flor en flor y recogen el néctar con el que hacen la miel en la colmena. " * 2,
         "other languages"),
        ("Les abeilles volent de fleur en fleur et récoltent le nectar dont elles font le miel de la ruche. " * 2,
         "other languages"),
        ("蜜蜂从一朵花飞到另一朵花，采集花蜜，然后在蜂巢里酿成蜂蜜。" * 5, "other languages"),
    ],
)  # fmt: skip
def test_why_a_text_is_left_out(content, reason):
    assert reason_against(without_wrapping(content), answer(content)) == reason


def test_the_server_says_why_a_text_is_left_out():
    assert reason_against(ENGLISH, answer(ENGLISH, "length")) == "cut off (--max_tokens)"
    assert reason_against(ENGLISH, answer(ENGLISH, "content_filter")) == "refusals"
    assert reason_against("", answer("", refusal="I won't.")) == "refusals"
    french = "Les abeilles volent de fleur en fleur et récoltent le nectar dont elles font le miel de la ruche. " * 2
    assert reason_against(french, answer(french), any_language=True) == ""


def test_real_english_of_every_kind_counts_as_english():
    for text in (
        "Water boils at 100 degrees. Write 3 + 4 = 7. Then divide 12 by 4 to get 3, and check it with 3 x 4 = 12.",
        "Photosynthesis turns carbon dioxide and water into glucose; the energy for it comes from light.",
        "Short.",
    ):
        assert is_english(text), text


def test_what_models_put_around_a_text_is_removed():
    for wrapped in (
        "Sure! Here's a short lesson about bees:\n\nBees fly.",
        "Here is the text you asked for:\nBees fly.",
        "```markdown\nBees fly.\n```",
        "<think>\nThe user wants bees.\n</think>\n\nBees fly.",
        "Bees fly.<|im_end|>\n<|im_start|>user\nMore!",
        "\n\n Bees fly. </s>",
    ):
        assert without_wrapping(wrapped) == "Bees fly.", wrapped
    assert without_wrapping("Here is my dog: Rex.\nHe barks.") == "Here is my dog: Rex.\nHe barks."


def test_conversations_alternate_and_start_with_the_user():
    assert conversation_in("Title\n\nStudent: a\nb\n\n**Teacher:** c\nTeacher: d\nstudent: e") == [
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "c\n\nd"},
    ]
    for text in ("", "no turns", "Teacher: a\nStudent: b\nTeacher: c", "Student: only", "Student:\nTeacher: b"):
        assert conversation_in(text) is None, text


def test_repeats_and_near_repeats_are_found_in_the_order_of_the_plan():
    selection = Selection()
    long = sentences("x", 20)
    texts = [long, long.upper().replace(".", " !"), long + " And one more.", sentences("y", 20)]
    kept = [selection.add(request(str(n)), answer(text)) for n, text in enumerate(texts)]
    assert kept == [True, False, False, True]
    assert selection.counts == {"answers left out: repeats": 1, "answers left out: near repeats": 1}


def test_costs():
    costs = Costs()
    costs.add(answer("", prompt_tokens=1000, completion_tokens=500_000))
    costs.add(answer("", prompt_tokens=None, completion_tokens=None))
    assert costs.in_words((2.0, 10.0)) == (
        "2 answers, 1,000 tokens in, 500,000 out (1 answers without token counts), cost 5.0020"
    )
    for wrong in ("", "1", "1,2,3", "a,b", "-1,2", "nan,1", "inf,1"):
        with pytest.raises(ValueError, match="--price must be IN,OUT"):
            parse_price(wrong)
