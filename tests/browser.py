"""Debian's Chromium, driven by Playwright, for the tests of the chat page; they skip where either is missing."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import time
from collections.abc import Iterator

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE_S = float(os.environ.get("JOJO_PATIENCE_S", "30"))  # a busy machine needs more: JOJO_PATIENCE_S=300 pytest ...
WIDE, NARROW = {"width": 1200, "height": 760}, {"width": 390, "height": 780}


@functools.cache
def executable() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def launched_browser() -> Iterator:
    """A browser with a new, empty profile. Skips the test, with the reason, where there is none."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="Playwright is missing: pip install -r requirements-dev.txt"
    )
    if executable() is None:
        pytest.skip("no browser is installed: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable(), args=list(FLAGS), timeout=6000 * PATIENCE_S)
        yield browser
        browser.close()


def until(page, expression: str, seconds: float = PATIENCE_S) -> None:
    """Wait until a JavaScript expression is true. Playwright's own way needs eval, which the page's policy forbids."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"after {seconds} s still not true: {expression}"
        page.wait_for_timeout(30)


class Watcher:
    """What a page must never do: open a dialog, report an error or a violation of its policy, ask another host."""

    def __init__(self, page, url: str):
        self.faults: list[str] = []
        page.on("dialog", lambda dialog: (self.faults.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        page.on("console", self._on_console)
        page.on("request", lambda request: self._on_request(request.url, url))

    def _on_console(self, message) -> None:
        # The browser itself reports each status of 400 and more, and each cut connection, as a resource that failed.
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            self.faults.append(f"{message.type}: {message.text}")

    def _on_request(self, requested: str, url: str) -> None:
        if not requested.startswith((url, "blob:", "data:")):
            self.faults.append(f"request: {requested}")


@pytest.fixture(scope="module")
def browser():
    with launched_browser() as browser:
        yield browser


@pytest.fixture
def visit(browser):
    """Opens the page of a stand-in with an empty profile; at the end nothing that `Watcher` forbids has happened."""
    opened = []

    def open_page(server, path: str = "", **context_options):
        context = browser.new_context(**{"viewport": WIDE, "accept_downloads": True, **context_options})
        context.set_default_timeout(1000 * PATIENCE_S)
        page = context.new_page()
        opened.append((context, Watcher(page, server.url)))
        page.goto(server.url + path)
        return page

    yield open_page
    for context, watcher in opened:
        context.close()
        assert watcher.faults == []


def button(page, name: str):
    return page.get_by_role("button", name=name, exact=True)


def replies(page):
    return page.locator("#messages .assistant")


def send(page, text: str, wait: bool = True) -> None:
    page.locator("#chat-model option").first.wait_for(state="attached")
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")
    if wait:
        wait_for_end(page)


def wait_for_end(page) -> None:
    button(page, "Send").wait_for()
    until(page, "document.querySelector('.running') === null")


def text_of_last(page) -> str:
    return replies(page).last.locator(".text").inner_text()
