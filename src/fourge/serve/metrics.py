"""Prometheus metrics. vllm's names with the prefix ``fourge:`` for ``vllm:``, same meaning; ours
besides: tool_call_unknown_names, and spec_decode_position_0_alarm (acceptance of the first draft
below 0.3, which a broken MTP layer shows first).
"""

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fourge.engine.async_engine import Spent
from fourge.formats.cache_rows import PAGE_TOKENS
from fourge.serve.served import TokenEngine

ALARM_BELOW = 0.3
ALARM_AFTER = 200  # drafts; fewer say little
_LATENCIES_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
    300.0, 600.0,
)  # fmt: skip

_CACHE_CONFIG = ("cache_kind", "enable_prefix_caching", "gpu_memory_utilization")

# metric -> (key of Engine.stats, what it is)
_GAUGES = {
    "num_requests_running": ("running", "Requests that take part in steps."),
    "num_requests_waiting": ("waiting", "Requests that wait for a place."),
    "kv_cache_usage_perc": ("cache_usage", "Share of cache pages that are in use, 0 to 1."),
}
_COUNTERS = {
    "prefix_cache_queries": ("prompt_tokens", "Prompt tokens looked up in the prefix cache."),
    "prefix_cache_hits": ("cached_prompt_tokens", "Prompt tokens found there."),
    "prompt_tokens": ("prompt_tokens", "Prompt tokens of requests that began to answer."),
    "generation_tokens": ("output_tokens", "Tokens generated."),
    "num_preemptions": ("preemptions", "Times that a request gave its pages back."),
    "spec_decode_num_drafts": ("drafts", "Times that drafts were verified."),
    "spec_decode_num_draft_tokens": ("draft_tokens", "Tokens drafted."),
    "spec_decode_num_accepted_tokens": ("accepted_tokens", "Drafted tokens that stood."),
}


class Metrics:
    """One registry per server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._success = Counter(
            "fourge:request_success", "Answers that ended, by reason.", ["finished_reason"],
            registry=self.registry,
        )  # fmt: skip
        self._first = self._latency("time_to_first_token", "Until the first token.")
        self._between = self._latency("inter_token_latency", "Between two tokens.")
        self._whole = self._latency("e2e_request_latency", "Until the end of an answer.")
        self._queued = self._latency("request_queue_time", "Until the first step of an answer.")
        self._prefill = self._latency("request_prefill_time", "From there to its first token.")
        self._decode = self._latency("request_decode_time", "From there to its last.")
        self._inference = self._latency("request_inference_time", "From first step to last token.")
        self._each = self._latency(
            "request_time_per_output_token", "Of an answer, after its first token."
        )
        self._lengths = Histogram(
            "fourge:request_generation_tokens", "Tokens of an answer.",
            buckets=[2**power for power in range(18)], registry=self.registry,
        )  # fmt: skip
        self._calls = Counter("fourge:tool_calls", "Tool calls sent.", registry=self.registry)
        self._unknown = Counter(
            "fourge:tool_call_unknown_names", "Calls of tools that the request does not have.",
            registry=self.registry,
        )  # fmt: skip

    def watch(self, engine: TokenEngine, details: Mapping[str, Any]) -> None:
        """Take the engine's own counters with every scrape; ``details`` of its cache go along."""
        self.registry.register(_EngineCollector(engine))
        labels = {name: str(details[name]) for name in _CACHE_CONFIG if name in details}
        labels |= {
            "block_size": str(PAGE_TOKENS),
            "cache_tokens": str(engine.stats()["cache_tokens"]),
        }
        info = Gauge(
            "fourge:cache_config_info", "What the cache is like; always 1.", list(labels),
            registry=self.registry,
        )  # fmt: skip
        info.labels(**labels).set(1)

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def between_tokens(self, seconds: float, count: int) -> None:
        for _ in range(count):
            self._between.observe(seconds)

    def finished(self, reason: str, num_tokens: int, seconds: float) -> None:
        self._success.labels(reason).inc()
        self._lengths.observe(num_tokens)
        self._whole.observe(seconds)

    def phases(self, spent: Spent, num_tokens: int) -> None:
        """Where the time of an answer of so many tokens went, as the engine has it."""
        self._queued.observe(spent.queued_s)
        self._prefill.observe(spent.prefill_s)
        self._decode.observe(spent.decode_s)
        self._inference.observe(spent.prefill_s + spent.decode_s)
        if num_tokens > 1:
            self._each.observe(spent.decode_s / (num_tokens - 1))

    def tool_calls(self, calls: int, unknown: int) -> None:
        self._calls.inc(calls)
        self._unknown.inc(unknown)

    def exposition(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self.registry)

    def _latency(self, name: str, text: str) -> Histogram:
        return Histogram(
            f"fourge:{name}_seconds", text, buckets=_LATENCIES_S, registry=self.registry
        )


class _EngineCollector(Collector):
    def __init__(self, engine: TokenEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        stats = self._engine.stats()
        for name, (key, text) in _GAUGES.items():
            yield GaugeMetricFamily(f"fourge:{name}", text, value=stats[key])
        for name, (key, text) in _COUNTERS.items():
            yield CounterMetricFamily(f"fourge:{name}", text, value=stats[key])
        yield from _acceptance(stats)


def _acceptance(stats: dict[str, Any]) -> Iterable[Metric]:
    """What the drafts of each position are worth; nothing without speculation."""
    shares = stats.get("acceptance_per_position")
    if not shares:
        return
    accepted = CounterMetricFamily(
        "fourge:spec_decode_num_accepted_tokens_per_pos", "Accepted drafts by position.",
        labels=["position"],
    )  # fmt: skip
    for position, share in enumerate(shares):
        accepted.add_metric([str(position)], round(share * stats["drafts"]))
    yield accepted
    alarm = stats["drafts"] >= ALARM_AFTER and shares[0] < ALARM_BELOW
    yield GaugeMetricFamily(
        "fourge:spec_decode_position_0_alarm",
        f"1: fewer than {ALARM_BELOW:.0%} of the first drafts stand, the MTP layer may be broken.",
        value=float(alarm),
    )
