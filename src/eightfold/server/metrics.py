"""Counts and times for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from eightfold.engine.outputs import EngineStats, RequestOutput

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST_TOKEN = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.25, 2.5, 5, 10, 20, 40, 80)
_PER_TOKEN = (0.001, 0.002, 0.004, 0.006, 0.008, 0.012, 0.016, 0.024, 0.032, 0.05, 0.075, 0.1, 0.2, 0.4, 0.8, 2)
_WHOLE = (0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 25, 50, 100, 200, 400, 800)

_GAUGES = {
    "requests_waiting": ("waiting", "Sequences that wait for their turn."),
    "requests_running": ("running", "Sequences that run."),
    "kv_cache_blocks": ("blocks_total", "Blocks of the key/value cache."),
    "kv_cache_blocks_used": ("blocks_used", "Blocks of the key/value cache that sequences hold."),
}
_COUNTERS = {
    "preemptions": ("preemptions", "Sequences that gave their blocks back and began again."),
    "prefix_cache_query_tokens": ("prefix_query_tokens", "Tokens of prompts that were looked up in the cache."),
    "prefix_cache_hit_tokens": ("prefix_hit_tokens", "Tokens of prompts that were found in the cache."),
    "engine_prompt_tokens": ("prompt_tokens", "Tokens of prompts that were computed."),
    "engine_generated_tokens": ("generated_tokens", "Tokens that were generated, also for clients that left."),
    "draft_tokens": ("drafted", "Tokens that prompt lookup guessed."),
    "draft_tokens_accepted": ("accepted", "Guesses of it that were right."),
    "model_draft_tokens": ("model_drafted", "Tokens that the draft model guessed."),
    "model_draft_tokens_accepted": ("model_accepted", "Guesses of it that were right."),
    "decode_passes": ("passes", "Steps that gave a sequence tokens, counted for each sequence."),
}


class Metrics:
    """The metrics of one server."""

    def __init__(self, model: str, stats: Callable[[], EngineStats]) -> None:
        registry = self._registry = CollectorRegistry()
        registry.register(_Engine(model, stats))
        name, labels = "eightfold_{}".format, ["model"]

        def histogram(what: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name(what), text, labels, registry=registry, buckets=buckets).labels(model)

        def counter(what: str, text: str) -> Counter:
            return Counter(name(what), text, labels, registry=registry).labels(model)

        self._first_token = histogram("time_to_first_token_seconds", "Arrival to first token.", _FIRST_TOKEN)
        self._per_token = histogram(
            "time_per_output_token_seconds", "Mean of an answer, its first left out.", _PER_TOKEN
        )
        self._whole = histogram("request_seconds", "Arrival to last token.", _WHOLE)
        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts of finished requests.")
        self._generated_tokens = counter("generated_tokens", "Tokens of answers of finished requests.")
        self._finished = Counter(name("answers_finished"), "Answers.", [*labels, "reason"], registry=registry)
        self._http = Counter(name("http_requests"), "Requests over HTTP.", ["path", "status"], registry=registry)
        self._model = model

    def finished(self, output: RequestOutput) -> None:
        times = output.times
        self._prompt_tokens.inc(len(output.prompt_ids))
        for answer in output.outputs:
            count = len(answer.token_ids)
            self._generated_tokens.inc(count)
            self._finished.labels(self._model, answer.finish_reason or "abort").inc()
            if count > 1 and times.finished is not None and times.first_token is not None:
                self._per_token.observe((times.finished - times.first_token) / (count - 1))
        if times.first_token is not None:
            self._first_token.observe(times.first_token - times.arrival)
        if times.finished is not None:
            self._whole.observe(times.finished - times.arrival)

    def aborted(self, answers: int) -> None:
        self._finished.labels(self._model, "abort").inc(answers)

    def answered(self, path: str, status: int) -> None:
        """Take note of an answer over HTTP; `path` is one of ours, or "other"."""
        self._http.labels(path, str(status)).inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _Engine:
    """The engine's own counts, asked for when they are read."""

    def __init__(self, model: str, stats: Callable[[], EngineStats]) -> None:
        self._model, self._stats = model, stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, (field, text) in _GAUGES.items():
            gauge = GaugeMetricFamily(f"eightfold_{name}", text, labels=["model"])
            gauge.add_metric([self._model], getattr(stats, field))
            yield gauge
        use = GaugeMetricFamily("eightfold_kv_cache_usage_ratio", "Share of blocks that are held.", labels=["model"])
        use.add_metric([self._model], stats.blocks_used / max(stats.blocks_total, 1))
        yield use
        for name, (field, text) in _COUNTERS.items():
            counter = CounterMetricFamily(f"eightfold_{name}", text, labels=["model"])
            counter.add_metric([self._model], getattr(stats, field))
            yield counter
