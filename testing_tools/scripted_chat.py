"""Hold a short fixed conversation with a chat model and show both sides; the end of `make demo`.

    python testing_tools/scripted_chat.py models/chitchat1500.pt "Hello!" "My name is Priya." "What is my name?"

Prints one line per message. The model always takes the likeliest token, so its replies are the same every time.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.cli import option, parse_options, run_script
from common.device import choose_device, choose_dtype
from common.speedups import load_speedups
from generation.chat import ChatSession
from setup_tokenizer import Tokenizer

LINES = ("Hello!", "My name is Priya.", "How are you today?", "What is my name?", "Thank you!", "Goodbye!")


@dataclasses.dataclass(frozen=True)
class ScriptedChatOptions:
    checkpoint: str = option("models/chitchat1500.pt", "chat model to talk to", positional=True)
    lines: tuple[str, ...] = option(LINES, "what the user says, one message per argument", positional=True, nargs="*")
    device: str = option("cpu", "device to run on")


def main() -> None:
    options = parse_options(ScriptedChatOptions, __doc__)
    fast = load_speedups(plain=False)
    if fast:
        fast.keep_freed_memory()
    from exchange.loading import load_model
    from generation.decoding import decode_step
    from generation.engine import Settings, TextEngine
    from generation.sampling import GREEDY

    device = choose_device(options.device)
    model, info = load_model(options.checkpoint, device, choose_dtype(None, device))
    tokenizer = Tokenizer.from_info(info, options.checkpoint)
    settings = Settings(GREEDY, stop_ids=tuple(tokenizer.special_tokens.values()))
    decode = fast.speed_up_generation(model).decode if fast else decode_step
    session = ChatSession(TextEngine(model, settings, decode, tokenizer))
    for line in options.lines or LINES:
        print(f"you:  {line}")
        print(f"jojo: {''.join(session.reply(line))}", flush=True)


if __name__ == "__main__":
    run_script(main)
