"""What GET /metrics reports, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """The counters and histograms of one server; each server has a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("jojo_requests", "Answered requests", ("endpoint", "status"), registry=registry)
        self.prompt_tokens = Counter("jojo_prompt_tokens", "Tokens of prompts", registry=registry)
        self.cached_tokens = Counter(
            "jojo_cached_prompt_tokens", "Tokens of prompts that were in the cache", registry=registry
        )
        self.generated_tokens = Counter("jojo_generated_tokens", "Generated tokens", registry=registry)
        self.cancelled = Counter("jojo_cancelled_requests", "Requests whose client left", registry=registry)
        self.first_token_s = Histogram(
            "jojo_time_to_first_token_seconds",
            "From the request to its first token",
            buckets=SECONDS,
            registry=registry,
        )
        self.per_token_s = Histogram(
            "jojo_time_per_token_seconds", "Between two tokens of a text", buckets=TOKEN_SECONDS, registry=registry
        )

    def watch(self, name: str, help: str, value: Callable[[], float]) -> None:
        """Report a number that is read whenever the metrics are requested."""
        Gauge(name, help, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
