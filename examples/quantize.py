"""Quantize a model while loading it, write the result, load it again, and get the same picture.

python examples/quantize.py --model Tongyi-MAI/Z-Image-Turbo --quantization int8 --output ./z-image-int8

Without ``--model`` it quantizes the embedded model, which needs no download.
"""

from __future__ import annotations

import argparse

from lowbit import Omni, OmniDiffusionSamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder in diffusers' format or Hub id; default: the embedded model")
    parser.add_argument("--quantization", default="int8")
    parser.add_argument("--prompt", default="a large red circle left of a small blue square")
    parser.add_argument("--output", default="quantized", help="folder to write")
    arguments = parser.parse_args()
    params = OmniDiffusionSamplingParams(seed=0)

    # Each BF16 tensor is quantized as it is read: the BF16 model is never in memory as a whole.
    online = Omni(arguments.model, quantization=arguments.quantization)
    for component, manifest in online.manifests.items():
        print(f"{component}: {manifest.summary()}")
        print(f"kept in BF16: {', '.join(f'{layer.name} ({layer.reason})' for layer in manifest.kept[:3])}, ...")
    online.save_pretrained(arguments.output)

    # The folder says how it was quantized: nothing needs to be given again.
    reloaded = Omni(arguments.output)
    pictures = [omni.generate(arguments.prompt, params)[0].images[0] for omni in (online, reloaded)]
    assert pictures[0].tobytes() == pictures[1].tobytes()
    print(f"{arguments.output} draws the same picture, byte for byte")


if __name__ == "__main__":
    main()
