"""Trains the embedded model from a seed, resuming where an earlier run stopped.

``python -m tools.train_embedded.train --work-dir DIR`` does all stages and writes the pipeline.
The autoencoder and the flow (text encoder and transformer) need nothing of each other: two
processes with ``--stage vae`` and ``--stage flow`` may train them at once.
"""

import argparse
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from transformers import Qwen3Model

from . import text
from .data import crowded_pictures, training_pictures
from .evaluate import GUIDANCE, STEPS, evaluate
from .export import build_pipeline, export
from .latents import PICTURES, Basis, compute_basis
from .training import Loop
from .transformer import FlowPlan, LatentData, make_loop, make_loss
from .vae import VaePlan, make_vae_loop, make_vae_loss

STAGES = ("vae", "flow", "export", "evaluate")


@dataclass(frozen=True)
class Plan:
    """The whole recipe."""

    vae_pictures: int = 8000
    flow_pictures: int = 24000
    vae: VaePlan = field(default_factory=VaePlan)
    flow: FlowPlan = field(default_factory=FlowPlan)


@dataclass(frozen=True)
class Run:
    """Where and how to train: the recipe, its seed, the checkpoints' folder, the device."""

    plan: Plan
    seed: int
    work: Path
    device: torch.device

    def vae_loop(self) -> Loop:
        """The autoencoder's loop, resumed."""
        return make_vae_loop(self.work / "vae.pt", self.seed, self.plan.vae, self.device)

    def flow_loop(self) -> Loop:
        """The loop of transformer and text encoder, resumed."""
        return make_loop(self.work / "flow.pt", self.seed, self.plan.flow, self.device)


def fixed_basis(run: Run) -> Basis:
    """The latent space, from the first loose pictures."""
    return compute_basis(training_pictures(PICTURES, run.seed, loose=True)[0])


def train_vae(run: Run) -> None:
    """Train the autoencoder up to its last step.

    On crowds first, because most of a caption's picture is plain background; then half on pictures of captions.
    """
    count = run.plan.vae_pictures
    crowds = crowded_pictures(count, run.seed)
    refining = torch.cat([crowds[: count // 2], training_pictures(count // 2, run.seed)[0]])
    loss = make_vae_loss(crowds, refining, fixed_basis(run), run.plan.vae, run.seed, run.device)
    run.vae_loop().run(loss)


def prepare_data(run: Run) -> LatentData:
    """Draw the pictures, compute their latents, tokenize their captions."""
    pictures, captions = training_pictures(run.plan.flow_pictures, run.seed)
    latents = fixed_basis(run).encode(pictures)
    ids, mask = text.tokenize(text.build_tokenizer(run.seed), [*captions, ""])
    return LatentData(latents, ids[:-1], mask[:-1], ids[-1:], mask[-1:])


def train_flow(run: Run) -> None:
    """Train the transformer with its text encoder up to the last step, on the grid's layouts."""
    run.flow_loop().run(make_loss(prepare_data(run), run.plan.flow, run.seed))


def write_pipeline(run: Run, output: Path) -> None:
    """Export the averaged weights of both checkpoints, finished or not."""
    vae_loop, flow_loop = run.vae_loop(), run.flow_loop()
    for loop in (vae_loop, flow_loop):
        if loop.step == 0:
            raise FileNotFoundError(f"no checkpoint to export: {loop.path}")
        loop.average.swap()
    vae, transformer = vae_loop.modules["vae"], flow_loop.modules["transformer"]
    encoder = flow_loop.modules["text_encoder"]
    assert isinstance(vae, AutoencoderKL)
    assert isinstance(transformer, ZImageTransformer2DModel)
    assert isinstance(encoder, Qwen3Model)
    tokenizer = text.build_tokenizer(run.seed)
    export(build_pipeline(transformer, encoder, vae, tokenizer).to("cpu"), output)
    print(f"steps: autoencoder {vae_loop.step}, flow {flow_loop.step}")
    print(f"seconds: autoencoder {vae_loop.seconds:.0f}, flow {flow_loop.seconds:.0f}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("src/lowbit/assets/embedded"))
    parser.add_argument("--work-dir", type=Path, default=Path("out/train_embedded"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", action="append", choices=STAGES, help="default: all of them")
    parser.add_argument("--vae-steps", type=int, default=VaePlan.steps)
    parser.add_argument("--vae-refine-steps", type=int, default=VaePlan.refine_steps)
    parser.add_argument("--flow-steps", type=int, default=FlowPlan.steps)
    parser.add_argument("--flow-refine-steps", type=int, default=FlowPlan.refine_steps)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    return parser.parse_args()


def main() -> None:
    """Run the stages asked for, in order."""
    args = _arguments()
    torch.set_num_threads(1)  # the loop brings its own threads
    stages = args.stage or STAGES
    plan = Plan(
        vae=replace(VaePlan(), steps=args.vae_steps, refine_steps=args.vae_refine_steps),
        flow=replace(FlowPlan(), steps=args.flow_steps, refine_steps=args.flow_refine_steps),
    )
    run = Run(plan, args.seed, args.work_dir, args.device)
    if "vae" in stages:
        train_vae(run)
    if "flow" in stages:
        train_flow(run)
    if "export" in stages:
        write_pipeline(run, args.output)
    if "evaluate" in stages:
        result = evaluate(args.output, 200, 0, STEPS, GUIDANCE)
        print(f"{result['passed']} of {result['captions']} held-out captions")


if __name__ == "__main__":
    main()
