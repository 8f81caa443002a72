"""``lowbit compare``: how close a quantized model is to its reference."""

from __future__ import annotations

import tempfile
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli import options
from lowbit.errors import ConfigError
from lowbit.inputs.data import OmniDiffusionSamplingParams

EXAMPLES = """Examples:

  lowbit compare --candidate-quantization int8 --prompt "a red circle above a blue star" --gate strict

  lowbit compare --model Qwen/Qwen-Image --candidate-quantization fp8 --ignored-layers img_mlp
  --prompt "a cup of coffee on the table" --height 512 --width 512 --num-inference-steps 20 --seed 142
  --output-json out/result.json --save-output-dir out/images --enforce-eager

  lowbit compare --reference-model Qwen/Qwen-Image --candidate-model ./qwen-image-int8 --prompts-file prompts.txt
  --seed 1 --seed 2 --perceptual --teacher-forced --layers --report out/report.html
  --gate "psnr_db>=25,max_peak_memory_ratio<=0.95"
"""


class Kind(str, Enum):
    """What to make."""

    t2i = "t2i"
    t2v = "t2v"


def compare(
    task: Annotated[Kind, typer.Option(help="t2i: pictures; t2v: videos.")] = Kind.t2i,
    model: options.Model = None,
    reference_model: Annotated[str | None, typer.Option(help="Default: --model.")] = None,
    candidate_model: Annotated[
        str | None, typer.Option(help="Such as a checkpoint that is quantized already. Default: --model.")
    ] = None,
    reference_quantization: Annotated[str | None, typer.Option(help="Default: none.")] = None,
    candidate_quantization: Annotated[str | None, typer.Option(help="Method, such as int8.")] = None,
    reference_quantization_config_json: Annotated[str | None, typer.Option(help="JSON, or a file of it.")] = None,
    candidate_quantization_config_json: Annotated[str | None, typer.Option(help="JSON, or a file of it.")] = None,
    ignored_layers: options.IgnoredLayers = None,
    reference_ignored_layers: Annotated[str | None, typer.Option(help="Layers the reference keeps.")] = None,
    candidate_ignored_layers: Annotated[
        str | None, typer.Option(help="Layers the candidate keeps. Default: --ignored-layers.")
    ] = None,
    reference_attention_quantization: Annotated[str | None, typer.Option(help=options.ATTENTION_HELP)] = None,
    candidate_attention_quantization: Annotated[str | None, typer.Option(help=options.ATTENTION_HELP)] = None,
    candidate_cache_backend: options.CacheBackend = None,
    cache_config: options.CacheConfig = None,
    calibration_prompt: options.CalibrationPrompts = None,
    prompt: options.Prompts = None,
    prompts_file: options.PromptsFile = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to steer away from.")] = None,
    height: options.Height = None,
    width: options.Width = None,
    num_inference_steps: options.Steps = None,
    guidance_scale: options.GuidanceScale = None,
    num_images_per_prompt: Annotated[int, typer.Option(min=1, help="Pictures per prompt and seed.")] = 1,
    num_frames: Annotated[int | None, typer.Option(help="Of a video.")] = None,
    fps: Annotated[int | None, typer.Option(help="Of a video.")] = None,
    seed: options.Seeds = None,
    warmup_runs: Annotated[int, typer.Option(min=0, help="Generations before measuring.")] = 0,
    measure_runs: Annotated[int, typer.Option(min=1, help="Measured generations of each case.")] = 1,
    perceptual: Annotated[bool, typer.Option("--perceptual", help="Add SSIM, FLIP, and LPIPS if it is there.")] = False,
    teacher_forced: Annotated[
        bool, typer.Option("--teacher-forced", help="Also give the candidate the reference's latents at each step.")
    ] = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="Also compare layers and blocks at the first, middle and last step.")
    ] = False,
    noise_floor: Annotated[
        bool, typer.Option("--noise-floor", help="Also compare the reference with itself in float32.")
    ] = False,
    gate: Annotated[
        str | None, typer.Option(help='Such as "psnr_db>=25,mae<=6,max_peak_memory_ratio<=0.95", smoke, strict.')
    ] = None,
    output_json: Annotated[str | None, typer.Option(help="File to write the result to.")] = None,
    save_output_dir: Annotated[str | None, typer.Option(help="Folder to write the pictures to.")] = None,
    report: Annotated[str | None, typer.Option(help="HTML file with pictures and charts to write.")] = None,
    dtype: options.Dtype = "bfloat16",
    device: options.Device = None,
    enforce_eager: Annotated[
        bool, typer.Option("--enforce-eager/--compile", help="--compile compiles the transformers' blocks.")
    ] = True,
) -> None:
    """Compare a quantized model with its reference: pictures, latents at every step, time and memory.

    The exit status is 1 where a condition of --gate does not hold.
    """
    from lowbit.evaluation import comparison
    from lowbit.evaluation.gates import parse_gate
    from lowbit.evaluation.perceptual import check_perceptual
    from lowbit.evaluation.recording import Side, Task
    from lowbit.evaluation.report import write_report

    if task is Kind.t2i and num_frames is not None:
        raise ConfigError("--num-frames is for --task t2v")
    if perceptual:
        check_perceptual()
    conditions = parse_gate(gate, comparison.known_figures(perceptual)) if gate else ()
    json_file = comparison.check_output_file(output_json, "--output-json") if output_json else None
    folder = comparison.check_output_folder(save_output_dir, "--save-output-dir") if save_output_dir else None
    report_file = comparison.check_output_file(report, "--report") if report else None
    common: dict[str, Any] = {"dtype": dtype, "device": device, "enforce_eager": enforce_eager}
    plan = comparison.Plan(
        reference=Side(
            name="reference",
            attention_quantization=options.attention_spec(
                reference_attention_quantization, "--reference-attention-quantization"
            ),
            model=reference_model or model,
            quantization_config=_quantization(
                "reference", reference_quantization, reference_quantization_config_json, reference_ignored_layers
            ),
            **common,
        ),
        candidate=Side(
            name="candidate",
            attention_quantization=options.attention_spec(
                candidate_attention_quantization, "--candidate-attention-quantization"
            ),
            model=candidate_model or model,
            quantization_config=_quantization(
                "candidate",
                candidate_quantization,
                candidate_quantization_config_json,
                candidate_ignored_layers or ignored_layers,
            ),
            calibration_prompts=tuple(calibration_prompt or ()),
            cache_backend=candidate_cache_backend,
            cache_config=options.read_json(cache_config, "--cache-config") if cache_config else None,
            **common,
        ),
        task=Task(
            prompts=tuple(options.read_prompts(prompt, prompts_file)),
            seeds=tuple(seed or (0,)),
            params=OmniDiffusionSamplingParams(
                height=height,
                width=width,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                negative_prompt=negative_prompt,
                num_outputs_per_prompt=num_images_per_prompt,
                num_frames=num_frames,
                fps=fps,
            ),
            warmup_runs=warmup_runs,
            measure_runs=measure_runs,
        ),
        perceptual=perceptual,
        teacher_forced=teacher_forced,
        noise_floor=noise_floor,
        layers=layers,
        gate=conditions,
        kind="frame" if task is Kind.t2v else "image",
    )
    with tempfile.TemporaryDirectory(prefix="lowbit-compare-") as work:
        found = comparison.compare(plan, Path(work))
        if json_file:
            found.write_json(json_file)
        if folder:
            found.write_pictures(folder)
        if report_file:
            write_report(found, report_file)
    _show(found)
    for path in (json_file, folder, report_file):
        if path:
            typer.echo(f"wrote       {path}")
    if not found.ok:
        raise typer.Exit(1)


def _show(found: Any) -> None:
    from lowbit.evaluation.layers import worst_layers

    summary = found.result["summary"]
    count = len(found.result["cases"])
    typer.echo(f"{'metric':20} {'median':>12} {'worst':>12}   over {count} case{'s' * (count != 1)}")
    for name, value in summary["median"].items():
        typer.echo(f"{name:20} {value:12.8g} {summary['worst'][name]:12.8g}")
    sides = [found.result[f"{side}_generation"] for side in ("reference", "candidate")]
    for name, title in (("avg_generation_time_s", "s per generation"), ("max_peak_memory_mb", "MB at most")):
        first, second = (side[name] for side in sides)
        typer.echo(f"{title:20} {first:12,.2f} {second:12,.2f}   reference, candidate: {second / first:.2f} times")
    skipped = found.result["candidate_generation"]["per_case_skipped_steps"]
    if any(skipped):
        steps = found.result["candidate_generation"]["num_inference_steps"] * len(skipped)
        typer.echo(f"{'steps skipped':20} {sum(skipped):12} of {steps}")
    if "noise_floor" in found.result:
        floor = found.result["noise_floor"]["summary"]["median"]["psnr_db"]
        typer.echo(f"{'noise floor':20} {floor:12.6g}   psnr_db of the reference against itself in float32")
    for name, error in worst_layers(found.result.get("layers", []))[:5]:
        typer.echo(f"{'layer':20} {error:12.6g} relative_l2   {name}")
    for verdict in found.verdicts:
        typer.echo(str(verdict))


def _quantization(side: str, method: str | None, config: str | None, ignored_layers: str | None) -> Any:
    option = f"--{side}-quantization"
    return options.quantization_spec(
        method, config, ignored_layers, method_option=option, config_option=f"{option}-config-json"
    )
