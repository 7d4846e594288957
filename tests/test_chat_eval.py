"""testing_tools/chat_eval.py: the judge of what the chitchat data has taught."""

from __future__ import annotations

import itertools
import json

import pytest

from data.chitchat.templates import assistant_words, load_phrases
from setup_tokenizer import IM_END, IM_END_ID
from tests.test_chitchat import chat_scores, run_script


@pytest.fixture(scope="module")
def questions():
    return chat_scores.load_questions()


def test_there_are_ten_openers_of_each_kind(questions):
    counts = [len(group["questions"]) for group in questions["openers"].values()]
    assert counts == [10, 10, 10, 10]
    assert len({opener for _, opener, _ in chat_scores.openers(questions)}) == 40


GOOD = {
    "greeting": "Hello! How can I help you today?",
    "thanks": "You're welcome! I'm happy to help.",
    "farewell": "Goodbye! Take care!",
    "how_are_you": "I'm doing well, thank you! How are you?",
}

HONEST = "I am a very small model and have not learned that. Ask me for a story or a joke."
TALE = "Once upon a time, {name} met a fox. The fox liked {name} very much. The end."


class FakeAssistant:
    """An assistant who gives fixed replies by kind of opener, and remembers names and facts."""

    def __init__(self, questions, replies, value_reply="It is {value}.", beyond=HONEST, tale=TALE):
        self.kinds = {opener: category for category, opener, _ in chat_scores.openers(questions)}
        self.names = {introduction: name for name, introduction in chat_scores.introductions(questions)}
        self.values = {
            f["tell"].format(value=v): (f["ask"], v) for f in questions["facts"].values() for v in f["values"]
        }
        self.beyond = {question for group in questions["beyond"]["questions"].values() for question in group}
        self.questions, self.replies = questions, replies
        self.value_reply, self.honest, self.tale = value_reply, beyond, tale

    def __call__(self, messages, max_tokens=chat_scores.MAX_REPLY_TOKENS):
        assert [message["role"] for message in messages] == (["user", "assistant"] * len(messages))[: len(messages)]
        said = [message["content"] for message in messages[::2]]
        return self.reply(said, said[-1]) + IM_END

    def reply(self, said, last):
        if last in self.kinds:
            return self.replies[self.kinds[last]]
        if last in self.beyond:
            return self.honest
        name = self.names.get(said[0])
        if last in self.questions["tales"]:
            return self.tale.format(name=name or "Mia")
        if last == self.questions["recall"]:
            return self.value_reply.format(value=name)
        told = dict(self.values[line] for line in said if line in self.values)
        return self.value_reply.format(value=told[last]) if last in told else "I see."


def test_a_perfect_assistant_gets_full_marks(questions):
    table = chat_scores.scores(chat_scores.evaluate(FakeAssistant(questions, GOOD), questions))
    assert table["openers"] == {"right": 40, "asked": 40}
    assert table["names"] == {"right": 50, "asked": 50}
    assert table["facts"] == table["beyond"] == {"right": 40, "asked": 40}
    assert table["tales"] == {"right": 20, "asked": 20}
    assert table["first_tales"] == {"right": 5, "asked": 5}


def test_the_conversations_have_eight_turns_and_ask_two_to_five_turns_after_a_fact(questions):
    conversations = chat_scores.conversations(questions)
    distances = []
    for turns in conversations:
        assert len(turns) == 8 and turns[7].expected is not None
        for number, turn in enumerate(turns):
            if turn.category.startswith("fact"):
                told = next(n for n, earlier in enumerate(turns) if turn.expected in earlier.text)
                distances.append(number - told)
    assert len(conversations) == 50 and {n: distances.count(n) for n in set(distances)} == {2: 10, 3: 10, 4: 10, 5: 10}


@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        ("I do not know that." + IM_END, "admit"),
        ("I am a very small model." + IM_END, "what it can do"),
        ("I am a very small model, so 17 and 25 is 42. Ask me for a story." + IM_END, "unexpected word"),
        (HONEST, "not ended"),
    ],
)
def test_faults_of_a_reply_beyond_small_talk(questions, reply, fault):
    beyond = questions["beyond"]
    assert fault in chat_scores.beyond_fault(reply, beyond["fits"], beyond["offers"], assistant_words())


@pytest.mark.parametrize(
    ("tale", "fault"),
    [
        ("Once upon a time, Annika met a fox. Annika liked the fox.", "does not end"),
        ("Once upon a time, Annika met a fox. The fox liked the sun. The end.", "keep the hero"),
        ("Once upon a time, Annika met a fox. Annika and Bob liked the fox. The end.", "another name, Bob"),
        ('Once upon a time, Annika and Annika met. "No," said Anni. The end.', "another name, Anni"),
        ("Annika " * 90 + "The end.", "more than 80 words"),
    ],
)
def test_faults_of_a_tale(tale, fault):
    assert fault in chat_scores.tale_fault(tale + IM_END, "Annika")
    assert chat_scores.tale_fault(TALE.format(name="Annika") + IM_END, "Annika") is None


def test_a_first_tale_may_have_any_hero_with_a_name_that_it_keeps():
    assert chat_scores.tale_fault(TALE.format(name="Annika") + IM_END) is None
    assert chat_scores.tale_fault(TALE.format(name="Laaaa") + IM_END) == "Laaaa is not a name"
    assert chat_scores.tale_fault(f"Once upon a time, Omara met Omar. They danced. The end.{IM_END}") == (
        "does not keep the hero"
    )


def test_every_line_of_the_generator_that_fits_is_accepted(questions):
    """What the data teaches must be able to win: each reply to a greeting, thanks, ... is judged as fitting."""
    known = assistant_words()
    for category, group in questions["openers"].items():
        for script in load_phrases()["topics"][category]:
            for template in script["lines"][1]:
                if "{name}" not in template:
                    reply = template + IM_END
                    assert not chat_scores.opener_fault(reply, group["fits"], group["never"], known), reply


def test_a_reply_of_another_kind_never_fits(questions):
    for right, wrong in itertools.permutations(GOOD, 2):
        if (right, wrong) == ("greeting", "how_are_you"):
            continue  # tested below: it needs the greeting's own words
        group = questions["openers"][right]
        fault = chat_scores.opener_fault(GOOD[wrong] + IM_END, group["fits"], group["never"], assistant_words())
        assert fault, (right, wrong)


@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        ("Hello! How are you?", "not ended"),
        (IM_END, "empty"),
        ("Hello, Zorba!" + IM_END, "unexpected word 'zorba'"),
        ("Hello hello hello" + IM_END, "three times"),
        ("I'm doing well, thank you!" + IM_END, "this kind of opener"),
        ("Hello! I helo you" + IM_END, "unexpected word 'helo'"),
        ("Hello.\nHow are you?" + IM_END, "more than one line"),
        ("Hello! Goodbye!" + IM_END, "unfitting"),
    ],
)
def test_faults_of_a_greeting(questions, reply, fault):
    group = questions["openers"]["greeting"]
    found = chat_scores.opener_fault(reply, group["fits"], group["never"], assistant_words())
    assert fault in found


def test_the_time_of_day_must_agree(questions):
    answers = chat_scores.evaluate(FakeAssistant(questions, {**GOOD, "greeting": "Good morning!"}), questions)
    faults = {answer.question: answer.fault for answer in answers if answer.category == "greeting"}
    assert faults["A very good morning to you"] is None
    assert faults["Good evening, dear Jojo, here I am"]


@pytest.mark.parametrize(
    "reply", ["Your name is Petra", "Your name is Pet.", "Your name is Petras.", "Your name is petra."]
)
def test_only_exactly_that_name_counts(reply):
    ended = reply if reply.endswith("Petra") else reply + IM_END
    assert chat_scores.value_fault(ended, "Petra")
    assert chat_scores.value_fault(f"Your name is Petra.{IM_END}", "Petra") is None


def test_forgotten_names_lower_the_score(questions):
    assistant = FakeAssistant(questions, GOOD, value_reply="You have not told me your name yet.")
    table = chat_scores.scores(chat_scores.evaluate(assistant, questions))
    assert table["names"] == {"right": 0, "asked": 50} and table["facts"] == {"right": 0, "asked": 40}


def test_a_limit_asks_the_first_questions_of_each_kind(questions):
    table = chat_scores.scores(chat_scores.evaluate(FakeAssistant(questions, GOOD), questions, limit=3))
    kinds = ("greeting", "how_are_you", "names", "beyond: arithmetic", "tales")
    assert {kind: table[kind]["asked"] for kind in kinds} == dict.fromkeys(kinds, 3)


def test_chat_eval_questions_a_checkpoint(tmp_path):
    """A model that only ever says nothing is asked everything, gets no point, and that is no error."""
    import torch

    from common.checkpoint import save_checkpoint
    from model import GPT, GPTConfig

    model = GPT(GPTConfig(block_size=128, n_layer=1, n_head=1, n_embd=16))
    with torch.no_grad():
        model.ln_f.bias.fill_(1.0)
        model.wte.weight[IM_END_ID].fill_(1.0)  # the last layer's output now points to <|im_end|>, always
    save_checkpoint(tmp_path / "model.pt", model, {"dataset": "chitchat", "format": "chat"})
    result = run_script(
        "testing_tools/chat_eval.py", "model.pt", "--device", "cpu", "--json", "scores.json", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert content["scores"]["names"] == {"right": 0, "asked": 50}
    assert content["scores"]["openers"] == {"right": 0, "asked": 40}
    assert [answer["fault"] for answer in content["answers"]] == ["empty"] * 195
    assert "names                    0     50" in result.stdout


def test_chat_eval_without_a_checkpoint_says_what_to_run(tmp_path):
    result = run_script("testing_tools/chat_eval.py", "none.pt", "--device", "cpu", cwd=tmp_path)
    assert result.returncode == 1 and "not found" in result.stderr and "Traceback" not in result.stderr
