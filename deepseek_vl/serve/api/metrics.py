"""The server's metrics, for Prometheus."""

from fastapi import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from deepseek_vl.engine.engine import Engine
from deepseek_vl.engine.generation import Generation


class Metrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "deepseek_vl_requests", "HTTP answers by status and route.", ["status", "route"], registry=registry
        )
        self.prompt_tokens = Counter("deepseek_vl_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.completion_tokens = Counter("deepseek_vl_completion_tokens", "Tokens of answers.", registry=registry)
        self.first_piece = Histogram(
            "deepseek_vl_first_piece_seconds",
            "From a request to its answer's first text.",
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
            registry=registry,
        )
        self.cached_tokens = Counter(
            "deepseek_vl_cached_tokens", "Tokens of prompts that did not run again.", registry=registry
        )
        self._memory = Gauge(
            "deepseek_vl_memory_bytes", "Set aside for running answers, or kept of earlier ones.", registry=registry
        )
        self._budget = Gauge("deepseek_vl_memory_budget_bytes", "Limit of the memory in use.", registry=registry)
        self._running = Gauge("deepseek_vl_running", "Answers being generated.", registry=registry)
        self._waiting = Gauge("deepseek_vl_waiting", "Answers waiting for a place in the batch.", registry=registry)

    def count_tokens(self, generation: Generation) -> None:
        """Count the tokens of a generation that has ended; any thread may call it."""
        if generation.token_ids:  # else its prompt has not run
            self.prompt_tokens.inc(generation.prompt_tokens)
            self.cached_tokens.inc(generation.cached_tokens)
            self.completion_tokens.inc(len(generation.token_ids))

    def response(self, engine: Engine, requests: int) -> Response:
        """The metrics in Prometheus' text format; `requests` is how many answers are running or waiting."""
        running = engine.running
        self._running.set(running)
        self._waiting.set(max(0, requests - running))
        self._memory.set(engine.memory_used)
        self._budget.set(engine.memory_bytes)
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)
