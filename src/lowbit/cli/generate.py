"""``lowbit generate``: a prompt to a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lowbit.cli import options
from lowbit.cli.messages import say, state
from lowbit.errors import ConfigError
from lowbit.inputs.data import OmniDiffusionSamplingParams
from lowbit.models.embedded import EMBEDDED_NAME
from lowbit.outputs import check_image_path

if TYPE_CHECKING:
    from lowbit.engine import Omni
    from lowbit.outputs import OmniRequestOutput

EXAMPLES = """Examples:

  lowbit generate "a large red circle left of a small blue square" --quantization int8 --output picture.png

  lowbit generate "a small green star" --seed 7 --num-images-per-prompt 4 --output star.png

  lowbit generate "a cat on a windowsill" --model Qwen/Qwen-Image -q fp8 --ignored-layers img_mlp --steps 20

  lowbit generate "a cat" -m ./z-image --quantization-config '{"transformer": "int8", "text_encoder": "int8"}'
"""


def generate(
    prompt: Annotated[str, typer.Argument(help="What the picture shows.")],
    model: options.Model = None,
    quantization: options.Quantization = None,
    quantization_config: options.QuantizationConfigText = None,
    ignored_layers: options.IgnoredLayers = None,
    gguf_model: options.GgufModel = None,
    gguf_type: options.GgufType = None,
    comfyui_model: options.ComfyUiModel = None,
    svdquant_model: options.SvdQuantModel = None,
    kernel: options.Kernel = None,
    output: Annotated[str, typer.Option("--output", "-o", help="File to write.")] = "output.png",
    steps: Annotated[
        int | None, typer.Option("--steps", "--num-inference-steps", help="Denoising steps. Default: the model's.")
    ] = None,
    height: Annotated[int | None, typer.Option(help="Pixels. Default: the model's.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels. Default: the model's.")] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of the starting noise: same seed, same picture. Default: a random one, which is printed."),
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Default: the model's.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to steer away from.")] = None,
    num_images_per_prompt: Annotated[int, typer.Option(min=1, help="Pictures to make, seeds counting up.")] = 1,
    attention_quantization: options.AttentionQuantization = None,
    cache_backend: options.CacheBackend = None,
    cache_config: options.CacheConfig = None,
    dtype: options.Dtype = "bfloat16",
    device: options.Device = None,
    enforce_eager: Annotated[
        bool, typer.Option("--enforce-eager/--compile", help="--compile compiles the transformer's blocks.")
    ] = True,
    calibration_prompt: options.CalibrationPrompts = None,
) -> None:
    """Make a picture from a prompt."""
    if not prompt.strip():
        raise ConfigError("The prompt is empty")
    target = check_image_path(output)
    params = OmniDiffusionSamplingParams(
        num_inference_steps=steps,
        height=height,
        width=width,
        seed=seed,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        num_outputs_per_prompt=num_images_per_prompt,
    )
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
    from lowbit.engine import Omni

    omni = Omni(
        model,
        quantization_config=spec,
        dtype=dtype,
        device=device,
        enforce_eager=enforce_eager,
        calibration_prompts=calibration_prompt or (),
        cache_backend=cache_backend,
        cache_config=options.read_json(cache_config, "--cache-config") if cache_config else None,
        attention_quantization=options.attention_spec(attention_quantization),
    )
    show_load(omni, model or EMBEDDED_NAME)
    result = omni.generate(prompt, params, progress=not state.quiet)
    assert not isinstance(result, list)
    _show_result(result)
    for path, drawn in zip(result.save_images(target), result.seeds, strict=True):
        typer.echo(f"wrote       {path} (seed {drawn})")


def show_load(omni: Omni, model: str) -> None:
    """Print what was loaded, and how."""
    dtype = str(omni.config.dtype).removeprefix("torch.")
    say(f"model       {model} ({type(omni.pipeline).__name__}) in {dtype} on {omni.device}")
    for manifest in omni.manifests.values():
        say(f"quantized   {manifest.summary()}")
    for name, record in omni.attention.items():
        say(f"attention   {name}: {record.summary()}")
    unquantized = [name for name in omni.modules() if name not in {*omni.manifests, *omni.attention}]
    say(f"unquantized {', '.join(unquantized) or 'none'}")
    say(f"loaded      in {omni.load_time_s:.2f} s, peak memory {omni.load_peak_memory_mb:,.0f} MB")


def _show_result(result: OmniRequestOutput) -> None:
    skipped = f" ({len(result.skipped_steps)} from the cache)" if result.skipped_steps else ""
    say(
        f"generated   in {result.generation_time_s:.2f} s: {result.num_inference_steps} steps,"
        f" median {result.step_time_s * 1e3:,.0f} ms{skipped}, seed {result.seeds[0]},"
        f" peak memory {result.peak_memory_mb:,.0f} MB"
    )
