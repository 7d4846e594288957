"""Serve models over HTTP: an OpenAI-compatible API for many clients at once, and a page to chat with them.

    python serve.py                                 # all chat models, the best-trained first
    python serve.py models/story5000.pt models/chitchat1500.pt --max_models 2
    JOJO_API_KEY=... python serve.py --host 0.0.0.0 --port 8080

The address is printed on standard output, one line per request on standard error. docs/serving.md describes the API.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import logging
import os
import sys
from typing import TYPE_CHECKING

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
from common.speedups import load_speedups
from common.threads import sleep_while_waiting_if_busy

if TYPE_CHECKING:  # at run time torch is imported only when the options are known to be right
    from collections.abc import Callable, Mapping

    from generation.row_cache import DecodeRows
    from model import GPT

API_KEY_VARIABLE = "JOJO_API_KEY"
MIN_API_KEY_LENGTH = 8


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """What to serve, where, and for whom."""

    checkpoints: tuple[str, ...] = option(
        (),
        "the models (default: all chat models in models, the best-trained first); the first is used when a request "
        "names none",
        positional=True,
        nargs="*",
    )

    host: str = option("127.0.0.1", "address to listen on; another needs --api_key or --no_auth", group="network")
    port: int = option(8000, "port to listen on; 0: any free one", group="network", at_least=0, at_most=65535)
    api_key: str | None = option(
        None,
        f"key that clients must send; safer in the environment variable {API_KEY_VARIABLE}, which other users cannot "
        "see",
        group="network",
        metavar="KEY",
    )
    no_auth: bool = option(False, "let anyone who can reach --host use the server without a key", group="network")
    allow_origin: tuple[str, ...] | None = option(
        None,
        "also serve web pages of this origin, such as https://chat.example.org; can be given several times",
        group="network",
        action="append",
        metavar="URL",
    )

    max_rows: int = option(16, "texts generated at a time", group="capacity", at_least=1, at_most=1024)
    max_waiting: int = option(
        64, "texts that wait for a row; further requests are refused", group="capacity", at_least=0, at_most=100_000
    )
    max_models: int = option(1, "models in memory at a time", group="capacity", at_least=1, at_most=1000)
    exact: bool = option(
        False, "compute each text on its own: exactly gen.py's ids, but no faster than one at a time", group="capacity"
    )
    grace: float = option(
        20.0, "seconds that running requests get after SIGTERM", group="capacity", metavar="S", at_least=0, at_most=3600
    )

    device: str | None = device_option()
    dtype: str | None = dtype_option()
    quantize: str | None = quantize_option()
    plain: bool = plain_option()

    feedback: str | None = option(
        None,
        "append people's feedback on replies, with the conversations, to this file (default: nothing is kept)",
        group="files",
        metavar="FILE",
    )
    log: str | None = option(
        None, "append one line per request to this file (default: standard error)", group="files", metavar="FILE"
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.plain and self.quantize:
            raise ValueError("--quantize needs fast/, which --plain leaves out; use one of them")
        if self.no_auth and self.api_key is not None:
            raise ValueError("--api_key cannot be combined with --no_auth; use one of them")
        for origin in self.allow_origin or ():
            if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
                raise ValueError(f"--allow_origin {origin}: give an origin such as https://chat.example.org")


def choose_api_key(options: ServeOptions) -> str | None:
    """The key that clients must send. Raises UserError if it is short, or if other machines can connect without it."""
    key = options.api_key if options.api_key is not None else os.environ.get(API_KEY_VARIABLE)
    if options.no_auth:
        return None
    if key is None:
        if not is_loopback(options.host):
            raise UserError(
                f"--host {options.host} lets other machines in: set {API_KEY_VARIABLE} or --api_key, or add --no_auth"
            )
        return None
    if len(key) < MIN_API_KEY_LENGTH or not (key.isascii() and key.isprintable()) or key != key.strip():
        raise UserError(
            f"the API key must have at least {MIN_API_KEY_LENGTH} printable ASCII characters; make one with: "
            "python -c 'import secrets; print(secrets.token_urlsafe())'"
        )
    return key


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def start_log(path: str | None) -> None:
    """Log one line per request, and never fail because of the log: a full disk must not stop the server."""
    try:
        handler = logging.StreamHandler(sys.stderr) if path is None else logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--log {path}: {error.strerror}; give a file in a folder that is writable") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.handleError = lambda record: None  # type: ignore[method-assign]
    for name, level in (("jojo", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.addHandler(handler)
        logger.propagate = False


def model_loader(options: ServeOptions) -> Callable[..., tuple[GPT, DecodeRows]]:
    """The function that loads a checkpoint and applies the faster parts.

    If it is given what `read_info` said about the checkpoint earlier, it raises UserError for a file that was replaced
    by a model of another shape or vocabulary: requests would be encoded for the earlier one.
    """
    fast = load_speedups(options.plain)
    if fast:
        fast.keep_freed_memory()  # before the first tensor is allocated
    from exchange.loading import load_model, tokenizer_of
    from generation.row_cache import decode_rows
    from setup_tokenizer import Tokenizer

    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the address
        device = choose_device(options.device)
        dtype = choose_dtype(options.dtype, device)
    allow_tf32()

    def load(path: str, known: Mapping | None = None) -> tuple[GPT, DecodeRows]:
        model, info = load_model(path, device, dtype)
        tokenizer = tokenizer_of(path, info, model)
        if known and (info["model"], tokenizer) != (known["model"], Tokenizer.from_info(known, path)):
            raise UserError(f"{path} was replaced by a model of another shape or vocabulary; start serve.py again")
        tokenizer.encode_text("")  # loads the vocabulary; the first request should not wait a second for it
        for parameter in model.parameters():  # a checkpoint's file may be replaced, so do not leave it mapped
            parameter.data = parameter.data.clone()
        if fast:
            # The fastest layers depend on the number of texts, and --exact needs those of gen.py, which has one.
            fast.speed_up_generation(model, options.quantize, 1 if options.exact else options.max_rows)
            fast.give_back_freed_memory()  # the original weights, which the faster layers have replaced
        return model, decode_rows

    return load


def choose_checkpoints(options: ServeOptions) -> list[str]:
    """The checkpoints to serve, each once: those that the options name, or all chat models, the best-trained first."""
    from exchange.choosing import chat_models

    return list(dict.fromkeys(options.checkpoints)) or [str(found.path) for found in chat_models()]


def main() -> None:
    options = parse_options(ServeOptions, __doc__)
    api_key = choose_api_key(options)
    start_log(options.log)
    load = model_loader(options)
    from exchange.loading import read_info, weights_digest
    from serving.models import ModelPool, model_cards
    from serving.server import serve
    from serving.settings import ServerSettings

    settings = ServerSettings(
        options.host,
        api_key,
        options.allow_origin or (),
        options.max_rows,
        options.max_waiting,
        options.max_models,
        options.exact,
        options.grace,
        feedback=options.feedback,
    )
    infos = {path: read_info(path) for path in choose_checkpoints(options)}
    pool = ModelPool(model_cards(infos), lambda path: load(path, infos[path]), settings, weights_digest)
    serve(
        pool, settings, options.port, lambda address: print(f"serving {', '.join(pool.cards)} at {address}", flush=True)
    )


if __name__ == "__main__":
    sleep_while_waiting_if_busy()
    run_script(main)
