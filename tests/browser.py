"""Debian's Chromium, driven by Playwright, for the tests of the chat page; they skip where either is missing."""

from __future__ import annotations

import contextlib
import functools
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
WIDE, NARROW = {"width": 1200, "height": 760}, {"width": 390, "height": 780}


@functools.cache
def executable() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def launched_browser() -> Iterator:
    """A browser with a new, empty profile. Skips the test, with the reason, where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is missing: pip install -r requirements-dev.txt")
    if executable() is None:
        pytest.skip("no browser is installed: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable(), args=list(FLAGS))
        yield browser
        browser.close()


def until(page, expression: str, seconds: float = 10) -> None:
    """Wait until a JavaScript expression is true. Playwright's own way needs eval in the page, which its policy forbids."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"after {seconds} s still not true: {expression}"
        page.wait_for_timeout(20)


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


# Every visible element with text of its own: its text and background colours, as the browser computed them.
CONTRASTS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (colour) => {
    const [r, g, b] = colour.map((value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = (node) => {
    for (; node; node = node.parentElement) {
      const colour = rgba(getComputedStyle(node).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].filter((child) => child.nodeType === 3 && child.data.trim());
    const isField = ["INPUT", "TEXTAREA", "SELECT"].includes(node.tagName);
    if ((own.length === 0 && !isField) || !node.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
    if (node.disabled || node.closest(".visually-hidden")) continue;
    const dialog = document.querySelector("dialog[open]");
    if (dialog && !dialog.contains(node)) continue;
    const [one, other] = [luminance(rgba(getComputedStyle(node).color)), luminance(background(node))];
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    found.push([ratio, `${node.tagName}.${node.className} ${node.textContent.trim().slice(0, 30)}`]);
  }
  return found;
}"""

# Controls without an accessible name, and ids that occur twice.
UNNAMED = """() => {
  const named = (node) => {
    const by = node.getAttribute("aria-labelledby");
    return node.getAttribute("aria-label") || (by && document.getElementById(by)?.textContent)
      || [...(node.labels ?? [])].some((label) => label.textContent.trim()) || (node.tagName !== "SELECT" && node.textContent.trim());
  };
  const controls = "button, a[href], input, select, textarea, meter, [role=button], [role=group], [role=dialog], dialog[open], summary, nav, aside, section, [role=log]";
  const unnamed = [...document.querySelectorAll(controls)].filter((node) => !named(node)).map((node) => node.outerHTML.slice(0, 80));
  const ids = [...document.querySelectorAll("[id]")].map((node) => node.id);
  return unnamed.concat(ids.filter((id, i) => ids.indexOf(id) !== i));
}"""
