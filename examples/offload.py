"""Run a quantized model that does not fit on the device: its weights wait in the CPU's memory, or on the disk.

python examples/offload.py --model Qwen/Qwen-Image --quantization int8 --device cuda
python examples/offload.py --model Qwen/Qwen-Image --quantization int8 --device cuda --disk ./weights

The offloading is diffusers' own. It moves quantized weights as they are: half the bytes of BF16 or fewer.
"""

from __future__ import annotations

import argparse

import torch

from lowbit import Omni, OmniDiffusionSamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder in diffusers' format or Hub id; default: the embedded model")
    parser.add_argument("--quantization", default="int8")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    parser.add_argument("--disk", help="folder for the weights; default: keep them in the CPU's memory")
    parser.add_argument("--prompt", default="a large red circle left of a small blue square")
    parser.add_argument("--output", default="offloaded.png")
    arguments = parser.parse_args()

    # Load on the CPU: the device never holds more than the layers of one group.
    omni = Omni(arguments.model, quantization=arguments.quantization, device="cpu")
    omni.pipeline.transformer.enable_group_offload(
        onload_device=torch.device(arguments.device),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=arguments.device != "cpu",  # prefetch the next group while this one computes
        offload_to_disk_path=arguments.disk,
    )
    for name, part in omni.pipeline.components.items():
        if isinstance(part, torch.nn.Module) and name != "transformer":
            part.to(arguments.device)
    output = omni.generate(arguments.prompt, OmniDiffusionSamplingParams(seed=0))[0]
    print(f"wrote {output.save_images(arguments.output)[0]}, {output.step_time_s:.2f} s a step")


if __name__ == "__main__":
    main()
