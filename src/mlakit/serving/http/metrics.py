"""Prometheus figures: what the server has answered, and what the engine holds now."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mlakit.serving.http.record import Record
from mlakit.serving.request import EngineStats

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
TOKEN_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)

GAUGES = {
    "mlakit_requests_running": ("running", "Sequences that hold pages of the cache."),
    "mlakit_requests_waiting": ("waiting", "Sequences that wait for pages or for a place."),
    "mlakit_cache_pages": ("pages_total", "Pages of the cache."),
    "mlakit_cache_pages_used": ("pages_used", "Pages that running sequences hold."),
    "mlakit_cache_pages_kept": ("pages_kept", "Pages kept for the prefix in them."),
    "mlakit_cache_pages_free": ("pages_free", "Pages that hold nothing."),
    "mlakit_cache_bytes": ("cache_nbytes", "Bytes of the cache."),
}
COUNTERS = {
    "mlakit_preemptions": ("preemptions", "Times a sequence gave its pages back."),
    "mlakit_prefix_pages_found": ("prefix_hits", "Pages found instead of computed."),
    "mlakit_engine_steps": ("steps", "Steps of the model."),
}


class EngineFigures(Collector):
    """The engine's figures at the moment somebody asks.

    Args:
        stats: gives them.
    """

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self.stats = stats

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client wants them."""
        now = self.stats()
        for name, (field, words) in GAUGES.items():
            yield GaugeMetricFamily(name, words, value=getattr(now, field))
        for name, (field, words) in COUNTERS.items():
            yield CounterMetricFamily(name, words, value=getattr(now, field))


class Metrics:
    """All figures of one server, in a registry of its own.

    Args:
        stats: the engine's.
    """

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineFigures(stats))
        self.requests = Counter(
            "mlakit_http_requests",
            "Answers by path and status.",
            ("path", "status"),
            registry=self.registry,
        )
        self.finished = Counter(
            "mlakit_sequences_finished",
            "Sequences by the way they ended.",
            ("reason",),
            registry=self.registry,
        )
        self.prompt = self._tokens("prompt", "Tokens of prompts.")
        self.cached = self._tokens("cached_prompt", "Prompt tokens found in shared pages.")
        self.written = self._tokens("completion", "Tokens written.")
        self.seconds = self._seconds("request", "Request to end of answer.", SECONDS)
        self.first = self._seconds("first_token", "Request to first token.", SECONDS)
        self.per_token = self._seconds(
            "per_token", "Mean time of a request's further tokens.", TOKEN_SECONDS
        )

    def _tokens(self, kind: str, words: str) -> Counter:
        return Counter(f"mlakit_{kind}_tokens", words, registry=self.registry)

    def _seconds(self, kind: str, words: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"mlakit_{kind}_seconds", words, registry=self.registry, buckets=buckets)

    def count(self, record: Record, path: str, seconds: float) -> None:
        """Adds a request that has ended.

        Args:
            record: what is known of it.
            path: its route, one word for all that are none.
            seconds: that it took.
        """
        self.requests.labels(path, str(record.status)).inc()
        if not record.prompt_tokens:
            return
        self.seconds.observe(seconds)
        self.prompt.inc(record.prompt_tokens)
        self.cached.inc(record.cached_tokens)
        self.written.inc(record.completion_tokens)
        for reason, number in record.finished.items():
            self.finished.labels(reason).inc(number)
        if record.first_token_seconds is not None:
            self.first.observe(record.first_token_seconds)
        if record.seconds_per_token is not None:
            self.per_token.observe(record.seconds_per_token)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
