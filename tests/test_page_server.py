"""The chat page in a real browser with the real server: what both promise each other holds."""

from __future__ import annotations

import json

import pytest

from serving.openai_api import GenerationFields
from tests.browser import button, replies, send, text_of_last, until, wait_for_end
from tests.live_server import LiveServer


@pytest.fixture(scope="module")
def server():
    with LiveServer(step_s=0.02) as server:
        yield server


def settings(page, **values) -> None:
    page.evaluate(f"localStorage.setItem('jojo.settings', {json.dumps(json.dumps(values))})")
    page.reload()


def test_a_stopped_reply_continues_as_if_it_had_not_been_stopped(server, visit):
    """Random models write bytes, not words: characters of several tokens are cut at every point sooner or later."""
    page = visit(server)
    tokens = replies(page).last.locator(".token")
    settings(page, temperature=0, max_tokens=40)
    page.get_by_role("button", name="Look inside").click()
    send(page, "Hello")
    expected = tokens.all_inner_texts()
    button(page, "Regenerate").click()
    until(page, "document.querySelectorAll('.running .token').length > 5")
    page.keyboard.press("Escape")
    wait_for_end(page)
    server.assert_free()
    n_before = tokens.count()
    assert n_before < len(expected)
    button(page, "Continue this reply").click()
    wait_for_end(page)
    assert tokens.all_inner_texts()[: len(expected)] == expected and tokens.count() > n_before


def test_another_token_is_taken_and_the_ones_before_it_stay(server, visit):
    page = visit(server)
    settings(page, temperature=0, max_tokens=12)
    send(page, "Hi")
    page.get_by_role("button", name="Look inside").click()
    tokens = replies(page).last.locator(".token")
    before = tokens.all_inner_texts()
    tokens.nth(4).click()
    alternatives = page.locator("#alternatives button")
    assert (
        alternatives.count() == 8 and alternatives.first.get_attribute("aria-current") is not None
    )  # greedy: the likeliest
    wanted = alternatives.nth(2).get_attribute("aria-label").split(",")[0]
    alternatives.nth(2).click()
    wait_for_end(page)
    after = tokens.all_inner_texts()
    assert after[:4] == before[:4] and tokens.nth(4).get_attribute("aria-label").startswith(wanted)
    assert len(after) == 5 + 12
    page.get_by_role("button", name="Look inside").click()
    assert text_of_last(page)
    server.assert_free()


def test_the_settings_have_the_ranges_of_the_api(server, visit):
    page = visit(server)
    for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
        (highest,) = [bound.le for bound in GenerationFields.model_fields[name].metadata if hasattr(bound, "le")]
        assert float(page.locator(f"#setting-{name}").get_attribute("max")) == highest


def test_the_text_model_and_both_models_beside_each_other(server, visit):
    page = visit(server, "#complete")
    settings(page, temperature=0, max_tokens=10)
    page.locator("#complete-model option").first.wait_for(state="attached")
    page.get_by_label("Text to continue").fill("Once upon a time")
    page.keyboard.press("Enter")
    page.locator("#document .actions button").first.wait_for()
    page.get_by_role("button", name="Look inside").click()
    tokens = page.locator("#document .token")
    before = tokens.all_inner_texts()
    assert len(before) == 10
    tokens.nth(3).click()
    page.locator("#alternatives button").nth(1).click()
    until(page, "document.querySelectorAll('#document .token').length === 14 && !document.querySelector('.running')")
    assert tokens.all_inner_texts()[:3] == before[:3]
    page.get_by_role("link", name="Compare").click()
    page.get_by_label("Message to both models").fill("Hello")
    page.keyboard.press("Enter")
    until(page, "document.querySelectorAll('.pair .actions button').length === 7")
    assert [text.count() for text in (page.locator(".pair .token"), page.get_by_role("alert"))] == [20, 0]
    server.assert_free()
