"""``lowbit validate``: a row of the table of supported models, with its proof."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli import options
from lowbit.errors import ConfigError
from lowbit.inputs.data import OmniDiffusionSamplingParams

EXAMPLES = """Examples:

  lowbit validate --quantization int8 --output-json docs/validation/embedded-int8.json

  lowbit validate ./qwen-image --quantization fp8 --ignored-layers img_mlp --num-inference-steps 20
  --output-json qwen-image-fp8.json --report qwen-image-fp8.html
"""


def validate(
    model: Annotated[str | None, typer.Argument(help="A folder or a Hub id. Default: the embedded model.")] = None,
    quantization: options.Quantization = None,
    quantization_config: options.QuantizationConfigText = None,
    ignored_layers: options.IgnoredLayers = None,
    gguf_model: options.GgufModel = None,
    gguf_type: options.GgufType = None,
    comfyui_model: options.ComfyUiModel = None,
    svdquant_model: options.SvdQuantModel = None,
    kernel: options.Kernel = None,
    attention_quantization: options.AttentionQuantization = None,
    calibration_prompt: options.CalibrationPrompts = None,
    height: options.Height = None,
    width: options.Width = None,
    num_inference_steps: options.Steps = None,
    guidance_scale: options.GuidanceScale = None,
    output_json: Annotated[str | None, typer.Option(help="File to write the proof to.")] = None,
    report: Annotated[str | None, typer.Option(help="HTML file with pictures and charts to write.")] = None,
    dtype: options.Dtype = "bfloat16",
    device: options.Device = None,
) -> None:
    """Compare a method with the unquantized model on twelve fixed prompts with two seeds each.

    Prints the row for docs/supported-models.md, which is generated from the JSON.
    """
    from lowbit.evaluation import comparison
    from lowbit.evaluation.report import write_report
    from lowbit.evaluation.validation import HEADER, row, validation_plan

    spec = options.quantization_spec(
        quantization,
        quantization_config,
        ignored_layers,
        kernel=kernel,
        gguf_model=gguf_model,
        gguf_type=gguf_type,
        comfyui_model=comfyui_model,
        svdquant_model=svdquant_model,
    )
    if spec is None:
        raise ConfigError("Give the method to validate: --quantization")
    json_file = comparison.check_output_file(output_json, "--output-json") if output_json else None
    page = comparison.check_output_file(report, "--report") if report else None
    params = OmniDiffusionSamplingParams(
        height=height, width=width, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale
    )
    prompts = tuple(calibration_prompt or ())
    plan = validation_plan(
        model,
        spec,
        params,
        dtype=dtype,
        device=device,
        calibration_prompts=prompts,
        attention_quantization=options.attention_spec(attention_quantization),
    )
    with tempfile.TemporaryDirectory(prefix="lowbit-validate-") as work:
        found = comparison.compare(plan, Path(work))
        if json_file:
            found.write_json(json_file)
        if page:
            write_report(found, page)
    typer.echo(HEADER)
    typer.echo(row(found.result).markdown(json_file.name if json_file else ""))
    for path in (json_file, page):
        if path:
            typer.echo(f"wrote       {path}")
