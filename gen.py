"""Generate text from a checkpoint, prompt by prompt, or chat with it.

    python gen.py models/story5000.pt --prompt "Once upon a time"
    python gen.py --chat                        # the newest checkpoint that was trained on chat data
    printf 'Hello!\\nWho are you?\\n' | python gen.py --chat

Standard output carries the text alone, as it is made; everything else goes to standard error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import UserError, option, parse_options, run_script
from common.device import choose_device, choose_dtype
from common.files import atomic_write, require_target
from fast.allocator import keep_freed_memory
from generation.chat import ChatSession, PromptSession, Quit
from generation.terminal import Console
from setup_tokenizer import ENDOFTEXT_ID, IM_END_ID, IM_START_ID, N_VOCAB, encode_text

if TYPE_CHECKING:  # at run time torch is imported when a model is loaded, not for --help
    from generation.engine import Settings, TextEngine
    from model import GPTConfig

DEFAULT_CHECKPOINT = "models/story5000.pt"
DEFAULT_MAX_TOKENS = 500


@dataclasses.dataclass(frozen=True)
class GenOptions:
    """What to generate, from what and how."""

    checkpoint: str | None = option(
        None,
        f"model to use (default: {DEFAULT_CHECKPOINT}; with --chat the newest one trained on chat data)",
        positional=True,
    )
    prompt: str | None = option(None, "text to continue (default: none, the model begins a document)")
    prompt_file: str | None = option(None, "file with the text to continue; - reads standard input", metavar="FILE")
    interactive: bool = option(False, "continue prompts that are typed one after another")
    chat: bool = option(False, "chat: keeps the history and marks who speaks, as the chat data does")
    system: str | None = option(None, "system message of the chat", metavar="TEXT")

    max_tokens: int | None = option(
        None, f"most tokens to generate (default: {DEFAULT_MAX_TOKENS}; in a chat what the window allows)"
    )
    nonstop: bool = option(False, "go on after the end of a document, without a limit unless --max_tokens sets one")
    stop: tuple[str, ...] | None = option(
        None, "stop before this text; may be given several times", action="append", metavar="TEXT"
    )
    num_samples: int = option(1, "continuations of the prompt, made together")

    temp: float | None = option(
        None, "temperature: lower is more focused, 0 takes the likeliest token (default: 0.8, in a chat 0.5)"
    )
    top_k: int | None = option(None, "draw from the K likeliest tokens; 0 from all (default: 200, in a chat 50)")
    top_p: float | None = option(None, "draw from the likeliest tokens that have this probability together")
    min_p: float | None = option(None, "draw from tokens at least this many times as likely as the likeliest")
    repetition_penalty: float = option(1.0, "above 1: make tokens that stand in the context less likely")
    seed: int | None = option(None, "make the same text again (default: a new one each time)")

    device: str | None = option(None, "cpu, mps, cuda, cuda:N (default: asks, or takes the best one)")
    dtype: str | None = option(
        None, "precision (default: the device's best)", choices=("float32", "bfloat16", "float16")
    )
    quantize: str | None = option(None, "8-bit weights: faster on a CPU, a little less exact", choices=("int8",))

    no_delay: bool = option(False, "show tokens on a terminal as fast as they come, without the typing effect")
    output: str | None = option(None, "also write the text to a file, when interrupted too", metavar="FILE")
    logprobs: str | None = option(
        None, "write each token's log probability and the likeliest ones' as JSONL", metavar="FILE"
    )
    verbose: bool = option(False, "tell about the model and the speed")

    def __post_init__(self):
        for name in ("max_tokens", "num_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.seed is not None and self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63, not {self.seed}")
        for name in ("top_k", "seed"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        if self.temp is not None and not 0 <= self.temp < 100:
            raise ValueError(f"temp must be at least 0 and below 100, not {self.temp}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be from 0 to 1, not {self.min_p}")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise ValueError(f"repetition_penalty must be from 0.01 to 100, not {self.repetition_penalty}")
        self._check_modes()

    def _check_modes(self) -> None:
        talks = self.chat or self.interactive
        if self.chat and self.interactive:
            raise ValueError("chat and interactive exclude each other")
        if self.prompt is not None and self.prompt_file is not None:
            raise ValueError("prompt and prompt_file exclude each other")
        if self.interactive and (self.prompt is not None or self.prompt_file is not None):
            raise ValueError("interactive asks for its prompts; leave prompt and prompt_file out")
        if talks and (self.num_samples > 1 or self.nonstop):
            raise ValueError("num_samples and nonstop continue one prompt; leave chat and interactive out")
        if self.system is not None and not self.chat:
            raise ValueError("system needs chat")
        if self.nonstop and self.num_samples > 1 and self.max_tokens is None:
            raise ValueError("nonstop with num_samples needs max_tokens")
        if self.stop and "" in self.stop:
            raise ValueError("stop must not be empty")


def choose_checkpoint(options: GenOptions) -> str:
    """The checkpoint that is meant. Raises UserError where --chat finds none that was trained on chat data."""
    from common.checkpoint import find_checkpoints
    from exchange.loading import read_info

    if options.checkpoint is not None or not options.chat:
        return options.checkpoint or DEFAULT_CHECKPOINT
    found = find_checkpoints()
    for path in found:
        try:
            if read_info(path).get("format") == "chat":
                print(f"chatting with {path}", file=sys.stderr)
                return str(path)
        except UserError as error:
            print(f"passed over: {error}", file=sys.stderr)
    there = f" (there are {', '.join(map(str, found[:8]))})" if found else ""
    raise UserError(
        f"no checkpoint in models was trained on chat data{there}; train one with: "
        "python data/prepare-chitchat.py && python train.py --dataset chitchat"
    )


def load_engine(options: GenOptions) -> TextEngine:
    """The model that the options name, ready to generate. Raises UserError where it is missing or does not fit."""
    keep_freed_memory()  # before torch takes its first memory
    from exchange.loading import load_model, read_info
    from generation.engine import TextEngine
    from generation.packed_linear import pack_linears

    started = time.perf_counter()
    path = choose_checkpoint(options)
    info = read_info(path)
    with contextlib.redirect_stdout(sys.stderr):  # their remarks are no generated text
        device = choose_device(options.device)
        dtype = choose_dtype(options.dtype, device)
    model, _ = load_model(path, device, dtype)
    if not ENDOFTEXT_ID < model.config.n_vocab <= N_VOCAB:
        raise UserError(
            f"{path} has a vocabulary of {model.config.n_vocab} tokens, which is not this project's tokenizer's; "
            "use a checkpoint that train.py made"
        )
    if options.chat and model.config.n_vocab < N_VOCAB:
        raise UserError(f"{path} has no ChatML tokens, so it cannot chat; leave --chat out or use another checkpoint")
    n_params = model.n_params()  # before its weights are packed, after which they are no parameters
    kernels = pack_linears(model, options.quantize, options.num_samples)
    if options.chat and info.get("format") != "chat":
        print(
            f"note: {path} was trained on {info.get('dataset', 'text')}, not on chat data; its replies will not be "
            "a conversation's",
            file=sys.stderr,
        )
    elif not options.chat and info.get("format") == "chat" and not holds_text(info):
        print(f"note: {path} was trained on chat data; talk to it with --chat", file=sys.stderr)
    engine = TextEngine(model, engine_settings(options))
    if options.verbose:
        print(describe_model(path, info, model.config, n_params, f"{device}, {dtype}, {kernels}"), file=sys.stderr)
        print(f"ready after {time.perf_counter() - started:.1f} s, seed {engine.seed}", file=sys.stderr)
    return engine


def holds_text(info: dict) -> bool:
    """Whether a model was trained on plain text, beside conversations perhaps."""
    from training.mixture import data_parts

    return any(part.get("format") == "text" for part in data_parts(info.get("data") or {}))


def engine_settings(options: GenOptions) -> Settings:
    """How the options want ids drawn; a chat is more focused by default, as small models need."""
    from generation.engine import Settings

    stop_ids = (IM_END_ID, ENDOFTEXT_ID, IM_START_ID) if options.chat else (ENDOFTEXT_ID,)
    default_temperature, default_top_k = (0.5, 50) if options.chat else (0.8, 200)
    top_k = default_top_k if options.top_k is None else options.top_k
    return Settings(
        temperature=default_temperature if options.temp is None else options.temp,
        top_k=top_k or None,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
        stop_ids=() if options.nonstop else stop_ids,
        stop_texts=options.stop or (),
        logprobs=options.logprobs is not None,
    )


def describe_model(path: str, info: dict, config: GPTConfig, n_params: int, device: str) -> str:
    """What --verbose tells about a model, in lines; `device` says in words where and how it computes."""
    facts = {
        "checkpoint": path,
        "data": f"{info.get('dataset')} ({info.get('format')}), {info.get('tokens_seen')} tokens seen",
        "iteration": f"{info.get('iter_num')}, loss train {info.get('train_loss')}, val {info.get('val_loss')}",
        "model": f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, window {config.block_size}, "
        f"{n_params / 1e6:.1f} M parameters",
        "device": device,
    }
    return "\n".join(f"{name:<11}{value}" for name, value in facts.items())


def read_prompt(options: GenOptions) -> str | None:
    """The prompt that the options give, None where there is none. Raises UserError for a file that cannot be read."""
    if options.prompt_file is None:
        return options.prompt
    try:
        if options.prompt_file == "-":
            return sys.stdin.buffer.read().decode("utf-8").replace("\r\n", "\n")
        return Path(options.prompt_file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{options.prompt_file} is not UTF-8 (byte {error.start}); convert it with: iconv -t utf-8"
        ) from error
    except OSError as error:
        raise UserError(f"{options.prompt_file} not read: {error.strerror}; check --prompt_file") from error


def generate_text(engine: TextEngine, options: GenOptions, prompt: str | None, console: Console) -> None:
    """Continue one prompt; several samples are shown one after another, each when it is complete."""
    prompt = prompt or ""
    ids = [ENDOFTEXT_ID, *encode_text(prompt)]
    if len(ids) > engine.block_size:
        console.notice(f"the prompt has {len(ids) - 1} tokens; the model sees the last {engine.block_size}")
    max_tokens = None if options.nonstop else DEFAULT_MAX_TOKENS
    max_tokens = options.max_tokens or max_tokens
    if options.num_samples == 1:
        console.show(_with_prompt(prompt, engine.stream(ids, max_tokens)))
        return
    samples = [prompt] * options.num_samples
    try:
        for number, piece in engine.stream_samples(ids, max_tokens, options.num_samples):
            samples[number] += piece
    finally:
        for number, text in enumerate(samples, start=1):
            console.show([f"--- {number} of {len(samples)} ---\n", text])


def _with_prompt(prompt: str, pieces: Iterator[str]) -> Iterator[str]:
    if prompt:
        yield prompt
    yield from pieces


def talk(session: PromptSession, messages: Iterator[str], console: Console) -> None:
    """Answer messages and do commands until the messages end or the person quits."""
    for message in messages:
        try:
            if message.startswith("/") and not message.startswith("//"):
                answer = session.command(message)
            else:
                answer = session.reply(message.removeprefix("/") if message.startswith("//") else message)
            if isinstance(answer, str):
                console.notice(answer)
            else:
                with contextlib.closing(answer):
                    console.show(answer)
        except UserError as error:
            console.notice(f"error: {error}")
        except KeyboardInterrupt:
            if not console.is_terminal:
                raise
            console.end_line()
        except Quit:
            return


def write_results(engine: TextEngine, options: GenOptions, console: Console) -> None:
    """What --output and --logprobs ask for, as far as it has come."""
    if not console.shown:
        return
    if options.output is not None:
        with atomic_write(options.output) as file:
            file.write("".join(console.shown).encode("utf-8", "replace"))
    if options.logprobs is not None:
        with atomic_write(options.logprobs) as file:
            for facts in engine.logprobs:
                file.write((json.dumps(facts, ensure_ascii=False) + "\n").encode("utf-8", "replace"))


def check_targets(options: GenOptions) -> None:
    """Raise UserError, before any work is done, where a result could not be written or would take another's place."""
    taken = {Path(options.checkpoint or DEFAULT_CHECKPOINT).resolve(): "the model"}
    for name in ("output", "logprobs"):
        path = getattr(options, name)
        if path is None:
            continue
        require_target(name, path)
        what = taken.setdefault(Path(path).resolve(), f"--{name}")
        what = "a checkpoint's name" if Path(path).suffix == ".pt" else what
        if what != f"--{name}":
            raise UserError(f"--{name} {path}: that is {what}; name another file")


def main() -> None:
    options = parse_options(GenOptions, __doc__)
    check_targets(options)
    prompt = read_prompt(options)
    signal.signal(signal.SIGTERM, _terminate)
    engine = load_engine(options)
    console = Console("you" if options.chat else "prompt", delay=not options.no_delay)
    try:
        if options.chat:
            session = ChatSession(engine, options.max_tokens, console.notice, options.system)
        else:
            session = PromptSession(engine, options.max_tokens or DEFAULT_MAX_TOKENS, console.notice)
        if not options.chat and not options.interactive:
            generate_text(engine, options, prompt, console)
        elif prompt is not None:
            console.show(session.reply(prompt))
        else:
            if console.is_terminal:
                console.notice("/help lists the commands; Ctrl-C stops a reply, Ctrl-D ends")
            talk(session, console.messages(), console)
    finally:
        write_results(engine, options, console)
    if options.verbose:
        print(engine.statistics(), file=sys.stderr)


def _terminate(number: int, frame) -> None:
    """End as Ctrl-C does, so that what was generated is kept."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    run_script(main)
