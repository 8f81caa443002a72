"""Predict step times on GPUs from the chips' limits: nothing here is measured.

    python -m benchmarks.gpu_model --output benchmarks/results/gpu_model.json

A product's time is the largest of three, plus what cannot overlap:

* the tensor cores' at their sustained rate, with whole waves: ``ceil(tiles / processors)`` tiles one after another on
  the busiest processor, each followed by its epilogue (scaling, converting and storing a tile);
* device memory's: operands read once, the result written once;
* the L2 cache's: every tile reads its rows of both operands.

8-bit layers add the quantization of their input (read in 16 bits, written in 8), those with one input once. A step adds
attention in 16 bits, weight-only modulation, which reads its weights, and the passes over the activations between
layers. All 8-bit products use the tiles of ``lowbit.ops.triton.tiles``; BF16 is given 128x256 tiles on every chip.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.published_models import (
    IMAGE_TOKENS,
    MODELS,
    PublishedModel,
    gemm_shapes,
    quantized_inputs,
    weight_only_weights,
)
from lowbit.ops.triton.launch import Target
from lowbit.ops.triton.tiles import FP8, INT8, Tile, choose_tile

BF16_TILE = Tile(128, 256, 64, num_warps=8, num_stages=4)
# Assumptions, the same for every chip. Large BF16 products sustain about four fifths of the data sheet's rate (8192^3
# of random data: 798 of 989 TFLOP/s on an H100); 8-bit ones draw as much power and are assumed to sustain 70%.
SUSTAINED = {"bf16": 0.80, INT8: 0.70, FP8: 0.70}
ATTENTION_SUSTAINED = 0.5  # of the BF16 rate: what fused attention kernels reach
MEMORY_SUSTAINED = 0.85
# Bytes of L2 reads a clock over the whole chip: NVIDIA states 5120 for the A100; assumed for its successors.
L2_BYTES_PER_CLOCK = 5120
# Passes over [tokens, width] in 16 bits per block outside linear layers and attention: norms, modulation, gates,
# residuals, rotary embedding, activation function; fused by a compiler to about these.
PASSES_PER_BLOCK = 16
# What a tile's epilogue and the start of its pipeline cost, in columns of depth that are multiplied in the same time.
EPILOGUE_COLUMNS = 384


@dataclass(frozen=True)
class ChipLimits:
    """What a data sheet says.

    Attributes:
        target: for the tile tables.
        rates: dense operations a second, in 1e12, by type; a type that is missing is not multiplied.
        memory: bytes a second, in 1e12.
        l2: bytes a second, in 1e12.
        source: where the numbers are from.
        clock: cycles a second at most, in 1e9; 0 where nothing is derived from it.
    """

    target: Target
    rates: dict[str, float]
    memory: float
    l2: float
    source: str
    clock: float = 0.0


def _l2(clock: float) -> float:
    return L2_BYTES_PER_CLOCK * clock / 1e3


CHIPS = {
    "A100 SXM 80 GB": ChipLimits(
        Target("cuda", 80, 108), {"bf16": 312, INT8: 624}, 2.039, _l2(1.41),
        "NVIDIA A100 data sheet; A100 architecture white paper (L2)", 1.41,
    ),
    "H100 SXM": ChipLimits(
        Target("cuda", 90, 132), {"bf16": 989, INT8: 1979, FP8: 1979}, 3.35, _l2(1.83),
        "NVIDIA H100 data sheet (halved: its figures are with sparsity)", 1.83,
    ),
    "H200": ChipLimits(
        Target("cuda", 90, 132), {"bf16": 989, INT8: 1979, FP8: 1979}, 4.8, _l2(1.83),
        "NVIDIA H200 data sheet (halved)", 1.83,
    ),
    "B200": ChipLimits(
        Target("cuda", 100, 148), {"bf16": 2250, INT8: 4500, FP8: 4500}, 8.0, _l2(1.97),
        "NVIDIA DGX B200 data sheet (an eighth, halved)", 1.97,
    ),
    "MI300X": ChipLimits(
        Target("hip", "gfx942", 304), {"bf16": 1307, INT8: 2615, FP8: 1307}, 5.3, 17.2,
        "AMD MI300X data sheet (Infinity Cache bandwidth); FP8 as this project computes it there, in FP16",
    ),
}  # fmt: skip


def gemm_seconds(chip: ChipLimits, kind: str, m: int, k: int, n: int) -> float:
    """Return the predicted time of one [m, k] by [k, n] product with 16-bit results."""
    return max(gemm_bounds(chip, kind, m, k, n).values())


def gemm_bounds(chip: ChipLimits, kind: str, m: int, k: int, n: int, tile: Tile | None = None) -> dict[str, float]:
    """Return the seconds that each part of the chip needs for a product, by default with the table's tile."""
    tile = tile or (BF16_TILE if kind == "bf16" else choose_tile(kind, chip.target, m, n))
    width = 2 if kind == "bf16" else 1
    processors = chip.target.processors
    tiles = tile.programs(m, n)
    rate = chip.rates[kind] * 1e12 * SUSTAINED[kind] / processors
    depth = math.ceil(k / tile.block_k) * tile.block_k + EPILOGUE_COLUMNS / width
    compute = math.ceil(tiles / processors) * 2 * tile.block_m * tile.block_n * depth / rate
    memory = (width * (m * k + n * k) + 2 * m * n) / (chip.memory * 1e12 * MEMORY_SUSTAINED)
    cache = tiles * width * (tile.block_m + tile.block_n) * k / (chip.l2 * 1e12)
    return {"tensor cores": compute, "memory": memory, "L2": cache}


def quantize_seconds(chip: ChipLimits, m: int, k: int) -> float:
    """Return the predicted time to quantize an [m, k] input: one pass."""
    return 3 * m * k / (chip.memory * 1e12 * MEMORY_SUSTAINED)


def step_seconds(chip: ChipLimits, model: PublishedModel, kind: str) -> dict[str, float]:
    """Return the predicted parts of one step of ``model`` on ``chip`` with its products in ``kind``."""
    shapes = gemm_shapes(model)
    memory = chip.memory * 1e12 * MEMORY_SUSTAINED
    tokens, width = model.attention_tokens, model.heads * model.head_dim
    attention = 4 * tokens * tokens * width * model.attention_layers
    return {
        "products": sum(count * gemm_seconds(chip, kind, *shape) for shape, count in shapes.items()),
        "quantization": 0.0
        if kind == "bf16"
        else sum(count * quantize_seconds(chip, m, k) for (m, k), count in quantized_inputs(model).items()),
        "attention": attention / (chip.rates["bf16"] * 1e12 * ATTENTION_SUSTAINED),
        "modulation": weight_only_weights(model) * (2 if kind == "bf16" else 1) / memory,
        "elementwise": PASSES_PER_BLOCK * 2 * tokens * width * model.attention_layers / memory,
    }


def predict(models: Sequence[str], chips: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row per model, chip and type."""
    rows = []
    for name in models:
        for chip_name in chips:
            chip = CHIPS[chip_name]
            parts = {kind: step_seconds(chip, MODELS[name], kind) for kind in chip.rates}
            total = {kind: sum(values.values()) for kind, values in parts.items()}
            for kind, shares in parts.items():
                rows.append(
                    {
                        "model": MODELS[name].title,
                        "chip": chip_name,
                        "kind": kind,
                        "milliseconds": {part: round(1e3 * value, 2) for part, value in shares.items()},
                        "total_ms": round(1e3 * total[kind], 1),
                        "speedup": round(total["bf16"] / total[kind], 2),
                        "speedup_with_8_bit_attention": round(
                            total["bf16"] / (total[kind] - (shares["attention"] / 2 if kind != "bf16" else 0)), 2
                        ),
                    }
                )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the predictions as Markdown."""
    lines = [
        "| model | chip | type | ms a step | products / quantization / attention / modulation / rest | over BF16 |"
        " with 8-bit attention |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        parts = " / ".join(f"{value:.1f}" for value in row["milliseconds"].values())
        ratio = " | " if row["kind"] == "bf16" else f"{row['speedup']:.2f} | {row['speedup_with_8_bit_attention']:.2f}"
        lines.append(f"| {row['model']} | {row['chip']} | {row['kind']} | {row['total_ms']} | {parts} | {ratio} |")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--chips", nargs="+", choices=list(CHIPS), default=list(CHIPS))
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse(arguments)
    rows = predict(options.models, options.chips)
    print(f"Predicted, not measured; {IMAGE_TOKENS} picture tokens\n\n{table(rows)}")
    if options.output is not None:
        sources = {name: CHIPS[name].source for name in options.chips}
        options.output.write_text(json.dumps({"predicted": True, "sources": sources, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
