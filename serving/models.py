"""The models that are served: which exist, which are in memory, and which requests use them.

A model is loaded when it is first asked for. If `max_models` are already in memory, the least recently used one is
dropped as soon as its last request has ended; new requests for it wait meanwhile, so that no request starves.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import gc
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from common.cli import UserError
from generation.batching import BatchEngine, QueueFull
from generation.row_cache import DecodeRows, decode_each
from generation.sampling import CHAT_SAMPLING, TEXT_SAMPLING
from generation.worker import Worker
from model import GPT, GPTConfig
from serving.deliveries import Deliveries
from serving.errors import ApiError
from serving.settings import ServerSettings
from setup_tokenizer import GPT2, Tokenizer

log = logging.getLogger("jojo")
DEFAULT_MAX_TOKENS = 500  # of a text; a chat's reply may fill the window

Loader = Callable[[str], tuple[GPT, DecodeRows]]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """The facts about one checkpoint that are known without loading its weights."""

    id: str
    path: str
    config: GPTConfig
    format: str = "text"
    dataset: str = ""
    created: int = 0
    tokenizer: Tokenizer = GPT2

    @property
    def can_chat(self) -> bool:
        """Whether the vocabulary has ChatML's control tokens."""
        return self.config.n_vocab >= self.tokenizer.n_vocab

    def as_dict(self) -> dict:
        """The model as GET /v1/models lists it; the fields that OpenAI's API does not have come last."""
        sampling = CHAT_SAMPLING if self.format == "chat" else TEXT_SAMPLING
        max_tokens = self.config.block_size // 4 if self.format == "chat" else DEFAULT_MAX_TOKENS
        default = {"temperature": sampling.temperature, "top_k": sampling.top_k, "max_tokens": max_tokens}
        return {
            **{"id": self.id, "object": "model", "created": self.created, "owned_by": "jojo"},
            **{"format": self.format, "can_chat": self.can_chat, "block_size": self.config.block_size},
            "tokenizer": {"name": self.tokenizer.name, "digest": self.tokenizer.digest},
            **{"default": default, "parameters": n_parameters(self.config), "dataset": self.dataset},
        }


async def _in_a_new_thread(function: Callable[..., T], *arguments: object) -> T:
    """What the function returns, computed in a thread that ends afterwards.

    OpenMP gives each thread that computes with torch a pool of its own. While all pools together have more threads than
    there are cores, they sleep instead of spinning between the parallel parts of a decode step, and waking them takes
    time in each. A thread of asyncio.to_thread would live on and keep its pool.
    """
    loader = concurrent.futures.ThreadPoolExecutor(1, "load")
    try:
        return await asyncio.get_running_loop().run_in_executor(loader, function, *arguments)
    finally:
        loader.shutdown(wait=False)


def model_cards(facts: Mapping[str, Mapping]) -> dict[str, ModelCard]:
    """Cards by id, for checkpoints and what `read_info` says about them; those with the same name get numbers."""
    cards: dict[str, ModelCard] = {}
    for path, info in facts.items():
        name = Path(path).stem if path.endswith(".pt") else Path(path).name
        number = sum(card.id.partition("#")[0] == name for card in cards.values())
        name = f"{name}#{number + 1}" if number else name
        created = int(Path(path).stat().st_mtime) if Path(path).exists() else 0
        config = GPTConfig(**info["model"])
        facts_known = {"format": info.get("format", "text"), "dataset": str(info.get("dataset") or "")}
        tokenizer = Tokenizer.from_info(info, path)
        cards[name] = ModelCard(name, path, config, **facts_known, created=created, tokenizer=tokenizer)
    return cards


def n_parameters(config: GPTConfig) -> int:
    """What `GPT.n_params` counts, without building the model."""
    C, bias = config.n_embd, int(config.bias)
    layer_norm = C * (1 + bias)
    block = 12 * C * C + bias * 9 * C + 2 * layer_norm
    return (config.vocab_size + config.block_size) * C + config.n_layer * block + layer_norm


class PooledModel:
    """A model of the pool that is in memory: the engine that runs it and the number of requests that use it."""

    def __init__(self, card: ModelCard, engine: BatchEngine, digest: str):
        self.card, self.engine = card, engine
        self.digest = digest  # of the weights
        self.users, self.last_used, self.is_retiring = 0, 0.0, False
        self.idle = asyncio.Event()
        self.idle.set()


class ModelPool:
    """Hands out models; everything but the loading itself happens in the event loop.

    `digest_of` a path is the digest of the weights there.
    """

    def __init__(
        self, cards: Mapping[str, ModelCard], load: Loader, settings: ServerSettings, digest_of: Callable[[str], str]
    ):
        self.cards, self.load, self.settings, self.digest_of = cards, load, settings, digest_of
        self.deliveries = Deliveries()
        self.worker = Worker(self.deliveries.flush)
        self.loaded: dict[str, PooledModel] = {}
        self.failure: UserError | None = None
        self.is_ready = False  # from the first model on
        self._changing = asyncio.Lock()  # held while models are loaded or dropped; waiters are served in order
        self._waiting: dict[str, list[asyncio.Future[PooledModel]]] = {}  # for models that are being loaded, by id
        self._tasks: set[asyncio.Task[None]] = set()

    def card(self, name: str | None) -> ModelCard:
        """The card of a model, of the first one if no name is given. Raises ApiError 404."""
        if name is None:
            return next(iter(self.cards.values()))
        if name not in self.cards:
            known = ", ".join(self.cards)
            raise ApiError(404, f"this server has no such model; it has {known}", param="model", code="model_not_found")
        return self.cards[name]

    @property
    def n_waiting(self) -> int:
        """Texts that wait for a row or for their model."""
        return self._n_waiting_for_models + sum(len(model.engine.waiting) for model in list(self.loaded.values()))

    @property
    def rows_in_use(self) -> int:
        return sum(model.engine.rows_in_use for model in list(self.loaded.values()))

    def acquire_loaded(self, card: ModelCard) -> PooledModel | None:
        """The model if it is in memory and is not being dropped; call `release` afterwards."""
        model = self.loaded.get(card.id)
        if model is None or model.is_retiring:
            return None
        return self._use(model)

    async def acquire(self, card: ModelCard) -> PooledModel:
        """The model once it is loaded; `release` it afterwards. Raises QueueFull, or ApiError if loading fails."""
        if model := self.acquire_loaded(card):
            return model
        self.check_waiting()
        waiting = asyncio.get_running_loop().create_future()
        if card.id not in self._waiting:
            self._waiting[card.id] = []
            # A task of its own, so that loading continues if a client leaves.
            task = asyncio.create_task(self._load_for_waiting(card))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self._waiting[card.id].append(waiting)
        try:
            return await waiting
        except asyncio.CancelledError:
            if waiting.done() and not waiting.cancelled() and not waiting.exception():
                self.release(waiting.result())
            raise

    async def _load_for_waiting(self, card: ModelCard) -> None:
        """Make room for a model, load it, and hand it to all requests that wait for it."""
        async with self._changing:
            try:
                await self._make_room()
                model = await self._load(card)
            except Exception as error:
                for waiting in self._waiting.pop(card.id):
                    if not waiting.done():
                        waiting.set_exception(error)
                return
            for waiting in self._waiting.pop(card.id):
                if not waiting.done():
                    waiting.set_result(self._use(model))  # at once, so that it is not idle before they resume

    def check_waiting(self) -> None:
        """Raise QueueFull if too many requests are waiting for a model."""
        if self._n_waiting_for_models >= self.settings.max_waiting:
            raise QueueFull

    @property
    def _n_waiting_for_models(self) -> int:
        return sum(map(len, self._waiting.values()))

    def release(self, model: PooledModel) -> None:
        """Record that one request no longer uses a model."""
        model.users -= 1
        if not model.users:
            model.idle.set()

    def _use(self, model: PooledModel) -> PooledModel:
        model.users += 1
        model.last_used = time.monotonic()
        model.idle.clear()
        return model

    async def _make_room(self) -> None:
        while len(self.loaded) >= self.settings.max_models:
            oldest = min(self.loaded.values(), key=lambda model: (model.users > 0, model.last_used))
            oldest.is_retiring = True
            await oldest.idle.wait()
            log.info("dropping model %s", oldest.card.id)
            self.worker.engines.remove(oldest.engine)
            del self.loaded[oldest.card.id]
            del oldest
            gc.collect()

    async def _load(self, card: ModelCard) -> PooledModel:
        log.info("loading model %s", card.id)
        started = time.monotonic()
        try:
            engine = await _in_a_new_thread(self._make_engine, card)
            digest = await _in_a_new_thread(self.digest_of, card.path)
        except UserError as error:
            self.failure = error
            log.error("model %s not loaded: %s", card.id, error)
            raise ApiError(503, "the model could not be loaded; the server's log says why", param="model") from error
        model = self.loaded[card.id] = PooledModel(card, engine, digest)
        self.is_ready = True
        self.worker.engines.append(engine)
        log.info("model %s ready after %.1f s", card.id, time.monotonic() - started)
        return model

    def _make_engine(self, card: ModelCard) -> BatchEngine:
        model, decode = self.load(card.path)
        rows, waiting = self.settings.max_rows, self.settings.max_waiting
        if self.settings.exact:
            whole = card.config.block_size  # prompts in one pass, as gen.py prefills them
            return BatchEngine(model, rows, waiting, decode_each, chunk_tokens=whole, keep_prefixes=False)
        return BatchEngine(model, rows, waiting, decode)
