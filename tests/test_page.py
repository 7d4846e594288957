"""The chat page in a real browser: every feature is used once, with a stand-in for the server."""

from __future__ import annotations

import json

import pytest

from tests.browser import button, replies, send, text_of_last, until, wait_for_end
from tests.chat_stand_in import REPLY, ChatStandIn


def test_a_chat_streams_and_is_kept(visit):
    with ChatStandIn(seconds_per_token=0.05) as server:
        page = visit(server)
        send(page, "first line", wait=False)
        until(
            page,
            f"{json.dumps(REPLY)}.startsWith(document.querySelector('.running .text')?.textContent || 'nothing yet')",
        )
        wait_for_end(page)
        assert text_of_last(page) == REPLY
        assert replies(page).last.locator(".numbers").inner_text().startswith("jojo-chat · 8 tokens · ")
        assert "tokens/s" in replies(page).last.inner_text()
        meter = page.get_by_role("meter")
        assert meter.get_attribute("aria-valuemax") == "256" and int(meter.get_attribute("aria-valuenow")) > 8
        area = page.get_by_label("Message", exact=True)
        area.fill("two")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("lines")
        page.keyboard.press("Enter")
        wait_for_end(page)
        assert server.requests[1]["messages"] == [
            {"role": "user", "content": "first line"},
            {"role": "assistant", "content": REPLY},
            {"role": "user", "content": "two\nlines"},
        ]
        page.reload()
        page.get_by_role("list", name="Your chats").get_by_role("button", name="first line", exact=True).click()
        assert [text.inner_text() for text in page.locator("#messages .text").all()] == [
            "first line",
            REPLY,
            "two\nlines",
            REPLY,
        ]


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_keeps_what_has_arrived_and_the_reply_can_be_continued(visit, how):
    with ChatStandIn(seconds_per_token=0.1) as server:
        page = visit(server)
        send(page, "Hi", wait=False)
        until(page, "document.querySelector('.running .text')?.textContent.startsWith('Hello there')")
        page.keyboard.press("Escape") if how == "Escape" else button(page, "Stop").click()
        wait_for_end(page)
        partial = text_of_last(page)
        assert partial and partial != REPLY and REPLY.startswith(partial)
        assert "stopped" in replies(page).last.inner_text()
        assert page.evaluate("document.activeElement.id") == "chat-text"
        button(page, "Continue this reply").click()
        wait_for_end(page)
        assert server.n_left == 1  # the server was told, and did not generate for nobody
        assert text_of_last(page) == partial + server.continuation
        assert len(server.requests[1]["assistant_prefix_ids"]) == len(partial.split())


def test_regenerate_keeps_the_earlier_version(visit):
    answers = iter(["First.", "Second.", "Third."])
    with ChatStandIn(reply=lambda messages: next(answers)) as server:
        page = visit(server)
        send(page, "Hi")
        button(page, "Regenerate").click()
        wait_for_end(page)
        assert text_of_last(page) == "Second." and "2 of 2" in replies(page).last.inner_text()
        assert server.requests[0]["messages"] == server.requests[1]["messages"]
        page.get_by_role("button", name="Previous version").click()
        assert text_of_last(page) == "First."
        send(page, "And?")
        assert server.requests[2]["messages"][1]["content"] == "First."


def test_edit_a_message_and_continue_from_there(visit):
    with ChatStandIn() as server:
        page = visit(server)
        send(page, "One")
        send(page, "Two")
        page.locator(".user").first.hover()
        button(page, "Edit and continue from here").first.click()
        page.get_by_label("Edit your message").fill("Uno")
        page.keyboard.press("Enter")
        assert "The 3 messages after this one will be removed" in page.get_by_role("dialog").inner_text()
        button(page, "Continue").click()
        wait_for_end(page)
        assert page.locator("#messages .user").count() == 1 and replies(page).count() == 1
        assert server.requests[-1]["messages"] == [{"role": "user", "content": "Uno"}]


def test_edit_a_reply_and_let_the_model_continue_it(visit):
    with ChatStandIn() as server:
        page = visit(server)
        send(page, "Hi")
        button(page, "Edit this reply").click()
        page.get_by_label("Edit this reply").fill("Good evening")
        button(page, "Save and continue").click()
        wait_for_end(page)
        assert text_of_last(page) == "Good evening" + server.continuation
        assert server.requests[-1]["continue_final_message"] is True
        assert server.requests[-1]["messages"][-1] == {"role": "assistant", "content": "Good evening"}
        button(page, "Edit this reply").click()
        page.get_by_label("Edit this reply").fill("Good night.")
        button(page, "Save").click()
        assert text_of_last(page) == "Good night." and len(server.requests) == 2
        button(page, "Edit this reply").click()
        page.get_by_label("Edit this reply").fill("never mind")
        page.keyboard.press("Escape")
        assert text_of_last(page) == "Good night."


def test_copy(visit):
    with ChatStandIn() as server:
        page = visit(server, permissions=["clipboard-read", "clipboard-write"])
        send(page, "Hi")
        replies(page).last.get_by_role("button", name="Copy").click()
        until(page, "document.getElementById('status').textContent === 'Copied.'")
        assert page.evaluate("navigator.clipboard.readText()") == REPLY


def test_several_chats_are_renamed_searched_and_deleted(visit):
    with ChatStandIn() as server:
        page = visit(server)
        chats = page.get_by_role("list", name="Your chats").get_by_role("listitem")
        for text in ("apples", "pears", "plums"):
            button(page, "New chat").click()
            send(page, text)
        assert [chat.inner_text() for chat in chats.all()] == ["plums", "pears", "apples"]
        chats.nth(1).hover()
        button(page, "Rename “pears”").click()
        page.get_by_label("Name", exact=True).fill("Fruit of the year")
        page.keyboard.press("Enter")
        page.get_by_label("Search chats").fill("fruit OF")
        assert [chat.inner_text() for chat in chats.all()] == ["Fruit of the year"]
        page.get_by_label("Search chats").fill("apples")
        chats.first.hover()
        button(page, "Delete “apples”").click()
        button(page, "Cancel").click()
        assert chats.count() == 1
        chats.first.hover()
        button(page, "Delete “apples”").click()
        button(page, "Delete").click()
        page.get_by_label("Search chats").fill("")
        page.reload()
        assert [chat.inner_text() for chat in chats.all()] == ["plums", "Fruit of the year"]
        chats.nth(1).get_by_role("button").first.click()
        assert page.locator("#messages .user .text").inner_text() == "pears"


def test_a_reply_continues_while_another_chat_is_shown(visit):
    with ChatStandIn(seconds_per_token=0.08) as server:
        page = visit(server)
        send(page, "slow", wait=False)
        until(page, "document.querySelector('.running .text')?.textContent.length > 5")
        button(page, "New chat").click()
        assert replies(page).count() == 0 and button(page, "Send").is_visible()
        page.get_by_role("list", name="Your chats").get_by_role("button", name="slow", exact=True).click()
        wait_for_end(page)
        assert text_of_last(page) == REPLY and server.n_left == 0


def test_export_is_what_prepare_chat_reads_and_import_reads_it_again(visit, tmp_path):
    from data.layouts.chat import conversations
    from data.readers.records import read_records

    with ChatStandIn() as server:
        page = visit(server)
        page.get_by_text("System message", exact=False).first.click()
        page.locator("#system-message").fill("You are kind.")
        assert page.locator("summary").inner_text() == "System message (set)"
        send(page, "Hi \u2028 there")  # a line separator, which ends no line of JSONL
        with page.expect_download() as download:
            button(page, "Export all chats").click()
        file = tmp_path / download.value.suggested_filename
        download.value.save_as(file)
        expected = [
            {"role": "system", "content": "You are kind."},
            {"role": "user", "content": "Hi \u2028 there"},
            {"role": "assistant", "content": REPLY},
        ]
        assert list(conversations(read_records(file))) == [expected]

        other = visit(server)
        faulty = '{"messages": [{"role": "tool", "content": "x"}]}\nnot JSON\n{"messages": []}\n'
        file.write_text(file.read_text("utf-8") + faulty, "utf-8")
        other.get_by_label("File with chats to import").set_input_files(file)
        other.locator("#import-result", has_text="1 chat imported. 3 lines skipped").wait_for()
        other.get_by_role("list", name="Your chats").get_by_role("button").first.click()
        assert other.locator("#system-message").input_value() == "You are kind."
        send(other, "Again")
        assert server.requests[-1]["messages"] == [*expected, {"role": "user", "content": "Again"}]


def test_settings_are_sent_only_where_they_were_changed(visit):
    with ChatStandIn() as server:
        page = visit(server)
        send(page, "Hi")
        fields = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens", "seed", "stop"}
        assert not fields & server.requests[0].keys()
        button(page, "Settings").click()
        assert page.get_by_label("Temperature").get_attribute("placeholder") == "0.5"  # the model's default
        assert page.get_by_label("Top k").get_attribute("placeholder") == "50"
        values = {
            "Temperature": "0",
            "Top k": "7",
            "Top p": "0.9",
            "Min p": "0.05",
            "Repetition penalty": "1.1",
            "Longest reply": "3",
            "Seed": "42",
        }
        for label, value in values.items():
            page.get_by_label(label).fill(value)
        page.get_by_label("Stop texts").fill("END\n\\n\\n")
        page.get_by_label("Top p").fill("2")
        button(page, "Save").click()
        assert page.get_by_role("dialog").is_visible()  # refused: out of range
        page.get_by_label("Top p").fill("0.9")
        button(page, "Save").click()
        page.reload()
        send(page, "Hi")
        sent = {
            "temperature": 0,
            "top_k": 7,
            "top_p": 0.9,
            "min_p": 0.05,
            "repetition_penalty": 1.1,
            "max_tokens": 3,
            "seed": 42,
            "stop": ["END", "\n\n"],
        }
        assert {name: server.requests[1][name] for name in fields} == sent
        assert "reached the limit" in replies(page).last.inner_text()
        button(page, "Settings").click()
        button(page, "Use all defaults").click()
        button(page, "Save").click()
        send(page, "Hi")
        assert not fields & server.requests[2].keys()


def test_full_storage_drops_old_tokens_before_any_text(visit):
    with ChatStandIn() as server:
        page = visit(server)
        send(page, "Old")
        key = page.evaluate("Object.keys(localStorage).find((name) => name.startsWith('jojo.tokens.'))")
        # Pad the first chat's tokens until the browser, which keeps 5 Mi characters, has no room for another chat.
        fill = """(key) => {
          localStorage[key] += " ".repeat(5 * 2 ** 20 - 2 ** 17);
          for (let step = 2 ** 16; step >= 512; ) {
            try { localStorage[key] += " ".repeat(step); } catch { step /= 2; }
          }
        }"""
        page.evaluate(fill, key)
        button(page, "New chat").click()
        send(page, "New")
        kept = page.evaluate("Object.keys(localStorage)")
        assert key not in kept and sum(name.startswith("jojo.chat.") for name in kept) == 2
        assert page.locator("#chat-notice").inner_text() == ""
