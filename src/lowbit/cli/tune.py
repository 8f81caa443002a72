"""``lowbit tune``: the cheapest recipe that meets a gate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli import options
from lowbit.errors import ConfigError
from lowbit.inputs.data import OmniDiffusionSamplingParams

EXAMPLES = """Examples:

  lowbit tune --quantization '{"method": "int8", "activation_bits": 4}' --gate "psnr_db>=35" --output recipe.json

  lowbit tune ./qwen-image --quantization int8 --quantization fp8 --gate "psnr_db>=30,worst_psnr_db>=25"
  --num-inference-steps 20 --budget 2h --work-dir out/tune --output recipe.json

  lowbit generate "..." --model ./qwen-image --quantization-config recipe.json
"""


def tune(
    model: Annotated[str | None, typer.Argument(help="A folder or a Hub id. Default: the embedded model.")] = None,
    quantization: Annotated[
        list[str] | None,
        typer.Option("--quantization", "-q", help="A method to choose from: a name, JSON or a file. Several times."),
    ] = None,
    gate: Annotated[str, typer.Option(help='What to meet, such as "psnr_db>=35".')] = "strict",
    output: Annotated[str, typer.Option("--output", "-o", help="File to write the recipe to.")] = "recipe.json",
    work_dir: Annotated[
        str | None, typer.Option(help="Folder of the search's state. Default: --output with .tune added.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="When to stop refining: a number of trials or a time, as 30m. Default: never."),
    ] = None,
    prompt: options.Prompts = None,
    prompts_file: options.PromptsFile = None,
    verification_prompts_file: Annotated[
        Path | None, typer.Option(help="Prompts to verify on, other than those of the search.")
    ] = None,
    seed: options.Seeds = None,
    height: options.Height = None,
    width: options.Width = None,
    num_inference_steps: options.Steps = None,
    guidance_scale: options.GuidanceScale = None,
    dtype: options.Dtype = "bfloat16",
    device: options.Device = None,
) -> None:
    """Find which layers must stay as they are, and which method the others take, to meet a gate at the least bytes.

    Interrupted, the same command goes on where it was. Without prompts, six of the twelve of `lowbit validate` are
    searched with and the other six verified with.
    """
    from lowbit.containers.atomic import write_text
    from lowbit.evaluation import comparison, tuning
    from lowbit.evaluation.gates import parse_gate
    from lowbit.evaluation.prompts import validation_prompts
    from lowbit.evaluation.recording import Side, Task

    if not quantization:
        raise ConfigError("Give the methods to choose from: --quantization, once or several times")
    methods = [read_method(text) for text in quantization]
    conditions = parse_gate(gate, comparison.known_figures(perceptual=False))
    limit = tuning.parse_budget(budget) if budget else None
    target = comparison.check_output_file(output, "--output")
    prompts = validation_prompts(model)
    params = OmniDiffusionSamplingParams(
        height=height, width=width, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale
    )
    seeds = tuple(seed or (0,))
    task, verification = (
        Task(prompts=tuple(options.read_prompts(given, file, default)), seeds=seeds, params=params)
        for given, file, default in (
            (prompt, prompts_file, prompts[:6]),
            (None, verification_prompts_file, prompts[6:]),
        )
    )
    for spec in methods:
        Side(name="candidate", model=model, quantization_config=spec).check()
    work = comparison.check_output_folder(work_dir or f"{output}.tune", "--work-dir")
    side = Side(name="reference", model=model, dtype=dtype, device=device)
    try:
        found, proof = tuning.tune(side, methods, task, verification, conditions, work, limit, typer.echo)
    except KeyboardInterrupt:
        typer.echo(f"what is known is in {work}: the same command goes on from there", err=True)
        raise
    write_text(target, json.dumps(found, indent=2) + "\n")
    proof.write_json(target.with_suffix(".proof.json"))
    _show(found, proof)
    typer.echo(f"wrote       {target}, {target.with_suffix('.proof.json')}")


def read_method(text: str) -> Any:
    """Return a method's specification from a name, JSON, or a file of JSON.

    Raises:
        ConfigError: as ``build_quant_config``, or not one method.
    """
    from lowbit.evaluation.sensitivity import one_method

    spec = options.read_json(text) if text.lstrip().startswith("{") or Path(text).is_file() else text
    one_method(spec)
    return spec


def _show(found: dict[str, Any], proof: Any) -> None:
    manifests = proof.result["candidate"]["manifests"].values()
    before, after = (sum(manifest[f"bytes_{when}"] for manifest in manifests) for when in ("before", "after"))
    first, second = (proof.result[f"{side}_generation"]["avg_generation_time_s"] for side in ("reference", "candidate"))
    kept = sum(layer["reason"] == "ignored_layers" for manifest in manifests for layer in manifest["layers"])
    typer.echo(f"recipe      {found.get('method', 'per component')}, {kept} layers kept by the recipe")
    typer.echo(f"size        {before / 1e6:,.2f} MB -> {after / 1e6:,.2f} MB ({after / before:.1%})")
    typer.echo(f"time        {first:.3f} s -> {second:.3f} s per picture")
    for verdict in proof.verdicts:
        typer.echo(str(verdict))
