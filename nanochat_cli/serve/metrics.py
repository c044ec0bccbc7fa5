"""Numbers for Prometheus, named after llama.cpp's; a registry of its own for every engine."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from nanochat_cli.inference.continuous_batch import Row


class Metrics:
    """What the engine counts, in the words of `/metrics`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.prompt = self._counter("prompt_tokens", "Tokens of prompts, read or reused")
        self.reused = self._counter("prompt_tokens_reused", "Tokens of prompts that were not read again")
        self.predicted = self._counter("tokens_predicted", "Tokens drawn")
        self.seconds = self._counter("step_seconds", "Time in steps of the engine")
        self.steps = self._counter("n_decode", "Steps of the engine")
        self.rejected = self._counter("requests_rejected", "Requests that found the queue full")
        self.running = Gauge("nanochat:rows_processing", "Texts in the last step", registry=self.registry)
        self.open = Gauge("nanochat:requests_processing", "Requests that are answered or wait", registry=self.registry)

    def _counter(self, name: str, what: str) -> Counter:
        return Counter(f"nanochat:{name}", what, registry=self.registry)

    def step(self, running: int, seconds: float, begun: Sequence[Row], drawn: int) -> None:
        """Count a step. begun: rows whose prompts it read; drawn: tokens."""
        self.steps.inc()
        self.seconds.inc(seconds)
        self.predicted.inc(drawn)
        self.running.set(running)
        self.prompt.inc(sum(len(row.prompt) for row in begun))
        self.reused.inc(sum(row.reused for row in begun))

    def text(self) -> bytes:
        return generate_latest(self.registry)
