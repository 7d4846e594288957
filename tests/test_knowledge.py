"""Educational text by a model: topics, prompts, plan, journal, client and filters."""

from __future__ import annotations

import asyncio
import email.utils
import itertools
import json
import re
import time
from collections import Counter
from pathlib import Path

import pytest
from model_server import ModelServer, Reply, completion, good_text

from common.cli import UserError
from data.knowledge.client import Client, RequestFailed, Retries, http_client, models_of, retry_after_s
from data.knowledge.journal import Answer, Journal
from data.knowledge.plan import Request, plan, variant
from data.knowledge.prompts import read_prompts
from data.knowledge.topics import Question, Topic, read_questions, read_topics

DATA = Path(__file__).resolve().parent.parent / "data"
PROMPTS = read_prompts(DATA / "knowledge-prompts.json")
TOPICS = read_topics(DATA / "knowledge-topics.json", PROMPTS.readers)


def answer(content: str, finish_reason: str = "stop", key: str = "k", **fields) -> Answer:
    return Answer(key, "m", content, finish_reason, fields.pop("max_tokens", 100), **fields)


def request(key: str = "k", as_chat: bool = False, user_message: str | None = None) -> Request:
    return Request(key, ({"role": "user", "content": key},), as_chat, key, "lesson", "6 to 8", user_message)


# --- topics and prompts ---


def test_the_topics_cover_many_subjects_and_every_age_without_repeats():
    assert len(TOPICS) >= 2000
    assert len({topic.subject for topic in TOPICS}) >= 40
    for subject in {topic.subject for topic in TOPICS}:
        ages = [topic.age for topic in TOPICS if topic.subject == subject]
        assert {age: ages.count(age) >= 10 for age in PROMPTS.readers} == dict.fromkeys(PROMPTS.readers, True), subject
    words = [tuple(sorted(set(re.findall(r"\w{4,}", topic.text.lower())))) for topic in TOPICS]
    alike = [words_ for words_, count in Counter(words).items() if count > 1 and len(words_) > 1]
    assert alike == []


def test_topics_of_a_text_file_are_for_every_reader_and_repeats_count_once(tmp_path):
    file = tmp_path / "topics.txt"
    file.write_text("\ufeff# mine\n\nbees\r\nBEES\n  the  tides \n", "utf-8")
    assert read_topics(file, PROMPTS.readers) == [Topic("bees"), Topic("the  tides")]
    readers = {sent.reader for sent in plan([Topic("bees")], PROMPTS, False, "m", 1)}
    assert readers == set(PROMPTS.readers)
    file.write_text("\n# nothing\n")
    with pytest.raises(UserError, match="contains no topic"):
        read_topics(file, PROMPTS.readers)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"animals": {"200": ["bees"]}}, 'unknown age "200"'),
        ({"animals": {"6 to 8": "bees"}}, "no list of topics"),
        ("{", "is not JSON"),
    ],
)
def test_a_wrong_file_of_topics_is_one_sentence(tmp_path, content, said):
    file = tmp_path / "topics.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=said):
        read_topics(file, PROMPTS.readers)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"topics as text": {"lesson": "About {topik}"}}, r"unknown placeholder \{topik\}.*\{reader\}"),
        ({"topics as text": {"lesson": "Anything"}}, r"needs the placeholder \{topic\}"),
        ({"questions as chat": {}}, 'needs an object "questions as chat"'),
        ({"system": None}, 'needs a text "system"'),
        ({"with_passage": "Use it."}, r"needs the placeholder \{passage\}"),
    ],
)
def test_a_wrong_edit_of_the_prompts_is_one_sentence_that_names_the_file(tmp_path, change, said):
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps(json.loads((DATA / "knowledge-prompts.json").read_text("utf-8")) | change))
    with pytest.raises(UserError, match=said) as error:
        read_prompts(file)
    assert str(file) in str(error.value)


def test_questions_come_from_flat_records_and_from_squads_own_layout():
    nested = {"data": [{"paragraphs": [{"context": "Tea is hot.", "qas": [{"question": "Is tea hot?", "id": "1"}]}]}]}
    flat = [{"question": "Why?", "context": None}, {"question": " why? "}, {"other": 1}, nested]
    assert list(read_questions(flat)) == [Question("Why?"), Question("Is tea hot?", "Tea is hot.")]


# --- the plan ---


def test_a_plan_asks_about_every_topic_before_it_asks_about_one_again():
    first = list(itertools.islice(plan(TOPICS, PROMPTS, False, "m", 1), len(TOPICS) + 50))
    assert {sent.about for sent in first[: len(TOPICS)]} == {topic.text for topic in TOPICS}
    assert [sent.about for sent in first[len(TOPICS) :]] == [sent.about for sent in first[:50]]
    assert all(again.form != sent.form for sent, again in zip(first, first[len(TOPICS) :], strict=False))
    assert len({sent.key for sent in first}) == len(first)
    forms = [sent.form for sent in first[:400]]
    assert all(forms.count(form) > 20 for form in PROMPTS.forms["topics as text"])
    assert "{" not in "".join(sent.messages[-1]["content"] for sent in first)


def test_a_plan_ends_and_holds_each_request_once():
    sources = [Topic("bees", "animals", "6 to 8"), Topic("tides")]
    requests = list(plan(sources, PROMPTS, True, "m", 1))
    forms, styles = len(PROMPTS.forms["topics as chat"]), len(PROMPTS.styles)
    assert len({sent.key for sent in requests}) == len(requests) == forms * styles * (1 + 3)
    for shape in [(1, 4, 2), (3, 2, 1), (4, 10, 3), (2, 2, 2)]:
        n = shape[0] * shape[1] * shape[2]
        assert len({variant(number, *shape) for number in range(7, 7 + n)}) == n


def test_the_order_depends_on_the_seed_and_the_key_on_the_model():
    def keys(model: str, seed: int) -> list[str]:
        return [sent.key for sent in itertools.islice(plan(TOPICS, PROMPTS, False, model, seed), 100)]

    assert keys("m", 1) == keys("m", 1)
    assert keys("m", 1) != keys("m", 2)
    assert not set(keys("m", 1)) & set(keys("n", 1))


def test_a_question_is_the_users_message_and_its_passage_is_only_in_the_prompt():
    (sent, *_) = plan([Question("Why {x}?", "Because {y}.")], PROMPTS, True, "m", 1)
    assert sent.user_message == "Why {x}?"
    assert "Why {x}?" in sent.messages[-1]["content"] and sent.messages[-1]["content"].endswith("Because {y}.")


# --- the journal ---


def test_the_journal_keeps_every_answer_and_removes_a_half_written_last_line(tmp_path):
    path = tmp_path / "a.jsonl"
    with Journal(path) as journal:
        for key in "abc":
            journal.append(answer(f"text {key} \u2028 é\ud800", key=key), about="bees")
    whole = path.read_bytes()
    for cut in range(1, len(whole.splitlines(keepends=True)[-1])):
        path.write_bytes(whole[:-cut])
        with Journal(path) as journal:
            assert len(journal) == 2 and journal.answer("c") is None
            assert journal.answer("b").content == "text b \u2028 é?"
            if cut % 50 == 1:
                journal.append(answer("again", key="c"))
                assert journal.answer("c").content == "again" and journal.answer("a").content.startswith("text a")


def test_damaged_lines_in_the_middle_are_counted_and_asked_again(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    with Journal(path) as journal:
        for key in "abc":
            journal.append(answer(key, key=key))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\x00\xff{\n" + b"[" * 100_000 + b"\n3\n{}\n" + lines[2])
    with Journal(path) as journal:
        assert [journal.answer(key) is not None for key in "abc"] == [True, False, True]
    assert "4 lines are not answers" in capsys.readouterr().err


def test_a_journal_is_used_by_one_run_at_a_time(tmp_path):
    with Journal(tmp_path / "a.jsonl"), pytest.raises(UserError, match="in use by another run"):
        Journal(tmp_path / "a.jsonl")
    with Journal(tmp_path / "a.jsonl"):
        pass


def test_an_answer_that_was_cut_off_is_asked_again_with_a_higher_limit_only(tmp_path):
    for _ in range(2):  # also after it was read back
        with Journal(tmp_path / "a.jsonl") as journal:
            if not len(journal):
                journal.append(answer("half a", "length", max_tokens=100))
            assert journal.has("k", 100) and not journal.has("k", 101)
    with Journal(tmp_path / "a.jsonl") as journal:
        journal.append(answer("whole", max_tokens=200))
        assert journal.has("k", 1000) and journal.answer("k").content == "whole"


# --- the client ---


class FakeTime:
    """A clock that a client sleeps on; `waits` lists how long."""

    def __init__(self):
        self.now, self.waits = 0.0, []

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds

    def clock(self) -> float:
        return self.now


def ask(behave, **settings):
    """(answer or error, waits, number of requests) of one request to a server that behaves so."""
    fake = FakeTime()
    with ModelServer(behave) as server:
        client = Client(
            server.api_url,
            None,
            "writer",
            100,
            retries=Retries(tries=settings.pop("tries", 4)),
            sleep=fake.sleep,
            clock=fake.clock,
            draw=lambda: 0.5,
            **settings,
        )

        async def one():
            async with http_client(client, 2) as http:
                return await client.ask(http, request(), asyncio.Event())

        try:
            result = asyncio.run(one())
        except (RequestFailed, UserError) as error:
            result = error
    return result, fake.waits, len(server.asked)


def failing(*replies: Reply):
    """A server that sends these replies to a request first, then a good one."""
    return lambda body, n_before: replies[n_before] if n_before < len(replies) else Reply(completion(good_text(body)))


TRANSIENT = {
    "429": Reply({"error": {"message": "slow down"}}, 429),
    "500": Reply("<html>oops</html>", 500),
    "503": Reply({"detail": "loading"}, 503),
    "529": Reply({}, 529),
    "cut": Reply(completion("text"), cut=True),
    "broken JSON": Reply('{"choices": [{"mess'),
    "not an object": Reply([1]),
    "no choices": Reply({"choices": []}),
    "an error with status 200": Reply({"error": {"message": "overloaded"}}),
    "null choices": Reply({"choices": None}),
}


@pytest.mark.parametrize("fault", TRANSIENT)
def test_errors_that_may_pass_are_tried_again_with_growing_waits(fault):
    result, waits, n_asked = ask(failing(*[TRANSIENT[fault]] * 3))
    assert isinstance(result, Answer) and result.content
    assert waits == [0.75, 1.5, 3.0] and n_asked == 4  # 1, 2, 4 s times (0.5 + 0.5 * 0.5)
    result, waits, n_asked = ask(failing(*[TRANSIENT[fault]] * 4))
    assert isinstance(result, RequestFailed) and "4 times" in str(result)


def test_waits_are_random_and_limited():
    retries = Retries(first_wait_s=1, longest_wait_s=60)
    assert [retries.wait_s(n, 0, lambda: 0.0) for n in (1, 2, 7, 100)] == [0.5, 1, 30, 30]
    assert [retries.wait_s(n, 0, lambda: 1.0) for n in (1, 2, 7, 100)] == [1, 2, 60, 60]
    assert retries.wait_s(1, 17, lambda: 1.0) == 17


def test_retry_after_is_honoured_in_every_form():
    for headers, expected in [
        ({"Retry-After": "7"}, 7),
        ({"retry-after-ms": "2500"}, 2.5),
        ({"Retry-After": email.utils.formatdate(time.time() + 30, usegmt=True)}, 30),
        ({"Retry-After": "soon"}, 0.75),
        ({"Retry-After": "-5"}, 0.75),
    ]:
        result, waits, _ = ask(failing(Reply({}, 429, headers)))
        assert isinstance(result, Answer)
        assert sum(waits) == pytest.approx(expected, abs=2 if expected == 30 else 1e-6), headers
    assert retry_after_s({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0


def test_a_server_that_says_nothing_is_tried_again():
    result, _, n_asked = ask(failing(Reply(completion("late"), delay_s=0.6)), timeout_s=0.2)
    assert isinstance(result, Answer) and result.content != "late" and n_asked == 2


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (Reply({"error": {"message": "bad key"}}, 401), "bad key; set OPENAI_API_KEY, or give --api_key"),
        (Reply({"error": 'model "x" not found, try pulling it first'}, 404), "pulling it first; check --model"),
        (Reply({"error": {"message": "Insufficient Balance"}}, 402), "add credit"),
        (Reply({"error": {"message": "You exceeded your current quota"}}, 429), "add credit"),
        (Reply({}, 429, {"Retry-After": "86400"}), "24.0 hours"),
        (Reply({}, 308, {"Location": "https://else.where"}), "redirects to https://else.where"),
    ],
)
def test_errors_of_every_request_end_the_run_at_once(reply, said):
    result, waits, n_asked = ask(failing(*[reply] * 9))
    assert isinstance(result, UserError) and said in str(result)
    assert n_asked == 1 and not waits


def test_a_request_that_the_server_rejects_is_not_tried_again():
    result, _, n_asked = ask(failing(Reply({"error": {"message": "content policy"}}, 400)))
    assert isinstance(result, RequestFailed) and str(result) == "HTTP 400: content policy" and n_asked == 1


def test_models_that_call_the_limit_otherwise_are_understood():
    def behave(body, n_before):
        if "max_tokens" in body:
            return Reply({"error": {"message": "Unsupported parameter: use 'max_completion_tokens' instead"}}, 400)
        return Reply(completion(f"at most {body['max_completion_tokens']}"))

    result, _, n_asked = ask(behave)
    assert result.content == "at most 100" and n_asked == 2


def test_null_content_and_missing_counts_are_an_empty_answer():
    result, *_ = ask(failing(Reply({"choices": [{"message": {"content": None}}], "usage": None})))
    assert (result.content, result.finish_reason, result.prompt_tokens) == ("", "unknown", None)


def test_no_server_and_the_list_of_models():
    with ModelServer(models=("a", "b")) as server:
        client = Client(server.api_url, None, "", 1)
        assert models_of(client) == ["a", "b"]
    with pytest.raises(UserError, match=r"no server answers at .*ollama serve"):
        models_of(client)
