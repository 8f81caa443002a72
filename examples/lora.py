"""Put a LoRA adapter beside the weights of a quantized transformer, set its strength, and take it off again.

python examples/lora.py --model Qwen/Qwen-Image --quantization int8 --adapter owner/adapter --prompt "a cat"

Without ``--adapter`` it writes a random one for the embedded model, which changes the picture in no useful way.
Needs peft.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from PIL import ImageChops
from safetensors.torch import save_file

from lowbit import Omni, OmniDiffusionSamplingParams


def random_adapter(transformer: torch.nn.Module, rank: int = 4) -> str:
    """Write an adapter for every query projection; return its folder."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, layer in transformer.named_modules():
        if name.endswith("to_q") and isinstance(layer, torch.nn.Linear):
            tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, layer.in_features, generator=generator)
            tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(layer.out_features, rank, generator=generator)
    folder = tempfile.mkdtemp()
    save_file(tensors, Path(folder, "pytorch_lora_weights.safetensors"))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder in diffusers' format or Hub id; default: the embedded model")
    parser.add_argument("--quantization", default="int8")
    parser.add_argument("--adapter", help="folder, file or Hub id; default: a random one")
    parser.add_argument("--strength", type=float, default=0.5)
    parser.add_argument("--prompt", default="a large red circle left of a small blue square")
    parser.add_argument("--output", default="lora.png")
    arguments = parser.parse_args()
    params = OmniDiffusionSamplingParams(seed=0)

    omni = Omni(arguments.model, quantization=arguments.quantization)
    before = omni.generate(arguments.prompt, params)[0].images[0]

    # A quantized layer is an nn.Linear, so the pipeline's own loader works; the quantized weights do not change.
    omni.pipeline.load_lora_weights(
        arguments.adapter or random_adapter(omni.pipeline.transformer), adapter_name="style"
    )
    omni.pipeline.set_adapters(["style"], [arguments.strength])
    adapted = omni.generate(arguments.prompt, params)[0]
    print(f"wrote {adapted.save_images(arguments.output)[0]}")
    print(f"the adapter changed the picture: {ImageChops.difference(before, adapted.images[0]).getbbox() is not None}")

    omni.pipeline.unload_lora_weights()
    after = omni.generate(arguments.prompt, params)[0].images[0]
    print(f"without it the picture is the first one again: {before.tobytes() == after.tobytes()}")


if __name__ == "__main__":
    main()
