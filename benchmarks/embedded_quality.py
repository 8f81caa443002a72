"""What the methods do to the pictures of the embedded model.

Every variant draws the same held-out captions from the same seeds; the detector counts the pictures that show what
their caption says, and PSNR tells how far each is from the BF16 picture. BF16 against FP32 is the noise floor: what no
method can be asked to beat.

    python -m benchmarks.embedded_quality --output benchmarks/results/embedded_quality.json
    python -m benchmarks.embedded_quality --count 20 --variants int8 fp8_reference
    python -m benchmarks.embedded_quality --count 8 --pictures docs/images/comparison.png
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.timing import write
from lowbit import Omni
from lowbit.models.embedded import embedded_model
from tools.train_embedded.captions import held_out_captions, parse
from tools.train_embedded.detector import judge
from tools.train_embedded.evaluate import SHOWCASE, generate

CALIBRATION_COUNT = 16
REFERENCE = "bf16"

VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp32": {"dtype": "float32"},
    "int8": {"quantization": "int8"},
    "fp8_reference": {"quantization_config": {"method": "fp8", "kernel": "reference"}},
    "fp8_block_reference": {
        "quantization_config": {"method": "fp8", "kernel": "reference", "weight_block_size": [128, 128]}
    },
    "fp8_static_reference": {
        "quantization_config": {"method": "fp8", "kernel": "reference", "activation_scheme": "static"},
        "calibration_prompts": held_out_captions(CALIBRATION_COUNT, seed=1),
    },
    "mxfp8_reference": {"quantization_config": {"method": "mxfp8", "kernel": "reference"}},
    "mxfp4_reference": {"quantization_config": {"method": "mxfp4", "kernel": "reference"}},
    "mxfp4_dualscale_reference": {"quantization_config": {"method": "mxfp4_dualscale", "kernel": "reference"}},
    "mxfp4_dualscale_all_reference": {
        "quantization_config": {"method": "mxfp4_dualscale", "kernel": "reference", "num_bf16_fallback_layers": 0}
    },
    "nvfp4_reference": {"quantization_config": {"method": "nvfp4", "kernel": "reference"}},
    "nvfp4_weight_only": {"quantization_config": {"method": "nvfp4", "weight_only": True}},
    "fp8_weight_only": {"quantization_config": {"method": "fp8", "kernel": "weight_only"}},
    **{
        f"gguf_{kind}": {"quantization_config": {"method": "gguf", "gguf_type": kind}}
        for kind in ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0")
    },
    "auto_round": {"quantization": "auto-round"},
    **{
        f"auto_round_group_{size}": {"quantization_config": {"method": "auto-round", "group_size": size}}
        for size in (64, 128)
    },
    "auto_round_asymmetric": {"quantization_config": {"method": "auto-round", "group_size": 128, "sym": False}},
    "svdquant_reference": {"quantization_config": {"method": "svdquant", "kernel": "reference"}},
    "svdquant_int4_reference": {
        "quantization_config": {"method": "svdquant", "precision": "int4", "kernel": "reference"}
    },
    **{
        f"svdquant_rank_{rank}_reference": {
            "quantization_config": {"method": "svdquant", "rank": rank, "kernel": "reference"}
        }
        for rank in (8, 16, 64)
    },
    "modelopt_fp8_reference": {
        "quantization_config": {"method": "modelopt", "quant_algo": "FP8", "kernel": "reference"},
        "calibration_prompts": held_out_captions(CALIBRATION_COUNT, seed=1),
    },
    "comfyui_reference": {"quantization_config": {"method": "comfyui", "kernel": "reference"}},
}
TITLES = {"bf16": "BF16", "int8": "Int8", "fp8_reference": "FP8"}


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio in dB of two uint8 pictures; infinite when they are equal."""
    error = np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def draw(options: dict[str, Any], captions: list[str], seeds: list[int]) -> tuple[list[np.ndarray], Omni]:
    """Return a picture per caption, uint8 [height, width, 3], and the engine that drew them."""
    omni, model = Omni(**options), embedded_model()
    pictures = generate(omni.pipeline, captions, seeds, model.num_inference_steps, model.guidance_scale)
    return pictures, omni


def assess(captions: list[str], pictures: list[np.ndarray], reference: list[np.ndarray]) -> dict[str, Any]:
    """Return the detector's score and the distances from the reference pictures."""
    passed = sum(judge(parse(caption), picture).ok for caption, picture in zip(captions, pictures, strict=True))
    values = [psnr(picture, other) for picture, other in zip(pictures, reference, strict=True)]
    finite = [value for value in values if math.isfinite(value)]
    median, worst = statistics.median(values), min(values)
    return {
        "detector_passed": passed,
        "detector_score": passed / len(captions),
        "psnr_db_median": median if math.isfinite(median) else None,
        "psnr_db_worst": worst if math.isfinite(worst) else None,
        "identical_pictures": len(values) - len(finite),
    }


def comparison(rows: dict[str, list[np.ndarray]], figures: dict[str, dict[str, Any]]) -> Image.Image:
    """Return the variants' pictures, a row each, with their names and figures."""
    side, label = next(iter(rows.values()))[0].shape[0], 150
    columns = len(next(iter(rows.values())))
    sheet = Image.new("RGB", (label + columns * (side + 4), len(rows) * (side + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (name, pictures) in enumerate(rows.items()):
        top = row * (side + 4)
        figure = figures[name]
        distance = figure["psnr_db_median"]
        lines = [
            TITLES.get(name, name),
            f"detector {figure['detector_score']:.1%}",
            "the reference" if distance is None else f"median PSNR {distance:.1f} dB",
            f"transformer {figure['transformer_mb']:.1f} MB",
        ]
        pen.multiline_text((8, top + side // 2 - 30), "\n".join(lines), fill="black", spacing=6)
        for column, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (label + column * (side + 4), top))
    return sheet


def transformer_megabytes(omni: Omni) -> float:
    """Return the bytes of the transformer's tensors as loaded, in 10^6."""
    manifest = omni.manifests.get("transformer")
    if manifest is not None:
        return manifest.bytes_after / 1e6
    return sum(tensor.numel() * tensor.element_size() for tensor in omni.pipeline.transformer.parameters()) / 1e6


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="held-out captions")
    parser.add_argument("--seed", type=int, default=0, help="of the captions; picture i has seed 1000 * seed + i")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--pictures", type=Path, help="picture to write: BF16, Int8 and FP8 side by side")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    captions = [*SHOWCASE, *held_out_captions(arguments.count, arguments.seed)]
    seeds = [*range(len(SHOWCASE)), *(1000 * arguments.seed + index for index in range(arguments.count))]
    names = [REFERENCE, *(name for name in arguments.variants if name != REFERENCE)]
    drawn: dict[str, list[np.ndarray]] = {}
    results: dict[str, dict[str, Any]] = {}
    shown = len(SHOWCASE)  # the showcase is for looking at: it does not count
    for name in names:
        drawn[name], omni = draw(VARIANTS[name], captions, seeds)
        results[name] = assess(captions[shown:], drawn[name][shown:], drawn[REFERENCE][shown:])
        results[name]["transformer_mb"] = round(transformer_megabytes(omni), 3)
        print(name, json.dumps(results[name]))
    if arguments.output:
        write(arguments.output, {"captions": arguments.count, "seed": arguments.seed, "variants": results})
    if arguments.pictures:
        rows = {name: drawn[name][:shown] for name in TITLES if name in drawn}
        comparison(rows, results).save(arguments.pictures, optimize=True)


if __name__ == "__main__":
    main()
