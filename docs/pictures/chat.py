"""Take chat-light.png and chat-dark.png, the pictures of the chat page: a chat, looked into.

    python docs/pictures/chat.py models/chitchat1500.pt

Serves the model, opens the page in the installed Chromium, sends the messages of CHAT, and opens the alternatives of
the most surprising token. Needs requirements-dev.txt, chromium and the font Inter (Debian: chromium, fonts-inter).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

FOLDER = Path(__file__).resolve().parent
CHAT = ("Hello!", "My name is Priya.", "What is my name?", "What do you like to do?")
SEED = 4


def main(checkpoint: str) -> None:
    command = [sys.executable, str(FOLDER.parent.parent / "serve.py"), checkpoint, "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, sync_playwright() as playwright:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().split()[-1]
            flags = ["--headless", "--no-sandbox", "--disable-gpu"]
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
            page = browser.new_page(
                viewport={"width": 1100, "height": 700}, device_scale_factor=1.5, color_scheme="light"
            )
            page.goto(address)
            page.evaluate(f"localStorage.setItem('jojo.settings', JSON.stringify({{ seed: {SEED} }}))")
            page.reload()
            talk(page)
            look_inside(page)
            for scheme in ("light", "dark"):
                page.evaluate(f"document.documentElement.dataset.theme = '{scheme}'")
                page.screenshot(path=FOLDER / f"chat-{scheme}.png")
            browser.close()
        finally:
            server.terminate()


def talk(page: Page) -> None:
    page.locator("#chat-model option").first.wait_for(state="attached")
    for index, text in enumerate(CHAT):
        page.get_by_label("Message", exact=True).fill(text)
        page.keyboard.press("Enter")
        reply = page.locator("#messages .assistant").nth(index)
        reply.get_by_text("tokens/s").wait_for(timeout=120_000)  # a short reply ends before "Stop" can be seen
        page.get_by_role("button", name="Send").wait_for(timeout=120_000)


def look_inside(page: Page) -> None:
    """Open the alternatives of the most surprising token of the last reply."""
    page.get_by_role("button", name="Look inside").click()
    tokens = page.locator("#messages .assistant").last.locator(".token")
    surprises = [token.get_attribute("class") or "" for token in tokens.all()]  # "token surprise-0" to "... -5"
    tokens.nth(surprises.index(max(surprises))).click()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} CHECKPOINT")
    main(sys.argv[1])
