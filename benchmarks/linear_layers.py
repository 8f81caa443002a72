"""Time quantized linear layers against their BF16 and FP32 twins on the CPU.

    python -m benchmarks.linear_layers --quick
    python -m benchmarks.linear_layers --output benchmarks/results/linear_layers.json
    python -m benchmarks.linear_layers --shapes 3840x10240 --rows 1 1088 --keep-freed-memory

Shapes are in_features x out_features. Each comparison is made in eager mode, in alternation; a ratio above 1 means that
the quantized layer is faster.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.timing import alternate, summary, write
from lowbit.ops import fp8, int8
from lowbit.ops.cpu.memory import keep_freed_memory
from lowbit.ops.dispatch import Problem, select

SHAPES = {
    "Z-Image attention": (3840, 3840),
    "Z-Image feed-forward in": (3840, 10240),
    "Z-Image feed-forward out": (10240, 3840),
    "Qwen-Image, FLUX attention": (3072, 3072),
    "Qwen-Image, FLUX feed-forward in": (3072, 12288),
    "Qwen-Image, FLUX feed-forward out": (12288, 3072),
    "FLUX single block out": (15360, 3072),
}
ROWS = (1, 64, 256, 1088, 4096)
QUICK_SHAPES = ("Z-Image attention", "Z-Image feed-forward in")
QUICK_ROWS = (1, 64, 1088)


def kernel(family: ModuleType, columns: int, features: int) -> ModuleType:
    """Return the module that ``auto`` chooses on this CPU."""
    problem = Problem(torch.device("cpu"), torch.bfloat16, features, columns)
    return select(family.__name__.rsplit(".", 1)[-1], family.IMPLEMENTATIONS, problem).load()


def layers(columns: int, features: int) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Return the same layer in four precisions, each a function of x [M, K] bfloat16 (float32 for ``fp32``)."""
    weight = torch.randn(features, columns) * columns**-0.5
    half = weight.bfloat16()
    linear = torch.nn.functional.linear
    int8_kernel, fp8_kernel = kernel(int8, columns, features), kernel(fp8, columns, features)
    int8_weight, int8_scale = int8.quantize_operator(half)
    int8_packed = int8_kernel.pack_weight(int8_weight)
    fp8_weight, fp8_scale = fp8.quantize_per_token_operator(half)
    fp8_packed = fp8_kernel.pack_weight(fp8_weight)
    return {
        "bf16": lambda x: linear(x, half),
        "fp32": lambda x: linear(x, weight),
        "int8": lambda x: int8_kernel.linear(x, int8_packed, int8_scale, None),
        "fp8": lambda x: fp8_kernel.linear(x, fp8_packed, fp8_scale, None),
    }


def measure(name: str, rows: list[int], repetitions: int, budget: float) -> list[dict[str, Any]]:
    """Time one shape for every number of rows."""
    columns, features = SHAPES.get(name) or tuple(int(edge) for edge in name.split("x"))
    precisions = layers(columns, features)
    results = []
    for count in rows:
        x = torch.randn(count, columns)
        inputs = {precision: x if precision == "fp32" else x.bfloat16() for precision in precisions}
        cases = {
            precision: (lambda layer=layer, given=inputs[precision]: layer(given))
            for precision, layer in precisions.items()
        }
        for case in cases.values():
            case()
        seconds = alternate(cases, repetitions=repetitions, warmup=0, budget=budget)
        times = {precision: summary(values) for precision, values in seconds.items()}
        ratios = {
            f"{quantized}_over_{twin}": round(times[twin]["median_ms"] / times[quantized]["median_ms"], 2)
            for quantized in ("int8", "fp8")
            for twin in ("bf16", "fp32")
        }
        results.append({"layer": name, "m": count, "k": columns, "n": features, "times": times, "speedup": ratios})
        shown = "  ".join(f"{precision} {times[precision]['median_ms']:9.2f}" for precision in times)
        print(f"M={count:<5}K={columns:<6}N={features:<6}ms: {shown}   speedup: {ratios}", flush=True)
    return results


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=None, help="names or KxN; default: all of " + ", ".join(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=None, help=f"default: {ROWS}")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--budget", type=float, default=10.0, help="seconds per comparison (default 10)")
    parser.add_argument("--quick", action="store_true", help=f"rows {QUICK_ROWS}, two shapes, 1.5 s each")
    parser.add_argument("--keep-freed-memory", action="store_true", help="see lowbit.ops.cpu.memory; for all alike")
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args()
    if options.keep_freed_memory:
        keep_freed_memory()
    torch.manual_seed(0)
    shapes = options.shapes or list(QUICK_SHAPES if options.quick else SHAPES)
    rows = options.rows or list(QUICK_ROWS if options.quick else ROWS)
    budget = min(options.budget, 1.5) if options.quick else options.budget
    results: list[dict[str, Any]] = []
    with torch.no_grad():
        for name in shapes:
            results += measure(name, rows, options.repetitions, budget)
    if options.output is not None:
        write(options.output, {"keep_freed_memory": options.keep_freed_memory, "results": results})


if __name__ == "__main__":
    main()
