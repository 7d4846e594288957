"""The chat page in a real browser: a reply is continued by models with the same vocabulary and with another one."""

from __future__ import annotations

import json

import pytest

from tests.browser import button, replies, send, text_of_last, until, wait_for_end
from tests.chat_stand_in import ALTERNATIVES, REPLY, ChatStandIn, model, split_tokens, token_id

TALES, FABLES = "ab" * 32, "cd" * 32
MODELS = [
    *(model("jojo-chat"), model("jojo-before")),
    *(model("jojo-tales", digest=TALES), model("jojo-tales-2", digest=TALES), model("jojo-fables", digest=FABLES)),
    *(model("jojo-story", "text"), model("jojo-tale", "text", digest=TALES)),
]
BEGUN, MORE = "Hello there, my", " and all was"  # the first three tokens of REPLY, and of what continues it
HI = {"role": "user", "content": "Hi"}
LOUDLY = ALTERNATIVES[1][0]


def ids(text: str) -> list[int]:
    return [token_id(token) for token in split_tokens(text)]


def visit_with_limit(visit, server, path: str = ""):
    """The page with replies of three tokens, so that they can be continued."""
    page = visit(server, path)
    page.evaluate(f"localStorage.setItem('jojo.settings', {json.dumps(json.dumps({'max_tokens': 3}))})")
    page.reload()
    return page


def choose(page, name: str) -> None:
    page.get_by_label("Model", exact=True).select_option(name)


def continue_reply(page) -> None:
    button(page, "Continue this reply").click()
    wait_for_end(page)


def edit_and_continue(page, text: str) -> None:
    button(page, "Edit this reply").click()
    page.get_by_label("Edit this reply").fill(text)
    button(page, "Save and continue").click()
    wait_for_end(page)


def take(page, index: int, text: str = LOUDLY) -> None:
    """Choose another token of the last reply, with "Look inside" switched on."""
    replies(page).last.locator(".token").nth(index).click()
    page.locator("#alternatives button", has_text=text.strip()).click()
    wait_for_end(page)


def tokens_of_last(page) -> list[str]:
    return replies(page).last.locator(".token").all_inner_texts()


def open_first_chat(page) -> None:
    page.reload()
    page.locator("#chat-model option").first.wait_for(state="attached")
    page.get_by_role("list", name="Your chats").get_by_role("button").first.click()


def sent(request: dict) -> tuple[str, str | None, list[int] | None]:
    """The model, the text and the ids that a request asks to continue."""
    *before, last = request["messages"]
    continues_text = request.get("continue_final_message", False)
    assert (before if continues_text else request["messages"]) == [HI]
    assert not continues_text or last["role"] == "assistant"
    return request["model"], last["content"] if continues_text else None, request.get("assistant_prefix_ids")


@pytest.mark.parametrize(("first", "second"), [("jojo-chat", "jojo-before"), ("jojo-tales", "jojo-tales-2")])
def test_a_model_with_the_same_vocabulary_continues_the_tokens(visit, first, second):
    with ChatStandIn(models=MODELS) as server:
        page = visit_with_limit(visit, server)
        page.locator("#chat-model option").first.wait_for(state="attached")
        choose(page, first)
        send(page, "Hi")
        open_first_chat(page)  # the vocabulary is kept with the chat
        choose(page, second)
        continue_reply(page)
        assert sent(server.requests[1]) == (second, None, ids(BEGUN))
        continue_reply(page)
        assert sent(server.requests[2]) == (second, None, ids(BEGUN + MORE))
        assert text_of_last(page) == BEGUN + 2 * MORE
        button(page, "Look inside").click()
        assert tokens_of_last(page) == split_tokens(BEGUN + 2 * MORE)


@pytest.mark.parametrize("inside", [False, True], ids=["text", "look inside"])
@pytest.mark.parametrize(
    ("first", "second"), [("jojo-chat", "jojo-tales"), ("jojo-tales", "jojo-chat"), ("jojo-tales", "jojo-fables")]
)
def test_a_model_with_another_vocabulary_continues_the_text(visit, first, second, inside):
    with ChatStandIn(models=MODELS) as server:
        page = visit_with_limit(visit, server)
        page.locator("#chat-model option").first.wait_for(state="attached")
        if inside:
            button(page, "Look inside").click()
        choose(page, first)
        send(page, "Hi")
        choose(page, second)
        continue_reply(page)
        assert sent(server.requests[1]) == (second, BEGUN, None)
        assert text_of_last(page) == BEGUN + MORE
        assert tokens_of_last(page) == (split_tokens(MORE) if inside else [])
        continue_reply(page)  # what the second model has written are tokens of its own
        assert sent(server.requests[2]) == (second, BEGUN, ids(MORE))
        assert text_of_last(page) == BEGUN + 2 * MORE
        open_first_chat(page)
        assert text_of_last(page) == BEGUN + 2 * MORE
        assert tokens_of_last(page) == (split_tokens(2 * MORE) if inside else [])
        continue_reply(page)
        assert sent(server.requests[3]) == (second, BEGUN, ids(2 * MORE))
        choose(page, first)
        continue_reply(page)
        assert sent(server.requests[4]) == (first, BEGUN + 3 * MORE, None)
        assert text_of_last(page) == BEGUN + 4 * MORE
        assert tokens_of_last(page) == (split_tokens(MORE) if inside else [])


def test_another_token_belongs_to_the_vocabulary_of_its_reply(visit):
    with ChatStandIn(models=MODELS) as server:
        page = visit_with_limit(visit, server)
        send(page, "Hi")
        button(page, "Look inside").click()
        choose(page, "jojo-tales")
        take(page, 2)
        assert sent(server.requests[1]) == ("jojo-tales", f"Hello there,{LOUDLY}", None)
        assert text_of_last(page) == f"Hello there,{LOUDLY}{MORE}"
        assert tokens_of_last(page) == split_tokens(MORE)
        take(page, 1)
        assert sent(server.requests[2]) == ("jojo-tales", f"Hello there,{LOUDLY}", ids(f" and{LOUDLY}"))
        assert text_of_last(page) == f"Hello there,{LOUDLY} and{LOUDLY}{MORE}"
        assert tokens_of_last(page) == split_tokens(f" and{LOUDLY}{MORE}")
        for expected in (f"Hello there,{LOUDLY}{MORE}", BEGUN):
            page.get_by_role("button", name="Previous version").click()
            assert text_of_last(page) == expected
        assert tokens_of_last(page) == split_tokens(BEGUN)
        choose(page, "jojo-before")
        take(page, 1)
        assert sent(server.requests[3]) == ("jojo-before", None, ids(f"Hello{LOUDLY}"))


def test_a_model_with_another_vocabulary_tries_again_with_the_text(visit):
    with ChatStandIn(models=MODELS, faults=["cut", "broken"]) as server:
        page = visit(server)
        send(page, "Hi")
        choose(page, "jojo-tales")
        for n in (1, 2):
            button(page, "Try again").click()
            wait_for_end(page)
            assert sent(server.requests[n]) == ("jojo-tales", BEGUN, None)
        assert text_of_last(page) == BEGUN + server.continuation


def test_a_model_that_fails_takes_no_tokens_away(visit):
    with ChatStandIn(models=MODELS, faults=[None, "broken"]) as server:
        page = visit_with_limit(visit, server)
        page.locator("#chat-model option").first.wait_for(state="attached")
        send(page, "Hi")
        choose(page, "jojo-tales")
        continue_reply(page)
        assert "broke" in page.get_by_role("alert").inner_text()
        assert text_of_last(page) == BEGUN
        choose(page, "jojo-chat")
        button(page, "Try again").click()
        wait_for_end(page)
        assert sent(server.requests[-1]) == ("jojo-chat", None, ids(BEGUN))
        assert text_of_last(page) == BEGUN + MORE


def test_an_edited_reply_is_continued_twice(visit):
    with ChatStandIn(models=MODELS) as server:
        page = visit_with_limit(visit, server)
        send(page, "Hi")
        edit_and_continue(page, "Good evening")
        assert sent(server.requests[1]) == ("jojo-chat", "Good evening", None)
        continue_reply(page)
        assert sent(server.requests[2]) == ("jojo-chat", "Good evening", ids(MORE))
        assert text_of_last(page) == "Good evening" + 2 * MORE
        button(page, "Look inside").click()
        assert text_of_last(page) == "Good evening" + 2 * MORE
        assert tokens_of_last(page) == split_tokens(2 * MORE)
        labels = [token.get_attribute("tabindex") for token in replies(page).last.locator(".token").all()]
        assert labels == ["0", *["-1"] * 5]  # the written text is no stop for the Tab key
        take(page, 1)
        assert sent(server.requests[3]) == ("jojo-chat", "Good evening", ids(f" and{LOUDLY}"))
        assert text_of_last(page) == f"Good evening and{LOUDLY}{MORE}"


def test_the_text_of_replies_from_an_older_version_of_the_page_is_continued(visit):
    forget = """() => {
      const key = Object.keys(localStorage).find((name) => name.startsWith("jojo.chat."));
      const withoutNew = (name, value) => (["start", "vocabulary"].includes(name) ? undefined : value);
      localStorage[key] = JSON.stringify(JSON.parse(localStorage[key]), withoutNew);
    }"""
    with ChatStandIn(models=MODELS) as server:
        page = visit_with_limit(visit, server)
        send(page, "Hi")
        edit_and_continue(page, "Good evening")
        page.evaluate(forget)
        open_first_chat(page)
        button(page, "Look inside").click()
        assert text_of_last(page) == f"Good evening{MORE}" and tokens_of_last(page) == split_tokens(MORE)
        take(page, 2)
        expected = f"Good evening and all{LOUDLY}"
        assert sent(server.requests[2]) == ("jojo-chat", expected, None)
        page.get_by_role("button", name="Previous version").click()
        continue_reply(page)
        assert sent(server.requests[3]) == ("jojo-chat", f"Good evening{MORE}", None)
        continue_reply(page)
        assert sent(server.requests[4]) == ("jojo-chat", f"Good evening{MORE}", ids(MORE))
        assert text_of_last(page) == "Good evening" + 3 * MORE


def test_a_reply_whose_tokens_were_dropped_is_continued(visit):
    drop = """() => {
      const isOfTokens = (name) => name.startsWith("jojo.tokens.");
      Object.keys(localStorage).filter(isOfTokens).forEach((name) => localStorage.removeItem(name));
    }"""
    with ChatStandIn(models=MODELS) as server:
        page = visit_with_limit(visit, server)
        send(page, "Hi")
        page.evaluate(drop)
        open_first_chat(page)
        continue_reply(page)
        assert sent(server.requests[1]) == ("jojo-chat", BEGUN, None)
        assert text_of_last(page) == BEGUN + MORE


def test_an_incomplete_character_is_completed_by_the_same_vocabulary_only(visit):
    """A reply that reached its limit inside a character ends with U+FFFD."""
    with ChatStandIn() as server:
        page = visit(server)
        found = page.evaluate(
            """async ([model, other]) => {
              const { generate, newReply } = await import("/static/reply.js");
              const tokens = [{ id: 1, text: "a" }, { id: 2, text: "\\ufffd", bytes: [0xf0, 0x9f] }];
              const found = [];
              for (const next of [model, other]) {
                const reply = newReply(model.id, { tokens, vocabulary: "gpt2_chatml" });
                reply.text += "\\ufffd";
                const input = { messages: [{ role: "user", content: "Hi" }] };
                await generate(reply, next, input, new AbortController().signal, () => {});
                found.push(reply.text);
              }
              return found;
            }""",
            [model("jojo-chat"), model("jojo-tales", digest=TALES)],
        )
        assert sent(server.requests[0]) == ("jojo-chat", None, [1, 2])
        assert sent(server.requests[1]) == ("jojo-tales", "a\ufffd", None)
        assert found == [f"a{server.continuation}", f"a\ufffd{server.continuation}"]


def test_the_text_page_sends_text_to_a_model_with_another_vocabulary(visit):
    with ChatStandIn(reply=lambda prompt: MORE if prompt.endswith("day") else " On a day", models=MODELS) as server:
        page = visit_with_limit(visit, server, "#complete")
        picker = page.get_by_label("Text model", exact=True)
        page.locator("#complete-model option").first.wait_for(state="attached")

        def wait() -> None:
            page.locator("#document .actions button").first.wait_for()
            until(page, "document.querySelector('.running') === null")

        def last_request() -> tuple:
            request = server.requests[-1]
            return request["model"], request["prompt"], request.get("prefix_ids")

        def texts() -> list[str]:
            return page.locator("#document .text").all_inner_texts()

        page.get_by_label("Text to continue").fill("Once.")
        page.keyboard.press("Enter")
        wait()
        assert last_request() == ("jojo-story", "Once.", None)
        picker.select_option("jojo-tale")
        button(page, "Continue this text").click()
        wait()
        assert last_request() == ("jojo-tale", "Once. On a day", None)
        button(page, "Continue this text").click()
        wait()
        assert last_request() == ("jojo-tale", "Once. On a day", ids(MORE))
        assert texts() == ["Once.", f" On a day{MORE}{MORE}"]
        button(page, "Look inside").click()
        tokens = page.locator("#document .token")
        assert tokens.all_inner_texts() == split_tokens(2 * MORE)
        tokens.nth(1).click()
        page.locator("#alternatives button", has_text="loudly").click()
        wait()
        assert last_request() == ("jojo-tale", "Once. On a day", ids(f" and{LOUDLY}"))
        assert texts() == ["Once.", f" On a day and{LOUDLY}{MORE}"]
        picker.select_option("jojo-story")
        tokens.nth(0).click()
        page.locator("#alternatives button", has_text="loudly").click()
        wait()
        assert last_request() == ("jojo-story", f"Once. On a day{LOUDLY}", None)
        assert texts()[1].startswith(f" On a day{LOUDLY}")


def test_compared_models_continue_their_own_tokens(visit):
    with ChatStandIn(models=MODELS) as server:
        page = visit(server, "#compare")
        page.locator("#compare-right option").first.wait_for(state="attached")
        page.get_by_label("Model on the right").select_option("jojo-tales")
        page.get_by_label("Message to both models").fill("Hi")
        page.keyboard.press("Enter")
        until(page, "document.querySelectorAll('.pair .word-button:not([hidden])').length === 4")
        button(page, "Look inside").click()
        right = page.locator(".pair .assistant").last
        right.locator(".token").nth(1).click()
        page.locator("#alternatives button", has_text="loudly").click()
        right.locator(".text", has_text="all was well").wait_for()
        until(page, "document.querySelector('.running') === null")
        assert sent(server.requests[-1]) == ("jojo-tales", None, ids(f"Hello{LOUDLY}"))
        assert right.locator(".text").inner_text() == f"Hello{LOUDLY}{server.continuation}" != REPLY
