"""Collecting answers: rounds of requests until there are enough documents.

Each round sends one request for every document that is still missing, several at a time, and then judges the answers in
the order of the plan. So which requests are sent depends on the answers, but not on `concurrency` or on how fast the
answers arrived.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from common.cli import UserError
from data.knowledge.client import Client, RequestFailed, Stopped, http_client
from data.knowledge.costs import Costs
from data.knowledge.filters import Selection
from data.knowledge.journal import Answer, Journal
from data.knowledge.plan import Request

if TYPE_CHECKING:
    import httpx2

MAX_FAILURES_IN_A_ROW = 10
MIN_JUDGED = 50  # if fewer than MIN_KEPT_SHARE of this many answers are kept, the run stops so that a person can look
MIN_KEPT_SHARE = 0.1
MAX_GAP = 10_000  # after this many requests of the plan without an answer, no more answers are expected


@dataclass
class Collector:
    """Asks for the answers of a plan and selects the documents among them.

    `on_answer` is called after each new answer. `failures` counts the requests that failed permanently, by reason; the
    next run sends these again.
    """

    client: Client
    journal: Journal
    selection: Selection
    concurrency: int
    on_answer: Callable[[Request, Answer], None]
    failures: Counter[str] = field(default_factory=Counter)
    costs: Costs = field(default_factory=Costs)  # of all answers that were judged, those of earlier runs too
    _failures_in_a_row: int = 0

    def collect(self, requests: Iterator[Request], n_documents: int) -> None:
        """Select up to `n_documents` documents, fewer if the plan ends.

        Raises UserError if requests keep failing or if most answers are unusable.
        """
        while missing := n_documents - len(self.selection.kept):
            round_ = list(itertools.islice(requests, missing))
            if not round_:
                return
            unanswered = [request for request in round_ if not self._has(request)]
            if unanswered:
                asyncio.run(self._ask_all(unanswered))
            self._judge(round_)

    def select(self, requests: Iterable[Request], n_documents: int) -> None:
        """Select up to `n_documents` documents among the answers in the journal, without asking for others."""
        n_missing = 0
        for request in requests:
            if len(self.selection.kept) == n_documents or n_missing == MAX_GAP:
                return
            answer = self.journal.answer(request.key)
            n_missing = n_missing + 1 if answer is None else 0
            if answer is not None:
                self._add(request, answer)

    def _has(self, request: Request) -> bool:
        return self.journal.has(request.key, self.client.max_tokens)

    def _add(self, request: Request, answer: Answer) -> None:
        self.costs.add(answer)
        self.selection.add(request, answer)

    def _judge(self, requests: Iterable[Request]) -> None:
        for request in requests:
            if (answer := self.journal.answer(request.key)) is not None:
                self._add(request, answer)
        n_kept, n_left_out = len(self.selection.kept), self.selection.counts.total()
        if n_kept + n_left_out >= MIN_JUDGED and n_kept < MIN_KEPT_SHARE * (n_kept + n_left_out):
            (reason, count), *_ = self.selection.counts.most_common(1)
            raise UserError(
                f"{n_left_out:,} of {n_kept + n_left_out:,} answers are unusable ({count:,} {reason}); "
                f"look at {self.journal.path}, then change --model, --prompts or --max_tokens"
            )

    async def _ask_all(self, requests: list[Request]) -> None:
        """Ask for all of these answers. After Ctrl-C or a fatal error the requests under way are still finished."""
        queue = iter(requests)
        stop = asyncio.Event()
        async with http_client(self.client, self.concurrency) as http:

            async def work() -> None:
                for request in queue:
                    with contextlib.suppress(Stopped):
                        await self._ask(http, request, stop)
                    if stop.is_set():
                        return

            n_workers = min(self.concurrency, len(requests))
            workers = [asyncio.create_task(work()) for _ in range(n_workers)]
            try:
                await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
            except asyncio.CancelledError:
                print("stopping: waiting for the requests under way; press Ctrl-C again to drop them", flush=True)
                raise
            finally:
                stop.set()
                outcomes = await asyncio.gather(*workers, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def _ask(self, http: httpx2.AsyncClient, request: Request, stop: asyncio.Event) -> None:
        try:
            answer = await self.client.ask(http, request, stop)
        except RequestFailed as error:
            self.failures[f"requests failed: {error}"] += 1
            self._failures_in_a_row += 1
            if self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
                raise UserError(
                    f"{MAX_FAILURES_IN_A_ROW} requests in a row failed ({error}); the answers so far are kept, so run "
                    "the same command to continue"
                ) from error
            return
        self._failures_in_a_row = 0
        self.journal.append(answer, about=request.about, form=request.form, reader=request.reader)
        self.on_answer(request, answer)
