"""The chat page in a real browser: nothing that people or models write is ever run, and every fault is explained."""

from __future__ import annotations

import json
import re

import pytest

from tests.browser import button, replies, send, text_of_last, until, wait_for_end
from tests.chat_stand_in import MODELS, REPLY, STATIC, ChatStandIn, model

PAYLOADS = (
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "<svg onload=alert(1)></svg>",
    "<iframe srcdoc='<script>parent.hacked = 1</script>'></iframe>",
    "<a href='javascript:alert(1)'>link</a>",
    "</div></textarea><script>alert(1)</script>",
    "{{constructor.constructor('alert(1)')()}} ${alert(1)} [x](javascript:alert(1))",
)
PAYLOAD = "\n".join(PAYLOADS)


def assert_harmless(page) -> None:
    """No script ran (`visit` also fails at any dialog or violation), and no element came from a text."""
    assert page.evaluate("window.hacked") is None
    assert page.locator("img, iframe, svg:not(.icon), script:not([src]), [onerror], [onload]").count() == 0
    assert page.locator("script").count() == 2
    assert page.locator("a[href^='javascript']").count() == 0


def test_payloads_in_messages_replies_tokens_and_names_stay_text(visit):
    with ChatStandIn(reply=lambda messages: PAYLOAD, models=[model(PAYLOADS[1]), *MODELS]) as server:
        page = visit(server)
        page.get_by_text("System message", exact=False).first.click()
        page.locator("#system-message").fill(PAYLOAD)
        send(page, PAYLOAD)
        assert text_of_last(page) == PAYLOAD and page.locator(".user .text").inner_text() == PAYLOAD
        assert server.requests[0]["messages"][0] == {"role": "system", "content": PAYLOAD}
        assert_harmless(page)
        button(page, "Look inside").click()
        page.locator(".text .token").nth(1).click()
        assert "<b>never</b>" in page.locator("#alternatives").inner_text()
        assert_harmless(page)
        page.keyboard.press("Escape")
        page.get_by_role("list", name="Your chats").get_by_role("button", name="Rename").click()
        page.get_by_label("Name", exact=True).fill(PAYLOADS[1])
        page.keyboard.press("Enter")
        page.reload()
        assert page.locator(".open-chat").inner_text() == PAYLOADS[1]
        page.locator(".open-chat").click()
        page.get_by_role("list", name="Your chats").get_by_role("button", name="Delete").click()
        assert PAYLOADS[1] in page.get_by_role("dialog").inner_text()
        assert_harmless(page)


def test_payloads_in_imports_and_in_the_browsers_store_stay_text(visit, tmp_path):
    lines = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}], "title": text}
        for text in PAYLOADS
    ]
    lines.append(
        {"messages": [{"role": "user", "content": "x", "__proto__": {"deleted": True}}], "__proto__": {"title": "y"}}
    )
    file = tmp_path / "<img src=x onerror=alert(1)>.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    with ChatStandIn() as server:
        page = visit(server)
        page.get_by_label("File with chats to import").set_input_files(file)
        page.locator("#import-result", has_text=f"{len(lines)} chats imported.").wait_for()
        for i, text in enumerate(PAYLOADS):
            page.locator(".open-chat").nth(i).click()
            assert text_of_last(page) == text and page.locator(".user .text").inner_text() == text
        assert_harmless(page)
        page.evaluate("localStorage.setItem('jojo.chat.broken', 'not JSON')")
        page.evaluate("localStorage.setItem('jojo.chat.strange', '{}')")
        page.evaluate("localStorage.setItem('jojo.settings', 'not JSON')")
        page.reload()
        assert page.locator(".open-chat").count() == len(lines)


def test_payloads_in_text_completions_and_errors_stay_text(visit):
    with ChatStandIn(reply=lambda prompt: PAYLOAD, faults=["broken", None]) as server:
        page = visit(server, "#complete")
        page.locator("#complete-model option").first.wait_for(state="attached")
        page.get_by_label("Text to continue").fill(PAYLOAD)
        page.keyboard.press("Enter")
        alert = page.get_by_role("alert")
        assert alert.inner_text().startswith("The model <b>broke</b>.")
        button(page, "Try again").click()
        until(page, "document.querySelector('#document .actions button') !== null")
        assert page.locator("#document .text").all_inner_texts() == [PAYLOAD, PAYLOAD]
        assert_harmless(page)


def test_a_missing_and_a_wrong_key_are_asked_for(visit):
    with ChatStandIn(key="correct horse") as server:
        page = visit(server)
        field = page.get_by_label("API key")
        assert field.get_attribute("type") == "password"
        field.fill("wrong")
        page.keyboard.press("Enter")
        page.get_by_text("The server does not accept the last key.").wait_for()
        field.fill("correct horse")
        page.keyboard.press("Enter")
        send(page, "Hi")
        assert text_of_last(page) == REPLY
        assert "correct horse" not in page.evaluate("JSON.stringify(localStorage)")
        page.reload()  # the tab remembers it
        send(page, "Hi")
        page.evaluate("sessionStorage.clear()")
        page.get_by_label("Message", exact=True).fill("Hi")
        page.keyboard.press("Enter")
        page.get_by_role("dialog", name="This server needs a key").wait_for()
        page.keyboard.press("Escape")
        assert "Ask whoever started the server" in page.get_by_role("alert").inner_text()


def test_a_busy_server_is_waited_for(visit):
    with ChatStandIn(faults=["busy", "waiting"]) as server:
        page = visit(server)
        send(page, "Hi", wait=False)
        page.get_by_text("The server is busy. Trying again in 1 s.").wait_for()
        page.get_by_text("Waiting for other replies to finish.").wait_for()
        wait_for_end(page)
        assert text_of_last(page) == REPLY and len(server.requests) == 2


def test_waiting_for_a_busy_server_can_be_stopped(visit):
    with ChatStandIn(faults=["busy"] * 9) as server:
        page = visit(server)
        send(page, "Hi", wait=False)
        page.get_by_text("The server is busy.").wait_for()
        page.keyboard.press("Escape")
        wait_for_end(page)
        assert len(server.requests) == 1 and "stopped" in replies(page).last.inner_text()


@pytest.mark.parametrize(
    ("fault", "message", "kept"),
    [
        ("cut", "The connection was lost before the reply was complete.", "Hello there, my"),
        ("error", "Out of memory.", "Hello there, my"),
        ("broken", "The model <b>broke</b>.", ""),
        ("unreachable", "The server cannot be reached.", ""),
    ],
)
def test_a_fault_is_explained_and_the_reply_can_be_tried_again(visit, fault, message, kept):
    with ChatStandIn(faults=[fault] if fault != "unreachable" else []) as server:
        page = visit(server)
        if fault == "unreachable":
            page.route("**/v1/chat/completions", lambda route: route.abort(), times=1)
        send(page, "Hi")
        alert = page.get_by_role("alert")
        assert message in alert.inner_text() and "serve" in alert.inner_text()
        assert text_of_last(page) == kept
        n_before = len(server.requests)
        button(page, "Try again").click()
        wait_for_end(page)
        assert alert.count() == 0
        assert text_of_last(page) == (kept + server.continuation if kept else REPLY)
        assert len(server.requests[n_before].get("assistant_prefix_ids", [])) == len(kept.split())


def test_a_server_that_was_stopped_and_started_again(visit):
    with ChatStandIn() as server:
        page = visit(server)
        page.route("**/v1/*", lambda route: route.abort())
        page.reload()
        assert "serve.py is still running" in page.get_by_role("alert").inner_text()
        page.unroute("**/v1/*")
        button(page, "Try again").click()
        send(page, "Hi")
        assert text_of_last(page) == REPLY


@pytest.mark.parametrize("file", sorted(STATIC.glob("*.*")), ids=lambda file: file.name)
def test_the_files_of_the_page(file):
    """No other host, no way to turn text into markup or code, nothing inline that the policy forbids; short files."""
    text = file.read_text("utf-8")
    assert len(text.splitlines()) <= 400
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"')]*", text)) - {"http://www.w3.org/2000/svg"}
    assert not {address for address in addresses if "http" in address}
    if file.suffix == ".js":
        code = re.sub(r"^\s*(//|\*|/\*\*).*", "", text, flags=re.MULTILINE)
        forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|setHTML|createContextualFragment"
        forbidden += r"|srcdoc|\beval\b|new Function|@import"
        assert not re.findall(forbidden, code)
    if file.suffix == ".html":
        assert not re.findall(r"\sstyle=|\son\w+=|<style|<script(?![^>]*\ssrc=)", text)
