"""Counts and times of a server for Prometheus."""

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lit_llama.device import resident_memory
from lit_llama.generate.engine.ticket import Statistics

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_ALL = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counts and times of one server.

    Args:
        statistics: Those of the engine; None while there is none.
    """

    def __init__(self, statistics: Callable[[], Statistics | None]) -> None:
        self._registry = CollectorRegistry()
        more: dict[str, Any] = {"registry": self._registry}
        self.replies = Counter("lit_llama_requests", "Replies by path and status.", ["path", "status"], **more)
        self.open = Gauge("lit_llama_requests_open", "Requests that are being answered.", **more)
        self.gone = Counter("lit_llama_disconnects", "Requests whose client went away.", **more)
        self.prompt_tokens = Counter("lit_llama_prompt_tokens", "Tokens of prompts.", **more)
        self.made_tokens = Counter("lit_llama_generated_tokens", "Tokens of answers.", **more)
        self.first = Histogram(
            "lit_llama_time_to_first_token_seconds", "Until an answer began.", buckets=_FIRST, **more
        )
        self.token = Histogram("lit_llama_time_per_token_seconds", "Between tokens, as a mean.", buckets=_TOKEN, **more)
        self.whole = Histogram("lit_llama_request_seconds", "Until an answer was complete.", buckets=_ALL, **more)
        self._registry.register(_Engine(statistics))

    def answered(self, *, prompt: int, made: int, seconds: float, first: float | None) -> None:
        """Count a request that has ended, however it did.

        Args:
            prompt: Tokens of its prompts.
            made: Tokens of its answers.
            seconds: That it took.
            first: Seconds until its answers began; None if they did not.
        """
        self.prompt_tokens.inc(prompt)
        self.made_tokens.inc(made)
        self.whole.observe(seconds)
        if first is not None:
            self.first.observe(first)
            if made > 1:
                self.token.observe((seconds - first) / (made - 1))

    def text(self) -> bytes:
        """Return all metrics in Prometheus's format."""
        return generate_latest(self._registry)


class _Engine(Collector):
    """What the engine counts itself."""

    def __init__(self, statistics: Callable[[], Statistics | None]) -> None:
        self._statistics = statistics

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("lit_llama_resident_bytes", "Memory of the process.", resident_memory())
        now = self._statistics()
        if now is None:
            return
        yield GaugeMetricFamily("lit_llama_answers_running", "Answers in the batch.", now.running)
        yield GaugeMetricFamily("lit_llama_answers_waiting", "Answers in the queue.", now.waiting)
        yield GaugeMetricFamily("lit_llama_cache_blocks", "Blocks of the cache.", now.blocks)
        yield GaugeMetricFamily("lit_llama_cache_blocks_free", "Blocks that nothing running holds.", now.blocks_free)
        counts = {
            "steps": ("Steps of the engine.", now.steps),
            "computed_tokens": ("Tokens that went through the model.", now.computed),
            "cached_tokens": ("Tokens of prompts that were found computed.", now.reused),
            "guessed_tokens": ("Tokens that were guessed.", now.guessed),
            "guessed_right_tokens": ("Guesses that were right.", now.guessed_right),
            "preemptions": ("Answers that were put off for want of memory.", now.preemptions),
        }
        for name, (text, value) in counts.items():
            yield CounterMetricFamily(f"lit_llama_{name}", text, value)
