"""The chat page in a real browser: models chosen, compared, looked into, and completing text."""

from __future__ import annotations

from tests.browser import NARROW, button, replies, send, text_of_last, until, wait_for_end
from tests.chat_stand_in import ALTERNATIVES, MODELS, REPLY, ChatStandIn, token_id


def test_the_model_picker_offers_chat_models_and_each_chat_keeps_its_own(visit):
    with ChatStandIn() as server:
        page = visit(server)
        picker = page.get_by_label("Model", exact=True)
        picker.locator("option").first.wait_for(state="attached")
        assert picker.locator("option").all_inner_texts() == ["jojo-chat", "jojo-before"]
        picker.select_option("jojo-before")
        send(page, "Hi")
        assert server.requests[0]["model"] == "jojo-before"
        button(page, "New chat").click()
        picker.select_option("jojo-chat")
        page.get_by_role("list", name="Your chats").get_by_role("button").first.click()
        assert picker.input_value() == "jojo-before"


def test_two_models_beside_each_other(visit):
    with ChatStandIn(reply=lambda asked: "Chat." if isinstance(asked, list) else " of text") as server:
        page = visit(server, "#compare")
        page.get_by_label("Model on the right").locator("option").first.wait_for(state="attached")
        assert page.get_by_label("Model on the right").input_value() == "jojo-before"
        page.get_by_label("Model on the right").select_option("jojo-story")
        page.get_by_label("Message to both models").fill("Tell me")
        page.keyboard.press("Enter")
        until(page, "document.querySelectorAll('.pair .numbers').length === 2 && !document.querySelector('.running')")
        left, right = page.locator(".pair .assistant").all()
        assert left.locator(".text").inner_text() == "Chat." and right.locator(".text").inner_text() == " of text"
        assert left.bounding_box()["y"] == right.bounding_box()["y"]
        by_model = {request["model"]: request for request in server.requests}
        assert by_model["jojo-chat"]["messages"] == [{"role": "user", "content": "Tell me"}]
        assert by_model["jojo-story"]["prompt"] == "Tell me"
        page.set_viewport_size(NARROW)
        assert left.bounding_box()["y"] < right.bounding_box()["y"]


def test_look_inside_and_take_another_token(visit):
    with ChatStandIn() as server:
        page = visit(server)
        send(page, "Hi")
        button(page, "Look inside").click()
        tokens = replies(page).last.get_by_role("group").get_by_role("button")
        assert tokens.all_inner_texts() == ["Hello", " there,", " my", " friend.", " How", " are", " you", " today?"]
        colours = {token.evaluate("node => getComputedStyle(node).backgroundColor") for token in tokens.all()}
        assert len(colours) == 6  # the stand-in's probabilities reach every class
        assert tokens.nth(2).get_attribute("aria-label") == "my, 41%"
        tokens.nth(2).click()
        dialog = page.get_by_role("dialog", name="Alternatives of this token")
        shown = [row.inner_text().split("\n") for row in dialog.get_by_role("button").all()]
        assert shown == [
            ["␣my", "41%"],
            ["␣quietly", "30%"],
            ["␣loudly", "8.2%"],
            ["↵", "1.8%"],
            ["␣<b>never</b>", "0.25%"],
            ["7", "0.034%"],
        ]
        dialog.get_by_role("button", name="loudly, 8.2%, use this one instead").click()
        wait_for_end(page)
        button(page, "Look inside").click()
        assert text_of_last(page) == "Hello there, loudly" + server.continuation
        assert server.requests[1]["assistant_prefix_ids"] == [
            token_id(t) for t in ("Hello", " there,", ALTERNATIVES[1][0])
        ]
        assert server.requests[1]["messages"] == server.requests[0]["messages"]
        page.get_by_role("button", name="Previous version").click()
        assert text_of_last(page) == REPLY
        page.reload()  # the probabilities are kept
        page.get_by_role("list", name="Your chats").get_by_role("button").first.click()
        button(page, "Look inside").click()
        tokens.nth(2).click()
        assert dialog.get_by_role("button").count() == 6


def test_a_character_of_several_tokens(visit):
    with ChatStandIn() as server:
        page = visit(server)
        page.evaluate("""async () => {
          const { newReply, replaceToken } = await import("/static/reply.js");
          const token = (id, bytes) => ({ id, text: "\\ufffd", bytes, logprob: -1, top: [] });
          const reply = newReply("m", { tokens: [token(1, [0xf0, 0x9f]), token(2, [0x98, 0x80])] });
          window.found = [reply.text, reply.tokens.map((t) => t.shown)];
          window.found.push(replaceToken(reply, 1, token(3, [0x98, 0x82])).text);
        }""")
        assert page.evaluate("window.found") == ["😀", ["", "😀"], "😂"]


def test_a_text_model_completes_text(visit):
    with ChatStandIn(reply=lambda prompt: " there was a 7 day week.") as server:
        page = visit(server)
        page.get_by_role("link", name="Complete").click()
        page.locator("#complete-model option").first.wait_for(state="attached")
        area = page.get_by_label("Text to continue")
        area.fill("Once upon a time")
        page.keyboard.press("Enter")
        until(page, "document.querySelector('#document')?.innerText.includes('week.')")
        assert server.requests[0]["prompt"] == "Once upon a time" and server.requests[0]["model"] == "jojo-story"
        button(page, "Look inside").click()
        tokens = page.locator("#document").get_by_role("group").get_by_role("button")
        tokens.nth(1).click()
        page.get_by_role("button", name="7, 0.034%, use this one instead").click()
        until(page, "document.querySelector('#document')?.innerText.includes('all was well')")
        assert server.requests[1]["prefix_ids"] == [token_id(" there"), token_id("7")]
        button(page, "Continue this text").click()
        until(page, "document.querySelector('#document')?.innerText.split('all was well').length === 3")
        assert len(server.requests[2]["prefix_ids"]) == 6
        button(page, "Look inside").click()
        button(page, "Edit this text").click()
        assert area.input_value() == "Once upon a time there7" + 2 * server.continuation


def test_a_server_of_text_models_alone_opens_the_page_that_uses_them(visit):
    with ChatStandIn(models=MODELS[2:]) as server:
        page = visit(server)
        page.get_by_label("Text to continue").wait_for()
        page.get_by_role("link", name="Chat").click()
        assert "python serve.py" in page.locator("#chat-notice").inner_text()
        page.get_by_label("Message", exact=True).fill("Hi")
        assert button(page, "Send").is_disabled()
