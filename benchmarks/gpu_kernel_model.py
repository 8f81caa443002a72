"""Predict the time of every Triton kernel from the chips' limits: nothing here is measured.

    python -m benchmarks.gpu_kernel_model --output benchmarks/results/gpu_kernel_model.json

Products are predicted as in ``benchmarks.gpu_model``, with the tile that is launched. Kernels of few rows with packed
weights read them once; what decodes or quantizes passes over memory once. Attention makes its two products at the 8-bit
rate, at the share of it that fused kernels reach, and an exponential for each score, of which a multiprocessor of
NVIDIA's makes 16 a clock (CUDA programming guide, throughput of arithmetic instructions). *Of the limit* is the least
time that the data sheet allows, for the operations or for the bytes that must move, over the predicted one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_model import (
    ATTENTION_SUSTAINED,
    CHIPS,
    MEMORY_SUSTAINED,
    SUSTAINED,
    ChipLimits,
    gemm_bounds,
)
from lowbit.ops.gguf_types import block_type
from lowbit.ops.triton.tiles import FP8, FP8_BLOCKS, INT8, choose_tile

TOKENS, WIDTH, HIDDEN, HEADS = 4352, 3840, 10240, 30  # Z-Image at 1024x1024 with 256 tokens of text
FEW = 16
EXPONENTIALS_PER_CLOCK = 16

Bounds = dict[str, float]
"""Part of the chip -> seconds that it needs."""


@dataclass(frozen=True)
class Prediction:
    """What a kernel needs of a chip.

    Attributes:
        bounds: seconds, sustained rates assumed.
        least: seconds by the data sheet.
    """

    bounds: Bounds
    least: float


def moving(chip: ChipLimits, count: float) -> Prediction:
    """Return what moving ``count`` bytes once takes."""
    least = count / (chip.memory * 1e12)
    return Prediction({"memory": least / MEMORY_SUSTAINED}, least)


def product(chip: ChipLimits, kind: str, m: int, k: int, n: int) -> Prediction | None:
    """Return a product of operands of 8 bits; ``None`` where the chip has none."""
    rate = "fp8" if kind == FP8_BLOCKS else kind
    if rate not in chip.rates:
        return None
    least = max(2 * m * n * k / (chip.rates[rate] * 1e12), (m * k + n * k + 2 * m * n) / (chip.memory * 1e12))
    return Prediction(gemm_bounds(chip, rate, m, k, n, choose_tile(kind, chip.target, m, n)), least)


def packed_product(chip: ChipLimits, m: int, bytes_per_weight: float) -> Prediction:
    """Return a product of few rows in 16 bits with a weight that is decoded on the way."""
    operations = 2 * m * WIDTH * HIDDEN
    moved = WIDTH * HIDDEN * bytes_per_weight + 2 * m * (WIDTH + HIDDEN)
    least = max(operations / (chip.rates["bf16"] * 1e12), moved / (chip.memory * 1e12))
    # Tiles of 16 rows whatever m is.
    multiplied = 2 * -(-m // 16) * 16 * WIDTH * HIDDEN / (chip.rates["bf16"] * 1e12 * SUSTAINED["bf16"])
    return Prediction({"tensor cores": multiplied, "memory": moved / (chip.memory * 1e12 * MEMORY_SUSTAINED)}, least)


def attention(chip: ChipLimits, kind: str) -> Prediction | None:
    """Return attention of ``TOKENS`` tokens, quantizing keys and values not counted."""
    rate = kind if kind in chip.rates else "bf16"  # fp8 is decoded to 16 bits where it is not multiplied
    operations = 4 * TOKENS * TOKENS * WIDTH
    least = operations / (chip.rates[rate] * 1e12)
    bounds = {"tensor cores": least / ATTENTION_SUSTAINED}
    if chip.clock:
        exponentials = HEADS * TOKENS * TOKENS
        bounds["exponentials"] = exponentials / (EXPONENTIALS_PER_CLOCK * chip.target.processors * chip.clock * 1e9)
    return Prediction(bounds, least)


KERNELS: Mapping[str, Callable[[ChipLimits], Prediction | None]] = {
    f"int8 product, {TOKENS} rows": lambda chip: product(chip, INT8, TOKENS, WIDTH, HIDDEN),
    f"fp8 product, {TOKENS} rows": lambda chip: product(chip, FP8, TOKENS, WIDTH, HIDDEN),
    f"fp8 product in blocks of 128, {TOKENS} rows": lambda chip: product(chip, FP8_BLOCKS, TOKENS, WIDTH, HIDDEN),
    f"int8 product, {FEW} rows": lambda chip: product(chip, INT8, FEW, WIDTH, HIDDEN),
    f"fp8 product, {FEW} rows": lambda chip: product(chip, FP8, FEW, WIDTH, HIDDEN),
    "int8 or fp8 weight-only, 1 row": lambda chip: packed_product(chip, 1, 1.0),
    f"4 bits in groups of 128, {FEW} rows": lambda chip: packed_product(chip, FEW, (64 + 2) / 128),
    f"GGUF Q4_K, {FEW} rows": lambda chip: packed_product(chip, FEW, gguf_bytes("Q4_K")),
    f"GGUF Q8_0, {FEW} rows": lambda chip: packed_product(chip, FEW, gguf_bytes("Q8_0")),
    f"mxfp4 weight-only, {FEW} rows": lambda chip: packed_product(chip, FEW, (16 + 1) / 32),
    f"nvfp4 weight-only, {FEW} rows": lambda chip: packed_product(chip, FEW, (8 + 1) / 16),
    f"quantizing to int8 or fp8, {TOKENS} rows": lambda chip: moving(chip, 3 * TOKENS * WIDTH),
    "norm and rotary embedding of heads": lambda chip: moving(chip, 4 * TOKENS * WIDTH),
    "gate": lambda chip: moving(chip, 6 * TOKENS * HIDDEN),
    "attention in int8": lambda chip: attention(chip, INT8),
    "attention in fp8": lambda chip: attention(chip, FP8),
}


def gguf_bytes(kind: str) -> float:
    """Return the bytes of a weight in a block type of GGUF."""
    block = block_type(kind)
    return block.bytes / block.elements


def predict(chips: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield a row per kernel and chip."""
    for kernel, make in KERNELS.items():
        for name in chips:
            prediction = make(CHIPS[name])
            if prediction is None:
                continue
            bound, seconds = max(prediction.bounds.items(), key=lambda item: item[1])
            yield {
                "kernel": kernel,
                "chip": name,
                "microseconds": round(1e6 * seconds, 1),
                "bound_by": bound,
                "of_the_limit": round(prediction.least / seconds, 2),
            }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the predictions as Markdown: a row per kernel, a column per chip."""
    chips = list(dict.fromkeys(row["chip"] for row in rows))
    cells = {
        (row["kernel"], row["chip"]): f"{row['microseconds']:,.1f}, {row['bound_by']}, {row['of_the_limit']:.0%}"
        for row in rows
    }
    lines = [f"| kernel: us, bound by, of the limit | {' | '.join(chips)} |", f"|---|{'---|' * len(chips)}"]
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        lines.append(f"| {kernel} | {' | '.join(cells.get((kernel, chip), '') for chip in chips)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=list(CHIPS), default=list(CHIPS))
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args(arguments)
    rows = list(predict(options.chips))
    print(f"Predicted, not measured; Z-Image's width\n\n{table(rows)}")
    if options.output is not None:
        options.output.write_text(json.dumps({"predicted": True, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
