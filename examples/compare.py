"""Follow a quantized model step by step: where does it part from BF16, and how far apart do the pictures end?

python examples/compare.py --model Tongyi-MAI/Z-Image-Turbo --quantization fp8

``lowbit compare`` does this for many prompts, in a process per model, with more metrics and a report.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from PIL import Image

from lowbit import Omni, OmniDiffusionSamplingParams


def trajectory(omni: Omni, prompt: str) -> tuple[list[torch.Tensor], Image.Image]:
    """Return the latents after each denoising step, and the picture."""
    latents: list[torch.Tensor] = []

    def keep(step: int, after: torch.Tensor) -> None:
        latents.append(after.float().cpu())

    output = omni.generate(prompt, OmniDiffusionSamplingParams(seed=0), on_step=keep)[0]
    return latents, output.images[0]


def psnr(first: Image.Image, second: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB; infinite if the pictures are equal."""
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    with np.errstate(divide="ignore"):
        return float(10 * np.log10(255**2 / np.mean(difference**2)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder in diffusers' format or Hub id; default: the embedded model")
    parser.add_argument("--quantization", default="int8")
    parser.add_argument("--prompt", default="a large red circle left of a small blue square")
    arguments = parser.parse_args()

    # The same seed gives both the same starting noise: it is drawn on the CPU, whatever the device.
    expected, reference = trajectory(Omni(arguments.model), arguments.prompt)
    found, candidate = trajectory(Omni(arguments.model, quantization=arguments.quantization), arguments.prompt)
    for step, (left, right) in enumerate(zip(expected, found, strict=True)):
        print(f"step {step}: relative error of the latents {(left - right).norm() / left.norm():.4f}")
    print(f"PSNR {psnr(reference, candidate):.1f} dB")


if __name__ == "__main__":
    main()
