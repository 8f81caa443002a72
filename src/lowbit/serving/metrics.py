"""Figures for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

import lowbit
from lowbit.engine.async_engine import Done, EngineThread, Failed

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_BATCH = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)


class Metrics:
    """An application's figures, in a registry of their own; observes its engine."""

    def __init__(self, model: str, quantization: str) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Answers by path and status.", "path", "status")
        self.errors = self._counter("errors", "Answers that are errors, by code.", "code")
        self.images = self._counter("images", "Pictures made.")
        self.steps = self._counter("denoising_steps", "Denoising steps of finished requests.")
        self.skipped = self._counter("skipped_steps", "Denoising steps in which a cache spared the blocks.")
        self.aborted = self._counter("ended_early", "Requests that ended without a result, by error.", "error")
        self.wait = self._histogram("queue_wait_seconds", "From arrival to the first step.", _SECONDS)
        self.step = self._histogram("step_seconds", "A step of all requests under way.", _SECONDS)
        self.batch = self._histogram("batch_size", "Requests under way in a step.", _BATCH)
        self.generation = self._histogram("generation_seconds", "From leaving the queue to the picture.", _SECONDS)
        self.waiting = Gauge("lowbit_queue_length", "Requests that wait.", registry=self.registry)
        self.running = Gauge("lowbit_running_requests", "Requests under way.", registry=self.registry)
        info = Gauge("lowbit_info", "What is served.", ("version", "model", "quantization"), registry=self.registry)
        info.labels(lowbit.__version__, model, quantization).set(1)
        ProcessCollector(registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"lowbit_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"lowbit_{name}", text, buckets=buckets, registry=self.registry)

    def watch(self, engine: EngineThread) -> None:
        """Read the lengths of an engine's queues whenever the figures are asked for."""
        self.waiting.set_function(lambda: len(engine.waiting))
        self.running.set_function(lambda: len(engine.running))

    def text(self) -> bytes:
        """Return the figures in Prometheus' text format."""
        return generate_latest(self.registry)

    def started(self, wait_s: float) -> None:
        """See ``Observer``."""
        self.wait.observe(wait_s)

    def stepped(self, requests: int, seconds: float) -> None:
        """See ``Observer``."""
        self.step.observe(seconds)
        self.batch.observe(requests)

    def ended(self, event: Done | Failed) -> None:
        """See ``Observer``."""
        if isinstance(event, Failed):
            self.aborted.labels(type(event.error).__name__).inc()
            return
        output = event.output
        self.images.inc(len(output.images))
        self.steps.inc(output.num_inference_steps)
        self.skipped.inc(len(output.skipped_steps))
        self.generation.observe(output.generation_time_s)
