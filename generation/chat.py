"""Prompt and chat sessions, independent of the terminal: the history, what fits the window, and slash commands.

    session = ChatSession(engine, system="You are kind.")
    print("".join(session.reply("Hello!")))

An engine continues ids as text; generation/engine.py has the real one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from pathlib import Path
from typing import ClassVar, Protocol

from common.cli import UserError
from common.files import atomic_write
from common.text_files import decode_text, unix_line_endings
from generation.window import fit_window, room_for_reply
from setup_tokenizer import GPT2, Tokenizer, check_messages

Pieces = Generator[str, None, None]  # of a text, as it is generated; a generator, so that it can be closed


class Engine(Protocol):
    """Continues ids as text."""

    block_size: int  # the longest context, in tokens
    temperature: float
    tokenizer: Tokenizer

    def stream(self, ids: list[int], max_tokens: int | None) -> Pieces:
        """The text that follows `ids`, in pieces, as it is generated."""

    def statistics(self) -> str:
        """The number of tokens and the speed of the last reply, in one line."""


class Models(Protocol):
    """The models that a session can switch between."""

    description: str  # of the current one, in one line

    def listing(self) -> str:
        """All models, one per line, with the current one marked."""

    def load(self, name: str) -> Engine:
        """Make another model the current one. Raises UserError, and changes nothing, for a name that does not exist."""


class Quit(Exception):
    """The user wants to exit."""


class PromptSession:
    """Independent prompts, one after another."""

    commands: ClassVar = {
        "help": "list these commands",
        "retry": "generate another reply to the last message",
        "temp": "X: show or set the temperature (0: always the likeliest token)",
        "model": "NAME: change the model; without NAME, list the models",
        "stats": "tokens, speed, and how full the window is",
        "quit": "exit (also Ctrl-D)",
    }

    def __init__(
        self,
        engine: Engine,
        max_tokens: int | None = None,
        notify: Callable[[str], None] = print,
        models: Models | None = None,
    ):
        self.engine, self.models = engine, models
        self.max_tokens = max_tokens
        self.notify = notify
        self.last_prompt: str | None = None

    def reply(self, text: str) -> Pieces:
        """The continuation of `text`, in pieces. Raises UserError for a text that does not fit."""
        text = unix_line_endings(text)
        ids = [self.engine.tokenizer.endoftext, *self.engine.tokenizer.encode_text(text)]
        if len(ids) > self.engine.block_size:
            raise UserError(f"the prompt has {len(ids) - 1} tokens and the window {self.engine.block_size}; shorten it")
        self.last_prompt = text
        return self.engine.stream(ids, self.max_tokens)

    def retry(self) -> Pieces:
        """Another reply to the last prompt."""
        if self.last_prompt is None:
            raise UserError("there is nothing to retry yet; type a prompt first")
        return self.reply(self.last_prompt)

    def command(self, line: str) -> str | Pieces:
        """Run a command such as "/temp 0.5"; returns a sentence about it, or a reply in pieces.

        Raises UserError for a command that does not exist or fails, and Quit for /quit.
        """
        name, _, argument = line[1:].rstrip().partition(" ")
        if name not in self.commands:
            raise UserError(
                f"unknown command /{name}; /help lists the commands; to send a message that starts with /, type //"
            )
        return getattr(self, f"_{name}")(argument.strip())

    def _help(self, argument: str) -> str:
        lines = [f"/{name:<7}{meaning}" for name, meaning in self.commands.items()]
        return "\n".join(
            [*lines, 'A line that ends in \\ continues on the next; lines between two """ are one message.']
        )

    def _retry(self, argument: str) -> Pieces:
        return self.retry()

    def _temp(self, argument: str) -> str:
        if argument:
            try:
                temperature = float(argument)
            except ValueError:
                temperature = -1.0
            if not 0 <= temperature <= 100:
                raise UserError(f"/temp {argument}: give a number from 0 (the likeliest token) to 100")
            self.engine.temperature = temperature
        return f"temperature {self.engine.temperature:g}"

    def _model(self, argument: str) -> str:
        if self.models is None:
            raise UserError("only one model is loaded here; start gen.py to choose among the models in models/")
        if not argument:
            return self.models.listing()
        self.engine = self.models.load(argument)
        return self.models.description

    def _stats(self, argument: str) -> str:
        return self.engine.statistics()

    def _quit(self, argument: str) -> str:
        raise Quit


class ChatSession(PromptSession):
    """A chat in ChatML: `messages` is the whole history; the model sees the newest messages that fit its window.

    The window holds the system message, the newest whole exchanges, and room for the reply: `max_tokens` tokens, or a
    quarter of the window if that is less.
    """

    commands: ClassVar = {
        "help": "list these commands",
        "reset": "clear the history, but keep the system message",
        "system": "TEXT: set the system message; without TEXT, show it",
        "save": "FILE: write the chat as JSONL, which can be prepared as training data",
        "load": "FILE: continue a saved chat",
        "retry": "generate another reply to the last message",
        "undo": "remove the last exchange",
        "temp": PromptSession.commands["temp"],
        "model": PromptSession.commands["model"],
        "stats": PromptSession.commands["stats"],
        "quit": PromptSession.commands["quit"],
    }

    def __init__(
        self,
        engine: Engine,
        max_tokens: int | None = None,
        notify: Callable[[str], None] = print,
        system: str | None = None,
        models: Models | None = None,
    ):
        super().__init__(engine, max_tokens, notify, models)
        self.messages: list[dict] = []
        self._has_warned_that_window_is_full = False
        if system:
            self.set_system(system)

    @property
    def system(self) -> list[dict]:
        """The system message, as a list of one message or none."""
        return [message for message in self.messages[:1] if message["role"] == "system"]

    @property
    def room_for_reply(self) -> int:
        """The number of tokens that a prompt must leave free."""
        return room_for_reply(self.engine.block_size, self.max_tokens)

    def reply(self, text: str) -> Pieces:
        """The assistant's reply to `text`, in pieces; adds both to the chat, the reply piece by piece.

        Raises UserError, and changes nothing, for a text that does not fit the window.
        """
        messages = [*self.messages, {"role": "user", "content": unix_line_endings(text)}]
        ids = self._window(messages)
        self.messages = messages
        return self._answer(ids)

    def _answer(self, ids: list[int]) -> Pieces:
        room = self.engine.block_size - len(ids)
        message = {"role": "assistant", "content": ""}
        self.messages.append(message)
        for piece in self.engine.stream(ids, room if self.max_tokens is None else min(room, self.max_tokens)):
            message["content"] += piece
            yield piece

    def _window(self, messages: list[dict]) -> list[int]:
        """The ids of `messages` that the model sees, without the oldest whole exchanges that do not fit."""
        ids, n_dropped = fit_window(messages, self.engine.block_size - self.room_for_reply, self.engine.tokenizer)
        if n_dropped and not self._has_warned_that_window_is_full:
            self.notify("the window is full: from now on the model no longer sees the oldest exchanges")
            self._has_warned_that_window_is_full = True
        return ids

    def retry(self) -> Pieces:
        """Another reply to the last message, which replaces the previous one."""
        start = self._last_user_message("retry")
        messages = self.messages[: start + 1]
        ids = self._window(messages)
        self.messages = messages
        return self._answer(ids)

    def undo(self) -> None:
        """Remove the last message and its reply."""
        self.messages = self.messages[: self._last_user_message("undo")]

    def _last_user_message(self, purpose: str) -> int:
        for index in range(len(self.messages) - 1, -1, -1):
            if self.messages[index]["role"] == "user":
                return index
        raise UserError(f"there is nothing to {purpose} yet; say something first")

    def set_system(self, text: str) -> None:
        """Set the system message. Raises UserError if it leaves no room for a chat."""
        message = {"role": "system", "content": unix_line_endings(text)}
        n_tokens = len(chat_ids([message, {"role": "user", "content": ""}], self.engine.tokenizer))
        capacity = self.engine.block_size - self.room_for_reply
        if n_tokens >= capacity:
            n_tokens = len(self.engine.tokenizer.encode_text(text))
            raise UserError(
                f"the system message has {n_tokens} tokens, too many for the window of {self.engine.block_size}; "
                "shorten it"
            )
        self.messages = [message, *self.messages[len(self.system) :]]

    def save(self, path: str) -> None:
        """Write the chat as one line of JSONL, which prepare-chat.py reads; overwrites nothing but a saved chat."""
        if not any(message["role"] != "system" for message in self.messages):
            raise UserError("there is nothing to save yet; say something first")
        if Path(path).exists():
            try:
                read_chat(path)
            except UserError as error:
                raise UserError(f"{path} exists and is not a saved chat; choose another name") from error
        with atomic_write(path) as file:
            file.write((json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n").encode())

    def load(self, path: str) -> None:
        """Continue a chat that `save` wrote. Raises UserError, and changes nothing, for any other file."""
        self.messages = read_chat(path)
        self._has_warned_that_window_is_full = False

    def _reset(self, argument: str) -> str:
        self.messages = self.system
        self._has_warned_that_window_is_full = False
        return "the chat starts over"

    def _system(self, argument: str) -> str:
        if argument:
            self.set_system(argument)
        return f"system: {self.system[0]['content']}" if self.system else "there is no system message"

    def _save(self, argument: str) -> str:
        if not argument:
            raise UserError("/save needs the name of a file, such as /save chat.jsonl")
        self.save(argument)
        return f"saved {len(self.messages)} messages to {argument}"

    def _load(self, argument: str) -> str:
        if not argument:
            raise UserError("/load needs the name of a file, such as /load chat.jsonl")
        self.load(argument)
        return f"loaded {len(self.messages)} messages from {argument}"

    def _model(self, argument: str) -> str:
        self._has_warned_that_window_is_full &= not argument  # another model may have another window
        return super()._model(argument)

    def _undo(self, argument: str) -> str:
        self.undo()
        return f"removed the last exchange; {len(self.messages)} messages remain"

    def _stats(self, argument: str) -> str:
        n_tokens = len(chat_ids(self.messages, self.engine.tokenizer)) if self.messages else 0
        return (
            f"{len(self.messages)} messages, {n_tokens} tokens, window of {self.engine.block_size} of which "
            f"{self.room_for_reply} are kept free for the reply\n{self.engine.statistics()}"
        )


def chat_ids(messages: list[dict], tokenizer: Tokenizer = GPT2) -> list[int]:
    """The ids after which the assistant replies: the messages and the header of its next message.

    They do not start with `<|endoftext|>`: in training the document mask hides it from every conversation.
    """
    return tokenizer.encode_chat(messages, add_generation_prompt=True)


def read_chat(path: str) -> list[dict]:
    """The messages of a saved chat. Raises UserError for a file that is not one `{"messages": [...]}` line."""
    try:
        lines = decode_text(Path(path).read_bytes(), path).split("\n")
        (line,) = [line for line in lines if line.strip()]
        messages = json.loads(line)["messages"]
        check_messages(messages)
    except OSError as error:
        raise UserError(f"{path} not read: {error.strerror}; give a file that /save wrote") from error
    except (ValueError, KeyError, TypeError) as error:  # ValueError: undecodable, not JSON, not one line, no messages
        raise UserError(f"{path} is not a saved chat; give a file that /save wrote") from error
    return [{"role": message["role"], "content": unix_line_endings(message["content"])} for message in messages]
