"""Metrics for Prometheus: requests, queue, seconds of each phase, tokens, cache hits, and memory of the process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from lfm2vl_edge.stats import Stats

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
"""Prometheus's text format."""
_BUCKETS: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
"""Seconds."""
_PHASES: Final = ("preprocess", "encode", "prefill", "decode")


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = self._counter("requests", "Requests by endpoint and HTTP status", "endpoint", "status")
        self._answers = self._counter("answers", "Answers by outcome", "outcome")
        self._seconds = self._counter("phase_seconds", "Seconds of answers by phase", "phase")
        self._tokens = self._counter("tokens", "Tokens: of prompts, restored from states, of answers", "kind")
        self._views = self._counter("views", "Views of images: encoded, or known", "kind")
        self._first = Histogram(
            "lfm2vl_first_token_seconds", "Time to the first token", buckets=_BUCKETS, registry=self.registry
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"lfm2vl_{name}", text, labels, registry=self.registry)

    def watch(self, counts: Callable[[], dict[str, int]]) -> None:
        """Report the scheduler's counts whenever the metrics are read."""
        for name, key, text in (
            ("queue_length", "waiting", "Requests that wait"),
            ("running", "running", "Requests that have a sequence"),
            ("context_used_tokens", "tokens", "Tokens of context that running requests need at most"),
            ("context_tokens", "n_ctx", "Tokens of context that are allocated"),
        ):
            gauge = Gauge(f"lfm2vl_{name}", text, registry=self.registry)
            gauge.set_function(partial(_count, counts, key))

    def count_request(self, endpoint: str, status: int) -> None:
        """Count a response."""
        self._requests.labels(endpoint, str(status)).inc()

    def count_answer(self, outcome: str, stats: Stats | None = None) -> None:
        """Count an answer: `stop`, `length`, `tool_calls`, `cancelled` or `error`; and what it cost."""
        self._answers.labels(outcome).inc()
        if stats is None:
            return
        for phase in _PHASES:
            self._seconds.labels(phase).inc(getattr(stats, f"{phase}_seconds"))
        self._tokens.labels("prompt").inc(stats.prompt_tokens - stats.restored_tokens)
        self._tokens.labels("restored").inc(stats.restored_tokens)
        self._tokens.labels("completion").inc(stats.completion_tokens)
        self._views.labels("encoded").inc(stats.encoded_views)
        self._views.labels("known").inc(stats.views - stats.encoded_views)
        self._first.observe(stats.first_token_seconds)

    def text(self) -> bytes:
        """Return everything in Prometheus's text format."""
        return generate_latest(self.registry)


def _count(counts: Callable[[], dict[str, int]], key: str) -> float:
    return float(counts()[key])
