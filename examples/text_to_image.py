"""Make a picture from Python, with the options of vLLM-Omni's example of the same name.

python examples/text_to_image.py --model Qwen/Qwen-Image --quantization int8 --ignored-layers "img_mlp" \
    --prompt "a cup of coffee on the table" --output coffee.png

Without ``--model`` it runs the embedded model, which needs no download.
"""

from __future__ import annotations

import argparse

from lowbit import Omni
from lowbit.inputs.data import OmniDiffusionSamplingParams


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder in diffusers' format or Hub id; default: the embedded model")
    parser.add_argument("--prompt", default="a large red circle left of a small blue square")
    parser.add_argument("--negative-prompt")
    parser.add_argument("--quantization", help="int8 or fp8; default: none")
    parser.add_argument("--ignored-layers", help="layers to keep, separated by commas")
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--num-inference-steps", type=int)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--num-images-per-prompt", type=int, default=1)
    parser.add_argument("--seed", type=int, default=142)
    parser.add_argument("--output", default="output.png")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    quantization = arguments.quantization
    if arguments.ignored_layers:
        quantization = {"method": quantization, "ignored_layers": arguments.ignored_layers.split(",")}
    omni = Omni(model=arguments.model, quantization_config=quantization)
    (output,) = omni.generate(
        arguments.prompt,
        OmniDiffusionSamplingParams(
            num_inference_steps=arguments.num_inference_steps,
            height=arguments.height,
            width=arguments.width,
            seed=arguments.seed,
            guidance_scale=arguments.guidance_scale,
            negative_prompt=arguments.negative_prompt,
            num_outputs_per_prompt=arguments.num_images_per_prompt,
        ),
    )
    for manifest in omni.manifests.values():
        print(manifest.summary())
    print(f"{output.generation_time_s:.2f} s, peak memory {output.peak_memory_mb:,.0f} MB")
    for path in output.save_images(arguments.output):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
