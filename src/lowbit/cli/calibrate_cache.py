"""``lowbit calibrate-cache``: TeaCache's coefficients for a model."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from lowbit.cli import options
from lowbit.inputs.data import OmniDiffusionSamplingParams

EXAMPLES = """Examples:

  lowbit calibrate-cache ./z-image --num-inference-steps 30 --output z-image-cache.json

  lowbit generate "..." --model ./z-image --cache-backend tea_cache --cache-config z-image-cache.json
"""


def calibrate_cache(
    model: Annotated[str | None, typer.Argument(help="A folder or a Hub id. Default: the embedded model.")] = None,
    prompt: options.Prompts = None,
    prompts_file: options.PromptsFile = None,
    seed: options.Seeds = None,
    height: options.Height = None,
    width: options.Width = None,
    num_inference_steps: options.Steps = None,
    guidance_scale: options.GuidanceScale = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="File to write the cache_config to.")] = None,
    dtype: options.Dtype = "bfloat16",
    device: options.Device = None,
) -> None:
    """Fit TeaCache's coefficients to a model from its own trajectories, without skipping anything.

    Without prompts, the twelve of `lowbit validate` are used.
    """
    from lowbit.containers.atomic import write_text
    from lowbit.engine import Omni
    from lowbit.evaluation import comparison
    from lowbit.evaluation.cache_calibration import calibrate
    from lowbit.evaluation.prompts import validation_prompts
    from lowbit.evaluation.recording import Task

    target = comparison.check_output_file(output, "--output") if output else None
    task = Task(
        prompts=tuple(options.read_prompts(prompt, prompts_file, validation_prompts(model))),
        seeds=tuple(seed or (0,)),
        params=OmniDiffusionSamplingParams(
            height=height, width=width, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale
        ),
    )
    fits = calibrate(Omni(model, dtype=dtype, device=device), task)
    for found in fits:
        changes = sorted(change for change, _ in found.pairs)
        typer.echo(
            f"{found.component}: {len(found.pairs)} steps, changes of the signal {changes[0]:.4g} to {changes[-1]:.4g},"
            f" R² {found.r_squared:.3f}"
        )
        typer.echo(f"coefficients {json.dumps(list(found.coefficients))}")
    if target:
        write_text(target, json.dumps({"coefficients": list(fits[0].coefficients)}, indent=2) + "\n")
        typer.echo(f"wrote       {target}")
