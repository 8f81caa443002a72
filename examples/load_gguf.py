"""Run the weights of a GGUF file in a pipeline whose other components come from the base model.

lowbit quantize -q gguf --gguf-type Q4_0 --output shapes-Q4_0.gguf    # a file of the embedded model, to try this with
python examples/load_gguf.py shapes-Q4_0.gguf --output picture.png

python examples/load_gguf.py owner/Qwen-Image-gguf:Q4_K_M --model Qwen/Qwen-Image --prompt "a cup of coffee"
"""

from __future__ import annotations

import argparse
from collections import Counter

from lowbit import Omni, OmniDiffusionSamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf_model", help="a local file, owner/repo/file.gguf, or owner/repo:TYPE")
    parser.add_argument("--model", help="base model: folder or Hub id; default: the embedded model")
    parser.add_argument("--prompt", default="a large red circle left of a small blue square")
    parser.add_argument("--output", default="picture.png")
    arguments = parser.parse_args()

    # The file's weights stay in the blocks of ggml; the kernels dequantize them on the fly.
    omni = Omni(arguments.model, quantization_config={"method": "gguf", "gguf_model": arguments.gguf_model})
    manifest = omni.manifests["transformer"]
    print(manifest.summary())
    print(f"layers per type: {dict(Counter(layer.method for layer in manifest.quantized))}")
    output = omni.generate(arguments.prompt, OmniDiffusionSamplingParams(seed=0))
    print(f"wrote {output[0].save_images(arguments.output)[0]}")


if __name__ == "__main__":
    main()
