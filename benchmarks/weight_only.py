"""Time layers whose weights alone are quantized, against BF16, FP32 and how fast memory gives them.

    python -m benchmarks.weight_only --quick
    python -m benchmarks.weight_only --output benchmarks/results/weight_only.json
    python -m benchmarks.weight_only --shapes 3840x3840 --rows 1 8 64 --budget 2

Shapes are in_features x out_features. Every layer is made of as many different weights as do not fit a cache, so that
each call reads its weight from memory. The bandwidth is that of reading a large array, measured before and after.
Reading a weight is summing its tensor's bytes with torch, likewise another at each call: one so small is not read at
the rate of a large array. The limit is the time that memory takes to give the weight, or that torch takes for as many
multiplications in its fastest type, at the best rate it reaches with many rows, whichever is longer.
``--one-core`` computes on one thread and reads its CPU clock, for machines that are busy with other work.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import alternate, summary, write
from lowbit.bench.limits import gemm_limits
from lowbit.ops import fp8, int8, int8_weight_only, mx, w4a16
from lowbit.ops.cpu import fp8 as cpu_fp8
from lowbit.ops.cpu import mx as cpu_mx
from lowbit.ops.cpu import w4a16 as cpu_w4a16
from lowbit.ops.weight_format import Prepared, WeightFormat

SHAPES = ("3840x3840", "3840x10240", "10240x3840", "256x23040")
ROWS = (1, 2, 4, 8, 16, 32, 64, 256, 1088)
QUICK_SHAPES, QUICK_ROWS = ("3840x3840",), (1, 8, 64)
BYTES_BEYOND_CACHES = 200 << 20
MOST_COPIES = 24
BLOCK = (128, 128)
GROUP_SIZE = 128
READING = ", read"

Linear = Callable[[torch.Tensor], torch.Tensor]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Layer:
    """A weight in one format: what computes with it, and what is read for that, the codes first."""

    linear: Linear
    tensors: tuple[torch.Tensor, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def read(self) -> None:
        """Sum the codes' bytes, eight as one."""
        self.tensors[0].view(torch.int64).sum()


def make_layers(weight: torch.Tensor) -> dict[str, Layer]:
    """Return the layer of ``weight`` [N, K] float32 in every format."""
    half = weight.bfloat16()
    codes, scale = int8.quantize_int8_per_token(weight)
    values, channel_scale = fp8.quantize_fp8_per_token(weight)
    block_values, block_scale = fp8.quantize_fp8_per_block(weight, BLOCK)
    packed, group_scale, _ = w4a16.quantize_int4_per_group(weight, GROUP_SIZE, True, torch.bfloat16)
    elements, element_scale = mx.quantize_mxfp4(weight)
    plain, blocks = torch.nn.functional.linear, WeightFormat(block=BLOCK)
    found: dict[str, tuple[Linear, tuple[torch.Tensor, ...]]] = {
        "bf16": (lambda x: plain(x, half), (half,)),
        "fp32": (lambda x: plain(x, weight), (weight,)),
        "int8": (lambda x: int8_weight_only.linear(x, Prepared(codes, scale), None), (codes, scale)),
        "fp8": (lambda x: cpu_fp8.linear(x, Prepared(values, channel_scale), None), (values, channel_scale)),
        "fp8-block": (
            lambda x: cpu_fp8.linear(x, Prepared(block_values, block_scale, format=blocks), None),
            (block_values, block_scale),
        ),
        "int4": (lambda x: cpu_w4a16.linear(x, Prepared(packed, group_scale), None), (packed, group_scale)),
        "mxfp4": (lambda x: cpu_mx.linear(x, Prepared(elements, element_scale), None), (elements, element_scale)),
    }
    return {name: Layer(*parts) for name, parts in found.items()}


def read_bandwidth(clock: Clock, seconds: float = 1.0) -> float:
    """Return the bytes a second at which torch's threads read memory: the best of summing a large array repeatedly."""
    array = torch.ones(64 << 20)
    best, end = 0.0, clock() + seconds
    while clock() < end:
        before = clock()
        array.sum()
        best = max(best, array.nbytes / (clock() - before))
    return best


def product_rate() -> float:
    """Return the operations a second of torch's fastest large product in BF16 or FP32."""
    limits = gemm_limits(("bf16", "fp32"), torch.device("cpu"))
    return max(limit["operations_per_second"] for limit in limits.values())


def alternate_by(clock: Clock, cases: Mapping[str, Callable[[], None]], repetitions: int) -> dict[str, list[float]]:
    """Time each case ``repetitions`` times by ``clock``, in turn, after one call of each: as ``timing.alternate``."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for repetition in range(repetitions + 1):
        for name in cases if repetition % 2 == 0 else reversed([*cases]):
            before = clock()
            cases[name]()
            seconds[name].append(clock() - before)
    return {name: values[1:] for name, values in seconds.items()}


def through_all(layers: list[Layer], x: torch.Tensor) -> Callable[[], None]:
    """Return a function that applies one layer after the other to ``x``."""

    def run() -> None:
        for layer in layers:
            layer.linear(x)

    return run


def read_all(layers: list[Layer]) -> Callable[[], None]:
    """Return a function that reads one weight after the other."""

    def run() -> None:
        for layer in layers:
            layer.read()

    return run


def measure(
    shape: str, rows: list[int], repetitions: int, budget: float, products: float, one_core: bool = False
) -> Iterator[dict[str, Any]]:
    """Time one shape for every number of rows; ``products``: operations a second at most."""
    clock = time.thread_time if one_core else time.perf_counter
    columns, features = (int(edge) for edge in shape.split("x"))
    copies = min(-(-BYTES_BEYOND_CACHES // (columns * features)), MOST_COPIES)
    made = [make_layers(torch.randn(features, columns) * columns**-0.5) for _ in range(copies)]
    for count in rows:
        x = torch.randn(count, columns)
        few = made if count <= 64 else made[:2]  # with many rows memory is not what is waited for
        cases = {
            name: through_all([layers[name] for layers in few], x if name == "fp32" else x.bfloat16())
            for name in made[0]
        }
        cases |= {name + READING: read_all([layers[name] for layers in few]) for name in made[0]}
        bandwidth = read_bandwidth(clock)
        if one_core:
            seconds = alternate_by(clock, cases, repetitions)
        else:
            seconds = alternate(cases, repetitions=repetitions, budget=budget)
        bandwidth = max(bandwidth, read_bandwidth(clock))
        per_call = {name: [value / len(few) for value in values] for name, values in seconds.items()}
        yield result(shape, count, bandwidth, 2 * count * columns * features / products, per_call, made[0])


def result(
    shape: str,
    rows: int,
    bandwidth: float,
    multiplying: float,
    seconds: dict[str, list[float]],
    layers: dict[str, Layer],
) -> dict[str, Any]:
    """Print and return the times, rates and ratios of one comparison; ``multiplying``: seconds at least."""
    times = {name: summary(seconds[name]) for name in layers}
    reading = {name: summary(seconds[name + READING])["median_ms"] for name in layers}
    found: dict[str, Any] = {"shape": shape, "m": rows, "bandwidth_gb_per_second": round(bandwidth / 1e9, 1)}
    print(f"{shape} M={rows}, memory {bandwidth / 1e9:.1f} GB/s", flush=True)
    for name, timed in times.items():
        rate = layers[name].weight_bytes / timed["median_ms"] * 1e3
        limit = max(layers[name].weight_bytes / bandwidth, multiplying)
        line = {
            **timed,
            "us_per_token": round(1e3 * timed["median_ms"] / rows, 1),
            "gb_per_second": round(rate / 1e9, 2),
            "share_of_bandwidth": round(rate / bandwidth, 3),
            "reading_ms": reading[name],
            "share_of_reading": round(reading[name] / timed["median_ms"], 3),
            "share_of_limit": round(1e3 * limit / timed["median_ms"], 3),
            "speedup_over_bf16": round(times["bf16"]["median_ms"] / timed["median_ms"], 2),
            "speedup_over_fp32": round(times["fp32"]["median_ms"] / timed["median_ms"], 2),
        }
        found[name] = line
        print(
            f"  {name:10}{timed['median_ms']:9.3f} ms {line['gb_per_second']:7.2f} GB/s"
            f" {line['share_of_bandwidth']:6.0%}, of reading {line['share_of_reading']:4.0%},"
            f" of the limit {line['share_of_limit']:4.0%}"
            f"  over bf16 {line['speedup_over_bf16']:6.2f}  over fp32 {line['speedup_over_fp32']:6.2f}",
            flush=True,
        )
    return found


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=None, help=f"KxN; default: {' '.join(SHAPES)}")
    parser.add_argument("--rows", nargs="+", type=int, default=None, help=f"default: {ROWS}")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--budget", type=float, default=6.0, help="seconds per comparison (default 6)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SHAPES[0]}, rows {QUICK_ROWS}, 1.5 s each")
    parser.add_argument("--one-core", action="store_true", help="one thread, by its CPU clock; no budget")
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.one_core:
        torch.set_num_threads(1)
    budget = min(options.budget, 1.5) if options.quick else options.budget
    products = product_rate()
    print(f"torch multiplies at {products / 1e12:.2f} TOP/s", flush=True)
    results: list[dict[str, Any]] = []
    with torch.no_grad():
        for shape in options.shapes or list(QUICK_SHAPES if options.quick else SHAPES):
            rows = options.rows or list(QUICK_ROWS if options.quick else ROWS)
            results += measure(shape, rows, options.repetitions, budget, products, options.one_core)
    if options.output is not None:
        head = {"one_core": options.one_core, "operations_per_second": products}
        write(options.output, {**head, "results": results})


if __name__ == "__main__":
    main()
