"""Time a linear layer with every method against BF16, FP32 and decoding the whole weight first, on the CPU.

    python -m benchmarks.linear_methods --quick
    python -m benchmarks.linear_methods --output benchmarks/results/linear_methods.json
    python -m benchmarks.linear_methods --methods int8 fp8 --shapes 3840x10240 10240x3840 --rows 1 1088

Shapes are in_features x out_features. All in one process, in alternation; x is bfloat16, float32 for ``fp32``. A ratio
above 1 means that the quantized layer is faster. ``whole`` decodes the weight as the method's reference does and
multiplies in that type; it takes so much longer that it is timed apart, less often. As in a model, layers are called
one after another, each with a weight of its own; times are those of one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear
from tqdm import tqdm

from benchmarks.timing import alternate, summary, write
from lowbit.quantization import build_quant_config
from lowbit.quantization.base import LinearMethod, QuantizationConfig
from lowbit.quantization.linear import QuantizedLinear

GGUF_TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0")
METHODS: dict[str, dict[str, Any]] = {
    "int8": {"method": "int8"},
    "fp8": {"method": "fp8"},
    "fp8, blocks of 128": {"method": "fp8", "weight_block_size": [128, 128]},
    "mxfp8": {"method": "mxfp8"},
    "mxfp4": {"method": "mxfp4"},
    "mxfp4_dualscale": {"method": "mxfp4_dualscale"},
    "nvfp4": {"method": "nvfp4"},
    "auto-round": {"method": "auto-round", "group_size": 128},
    "auto-round, asymmetric": {"method": "auto-round", "group_size": 128, "sym": False},
    "auto-round, 8 bits": {"method": "auto-round", "group_size": 128, "bits": 8},
    "auto-round, 8 bits, asymmetric": {"method": "auto-round", "group_size": 128, "bits": 8, "sym": False},
    "svdquant": {"method": "svdquant"},
    "svdquant, int4": {"method": "svdquant", "precision": "int4"},
    **{f"gguf {kind}": {"method": "gguf", "gguf_type": kind} for kind in GGUF_TYPES},
}
LAYERS = 8
"""Called one after another."""

ROWS = (1, 8, 64, 256, 1088)
QUICK_METHODS, QUICK_ROWS = ("int8", "fp8", "gguf Q4_K"), (1, 64, 1088)
SLOW_REPETITIONS = 3
"""Of decoding the whole weight, which takes up to a hundred times as long as the layer and varies little."""

DISTINCT_ROWS = 256
"""Of the weight; they are repeated, to save the time of quantizing."""


def quantized_layer(
    method: LinearMethod, quantized: dict[str, torch.Tensor], shape: tuple[int, int]
) -> QuantizedLinear:
    """Return a layer of ``shape`` (K, N) whose output channels repeat those of the ``quantized`` weight."""
    empty = torch.nn.Linear(*shape, bias=False, device="meta")
    layer = QuantizedLinear.like(empty, method, "", torch.bfloat16)
    for name, tensor in quantized.items():
        times = layer.get_parameter(name).shape[0] // tensor.shape[0] if tensor.ndim else 1
        layer.replace_tensor(name, tensor.repeat(times, *[1] * (tensor.ndim - 1)) if times > 1 else tensor)
    layer.process_weights_after_loading()
    return layer


def cases(layer: QuantizedLinear, weight: torch.Tensor, x: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """Return the layer in each way, for its weight [N, K] float32 and x [M, K] bfloat16."""
    half, wide = weight.bfloat16(), x.float()
    restored = layer.bound.kernel.restore(layer.prepared()).weight

    def decoded() -> torch.Tensor:
        return layer.method.dequantize_weight(canonical)

    canonical = QuantizedLinear.like(layer, layer.method, "", torch.bfloat16)
    for name in layer.quantized_names:
        canonical.replace_tensor(name, restored if name == "weight" else layer.get_parameter(name).data)
    return {
        "quantized": lambda: layer(x),
        "bf16": lambda: linear(x, half),
        "fp32": lambda: linear(wide, weight),
        "whole, bf16": lambda: linear(x, decoded().bfloat16()),
        "whole, fp32": lambda: linear(x.float(), decoded()).bfloat16(),
    }


def call_all(functions: list[Callable[[], torch.Tensor]]) -> None:
    """Call ``functions`` one after another."""
    for function in functions:
        function()


def measure(
    name: str, config: QuantizationConfig, shape: tuple[int, int], rows: int, repetitions: int, budget: float
) -> dict[str, Any]:
    """Time one method, shape and number of rows."""
    columns, features = shape
    distinct = torch.randn(DISTINCT_ROWS, columns) * columns**-0.5
    method, x = config.linear_method(), torch.randn(rows, columns).bfloat16()
    quantized = method.quantize_weight(distinct)
    layers = [quantized_layer(method, quantized, shape) for _ in range(LAYERS)]
    weights = [distinct.repeat(features // DISTINCT_ROWS, 1) for _ in layers]
    each = [cases(layer, weight, x) for layer, weight in zip(layers, weights, strict=True)]
    together = {way: partial(call_all, [ways[way] for ways in each]) for way in each[0]}
    whole = {way: together.pop(way) for way in list(together) if way.startswith("whole")}
    seconds = alternate(together, repetitions=repetitions, warmup=2, budget=budget)
    seconds |= alternate(whole, repetitions=SLOW_REPETITIONS, warmup=0, budget=budget)
    times = {way: summary([value / LAYERS for value in values]) for way, values in seconds.items()}
    layer = layers[0]
    ours = times["quantized"]["median_ms"]
    return {
        "method": name,
        "kernel": layer.bound.implementation.name,
        "m": rows,
        "k": columns,
        "n": features,
        "bytes_of_bf16": round(layer.quantized_bytes() / (2 * columns * features), 4),
        "times": times,
        "speedup": {way: round(times[way]["median_ms"] / ours, 2) for way in times if way != "quantized"},
    }


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=None, help="default: all")
    parser.add_argument("--rows", nargs="+", type=int, default=None, help=f"default: {ROWS}")
    parser.add_argument("--shapes", nargs="+", default=["3840x3840"], help="in_features x out_features")
    parser.add_argument("--repetitions", type=int, default=31)
    parser.add_argument("--budget", type=float, default=4.0, help="seconds per comparison (default 4)")
    parser.add_argument("--quick", action="store_true", help=f"methods {QUICK_METHODS}, rows {QUICK_ROWS}")
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args()
    options.shapes = [tuple(int(edge) for edge in shape.split("x")) for shape in options.shapes]
    if any(len(shape) != 2 or shape[1] % DISTINCT_ROWS for shape in options.shapes):
        parser.error(f"--shapes are KxN, N a multiple of {DISTINCT_ROWS}")
    return options


def main() -> None:
    """Run the command line."""
    options = parse()
    torch.manual_seed(0)
    rows = options.rows or list(QUICK_ROWS if options.quick else ROWS)
    methods = options.methods or list(QUICK_METHODS if options.quick else METHODS)
    work = [(name, shape, count) for name in methods for shape in options.shapes for count in rows]
    results: list[dict[str, Any]] = []
    with torch.no_grad():
        for name, shape, count in (progress := tqdm(work, unit="layer")):
            config = build_quant_config(METHODS[name])
            assert isinstance(config, QuantizationConfig)
            found = measure(name, config, shape, count, options.repetitions, options.budget)
            results.append(found)
            ours = found["times"]["quantized"]["median_ms"]
            progress.write(f"{name:20} M={count:<5} {shape} {ours:8.2f} ms   faster than: {found['speedup']}")
    if options.output is not None:
        write(options.output, {"results": results})


if __name__ == "__main__":
    main()
