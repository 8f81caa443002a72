"""Timing on a GPU, and what the parts of the GPU benchmark share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Call = Callable[[], Any]
# What is read again within one measurement should not come from the L2 cache: 50 MB on an H100.
COLD_BYTES = 256 << 20


@dataclass
class Context:
    """What a part is given.

    Attributes:
        device: to run on.
        models: names of the published models to take shapes from.
        deadline: ``time.monotonic()`` after which no new row is begun.
        compile: whether to time compiled steps.
        rounds: measurements of each case.
        few_layers: use models of few layers, to try the benchmark itself.
    """

    device: torch.device
    models: Sequence[str]
    deadline: float = float("inf")
    compile: bool = True
    rounds: int = 7
    few_layers: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def remaining(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()


def copies_for(bytes_each: int) -> int:
    """Return how many sets of operands keep the L2 cache cold, 2 to 16."""
    return min(max(-(-COLD_BYTES // max(bytes_each, 1)), 2), 16)


def synchronize(device: torch.device) -> None:
    """Wait for ``device``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def captured(calls: Sequence[Call], device: torch.device) -> Call:
    """Return a function that replays ``calls`` as one CUDA graph, after a warm-up; on the CPU one that calls them."""
    if device.type != "cuda":
        calls[0]()
        return lambda: [call() for call in calls]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def seconds_of(call: Call, device: torch.device) -> float:
    """Return the seconds of one call, by the device's own clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    call()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def time_cases(cases: Mapping[str, Sequence[Call]], context: Context) -> dict[str, Any]:
    """Time cases in alternation, each captured as a CUDA graph of all its calls.

    Args:
        cases: name -> calls that do the same on different operands.
        context: device and rounds.

    Returns:
        name -> median seconds of one call, or the message of what failed.
    """
    results: dict[str, Any] = {}
    replays = {}
    for name, calls in cases.items():
        try:
            replays[name] = captured(calls, context.device)
        except Exception as error:  # a peer that can't run a shape must not end the benchmark
            results[name] = describe(error)
    samples: dict[str, list[float]] = {name: [] for name in replays}
    for turn in range(context.rounds):
        for name in list(replays) if turn % 2 == 0 else reversed(list(replays)):
            samples[name].append(seconds_of(replays[name], context.device) / len(cases[name]))
    return {**results, **{name: statistics.median(values) for name, values in samples.items()}}


def describe(error: BaseException) -> str:
    """Return one line about an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
