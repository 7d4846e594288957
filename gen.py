"""Generate text with a model, continue prompts one after another, or chat.

    python gen.py models/story5000.pt --prompt "Once upon a time"
    python gen.py --chat                        # the best-trained chat model
    printf 'Hello!\\nWho are you?\\n' | python gen.py --chat

Only the generated text goes to standard output, as it is generated; everything else goes to standard error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from common.cli import UserError, check_options, option, parse_options, run_script
from common.device import (
    allow_tf32,
    choose_device,
    choose_dtype,
    device_option,
    dtype_option,
    plain_option,
    quantize_option,
)
from common.files import atomic_write, require_target
from common.speedups import load_speedups
from common.text_files import decode_text, unix_line_endings
from common.threads import sleep_while_waiting_if_busy
from generation.chat import ChatSession, PromptSession
from generation.terminal import Console, talk, wrapped
from setup_tokenizer import IM_END, IM_START, Tokenizer

if TYPE_CHECKING:  # at run time torch is imported only when a model is loaded, so that --help is instant
    from exchange.choosing import FoundModel
    from generation.engine import Settings, TextEngine

DEFAULT_MAX_TOKENS = 500


@dataclasses.dataclass(frozen=True)
class GenOptions:
    """What to generate, from what, and how."""

    checkpoint: str | None = option(
        None,
        "the model (default: the newest in models; with --chat the best-trained one of the chat models there)",
        positional=True,
    )
    prompt: str | None = option(
        None, "text to continue (default: none; the model starts a new document)", group="prompt"
    )
    prompt_file: str | None = option(
        None, "file with the text to continue; - reads standard input", group="prompt", metavar="FILE"
    )
    interactive: bool = option(False, "continue prompts that you type one after another", group="prompt")
    chat: bool = option(False, "chat with the model, in the format of its training conversations", group="prompt")
    system: str | None = option(None, "system message of the chat", group="prompt", metavar="TEXT")

    max_tokens: int | None = option(
        None,
        f"generate at most N tokens (default: {DEFAULT_MAX_TOKENS}; in a chat, as many as the window allows)",
        group="length",
        at_least=1,
    )
    nonstop: bool = option(
        False, "continue after the end of a document, without a limit unless --max_tokens sets one", group="length"
    )
    stop: tuple[str, ...] | None = option(
        None, "stop before this text; can be given several times", group="length", action="append", metavar="TEXT"
    )
    num_samples: int = option(
        1, "continuations of the prompt, generated together", group="length", at_least=1, at_most=4096
    )

    temp: float | None = option(
        None,
        "temperature: lower is more focused, 0 takes the likeliest token (default: 0.8, in a chat 0.5)",
        group="sampling",
        at_least=0,
        at_most=100,
    )
    top_k: int | None = option(
        None,
        "sample from the K likeliest tokens; 0: from all (default: 200, in a chat 50)",
        group="sampling",
        metavar="K",
        at_least=0,
    )
    top_p: float | None = option(
        None,
        "sample from the likeliest tokens whose probabilities add up to P",
        group="sampling",
        metavar="P",
        above=0,
        at_most=1,
    )
    min_p: float | None = option(
        None,
        "sample from tokens at least P times as likely as the likeliest one",
        group="sampling",
        metavar="P",
        at_least=0,
        at_most=1,
    )
    repetition_penalty: float = option(
        1.0,
        "above 1: tokens that are already in the context become less likely",
        group="sampling",
        metavar="X",
        at_least=0.01,
        at_most=100,
    )
    seed: int | None = option(
        None,
        "the same seed gives the same text (default: a new one each time)",
        group="sampling",
        at_least=0,
        below=2**63,
    )

    device: str | None = device_option()
    dtype: str | None = dtype_option()
    quantize: str | None = quantize_option()
    plain: bool = plain_option()

    output: str | None = option(
        None, "also write the text to a file, even if interrupted", group="files", metavar="FILE"
    )
    logprobs: str | None = option(
        None,
        "write each token's log probability, and those of the likeliest tokens, as JSONL",
        group="files",
        metavar="FILE",
    )
    no_delay: bool = option(False, "print tokens on a terminal at full speed, without the typing effect", group="files")
    verbose: bool = option(False, "print details of the model and the speed", group="files")

    def __post_init__(self) -> None:
        check_options(self)
        is_session = self.chat or self.interactive
        if self.chat and self.interactive:
            raise ValueError("--chat cannot be combined with --interactive; use one of them")
        if self.prompt is not None and self.prompt_file is not None:
            raise ValueError("--prompt cannot be combined with --prompt_file; use one of them")
        if self.interactive and (self.prompt is not None or self.prompt_file is not None):
            raise ValueError("--interactive asks for its prompts; leave --prompt and --prompt_file out")
        if is_session and (self.num_samples > 1 or self.nonstop):
            raise ValueError("--num_samples and --nonstop continue one prompt; leave --chat and --interactive out")
        if self.system is not None and not self.chat:
            raise ValueError("--system needs --chat")
        if self.nonstop and self.num_samples > 1 and self.max_tokens is None:
            raise ValueError("--nonstop with --num_samples needs --max_tokens")
        if self.stop and "" in self.stop:
            raise ValueError("--stop must not be empty")
        if self.plain and self.quantize:
            raise ValueError("--quantize needs fast/, which --plain leaves out; use one of them")


def find_choices(chat: bool) -> list[FoundModel]:
    """The models to choose from: for a chat the best-trained first, otherwise the newest first."""
    from exchange.choosing import chat_models, newest_models

    return chat_models() if chat else newest_models()


def choose_checkpoint(chat: bool) -> str:
    """The checkpoint to load if the options name none; prints it and the others to standard error. Raises UserError."""
    from exchange.choosing import names

    chosen, *others = find_choices(chat)
    first = "chatting with {}, the best-trained chat model" if chat else "using {}, the newest model"
    print(wrapped(f"{first.format(chosen.path)}: {chosen.description}"), file=sys.stderr)
    if others:
        print(wrapped(f"other {'chat ' if chat else ''}models: {names(others)}"), file=sys.stderr)
    return str(chosen.path)


def load_engine(
    path: str, info: Mapping[str, Any], options: GenOptions, device: str, dtype: str, fast: ModuleType | None
) -> TextEngine:
    """The model of `path`, ready to generate. Raises UserError if it does not fit.

    `info` is what `read_info` says about it, `fast` what `load_speedups` returned.
    """
    from exchange.choosing import details, format_note
    from exchange.loading import load_model, tokenizer_of
    from generation.decoding import decode_step
    from generation.engine import TextEngine

    started = time.perf_counter()
    model, _ = load_model(path, device, dtype)
    tokenizer = tokenizer_of(path, info, model)
    if options.chat and model.config.n_vocab < tokenizer.n_vocab:
        raise UserError(f"{path} has no ChatML tokens, so it cannot chat; leave --chat out or use another checkpoint")
    if note := format_note(path, info, options.chat):
        print(wrapped(f"note: {note}"), file=sys.stderr)
    n_params = model.n_params()  # counted before the weights are packed and stop being parameters
    decode, layers = decode_step, "plain layers"
    if fast:
        speedups = fast.speed_up_generation(model, options.quantize, options.num_samples)
        decode, layers = speedups.decode, speedups.description
    engine = TextEngine(model, engine_settings(options, tokenizer), decode, tokenizer)
    if options.verbose:
        print(details(path, info, model.config, n_params, f"{device}, {dtype}, {layers}"), file=sys.stderr)
        print(f"ready after {time.perf_counter() - started:.1f} s, seed {engine.seed}", file=sys.stderr)
    return engine


class CurrentModel:
    """The model in use, which /model can change (see chat.Models): its `path`, `engine` and one-line `description`."""

    def __init__(self, options: GenOptions):
        self.options, self.fast = options, load_speedups(options.plain)
        if self.fast:
            self.fast.keep_freed_memory()  # before the first tensor is allocated
        self.path = options.checkpoint or choose_checkpoint(options.chat)
        from exchange.loading import read_info

        info = read_info(self.path)  # a wrong name is reported before anything else
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for generated text
            self.device = choose_device(options.device)
            self.dtype = choose_dtype(options.dtype, self.device)
        allow_tf32()
        self.engine = self._load(self.path, info)
        self.description = ""  # of the model that /model loaded last

    def _load(self, path: str, info: Mapping[str, Any]) -> TextEngine:
        return load_engine(path, info, self.options, self.device, self.dtype, self.fast)

    def listing(self) -> str:
        """The models that /model can change to, with a star on the current one."""
        from exchange.choosing import listing

        return listing(find_choices(self.options.chat), self.path)

    def load(self, name: str) -> TextEngine:
        """Change to another model, with the same temperature. Raises UserError if no model has that name."""
        from exchange.choosing import named_model

        chosen = named_model(name, find_choices(self.options.chat))
        engine = self._load(str(chosen.path), chosen.info)
        engine.temperature, engine.logprobs = self.engine.temperature, self.engine.logprobs
        self.path, self.engine = str(chosen.path), engine
        self.description = f"now {self.path}: {chosen.description}"
        return engine


def engine_settings(options: GenOptions, tokenizer: Tokenizer) -> Settings:
    """How ids are sampled: by the options, or else by the defaults for text or for a chat."""
    from generation.engine import Settings
    from generation.sampling import CHAT_SAMPLING, TEXT_SAMPLING, Sampling

    default = CHAT_SAMPLING if options.chat else TEXT_SAMPLING
    top_k = default.top_k if options.top_k is None else options.top_k
    sampling = Sampling(
        temperature=default.temperature if options.temp is None else options.temp,
        top_k=top_k or None,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
    )
    stop_ids = tuple(tokenizer.special_tokens.values()) if options.chat else (tokenizer.endoftext,)
    return Settings(
        sampling,
        seed=options.seed,
        stop_ids=() if options.nonstop else stop_ids,
        stop_texts=options.stop or (),
        hidden_ids=hidden_ids(options, tokenizer),
        logprobs=options.logprobs is not None,
    )


def hidden_ids(options: GenOptions, tokenizer: Tokenizer) -> tuple[int, ...]:
    """ChatML's control tokens, which a chat model may also generate in a text, without those that --stop names."""
    names = {tokenizer.im_start: IM_START, tokenizer.im_end: IM_END}
    return tuple(token for token, name in names.items() if not any(name in text for text in options.stop or ()))


def read_prompt(options: GenOptions) -> str | None:
    """The prompt that the options give, or None. Raises UserError for a file that cannot be read."""
    if options.prompt_file is None:
        return None if options.prompt is None else unix_line_endings(options.prompt)
    try:
        if options.prompt_file == "-":
            content = sys.stdin.buffer.read()
        else:
            content = Path(options.prompt_file).read_bytes()
    except OSError as error:
        raise UserError(f"{options.prompt_file} not read: {error.strerror}; check --prompt_file") from error
    return decode_text(content, options.prompt_file)


def generate_text(engine: TextEngine, options: GenOptions, prompt: str | None, console: Console) -> None:
    """Continue one prompt; several samples are printed one after another when all are complete."""
    prompt = prompt or ""
    ids = [engine.tokenizer.endoftext, *engine.tokenizer.encode_text(prompt)]
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


def write_results(engine: TextEngine, options: GenOptions, console: Console) -> None:
    """Write the files of --output and --logprobs, with everything that has been generated."""
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
    """Raise UserError, before any work is done, if a result could not be written or would overwrite another file."""
    taken = {} if options.checkpoint is None else {Path(options.checkpoint).resolve(): "the model"}
    for name in ("output", "logprobs"):
        path = getattr(options, name)
        if path is None:
            continue
        require_target(name, path)
        what = taken.setdefault(Path(path).resolve(), f"--{name}")
        what = "the name of a checkpoint" if Path(path).suffix == ".pt" else what
        if what != f"--{name}":
            raise UserError(f"--{name} {path}: this is {what}; name another file")


def main() -> None:
    options = parse_options(GenOptions, __doc__)
    check_targets(options)
    prompt = read_prompt(options)
    signal.signal(signal.SIGTERM, _terminate)
    models = CurrentModel(options)
    engine = models.engine
    console = Console("you" if options.chat else "prompt", delay=not options.no_delay)
    try:
        session: PromptSession
        if options.chat:
            session = ChatSession(engine, options.max_tokens, console.notice, options.system, models)
        else:
            session = PromptSession(engine, options.max_tokens or DEFAULT_MAX_TOKENS, console.notice, models)
        if not options.chat and not options.interactive:
            generate_text(engine, options, prompt, console)
        elif prompt is not None:
            console.show(session.reply(prompt))
        else:
            if console.is_terminal:
                console.notice("/help lists the commands; Ctrl-C stops a reply, Ctrl-D exits")
            talk(session, console.messages(), console)
    finally:
        write_results(models.engine, options, console)
    if options.verbose:
        print(models.engine.statistics(), file=sys.stderr)


def _terminate(number: int, frame: object) -> None:
    """Exit as after Ctrl-C, so that the text generated so far is kept."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sleep_while_waiting_if_busy()
    run_script(main)
