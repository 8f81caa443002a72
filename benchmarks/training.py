"""Time a training step of a LoRA on a transformer of real width, and its memory: quantized bases against BF16.

    python -m benchmarks.training --quick
    python -m benchmarks.training --output benchmarks/results/training.json
    python -m benchmarks.training --model z-image --layers 2 --size 512 --methods int8 nvfp4

The model has the published width and few layers, random weights, adapters of rank 16 on its attention and feed-forward
layers, activation checkpointing, and AdamW. A step is forward, backward and update. Steps are timed in alternation in
one process; memory is the greatest resident size of a step over that before the weights were made, each in a process of
its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from benchmarks.timing import alternate, summary, write
from lowbit.bench.inputs import step_inputs
from lowbit.bench.transformers import Subject, find_subject, share
from lowbit.engine.memory import status_bytes
from lowbit.quantization.factory import build_quant_config
from lowbit.quantization.plan import plan_layers, quantize_model

BF16 = "bf16"
METHODS = ("int8", "fp8", "nvfp4", "auto-round")
RANK = 16


def trainer(subject: Subject, base: nn.Module, method: str) -> Callable[[], float]:
    """Return a function that makes one training step and returns its loss.

    Args:
        subject: the model and what a step is to make.
        base: its unquantized weights, which are shared or dropped.
        method: ``"bf16"`` or a quantization method.
    """
    config: Any = build_quant_config("int8")
    names = [name for name, decision in plan_layers(base, config).items() if decision.method]
    model: Any = share(base)
    if method != BF16:
        quantize_model(model, method)
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names))
    model.enable_gradient_checkpointing()
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    given = step_inputs(model, subject.workload, torch.bfloat16)

    def step() -> float:
        optimizer.zero_grad()
        found = model(**given, return_dict=False)[0]
        first = found[0] if isinstance(found, list) else found
        loss = first.float().square().mean()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def memory_of(subject: Subject, method: str) -> float:
    """Return the megabytes that weights and a training step add to this fresh process."""
    before = status_bytes("VmRSS")
    base = subject.load(torch.bfloat16, torch.device("cpu"))
    step = trainer(subject, base, method)
    del base
    Path("/proc/self/clear_refs").write_text("5")  # the greatest size so far is of before
    for _ in range(2):
        step()
    return (status_bytes("VmHWM") - before) / 1e6


def in_process(options: argparse.Namespace, method: str) -> float:
    """Return ``memory_of`` of a process of its own."""
    setting = ["--model", options.model, "--layers", str(options.layers), "--size", str(options.size)]
    command = [sys.executable, "-m", "benchmarks.training", *setting, "--memory-of", method]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the results as text."""
    lines = [f"{'base':12} {'step':>10} {'over BF16':>10} {'memory':>10} {'of BF16':>8}"]
    for row in rows:
        lines.append(
            f"{row['method']:12} {row['median_ms']:7.0f} ms {row['over_bf16']:10.2f} {row['memory_mb']:7.0f} MB"
            f" {row['memory_of_bf16']:8.2f}"
        )
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="z-image")
    parser.add_argument("--layers", type=int, default=2, help="of the main list (default 2); others in proportion")
    parser.add_argument("--size", type=int, default=512, help="of the picture, in pixels (default 512)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="besides bf16")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="int8; one layer, two rounds")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args(arguments)


def main() -> None:
    """Run the command line."""
    options = parse()
    if options.quick:
        options.layers, options.repetitions, options.methods = 1, 2, ["int8"]
    subject = find_subject(options.model, size=options.size, layers=options.layers, num_frames=1)
    if options.memory_of:
        print(memory_of(subject, options.memory_of))
        return
    methods = [BF16, *options.methods]
    memory = {method: in_process(options, method) for method in methods}
    base = subject.load(torch.bfloat16, torch.device("cpu"))
    steps = {method: trainer(subject, base, method) for method in methods}
    times = alternate(steps, repetitions=options.repetitions, progress="training steps")
    found = {method: summary(values) for method, values in times.items()}
    rows = [
        {
            "method": method,
            **found[method],
            "over_bf16": round(found[BF16]["median_ms"] / found[method]["median_ms"], 3),
            "memory_mb": round(memory[method], 1),
            "memory_of_bf16": round(memory[method] / memory[BF16], 3),
        }
        for method in methods
    ]
    print(table(rows))
    if options.output is not None:
        setting = {name: getattr(options, name) for name in ("model", "layers", "size")}
        write(options.output, {**setting, "rank": RANK, "results": rows})


if __name__ == "__main__":
    main()
