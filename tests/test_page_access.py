"""The chat page for everyone: by keyboard alone, for screen readers, dark and light, on a phone and on a desktop."""

from __future__ import annotations

import pytest

from tests.browser import NARROW, WIDE, button, send, text_of_last, until, wait_for_end
from tests.chat_stand_in import REPLY, ChatStandIn

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
    const linear = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = colour.map((value) => linear(value / 255));
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
    if (own.length === 0 && !isField) continue;
    if (!node.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
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
      || [...(node.labels ?? [])].some((label) => label.textContent.trim())
      || (node.tagName !== "SELECT" && node.textContent.trim());
  };
  const controls = "button, a[href], input, select, textarea, summary, nav, aside, section, dialog[open], "
    + "[role=meter], [role=button], [role=group], [role=dialog], [role=log]";
  const unnamed = [...document.querySelectorAll(controls)].filter((node) => !named(node));
  const ids = [...document.querySelectorAll("[id]")].map((node) => node.id);
  return unnamed.map((node) => node.outerHTML.slice(0, 80)).concat(ids.filter((id, i) => ids.indexOf(id) !== i));
}"""


def press_tab_until(page, condition: str, limit: int = 40, key: str = "Tab") -> None:
    """Press Tab until the focused element `node` meets a condition, as a person does who uses no mouse."""
    for _ in range(limit):
        page.keyboard.press(key)
        if page.evaluate(f"(() => {{ const node = document.activeElement; return {condition}; }})()"):
            shown = "getComputedStyle(document.activeElement).outlineStyle !== 'none'"
            drawn_otherwise = "document.activeElement.matches('.composer textarea, .token')"
            assert page.evaluate(f"{shown} || {drawn_otherwise}")
            return
    raise AssertionError(f"{limit} times {key} do not reach {condition}")


def test_everything_by_keyboard(visit):
    with ChatStandIn() as server:
        page = visit(server)
        page.locator("#chat-model option").first.wait_for(state="attached")
        assert page.evaluate("document.activeElement.id") == "chat-text"  # ready to write
        page.keyboard.type("first")
        page.keyboard.press("Enter")
        wait_for_end(page)
        assert text_of_last(page) == REPLY
        # Look inside, and take the second alternative of the third token.
        press_tab_until(page, "node.id === 'look-inside'", key="Shift+Tab")
        page.keyboard.press("Space")
        press_tab_until(page, "node.classList.contains('token')")
        for key in ("ArrowRight", "ArrowRight", "Enter"):
            page.keyboard.press(key)
        assert "the token that was drawn" in page.evaluate("document.activeElement.getAttribute('aria-label')")
        page.keyboard.press("Escape")
        assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "my, 41%"
        for key in ("End", "Home", "ArrowRight", "ArrowRight", "Enter", "ArrowDown", "Enter"):
            page.keyboard.press(key)
        wait_for_end(page)
        assert "quietly and all was well." in text_of_last(page)
        # Regenerate from the buttons of the reply; rename and delete the chat; change a setting.
        press_tab_until(page, "node.getAttribute('aria-label') === 'Regenerate'", limit=60)
        page.keyboard.press("Enter")
        wait_for_end(page)
        assert len(server.requests) == 3
        press_tab_until(page, "node.getAttribute('aria-label')?.startsWith('Rename')", limit=60, key="Shift+Tab")
        page.keyboard.press("Enter")
        page.keyboard.type("By keyboard")
        page.keyboard.press("Enter")
        page.locator(".open-chat", has_text="By keyboard").wait_for()
        assert page.evaluate("document.activeElement !== document.body")  # the focus is not lost
        press_tab_until(page, "node.id === 'open-settings'")
        page.keyboard.press("Enter")
        page.keyboard.type("0.2")
        page.keyboard.press("Enter")
        press_tab_until(page, "node.textContent === 'Compare'", key="Shift+Tab")
        page.keyboard.press("Enter")
        until(page, "document.activeElement.id === 'compare-text'")  # the page is shown a moment after the key
        page.keyboard.type("both")
        page.keyboard.press("Enter")
        until(page, "document.querySelectorAll('.pair .actions button:not([hidden])').length === 12")
        assert [request["temperature"] for request in server.requests[3:]] == [0.2, 0.2]


def test_the_skip_link_leads_to_the_message_box(visit):
    with ChatStandIn() as server:
        page = visit(server)
        page.evaluate("document.activeElement.blur(), document.getElementById('skip').focus()")
        assert page.locator("#skip").bounding_box()["y"] >= 0
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "chat-text"


def test_a_screen_reader_is_told(visit):
    with ChatStandIn(seconds_per_token=0.1) as server:
        page = visit(server)
        page.evaluate("""() => {
          window.spoken = [];
          const status = document.getElementById("status");
          const listen = () => status.textContent && window.spoken.push(status.textContent);
          new MutationObserver(listen).observe(status, { childList: true });
        }""")
        send(page, "Hi", wait=False)
        page.locator(".running[aria-busy=true]").wait_for()
        wait_for_end(page)
        until(page, "window.spoken.length === 2")
        # Not piece by piece, but once and complete.
        assert page.evaluate("window.spoken") == ["The model is writing.", f"jojo-chat: {REPLY}"]
        assert page.get_by_role("article", name="You").count() == page.get_by_role("article", name="Reply").count() == 1
        assert page.get_by_role("log", name="Messages").get_attribute("aria-live") == "off"
        assert page.get_by_role("link", name="Chat").get_attribute("aria-current") == "page"


@pytest.mark.parametrize("scheme", ["dark", "light"])
@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_names_contrast_and_width(visit, scheme, viewport):
    """In each state every control has a name, text has a contrast of 4.5, and nothing is wider than the window."""
    with ChatStandIn(faults=[None, "broken"]) as server:
        page = visit(server, color_scheme=scheme, viewport=viewport)
        is_dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 27)"
        assert is_dark == (scheme == "dark")

        def check(state: str) -> None:
            assert page.evaluate(UNNAMED) == [], state
            poor = [f"{what}: {ratio:.1f}" for ratio, what in page.evaluate(CONTRASTS) if ratio < 4.5]
            assert poor == [], state
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), state
            assert page.evaluate(
                "[...document.querySelectorAll('.scroll')].every((area) => area.scrollWidth <= area.clientWidth)"
            ), state

        check("empty")
        send(page, "A message that is long enough to be wrapped " + "and-a-word-without-spaces" * 10)
        send(page, "fails")
        check("chat with an error")
        button(page, "Look inside").click()
        page.locator(".text .token").nth(2).click()
        check("look inside")
        page.keyboard.press("Escape")
        button(page, "Settings").click()
        check("settings")
        page.keyboard.press("Escape")
        if viewport is NARROW:
            assert not button(page, "New chat").is_visible()
            button(page, "Open the list of chats").click()
            page.wait_for_timeout(300)  # it slides
            check("list of chats")
            assert page.evaluate("document.activeElement.id") == "new-chat"
            page.keyboard.press("Escape")
            button(page, "New chat").wait_for(state="hidden")
            assert page.evaluate("document.activeElement.id") == "open-sidebar"
        for name, label in (("Compare", "Message to both models"), ("Complete", "Text to continue")):
            page.get_by_role("link", name=name).click()
            page.get_by_label(label).fill("Hi")
            page.keyboard.press("Enter")
            until(
                page, "document.querySelector('.running') === null && document.querySelectorAll('.token').length > 10"
            )
            check(name)


def test_white_space_has_a_name_and_the_drawn_token_is_current(visit):
    with ChatStandIn(reply=lambda messages: "one  two\nthree") as server:
        page = visit(server)
        send(page, "Hi")
        button(page, "Look inside").click()
        tokens = page.locator("#messages .token")
        labels = [token.get_attribute("aria-label").partition(",")[0] for token in tokens.all()]
        assert labels == ["one", "space", "two", "line break", "three"]
        tokens.first.click()
        current = page.locator("#alternatives [aria-current]")
        assert current.count() == 1 and current.get_attribute("aria-current") == "true"


def test_the_theme_switch_outlives_a_reload(visit):
    with ChatStandIn() as server:
        page = visit(server, color_scheme="light")
        background = "getComputedStyle(document.body).backgroundColor"
        light = page.evaluate(background)
        for _ in range(2):  # system, light, dark
            page.get_by_role("button", name="Theme").click()
        dark = page.evaluate(background)
        assert dark != light
        page.reload()
        assert page.evaluate(background) == dark
        page.get_by_role("button", name="Theme: dark").click()
        assert page.evaluate(background) == light
