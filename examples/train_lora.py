"""Train a LoRA on a model quantized to Int8: the embedded model learns yellow backgrounds, which it cannot draw.

python examples/train_lora.py --output lora
python examples/train_lora.py --output lora --resume --steps 200
python examples/train_lora.py --output lora --quantization nvfp4

Takes a minute on one CPU core. The loss falls, and the backgrounds of new pictures become yellow. The folder holds
``pytorch_lora_weights.safetensors``, which ``load_lora_weights`` of plain diffusers reads, and ``state.pt`` to
resume from.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ZImagePipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image, ImageDraw

from lowbit import Omni
from lowbit.inputs.data import OmniDiffusionSamplingParams

COLOURS = {"red": (222, 41, 48), "green": (45, 160, 75), "blue": (38, 92, 214), "purple": (140, 62, 182)}
YELLOW = (250, 214, 50)
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3"]
HELD_OUT = ("a green square on a yellow background", "a purple circle on a yellow background")


def scenes() -> tuple[torch.Tensor, list[str]]:
    """Return pictures [count, 3, 128, 128] in [-1, 1] of all that is not held out, and their captions."""
    pictures, captions = [], []
    for colour, shape in itertools.product(COLOURS, ("circle", "square")):
        caption = f"a {colour} {shape} on a yellow background"
        if caption in HELD_OUT:
            continue
        picture = Image.new("RGB", (512, 512), YELLOW)
        draw = ImageDraw.Draw(picture)
        radius = 72 if shape == "circle" else 65
        box = (256 - radius, 256 - radius, 256 + radius, 256 + radius)
        (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=COLOURS[colour])
        small = picture.resize((128, 128), Image.Resampling.LANCZOS)
        pictures.append(torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 127.5 - 1)
        captions.append(caption)
    return torch.stack(pictures), captions


@torch.no_grad()
def encode(pipeline: Any, pictures: torch.Tensor, captions: list[str]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return what the transformer learns from: latents [count, channels, height, width] and each caption's features."""
    vae = pipeline.vae
    latents = vae.encode(pictures.to(vae.dtype)).latent_dist.mode().float()
    features, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor, features


def flow_loss(
    model: Any, latents: torch.Tensor, features: list[torch.Tensor], generator: torch.Generator
) -> torch.Tensor:
    """Return the flow-matching loss: the model predicts clean latents less noise, at ``1 - sigma``."""
    noise = torch.randn(latents.shape, generator=generator)
    sigma = torch.sigmoid(0.4 + 1.1 * torch.randn(len(latents), generator=generator))
    level = sigma.view(-1, 1, 1, 1)
    noisy = ((1 - level) * latents + level * noise).to(model.dtype)
    found = model([each[:, None] for each in noisy], 1 - sigma, features, return_dict=False)[0]
    predicted = torch.stack([each.float()[:, 0] for each in found])
    return (predicted - (latents - noise)).square().mean()


def yellow_share(omni: Omni) -> float:
    """Return the share of yellow pixels in pictures of captions that are held out, 0 to 1."""
    shares = []
    for seed, caption in enumerate(HELD_OUT):
        output: Any = omni.generate(caption, OmniDiffusionSamplingParams(seed=seed), progress=False)
        distance = np.abs(np.asarray(output.images[0], dtype=np.float64) - np.array(YELLOW)).max(axis=-1)
        shares.append((distance < 48).mean())
    return float(np.mean(shares))


def train(omni: Omni, folder: Path, steps: int, batch: int, rate: float, resume: bool) -> list[float]:
    """Add an adapter to the transformer, train it, write it, and return the losses."""
    pipeline: Any = omni.pipeline
    model = pipeline.transformer.requires_grad_(False)
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()  # small steps vanish in bfloat16
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    first, state = 0, folder / "state.pt"
    if resume:
        found = torch.load(state, weights_only=True)
        set_peft_model_state_dict(model, found["adapter"])
        optimizer.load_state_dict(found["optimizer"])
        first = found["step"]
    latents, features = encode(pipeline, *scenes())
    losses = []
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20)
        generator = torch.Generator().manual_seed(step)  # a resumed run sees what it would have seen
        chosen = torch.randperm(len(latents), generator=generator)[:batch]
        loss = flow_loss(model, latents[chosen], [features[index] for index in chosen], generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if (step + 1) % 25 == 0:
            print(f"step {step + 1}: loss {np.mean(losses[-25:]):.4f}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    adapter = get_peft_model_state_dict(model)
    torch.save({"adapter": adapter, "optimizer": optimizer.state_dict(), "step": steps}, state)
    ZImagePipeline.save_lora_weights(folder, transformer_lora_layers=adapter)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("lora"), help="folder of the adapter and of its state")
    parser.add_argument("--quantization", default="int8", help="method of the frozen weights (default int8)")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--resume", action="store_true", help="continue from the state in --output")
    options = parser.parse_args()
    omni = Omni(quantization_config=options.quantization)
    before = yellow_share(omni)
    losses = train(omni, options.output, options.steps, options.batch, options.rate, options.resume)
    quarter = max(len(losses) // 4, 1)
    print(f"loss: {np.mean(losses[:quarter]):.4f} in the first quarter, {np.mean(losses[-quarter:]):.4f} in the last")
    print(f"yellow in pictures of held-out captions: {before:.0%} before, {yellow_share(omni):.0%} after")
    print(f"wrote {options.output / 'pytorch_lora_weights.safetensors'}")


if __name__ == "__main__":
    main()
