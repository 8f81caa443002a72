"""``lowbit sensitivity``: which layers quantization hurts."""

from __future__ import annotations

from typing import Annotated

import typer

from lowbit.cli import options
from lowbit.errors import ConfigError
from lowbit.inputs.data import OmniDiffusionSamplingParams

EXAMPLES = """Examples:

  lowbit sensitivity --quantization int8

  lowbit sensitivity ./qwen-image --quantization fp8 --prompts-file prompts.txt --seed 1 --seed 2
  --num-inference-steps 20 --output-json out/fp8.json --report out/fp8.html
"""
_BAR = 30


def sensitivity(
    model: Annotated[str | None, typer.Argument(help="A folder or a Hub id. Default: the embedded model.")] = None,
    quantization: options.Quantization = None,
    quantization_config: options.QuantizationConfigText = None,
    ignored_layers: options.IgnoredLayers = None,
    prompt: options.Prompts = None,
    prompts_file: options.PromptsFile = None,
    seed: options.Seeds = None,
    height: options.Height = None,
    width: options.Width = None,
    num_inference_steps: options.Steps = None,
    guidance_scale: options.GuidanceScale = None,
    probes: Annotated[int, typer.Option(min=1, help="Denoising steps to look at, evenly spaced.")] = 4,
    output_json: Annotated[
        str | None, typer.Option(help="File for the result; one of an interrupted run is continued.")
    ] = None,
    report: Annotated[str | None, typer.Option(help="HTML file with a chart to write.")] = None,
    dtype: options.Dtype = "bfloat16",
    device: options.Device = None,
) -> None:
    """Rank layers by the damage that quantizing each alone does to the model's prediction.

    Without prompts, three of the twelve of `lowbit validate` are used.
    """
    from lowbit.containers.atomic import write_text
    from lowbit.evaluation import comparison
    from lowbit.evaluation.prompts import validation_prompts
    from lowbit.evaluation.recording import Side, Task
    from lowbit.evaluation.report import render_sensitivity
    from lowbit.evaluation.sensitivity import measure, one_method, settings

    spec = options.quantization_spec(quantization, quantization_config, ignored_layers)
    if spec is None:
        raise ConfigError("Give the method whose damage to measure: --quantization")
    config = one_method(spec)
    json_file = comparison.check_output_file(output_json, "--output-json") if output_json else None
    page = comparison.check_output_file(report, "--report") if report else None
    task = Task(
        prompts=tuple(options.read_prompts(prompt, prompts_file, validation_prompts(model)[:3])),
        seeds=tuple(seed or (0,)),
        params=OmniDiffusionSamplingParams(
            height=height, width=width, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale
        ),
    )
    Side(name="candidate", model=model, quantization_config=spec).check()
    omni = Side(name="reference", model=model, dtype=dtype, device=device).load()
    layers = measure(omni, spec, task, json_file, probes)
    _show(layers)
    if page:
        write_text(page, render_sensitivity(layers, settings(omni, config, task, probes)))
    for path in (json_file, page):
        if path:
            typer.echo(f"wrote       {path}")


def _show(layers: object) -> None:
    from lowbit.evaluation.sensitivity import rank

    ranked = rank(layers)  # type: ignore[arg-type]
    width = max(len(layer.name) for layer in ranked)
    largest = max(layer.damage for layer in ranked) or 1.0
    typer.echo(f"{'layer':{width}} {'damage':>10} {'saves MB':>9}")
    for layer in ranked:
        bar = "█" * round(_BAR * layer.damage / largest)
        typer.echo(f"{layer.name:{width}} {layer.damage:10.3g} {layer.saved_bytes / 1e6:9.3f} {bar}")
