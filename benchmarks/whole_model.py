"""One step of the whole Z-Image transformer in its true shape: 30 layers, 6.15 B parameters, random weights.

    python -m benchmarks.whole_model --output benchmarks/results/whole_model.json
    python -m benchmarks.whole_model --methods int8 --compiled
    python -m benchmarks.whole_model --layers 2                      # to try it out

Each method runs in a process of its own. Weights are made one at a time in bfloat16 and quantized at once, so that no
more than the quantized model and one weight is ever held. The peak is that of the process's resident memory: while
the model is made, and, counted anew, while it computes. BF16 takes 12.3 GB and minutes on a CPU without BF16
instructions: ``--repetitions`` counts steps after the first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.timing import summary, write
from lowbit.quantization import QuantizationConfig

METHODS = ("bf16", "int8", "fp8")


def main() -> None:
    options = parse_arguments()
    if options.worker:
        print(json.dumps(measure(options.methods[0], options)))
        return
    runs = [run_worker(method) for method in options.methods]
    for run in runs:
        baseline = next((other for other in runs if other["method"] == "bf16"), None)
        if baseline:
            run["speedup_over_bf16"] = round(baseline["step"]["median_ms"] / run["step"]["median_ms"], 3)
        print(
            f"{run['method']:5} step {run['step']['median_ms'] / 1e3:8.2f} s (first {run['first_step_seconds']:.2f} s),"
            f" weights {run['weight_bytes'] / 1e9:5.2f} GB, peak {run['peak_bytes_making'] / 1e9:5.2f} GB making it,"
            f" {run['peak_bytes_step'] / 1e9:5.2f} GB computing"
        )
    setting = {name: getattr(options, name) for name in ("size", "layers", "compiled", "keep_freed_memory")}
    if options.output:
        write(options.output, {**setting, "runs": runs})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["int8", "bf16"], help="default: int8 bf16")
    parser.add_argument("--layers", type=int, default=30, help="default: %(default)s, as published")
    parser.add_argument("--size", type=int, default=512, help="of the picture, in pixels (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=2, help="steps after the first (default: %(default)s)")
    parser.add_argument("--compiled", action="store_true", help="compile the blocks")
    parser.add_argument("--keep-freed-memory", action="store_true", help="see lowbit.ops.cpu.memory; for all alike")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_worker(method: str) -> dict[str, Any]:
    arguments = [argument for argument in sys.argv[1:] if argument not in METHODS and argument != "--methods"]
    command = [sys.executable, "-m", "benchmarks.whole_model", *arguments, "--worker", "--methods", method]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def measure(method: str, options: argparse.Namespace) -> dict[str, Any]:
    """Make the model in this process, compute, and return what it took."""
    import torch

    from lowbit.bench.compilation import compilation_allowed, compile_blocks, warm_up
    from lowbit.bench.inputs import step_inputs
    from lowbit.bench.transformers import find_subject
    from lowbit.engine.memory import PeakMemory, status_bytes
    from lowbit.ops.cpu.memory import keep_freed_memory

    if options.keep_freed_memory:
        keep_freed_memory()
    start_bytes = status_bytes("VmRSS")
    cpu = torch.device("cpu")
    subject = find_subject("z-image", size=options.size, layers=options.layers)
    peak, begin = PeakMemory(cpu), time.perf_counter()
    model, kernels = make_model(subject.class_name, subject.config, method)
    made = time.perf_counter() - begin
    result: dict[str, Any] = {
        "method": method,
        "process": os.getpid(),
        "parameters": sum(tensor.numel() for tensor in subject.empty().parameters()),
        "kernels": kernels,
        "weight_bytes": sum(tensor.numel() * tensor.element_size() for tensor in model.parameters()),
        "tokens": subject.workload.image_tokens + subject.workload.text_tokens,
        "start_bytes": start_bytes,
        "make_seconds": round(made, 2),
        "peak_bytes_making": round(1e6 * peak.megabytes()),
    }
    given = step_inputs(model, subject.workload, torch.bfloat16)

    def step() -> None:
        with torch.no_grad():
            model(**given, return_dict=False)

    with compilation_allowed():
        result["compilation"] = warm_up(step, compile_blocks(model))[1] if options.compiled else None
        peak, times = PeakMemory(cpu), []
        for _ in range(1 + options.repetitions):
            before = time.perf_counter()
            step()
            times.append(time.perf_counter() - before)
    steps = {"first_step_seconds": round(times[0], 3), "step": summary(times[1:] or times)}
    return {**result, **steps, "peak_bytes_step": round(1e6 * peak.megabytes())}


def make_model(class_name: str, config: dict[str, Any], method: str) -> tuple[Any, dict[str, int]]:
    """Return the transformer with random weights, quantized weight by weight, and its layers by kernel."""
    import torch
    from torch import nn

    from lowbit.bench.transformers import fill, hollow_transformer, random_noise
    from lowbit.hosts.attention import speed_up_attention
    from lowbit.hosts.fused import fuse_elementwise
    from lowbit.quantization.factory import build_quant_config
    from lowbit.quantization.plan import make_manifest, plan_layers, quantize_layer

    cpu, noise = torch.device("cpu"), random_noise(torch.bfloat16)
    model = hollow_transformer(class_name, config)
    chosen = build_quant_config(None if method == "bf16" else method)
    plan = plan_layers(model, chosen) if isinstance(chosen, QuantizationConfig) else {}
    for name, decision in plan.items():
        if decision.method is not None:
            linear = model.get_submodule(name)
            fill(linear, noise, cpu)
            assert isinstance(linear, nn.Linear)
            model.set_submodule(name, quantize_layer(linear, decision.method, name))
    for module in model.modules():
        fill(module, noise, cpu)
    model.eval().requires_grad_(False)
    if plan:
        speed_up_attention(model, device=cpu, dtype=torch.bfloat16)  # as Omni does
        fuse_elementwise(model, device=cpu, dtype=torch.bfloat16)
    kernels = make_manifest(model, plan).by_kernel() if plan else {}
    return model, {f"{name} ({kernel})": count for (name, kernel), count in kernels.items()}


if __name__ == "__main__":
    main()
