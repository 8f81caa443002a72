"""Time one step of a transformer of real width: 8 bits against 16 and 32, and against other libraries.

    python -m benchmarks.transformer_step --quick
    python -m benchmarks.transformer_step --output benchmarks/results/transformer_step.json
    python -m benchmarks.transformer_step --model qwen-image --layers 2 --variants bf16 fp32 int8 int8-compiled torchao
    python -m benchmarks.transformer_step --size 1024 --layers 1 --repetitions 2 --dtype float32

The model has the published width and few layers, random weights, and sees a square picture and the text of its
published shape (``lowbit.models.published``). All variants share one bfloat16 model's weights, quantize the same
layers and are timed in alternation: first with the system's allocator settings, then with those of
``lowbit.ops.cpu.memory``, for all alike. Compiled blocks are one graph each; falling back to eager mode, or compiling
while timing, ends the run with an error. A library that isn't installed is left out and named.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.timing import write
from lowbit.bench.peers import PEERS
from lowbit.bench.steps import (
    COMPILED,
    DEFAULT_ALLOCATOR,
    KEPT_ALLOCATOR,
    check_precisions,
    make_variants,
    table,
    time_variants,
)
from lowbit.bench.transformers import find_subject
from lowbit.models.published import PUBLISHED

ALLOCATORS = {"default": (DEFAULT_ALLOCATOR,), "kept": (KEPT_ALLOCATOR,), "both": (DEFAULT_ALLOCATOR, KEPT_ALLOCATOR)}
PRECISIONS = ("bf16", "fp32", "int8", "fp8", "torchao", "sdnq", "quanto", "gguf")
EAGER_ONLY = ("quanto", "gguf")  # weight-only: their time is that of the product in the activations' precision
VARIANTS = tuple(name for p in PRECISIONS for name in ((p,) if p in EAGER_ONLY else (p, p + COMPILED)))
QUICK_VARIANTS = ("bf16", "fp32", "int8", "fp8")


def installed(variants: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide variants into those that can run and those whose library is missing."""
    present: list[str] = []
    missing: list[str] = []
    for variant in variants:
        peer = PEERS.get(variant.removesuffix(COMPILED))
        (present if peer is None or peer.installed else missing).append(variant)
    return present, missing


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[entry.name for entry in PUBLISHED], default="z-image")
    parser.add_argument("--variants", nargs="+", default=None, help=f"default: {' '.join(VARIANTS)}")
    parser.add_argument("--layers", type=int, default=3, help="of the main list (default 3); others in proportion")
    parser.add_argument("--size", type=int, default=512, help="of the picture, in pixels (default 512)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of quantized variants")
    parser.add_argument("--repetitions", type=int, default=3, help="rounds for each allocator (default 3)")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds per allocator; two rounds at least")
    parser.add_argument("--allocator", choices=ALLOCATORS, default="both", help="settings for all alike")
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK_VARIANTS)}; one layer, two rounds")
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    return parser.parse_args(arguments)


def main() -> None:
    """Run the command line."""
    options = parse()
    if options.quick:
        options.layers, options.repetitions = 1, 2
    variants, missing = installed(options.variants or (QUICK_VARIANTS if options.quick else VARIANTS))
    if missing:
        print(f"left out, not installed: {', '.join(missing)}")
    check_precisions(variants)
    subject = find_subject(options.model, size=options.size, layers=options.layers, num_frames=1)
    base = subject.load(torch.bfloat16, torch.device("cpu"))
    dtype = getattr(torch, options.dtype)
    built = make_variants(base, variants, subject.workload, dtype, lambda text: print(text, flush=True))
    rows = time_variants(
        built, repetitions=options.repetitions, budget=options.budget, allocators=ALLOCATORS[options.allocator]
    )
    print(table(rows))
    if options.output is not None:
        setting = {name: getattr(options, name) for name in ("model", "layers", "size", "dtype")}
        tokens = subject.workload.image_tokens + subject.workload.text_tokens
        write(options.output, {**setting, "tokens": tokens, "left_out": missing, "results": rows})


if __name__ == "__main__":
    main()
