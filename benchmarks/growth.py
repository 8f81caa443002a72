"""How cost grows: a step's time with tokens, layers and batch; loading's time and memory with bytes.

    python -m benchmarks.growth --output benchmarks/results/growth.json
    python -m benchmarks.growth --parts tokens --output growth.json

Z-Image blocks of published width, random weights, no refiners. BF16 is left out above ``--most-bf16`` tokens, which
take minutes on a CPU without BF16 instructions. Each table has the exponent p of time = c * x**p, fitted to all points
by least squares of the logarithms, and that between the last two points. Where a step's time goes is taken from
torch.profiler. ``benchmarks.performance_page`` makes the tables.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.performance_page import growth
from benchmarks.timing import alternate, machine, summary, write
from lowbit.bench.inputs import Workload, step_inputs
from lowbit.bench.transformers import random_transformer, share
from lowbit.hosts.attention import speed_up_attention
from lowbit.hosts.fused import fuse_elementwise
from lowbit.models.published import published_transformer
from lowbit.quantization.plan import quantize_model

PARTS = ("tokens", "layers", "batch", "loading")
TEXT_TOKENS = 64
# Patches along height and width; with the text a power of two.
PATCHES = {
    256: (12, 16),
    512: (16, 28),
    1024: (24, 40),
    2048: (32, 62),
    4096: (63, 64),
    8192: (64, 127),
}
LAYERS = (1, 2, 4, 6)
BATCHES = (1, 2, 4, 8)
SMALL = 256  # tokens, for the tables of layers and batch
PRECISIONS = {"int8": torch.bfloat16, "fp32": torch.float32, "bf16": torch.bfloat16}
BETWEEN_OPERATORS = ("lowbit::normalize", "lowbit::gate")
LINEAR_OPERATORS = ("aten::addmm", "aten::mm", "aten::linear", "aten::matmul", "mkldnn::", "onednn::", "lowbit::")

Models = dict[str, nn.Module]


def workload(tokens: int, batch: int = 1) -> Workload:
    rows, columns = PATCHES[tokens]
    return Workload(height=16 * rows, width=16 * columns, text_tokens=TEXT_TOKENS, batch=batch)


def make_models(layers: int) -> Models:
    published = published_transformer("z-image")
    assert published is not None
    config = {**published.config, "n_layers": layers, "n_refiner_layers": 0}
    base = random_transformer(published.class_name, config, torch.bfloat16, torch.device("cpu"))
    quantized = share(base)
    quantize_model(quantized, "int8")
    speed_up_attention(quantized, device=torch.device("cpu"), dtype=torch.bfloat16)  # as Omni does
    fuse_elementwise(quantized, device=torch.device("cpu"), dtype=torch.bfloat16)
    return {"int8": quantized, "fp32": share(base, torch.float32), "bf16": base}


def make_step(model: nn.Module, precision: str, work: Workload) -> Callable[[], None]:
    given = step_inputs(model, work, PRECISIONS[precision])

    def step() -> None:
        with torch.no_grad():
            model(**given, return_dict=False)

    return step


def measure(models: Models, work: Workload, precisions: Sequence[str], repetitions: int) -> dict[str, Any]:
    """Return a row: milliseconds by precision, and where the time of each goes."""
    cases = {name: make_step(models[name], name, work) for name in precisions}
    seconds = alternate(cases, repetitions=repetitions)
    return {
        "ms": {name: summary(times)["median_ms"] for name, times in seconds.items()},
        "shares": {name: profile(case) for name, case in cases.items()},
    }


def profile(step: Callable[[], object]) -> dict[str, float]:
    """Return the shares of a step's time in attention, linear layers and the rest."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    spent: Counter[str] = Counter()
    for event in profiler.key_averages():
        spent[kind_of(event.key)] += event.self_cpu_time_total
    total = sum(spent.values())
    return {kind: round(spent[kind] / total, 3) for kind in ("linear", "attention", "other")}


def kind_of(operator: str) -> str:
    """Return where an operator's time belongs."""
    if "attention" in operator:
        return "attention"
    is_linear = operator.startswith(LINEAR_OPERATORS) and operator not in BETWEEN_OPERATORS
    return "linear" if is_linear else "other"


def exponents(points: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Return the exponent fitted to all points (x, y), and that between the last two.

    The fit is the least squares of log y = log c + p log x.
    """
    logs = [(math.log(x), math.log(y)) for x, y in points]
    center_x, center_y = (sum(axis) / len(logs) for axis in zip(*logs, strict=True))
    slope = sum((x - center_x) * (y - center_y) for x, y in logs) / sum((x - center_x) ** 2 for x, _ in logs)
    (x0, y0), (x1, y1) = logs[-2:]
    return {"fitted": round(slope, 3), "last": round((y1 - y0) / (x1 - x0), 3)}


def with_exponents(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    found = {}
    for precision in PRECISIONS:
        points = [(row[name], row["ms"][precision]) for row in rows if precision in row["ms"]]
        if len(points) > 1:
            found[precision] = exponents(points)
    return {"rows": rows, "exponents": found}


def grow_tokens(options: argparse.Namespace) -> dict[str, Any]:
    models, rows = make_models(1), []
    for tokens in PATCHES:
        if tokens <= options.most_tokens:
            names = [name for name in PRECISIONS if name != "bf16" or tokens <= options.most_bf16]
            rows.append({"tokens": tokens, **measure(models, workload(tokens), names, options.repetitions)})
            print(rows[-1], flush=True)
    return with_exponents("tokens", rows)


def grow_layers(options: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for layers in LAYERS:
        models = make_models(layers)
        rows.append({"layers": layers, **measure(models, workload(SMALL), ("int8", "fp32"), options.repetitions)})
        print(rows[-1], flush=True)
    return with_exponents("layers", rows)


def grow_batch(options: argparse.Namespace) -> dict[str, Any]:
    models, rows = make_models(1), []
    for batch in BATCHES:
        work = workload(SMALL, batch)
        rows.append({"batch": batch, **measure(models, work, ("int8", "fp32"), options.repetitions)})
        print(rows[-1], flush=True)
    return with_exponents("batch", rows)


def grow_loading(options: argparse.Namespace) -> dict[str, Any]:
    """Load checkpoints of several sizes in Int8, each in a process of its own."""
    from benchmarks.load_memory import run_worker, write_checkpoint

    rows, flags = [], argparse.Namespace(step=False, cold_memory=False)
    for layers in LAYERS:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            size = write_checkpoint(Path(folder), 3840, layers, 0)
            runs = [run_worker(Path(folder), "int8", flags) for _ in range(options.repetitions)]
        best = min(runs, key=lambda run: run["load_seconds"])
        rows.append(
            {
                "checkpoint_bytes": size,
                "load_seconds": round(best["load_seconds"], 3),
                "model_bytes": best["model_bytes"],
                "peak_bytes": best["peak_rss_anon_bytes"] - best["start_rss_anon_bytes"],
            }
        )
        print(rows[-1], flush=True)
    times = exponents([(row["checkpoint_bytes"], row["load_seconds"]) for row in rows])
    memory = exponents([(row["model_bytes"], row["peak_bytes"]) for row in rows])
    return {"rows": rows, "exponents": {"load_seconds": times, "peak_bytes": memory}}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--repetitions", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--most-tokens", type=int, default=8192, help="default: %(default)s")
    parser.add_argument("--most-bf16", type=int, default=1024, help="tokens (default: %(default)s)")
    parser.add_argument("--folder", help="where to write checkpoints (default: the system's temporary folder)")
    parser.add_argument("--output", type=Path, help="JSON file; parts of it that are not measured now are kept")
    return parser.parse_args()


MEASURE = {"tokens": grow_tokens, "layers": grow_layers, "batch": grow_batch, "loading": grow_loading}


def main() -> None:
    options = parse_arguments()
    earlier = options.output is not None and options.output.exists()
    found: dict[str, Any] = json.loads(options.output.read_text()) if earlier else {}
    for part in options.parts:
        print(f"{part}:", flush=True)
        found[part] = MEASURE[part](options)
        if options.output:
            write(options.output, {part: found[part] for part in PARTS if part in found})
    print(growth({**found, "date": "", "machine": machine()}))


if __name__ == "__main__":
    main()
