"""The chat page in a real browser: replies are rated, said better, compared, sent to the server and exported."""

from __future__ import annotations

import json
import time
from collections import Counter

from data.layouts.preferences import preferences
from data.readers.records import read_records
from tests.browser import PATIENCE_S, button, replies, send, text_of_last, until
from tests.chat_stand_in import DIGEST, REPLY, ChatStandIn, split_tokens, token_id
from tests.test_page_safety import PAYLOAD, assert_harmless

HI = {"role": "user", "content": "Hi"}
SAID = {"role": "assistant", "content": REPLY}
IDS = [token_id(token) for token in split_tokens(REPLY)]


def pressed(scope, name: str) -> bool:
    return button(scope, name).get_attribute("aria-pressed") == "true"


def wait_for_events(page, server, n: int) -> list[dict]:
    deadline = time.monotonic() + PATIENCE_S
    while len(server.feedback) < n and time.monotonic() < deadline:
        page.wait_for_timeout(30)
    assert len(server.feedback) == n
    return server.feedback


def exported(page, path) -> list[dict]:
    with page.expect_download() as download:
        button(page, "Export feedback").click()
    assert download.value.suggested_filename == "jojo-feedback.jsonl"
    download.value.save_as(path)
    return list(read_records(path))


def test_ratings_are_sent_one_after_another_and_kept_with_the_chat(visit):
    with ChatStandIn(keeps_feedback=True) as server:
        page = visit(server)
        send(page, "Hi")
        assert page.locator("#feedback-kept").inner_text() == "This server keeps ratings and their conversations."
        for name in ("Good", "Bad", "Bad", "Good"):  # by mistake, meant, withdrawn, another opinion
            button(page, name).click()
            assert page.evaluate("document.activeElement.getAttribute('aria-label')") == name
        events = wait_for_events(page, server, 4)
        assert [event["rating"] for event in events] == ["good", "bad", "none", "good"]
        assert len({event["id"] for event in events}) == 1
        expected = {"model": "jojo-chat", "digest": DIGEST, "messages": [HI, SAID], "token_ids": IDS}
        assert expected.items() <= events[0].items()
        assert pressed(page, "Good") and not pressed(page, "Bad")
        page.reload()
        page.get_by_role("list", name="Your chats").get_by_role("button").first.click()
        assert pressed(page, "Good") and not pressed(page, "Bad")
        send(page, "More")
        older = replies(page).first
        assert older.get_by_role("button", name="Good").evaluate("node => getComputedStyle(node).opacity") == "1"
        assert older.get_by_role("button", name="Copy").evaluate("node => getComputedStyle(node).opacity") == "0"
        button(replies(page).last, "Bad").click()
        messages = wait_for_events(page, server, 5)[-1]["messages"]
        assert messages == [HI, SAID, {"role": "user", "content": "More"}, SAID]


def test_a_reply_is_said_better_by_keyboard(visit):
    with ChatStandIn(keeps_feedback=True) as server:
        page = visit(server)
        send(page, "Hi")
        button(page, "Say it better").focus()
        page.keyboard.press("Enter")
        page.get_by_label("Say it better").fill("never mind")
        page.keyboard.press("Escape")
        assert text_of_last(page) == REPLY and page.evaluate("document.activeElement.textContent") == "Say it better"
        page.keyboard.press("Enter")
        assert page.get_by_label("Say it better").input_value() == REPLY
        page.keyboard.press("Control+A")
        page.keyboard.type("Ahoy!")
        page.keyboard.press("Enter")
        assert text_of_last(page) == "Ahoy!" and page.evaluate("document.activeElement.textContent") == "Say it better"
        (event,) = wait_for_events(page, server, 1)
        assert event["correction"] == "Ahoy!" and event["messages"] == [HI, SAID] and "rating" not in event
        assert event["token_ids"] == IDS
        assert pressed(page, "Say it better") and button(page, "Good").count() == 0  # on a person's own words
        assert "written by you" in replies(page).last.inner_text()
        send(page, "And?")  # the chat continues from there
        assert server.requests[-1]["messages"][1]["content"] == "Ahoy!"
        first = replies(page).first
        first.hover()
        first.get_by_role("button", name="Previous version").click()
        assert first.locator(".better").inner_text() == "Your version: Ahoy!"
        button(first, "Bad").click()
        button(first, "Say it better").click()
        page.get_by_label("Say it better").fill("Ahoy, matey!")
        page.keyboard.press("Enter")
        button(replies(page).last, "Good").click()
        events = wait_for_events(page, server, 4)
        assert [(event.get("rating"), event.get("correction")) for event in events[1:]] == [
            ("bad", "Ahoy!"),
            ("bad", "Ahoy, matey!"),
            ("good", None),
        ]
        assert events[3]["messages"][1]["content"] == "Ahoy!"  # what the model was asked, not what is shown now
        button(first, "Say it better").click()
        page.get_by_label("Say it better").fill(f" {REPLY}\n")  # the model's words: no correction any more
        page.keyboard.press("Enter")
        assert first.locator(".text").inner_text() == REPLY and first.locator(".better").is_hidden()
        assert "correction" not in wait_for_events(page, server, 5)[-1]


def test_without_the_servers_file_nothing_is_sent_and_the_export_is_what_is_prepared(visit, tmp_path):
    with ChatStandIn() as server:
        page = visit(server)
        page.locator("#chat-model option").first.wait_for(state="attached")
        assert page.locator("#feedback-kept").inner_text() == "Ratings stay in this browser."
        button(page, "Export feedback").click()
        assert page.locator("#import-result").inner_text() == "No reply has been rated yet."
        page.get_by_text("System message", exact=False).first.click()
        page.locator("#system-message").fill("You are kind.")
        send(page, "Hi \u2028 there")
        button(page, "Say it better").click()
        page.get_by_label("Say it better").fill("Ahoy!\nYou?")
        page.keyboard.press("Enter")
        button(page, "New chat").click()
        page.locator("#system-message").fill("")
        for name in ("Good", "Bad"):
            send(page, "Hi")
            button(replies(page).last, name).click()
        page.reload()
        events = exported(page, tmp_path / "feedback.jsonl")
        assert server.feedback == [] and len(events) == 3
        assert all(event["digest"] == DIGEST and event["token_ids"] == IDS and event["time"] for event in events)
        skipped = Counter()
        (pair,) = preferences(events, skipped)
        assert pair == [
            {"role": "system", "content": "You are kind."},
            {"role": "user", "content": "Hi \u2028 there"},
            {"role": "assistant", "content": "Ahoy!\nYou?", "preferred": True},
            {"role": "assistant", "content": REPLY, "preferred": False},
        ]
        assert skipped == {"label without an opposite one on the same prompt": 2}


def test_two_models_are_compared(visit, tmp_path):
    with ChatStandIn(reply=lambda asked: next(texts), keeps_feedback=True, seconds_per_token=0.02) as server:
        texts = iter(["One two.", "Three four."])
        page = visit(server, "#compare")
        page.locator("#compare-right option").first.wait_for(state="attached")
        page.get_by_label("Message to both models").fill("Hi")
        page.keyboard.press("Enter")
        until(page, "document.querySelectorAll('.pair .word-button:not([hidden])').length === 4")
        left, right = page.locator(".pair .assistant").all()
        said = [side.locator(".text").inner_text() for side in (left, right)]
        button(left, "This one is better").click()
        assert pressed(left, "This one is better") and not pressed(right, "This one is better")
        button(right, "This one is better").click()
        assert pressed(right, "This one is better") and not pressed(left, "This one is better")
        button(right, "Say it better").click()
        page.get_by_label("Say it better").fill("Five.")
        page.keyboard.press("Enter")
        events = wait_for_events(page, server, 3)
        assert events[0]["id"] == events[1]["id"] != events[2]["id"]
        assert events[1]["messages"] == [HI, {"role": "assistant", "content": said[1]}]
        assert events[1]["model"] == "jojo-before" and events[1]["preferred_over"]["model"] == "jojo-chat"
        ids = [token_id(token) for token in split_tokens(said[0])]
        assert events[1]["preferred_over"] == {
            **{"model": "jojo-chat", "digest": DIGEST, "token_ids": ids},
            "content": said[0],
        }
        pairs = [[message["content"] for message in pair[1:]] for pair in preferences(server.feedback)]
        assert pairs == [[said[1], said[0]], ["Five.", said[1]]]
        assert list(preferences(exported(page, tmp_path / "feedback.jsonl"))) == list(preferences(server.feedback))
        assert pressed(right, "This one is better")
        button(right, "This one is better").click()
        assert wait_for_events(page, server, 4)[-1]["rating"] == "none"
        assert len(exported(page, tmp_path / "feedback.jsonl")) == 1


def test_a_rating_that_the_server_could_not_keep_is_said_and_tried_again(visit):
    with ChatStandIn(keeps_feedback=True, feedback_faults=(507, 507)) as server:
        page = visit(server)
        send(page, "Hi")
        button(page, "Good").click()
        alert = page.get_by_role("alert")
        assert "the <b>disk</b> is full. Ask whoever started the server" in alert.inner_text()
        assert pressed(page, "Good")
        button(page, "Try again").click()
        button(page, "Bad").click()  # a later event also clears the error
        alert.wait_for(state="detached")
        assert [event["rating"] for event in wait_for_events(page, server, 1)] == ["bad"]
        assert_harmless(page)


def test_payloads_in_corrections_stay_text(visit):
    with ChatStandIn(reply=lambda messages: PAYLOAD, keeps_feedback=True) as server:
        page = visit(server)
        send(page, PAYLOAD)
        button(page, "Say it better").click()
        page.get_by_label("Say it better").fill(PAYLOAD * 2)
        page.keyboard.press("Enter")
        assert text_of_last(page) == PAYLOAD * 2
        page.get_by_role("button", name="Previous version").click()
        assert page.locator(".better").inner_text() == f"Your version: {PAYLOAD * 2}"
        assert json.loads(json.dumps(wait_for_events(page, server, 1)))[0]["correction"] == PAYLOAD * 2
        assert_harmless(page)
