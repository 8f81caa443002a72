"""Trains the embedded model from a seed, all stages, resuming where an earlier run stopped.

``python -m tools.train_embedded.train --output src/lowbit/assets/embedded --work-dir DIR``
"""

import argparse
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Model

from . import text, vae
from .captions import held_out_captions
from .data import training_pictures
from .evaluate import assess, evaluate, generate, grid
from .export import build_pipeline, export
from .training import Loop, save_atomically
from .transformer import FlowPlan, LatentData, make_loop, make_loss

PROBE_CAPTIONS = 48
PROBE_STEPS = 12


@dataclass(frozen=True)
class Plan:
    """The whole recipe. The autoencoder sees the first ``vae_pictures`` of ``pictures``."""

    pictures: int = 16000
    vae_pictures: int = 6000
    vae: vae.VaePlan = field(default_factory=vae.VaePlan)
    flow: FlowPlan = field(default_factory=FlowPlan)


def prepare_data(
    autoencoder: AutoencoderKL,
    tokenizer: PreTrainedTokenizerFast,
    pictures: Tensor,
    captions: list[str],
    path: Path,
) -> LatentData:
    """Normalized latents with tokenized captions; the latents are kept in ``path``.

    Sets the autoencoder's normalization too.
    """
    if path.exists():
        raw = torch.load(path, weights_only=True)["latents"]
    else:
        raw = vae.encode(autoencoder, pictures)
        save_atomically({"latents": raw}, path)
    vae.set_normalization(autoencoder, raw)
    config = autoencoder.config
    latents = (raw - config.shift_factor) * config.scaling_factor
    ids, mask = text.tokenize(tokenizer, [*captions, ""])
    return LatentData(latents, ids[:-1], mask[:-1], ids[-1:], mask[-1:])


class Probe:
    """Scores the averaged weights on a few captions at checkpoints, and logs it."""

    def __init__(
        self,
        loop: Loop,
        autoencoder: AutoencoderKL,
        tokenizer: PreTrainedTokenizerFast,
        folder: Path,
        every: int,
    ) -> None:
        self.loop, self.folder, self.every = loop, folder, every
        transformer, encoder = loop.modules["transformer"], loop.modules["text_encoder"]
        assert isinstance(transformer, ZImageTransformer2DModel)
        assert isinstance(encoder, Qwen3Model)
        self.pipeline = build_pipeline(transformer, encoder, autoencoder, tokenizer)
        self.last = loop.step

    def __call__(self, step: int) -> None:
        if step - self.last < self.every:
            return
        self.last = step
        captions = held_out_captions(PROBE_CAPTIONS, seed=1)
        self.loop.average.swap()
        pictures = generate(self.pipeline, captions, list(range(len(captions))), PROBE_STEPS)
        self.loop.average.swap()
        result = assess(captions, pictures)
        grid(pictures).save(self.folder / f"probe_{step:06d}.png")
        line = {"step": step, "seconds": round(self.loop.seconds), **result}
        with (self.folder / "probes.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")


def train(
    output: Path, work: Path, seed: int, plan: Plan, device: torch.device, probe_every: int
) -> None:
    """All stages: data, autoencoder, text encoder with transformer, export."""
    work.mkdir(parents=True, exist_ok=True)
    pictures, captions = training_pictures(plan.pictures, seed)
    autoencoder = vae.train_vae(
        pictures[: plan.vae_pictures], work / "vae.pt", seed, plan.vae, device
    )
    tokenizer = text.build_tokenizer(seed)
    data = prepare_data(autoencoder, tokenizer, pictures, captions, work / "latents.pt")
    loop = make_loop(work / "flow.pt", seed, plan.flow, device)
    probe = Probe(loop, autoencoder, tokenizer, work, probe_every)
    loop.run(make_loss(data, plan.flow, seed), probe)
    loop.average.swap()
    export(probe.pipeline.to("cpu"), output)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("src/lowbit/assets/embedded"))
    parser.add_argument("--work-dir", type=Path, default=Path("out/train_embedded"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=FlowPlan.steps, help="transformer's steps")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--probe-every", type=int, default=800, help="steps between probes")
    return parser.parse_args()


def main() -> None:
    """Train, then evaluate what was written."""
    args = _arguments()
    plan = Plan(flow=replace(FlowPlan(), steps=args.steps))
    train(args.output, args.work_dir, args.seed, plan, args.device, args.probe_every)
    result = evaluate(args.output, count=200, seed=0, steps=20, guidance=0.0)
    print(f"{result['passed']} of {result['captions']} held-out captions")


if __name__ == "__main__":
    main()
