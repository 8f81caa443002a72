"""Generates held-out captions with the stock pipeline and lets the detector judge them.

``python -m tools.train_embedded.evaluate --model FOLDER`` writes ``evaluation.json``,
``generation_defaults.json``, ``samples.png`` and the model card into the folder.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DiffusionPipeline, ZImagePipeline
from PIL import Image
from tqdm import tqdm

from lowbit.models.generation_defaults import FILE_NAME, generation_defaults_text

from .captions import held_out_captions, parse
from .detector import judge
from .drawing import CANVAS
from .export import folder_bytes

STEPS = 20
GUIDANCE = 0.0
"""0 turns guidance off: one forward pass a step."""
BATCH = 8
GRID_COLUMNS = 8
CARD = Path(__file__).with_name("card.md")
"""The model card with its figures in braces."""
SHOWCASE = (
    "a large red circle left of a small blue square",
    "an orange star above a purple triangle on a black background",
    "a small yellow circle right of a large green triangle on a gray background",
    "a purple square below a yellow star",
)
"""Captions at the head of the sample grid; the first is the README's."""


def generate(
    pipeline: ZImagePipeline,
    captions: list[str],
    seeds: list[int],
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> list[np.ndarray]:
    """One picture a caption, uint8 arrays (CANVAS, CANVAS, 3); noise from CPU generators."""
    pictures: list[np.ndarray] = []
    pipeline.set_progress_bar_config(disable=True)
    for start in tqdm(range(0, len(captions), BATCH), mininterval=5.0, desc="generating"):
        part = slice(start, start + BATCH)
        images = pipeline(
            prompt=list(captions[part]),
            height=CANVAS,
            width=CANVAS,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
        ).images
        pictures += [np.asarray(image.convert("RGB")) for image in images]
    return pictures


def assess(captions: list[str], pictures: list[np.ndarray]) -> dict[str, Any]:
    """The share the detector accepts, and for every other picture why not."""
    verdicts = [judge(parse(c), p) for c, p in zip(captions, pictures, strict=True)]
    failures = [
        {"index": index, "caption": captions[index], "reasons": list(verdict.reasons)}
        for index, verdict in enumerate(verdicts)
        if not verdict.ok
    ]
    passed = len(captions) - len(failures)
    return {
        "captions": len(captions),
        "passed": passed,
        "score": passed / len(captions),
        "failures": failures,
    }


def grid(pictures: list[np.ndarray], columns: int = GRID_COLUMNS) -> Image.Image:
    """Pictures side by side with a thin line between them."""
    rows = -(-len(pictures) // columns)
    cell = CANVAS + 2
    sheet = Image.new("RGB", (columns * cell, rows * cell), (200, 200, 200))
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        sheet.paste(Image.fromarray(picture), (column * cell + 1, row * cell + 1))
    return sheet


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name, then rename."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def card(result: dict[str, Any]) -> str:
    """The model card with the figures of an evaluation."""
    figures = {
        "steps": result["num_inference_steps"],
        "guidance": result["guidance_scale"],
        "passed": result["passed"],
        "captions": result["captions"],
        "score": f"{result['score']:.1%}",
    }
    text = CARD.read_text()
    for name, value in figures.items():
        text = text.replace(f"{{{name}}}", str(value))
    return text


def evaluate(folder: Path, count: int, seed: int, steps: int, guidance: float) -> dict[str, Any]:
    """Score the model in BF16 on held-out captions.

    Writes evaluation.json, generation_defaults.json, samples.png and README.md.
    """
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    captions = held_out_captions(count, seed)
    seeds = [1000 * seed + index for index in range(count)]
    began = time.monotonic()
    pictures = generate(pipeline, captions, seeds, steps, guidance)
    seconds = time.monotonic() - began
    result = {
        **assess(captions, pictures),
        "dtype": "bfloat16",
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "height": CANVAS,
        "width": CANVAS,
        "caption_seed": seed,
        "picture_seeds": "1000 * caption_seed + index",
        "bytes": folder_bytes(folder),
        "seconds": round(seconds, 1),
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    write_text(folder / "evaluation.json", json.dumps(result, indent=2) + "\n")
    defaults = {name: result[name] for name in ("height", "width", "num_inference_steps", "guidance_scale")}
    write_text(folder / FILE_NAME, generation_defaults_text(defaults))
    write_text(folder / "README.md", card(result))
    shown = generate(pipeline, list(SHOWCASE), list(range(len(SHOWCASE))), steps, guidance)
    grid(shown + pictures[: 32 - len(shown)]).save(folder / "samples.png", optimize=True)
    return result


def main() -> None:
    """Parse the command line and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("src/lowbit/assets/embedded"))
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    args = parser.parse_args()
    result = evaluate(args.model, args.count, args.seed, args.steps, args.guidance)
    for failure in result["failures"]:
        print(f"{failure['caption']}: {'; '.join(failure['reasons'])}")
    print(f"{result['passed']} of {result['captions']} ({result['score']:.1%})")


if __name__ == "__main__":
    main()
