"""Time linear layers with GGUF weights against BF16, FP32 and decoding the whole weight first, on the CPU.

    python -m benchmarks.gguf_layers --output benchmarks/results/gguf_layers.json

All in one process, in alternation; x is bfloat16, float32 for ``fp32``. A ratio above 1 means that the quantized
layer is faster.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import alternate, summary, write
from lowbit.ops import gguf
from lowbit.ops.dispatch import Problem, select

TYPES = ("Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K")
ROWS = (1, 8, 64, 256, 1088)
DISTINCT_ROWS = 128  # of the weight; they are repeated, to save the time of quantizing


def cases_for(kind: str, weight: torch.Tensor, x: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """Return the layer in each way, for a weight [N, K] float32 and x [M, K] bfloat16."""
    raw = gguf.gguf_quantize(weight[:DISTINCT_ROWS], kind).repeat(len(weight) // DISTINCT_ROWS, 1)
    problem = Problem(torch.device("cpu"), x.dtype, *weight.shape, weight_type=kind)
    kernel = select("gguf", gguf.IMPLEMENTATIONS, problem).load()
    linear = torch.nn.functional.linear
    half, wide = weight.bfloat16(), x.float()
    return {
        "gguf": lambda: kernel.linear(x, raw, kind, None),
        "bf16": lambda: linear(x, half),
        "fp32": lambda: linear(wide, weight),
        "whole, bf16": lambda: linear(x, gguf.dequantize_operator(raw, kind, torch.bfloat16)),
        "whole, fp32": lambda: linear(x.float(), gguf.dequantize_operator(raw, kind, torch.float32)).bfloat16(),
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=list(TYPES))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--shape", default="3840x3840", help="in_features x out_features")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--budget", type=float, default=4.0, help="seconds per comparison (default 4)")
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args()
    torch.manual_seed(0)
    columns, features = (int(edge) for edge in options.shape.split("x"))
    weight = torch.randn(DISTINCT_ROWS, columns).repeat(features // DISTINCT_ROWS, 1) * columns**-0.5
    results: list[dict[str, Any]] = []
    with torch.no_grad():
        for kind in options.types:
            for rows in options.rows:
                cases = cases_for(kind, weight, torch.randn(rows, columns).bfloat16())
                seconds = alternate(cases, repetitions=options.repetitions, warmup=1, budget=options.budget)
                times = {name: summary(values) for name, values in seconds.items()}
                ours = times["gguf"]["median_ms"]
                ratios = {name: round(times[name]["median_ms"] / ours, 2) for name in times if name != "gguf"}
                results.append(
                    {"type": kind, "m": rows, "k": columns, "n": features, "times": times, "speedup": ratios}
                )
                print(f"{kind:5} M={rows:<5} {ours:8.2f} ms   faster than: {ratios}", flush=True)
    if options.output is not None:
        write(options.output, {"results": results})


if __name__ == "__main__":
    main()
