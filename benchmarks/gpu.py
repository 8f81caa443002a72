"""Every check and benchmark that needs a GPU, in one command and under ten minutes on an H100.

    python -m benchmarks.gpu --output results.json
    python -m benchmarks.gpu --only correctness gemm
    python -m benchmarks.gpu --only steps --models z-image --no-compile
    python -m benchmarks.gpu --only tune

Parts: `correctness` holds every kernel against float64; `modulation`, `quantization` and `elementwise` time those
kernels; `gemm` times the products of the models' layers beside torch's and torchao's; `steps` times whole transformer
steps at true size with random weights, eager, as CUDA graphs and compiled, and their memory; `tune` (only when asked
for) times candidates for the tables in lowbit/ops/triton/tiles.py and prints the best. The JSON file is written after
every row; a part that fails is recorded with its error and the rest goes on. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_kernels, gpu_steps
from benchmarks.gpu_timing import Context, describe
from benchmarks.published_models import MODELS
from benchmarks.timing import machine

Row = dict[str, Any]
PARTS: dict[str, Callable[[Context], Iterator[Row]]] = {
    "correctness": gpu_kernels.correctness,
    "modulation": gpu_kernels.modulation,
    "quantization": gpu_kernels.quantization,
    "elementwise": gpu_kernels.elementwise_kernels,
    "gemm": gpu_kernels.gemm,
    "steps": gpu_steps.steps,
    "tune": gpu_kernels.tune,
}
DEFAULT_PARTS = [name for name in PARTS if name != "tune"]
# Share of the time that is left which a part may take, so that one slow part does not use up the others'.
SHARES = {**dict.fromkeys(PARTS, 0.3), "gemm": 0.4, "steps": 1.0, "tune": 1.0}


def describe_device(device: torch.device) -> Row:
    """Describe what the numbers depend on."""
    import triton

    row: Row = {**machine(), "triton": triton.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        row["device"] = {
            "name": properties.name,
            "capability": [properties.major, properties.minor],
            "processors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "l2": getattr(properties, "L2_cache_size", None),
        }
    return row


def run_part(name: str, context: Context, save: Callable[[], None], record: Row) -> None:
    """Run one part into ``record``, saving after every row; an error ends the part and is recorded."""
    start = time.monotonic()
    rows: list[Row] = record.setdefault("rows", [])
    try:
        for row in PARTS[name](context):
            rows.append(row)
            print(f"  {json.dumps(row)}", flush=True)
            save()
    except Exception as error:
        record["error"] = describe(error)
        record["traceback"] = traceback.format_exc().splitlines()[-12:]
        print(f"  FAILED: {record['error']}", flush=True)
    record["seconds"] = round(time.monotonic() - start, 1)
    record["notes"] = list(context.notes)
    context.notes.clear()
    if context.device.type == "cuda":
        torch.cuda.empty_cache()
    save()


def run(options: argparse.Namespace) -> Row:
    """Run the chosen parts; return the results, which are in ``options.output`` too."""
    device = torch.device(options.device)
    results: Row = {"date": time.strftime("%Y-%m-%d"), "machine": describe_device(device), "parts": {}}

    def save() -> None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        temporary = options.output.with_suffix(".partial")
        temporary.write_text(json.dumps(results, indent=1) + "\n")
        temporary.replace(options.output)

    end = time.monotonic() + options.budget
    for number, name in enumerate(options.only, start=1):
        left = end - time.monotonic()
        print(f"[{number}/{len(options.only)}] {name} ({left:.0f} s left)", flush=True)
        context = Context(
            device,
            options.models,
            deadline=time.monotonic() + left * SHARES[name],
            compile=options.compile,
            rounds=options.rounds,
            few_layers=options.few_layers,
        )
        run_part(name, context, save, results["parts"].setdefault(name, {}))
    return results


def summary(results: Row) -> str:
    """Return what to look at first: failures, and how steps compare."""
    lines = []
    for name, part in results["parts"].items():
        failed = [row for row in part["rows"] if row.get("passed") is False]
        verdict = part.get("error") or (f"{len(failed)} checks failed" if failed else "done")
        lines.append(f"{name}: {verdict}, {len(part['rows'])} rows, {part['seconds']} s")
    rows = [row for row in results["parts"].get("steps", {}).get("rows", []) if "milliseconds" in row]
    baseline = {(row["model"], row["kind"]): row["milliseconds"] for row in rows if row["precision"] == "bf16"}
    for row in rows:
        base = baseline.get((row["model"], row["kind"]))
        ratio = f"  {base / row['milliseconds']:.2f} x bf16" if base else ""
        lines.append(f"{row['model']:12s}{row['precision']:14s}{row['kind']:10s}{row['milliseconds']:10.2f} ms{ratio}")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=DEFAULT_PARTS, help="parts to run")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu.json"), help="JSON file to write")
    parser.add_argument("--budget", type=float, default=540, help="seconds after which no new row is begun")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each case")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="time compiled steps too"
    )
    parser.add_argument("--few-layers", action="store_true", help="steps of models of few layers, to try the benchmark")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the benchmark")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 when a part failed or a check did not pass."""
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("No CUDA or ROCm device is present. Use --device cpu --few-layers to try the benchmark itself.")
        return 2
    results = run(options)
    print(summary(results))
    parts = results["parts"].values()
    failed = any("error" in part or any(row.get("passed") is False for row in part["rows"]) for part in parts)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
