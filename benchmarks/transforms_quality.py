"""What smoothing and rotation do to the embedded model's pictures as they are, without planted outliers.

    python -m benchmarks.transforms_quality --output benchmarks/results/transforms_quality.json

Each variant is compared with BF16 on the first prompts of ``lowbit validate``: PSNR of the pictures, and the relative
L2 of a step's result when every step begins with BF16's latents, so that errors do not pile up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.timing import write
from lowbit.evaluation.comparison import Plan, compare
from lowbit.evaluation.prompts import validation_prompts
from lowbit.evaluation.recording import Side, Task

VARIANTS: dict[str, dict[str, Any]] = {
    "int8": {"method": "int8"},
    "smoothing 0.5": {"method": "int8", "smoothing": 0.5},
    "rotation 64": {"method": "int8", "rotation": 64},
    "smoothing 0.5, rotation 64": {"method": "int8", "smoothing": 0.5, "rotation": 64},
}
CALIBRATION_PROMPTS = (
    "a large red star above a small blue circle",
    "a green triangle on a black background",
    "a small purple square right of a large orange star",
)


def measure(config: dict[str, Any], prompts: tuple[str, ...]) -> dict[str, float]:
    """Compare a configuration of the embedded model with BF16."""
    calibration = CALIBRATION_PROMPTS if "smoothing" in config else ()
    reference = Side(name="reference", device="cpu")
    candidate = Side(name="candidate", device="cpu", quantization_config=config, calibration_prompts=calibration)
    plan = Plan(reference=reference, candidate=candidate, task=Task(prompts=prompts), teacher_forced=True)
    with tempfile.TemporaryDirectory() as work:
        result = compare(plan, Path(work)).result
    steps = [step["relative_l2"] for case in result["cases"] for step in case["teacher_forced_trajectory"]]
    return {
        "psnr_db_median": round(result["summary"]["median"]["psnr_db"], 2),
        "psnr_db_worst": round(result["summary"]["worst"]["psnr_db"], 2),
        "step_relative_l2_mean": float(f"{statistics.mean(steps):.4g}"),
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=6, help="how many (default %(default)s)")
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args()
    prompts = tuple(validation_prompts(None)[: options.prompts])
    results = {}
    for name, config in VARIANTS.items():
        results[name] = measure(config, prompts)
        print(name, json.dumps(results[name]), flush=True)
    if options.output is not None:
        write(options.output, {"prompts": list(prompts), "results": results})


if __name__ == "__main__":
    main()
