"""Time attention on the CPU: torch's scaled_dot_product_attention in BF16 and FP32 against lowbit's kernels.

    python -m benchmarks.attention --quick
    python -m benchmarks.attention --output benchmarks/results/attention.json

Inputs are [1, tokens, heads, head_dim] BF16, normal, the keys with a mean per channel; ``sdpa_fp32`` gets the same
values in FP32. Cases alternate. Errors are relative (Frobenius norm) to attention in float64, over two heads.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import alternate, summary, write
from lowbit.ops.attention import UNQUANTIZED, AttentionProblem, attention_operator, select_kernel
from lowbit.ops.cpu.memory import keep_freed_memory

# Name -> kind and kernel; torch's own are named sdpa_*.
CASES = {
    "sdpa_bf16": (UNQUANTIZED, "sdpa"),
    "sdpa_fp32": (UNQUANTIZED, "sdpa"),
    "lowbit_unquantized": (UNQUANTIZED, "native"),
    "lowbit_int8": ("int8", "auto"),
    "lowbit_fp8": ("fp8", "auto"),
}
CHECKED_HEADS = 2


def make(tokens: int, heads: int, width: int) -> list[torch.Tensor]:
    """Return query, key and value in BF16."""
    query, key, value = (torch.randn(1, tokens, heads, width) for _ in range(3))
    return [tensor.bfloat16() for tensor in (query, key + 2 * torch.randn(heads, width), value)]


def runs(inputs: list[torch.Tensor]) -> dict[str, Callable[[], torch.Tensor]]:
    """Return the cases that run here, each computing attention of ``inputs``."""
    single = [tensor.float() for tensor in inputs]
    width = inputs[0].shape[-1]
    found: dict[str, Callable[[], torch.Tensor]] = {}
    for name, (kind, option) in CASES.items():
        given = single if name.endswith("fp32") else inputs
        try:
            kernel = select_kernel(AttentionProblem(torch.device("cpu"), given[0].dtype, kind, width), option)
        except ValueError as error:
            print(f"left out {name}: {error}")
            continue
        found[name] = lambda given=given, kind=kind, kernel=kernel: attention_operator(  # type: ignore[misc]
            *given, None, width**-0.5, False, kind, kernel
        )
    return found


def relative_error(result: torch.Tensor, inputs: list[torch.Tensor]) -> float:
    """Return the error of the first heads of ``result`` against float64."""
    query, key, value = (tensor[:, :, :CHECKED_HEADS].double().transpose(1, 2) for tensor in inputs)
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    return float((result[:, :, :CHECKED_HEADS].double() - exact).norm() / exact.norm())


def measure(tokens: int, heads: int, width: int, repetitions: int, budget: float) -> dict[str, Any]:
    """Time one size."""
    inputs = make(tokens, heads, width)
    cases = runs(inputs)
    errors = {name: relative_error(case(), inputs) for name, case in cases.items()}
    seconds = alternate(cases, repetitions=repetitions, warmup=0, budget=budget)
    times = {name: summary(values) for name, values in seconds.items()}
    speedup = {
        f"{name}_over_{baseline}": round(times[baseline]["median_ms"] / times[name]["median_ms"], 2)
        for name in times
        if name.startswith("lowbit")
        for baseline in ("sdpa_bf16", "sdpa_fp32")
    }
    for name, time in times.items():
        print(
            f"{tokens:6} tokens  {name:20} {time['median_ms']:10.1f} ms   relative error {errors[name]:.2e}", flush=True
        )
    print(f"{tokens:6} tokens  {speedup}", flush=True)
    return {
        "tokens": tokens,
        "heads": heads,
        "head_dim": width,
        "times": times,
        "relative_error": {name: float(f"{error:.3g}") for name, error in errors.items()},
        "speedup": speedup,
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=None, help="default: 1088 4160")
    parser.add_argument("--heads", type=int, default=30)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--budget", type=float, default=90.0, help="seconds per size (default 90)")
    parser.add_argument("--quick", action="store_true", help="1088 tokens, three repetitions")
    parser.add_argument("--keep-freed-memory", action="store_true", help="see lowbit.ops.cpu.memory; for all alike")
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args()
    if options.keep_freed_memory:
        keep_freed_memory()
    torch.manual_seed(0)
    sizes = options.tokens or ([1088] if options.quick else [1088, 4160])
    repetitions = 3 if options.quick else options.repetitions
    with torch.no_grad():
        results = [measure(tokens, options.heads, options.head_dim, repetitions, options.budget) for tokens in sizes]
    if options.output is not None:
        write(options.output, {"keep_freed_memory": options.keep_freed_memory, "results": results})


if __name__ == "__main__":
    main()
