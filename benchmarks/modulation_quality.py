"""What 8-bit modulation weights do to the embedded model's pictures: PSNR against BF16, with and without.

    python -m benchmarks.modulation_quality --output benchmarks/results/modulation_quality.json

The embedded model's family keeps its modulation by default (it is 2% of the weights); here it is asked for by name.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.embedded_quality import assess
from benchmarks.timing import write
from lowbit import Omni
from lowbit.models.embedded import embedded_model
from tools.train_embedded.captions import held_out_captions
from tools.train_embedded.evaluate import generate

MODULATION = {"method": "int8", "weight_only_layers": ["adaLN_modulation"]}
VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "modulation alone": {"quantization_config": {**MODULATION, "ignored_layers": ["attention", "feed_forward"]}},
    "int8": {"quantization": "int8"},
    "int8 and modulation": {"quantization_config": MODULATION},
}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=8, help="held-out captions")
    parser.add_argument("--steps", type=int, default=8, help="denoising steps")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    captions, seeds = held_out_captions(arguments.count, 0), list(range(arguments.count))
    results: dict[str, Any] = {}
    reference = None
    for name, options in VARIANTS.items():
        pipeline = Omni(**options).pipeline
        pictures = generate(pipeline, captions, seeds, arguments.steps, embedded_model().guidance_scale)
        reference = reference if reference is not None else pictures
        results[name] = assess(captions, pictures, reference)
        print(name, results[name], flush=True)
    if arguments.output is not None:
        write(arguments.output, {"captions": arguments.count, "steps": arguments.steps, "variants": results})


if __name__ == "__main__":
    main()
