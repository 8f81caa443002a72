"""Options that several commands share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cache import CACHE_BACKENDS
from lowbit.errors import ConfigError
from lowbit.ops.attention import KINDS, check_kind
from lowbit.quantization.backends import BACKENDS
from lowbit.quantization.factory import SUPPORTED_QUANTIZATION_METHODS

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="A folder in diffusers' format or a Hub id. Default: the embedded model."),
]
Quantization = Annotated[
    str | None,
    typer.Option(
        "--quantization", "-q", help=f"Method: {', '.join([*SUPPORTED_QUANTIZATION_METHODS, *BACKENDS])}, none."
    ),
]
QuantizationConfigText = Annotated[
    str | None,
    typer.Option("--quantization-config", help="Method with options, or one per component: JSON, or a file of it."),
]
IgnoredLayers = Annotated[
    str | None,
    typer.Option("--ignored-layers", help="Layers to keep, by name or pattern, separated by commas."),
]
Kernel = Annotated[
    str | None, typer.Option("--kernel", help="Implementation to compute with, as `lowbit info` lists them.")
]
GgufModel = Annotated[
    str | None,
    typer.Option("--gguf-model", help="For gguf: a file, owner/repo/file.gguf or owner/repo:Q4_K_M with the weights."),
]
GgufType = Annotated[
    str | None, typer.Option("--gguf-type", help="For gguf: the type to quantize to, such as Q8_0 or Q4_K.")
]
ComfyUiModel = Annotated[
    str | None,
    typer.Option("--comfyui-model", help="For comfyui: a file or owner/repo/file.safetensors with the weights."),
]
SvdQuantModel = Annotated[
    str | None,
    typer.Option("--svdquant-model", help="For svdquant: nunchaku's file, or owner/repo/file.safetensors."),
]
Dtype = Annotated[str, typer.Option("--dtype", help="Of what is not quantized: bfloat16, float16 or float32.")]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, xpu... Default: an accelerator if there is one.")
]
ATTENTION_HELP = f"Compute attention in 8 bits: {', '.join(KINDS)}, or JSON from components to these."
AttentionQuantization = Annotated[str | None, typer.Option("--attention-quantization", help=ATTENTION_HELP)]
CacheBackend = Annotated[
    str | None,
    typer.Option(help=f"Reuse what earlier denoising steps computed: {', '.join(CACHE_BACKENDS)}."),
]
CacheConfig = Annotated[
    str | None, typer.Option(help="Options of the cache: JSON such as '{\"rel_l1_thresh\": 0.2}', or a file of it.")
]
CalibrationPrompts = Annotated[
    list[str] | None,
    typer.Option("--calibration-prompt", help="For smoothing and FP8's static scheme; may be given several times."),
]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", help="May be given several times.")]
PromptsFile = Annotated[Path | None, typer.Option(help="A prompt per line, # begins a comment.")]
Seeds = Annotated[list[int] | None, typer.Option("--seed", help="May be given several times. Default: 0.")]
Height = Annotated[int | None, typer.Option(help="Pixels. Default: the model's.")]
Width = Annotated[int | None, typer.Option(help="Pixels. Default: the model's.")]
Steps = Annotated[int | None, typer.Option("--num-inference-steps", help="Default: the model's.")]
GuidanceScale = Annotated[float | None, typer.Option(help="Default: the model's.")]


def quantization_spec(
    method: str | None,
    config: str | None,
    ignored_layers: str | None = None,
    method_option: str = "--quantization",
    config_option: str = "--quantization-config",
    **given: str | None,
) -> Any:
    """Combine the command line's options to what ``build_quant_config`` takes.

    Args:
        method: a method's name, of the option ``method_option``.
        config: JSON or a file of it, of ``config_option``.
        ignored_layers: patterns between commas.
        method_option: what the user typed for ``method``, for messages.
        config_option: what the user typed for ``config``, for messages.
        given: other options of methods, by name, such as ``kernel``.

    Raises:
        ConfigError: JSON that can't be read, or options that nothing applies to.
    """
    spec: Any = read_json(config, config_option) if config is not None else None
    options: dict[str, Any] = {}
    if ignored_layers is not None:
        options["ignored_layers"] = [name.strip() for name in ignored_layers.split(",") if name.strip()]
    options.update({name: value for name, value in given.items() if value is not None})
    if isinstance(spec, dict) and method is not None and ("method" in spec or "quant_method" in spec):
        raise ConfigError(f"Give the method in {method_option} or in {config_option}, not in both")
    if method is not None:
        spec = {"method": method, **(spec or {})}
    if options and (spec is None or (method or "").lower() == "none"):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in options)
        raise ConfigError(f"{names} needs {method_option}")
    if options and not ("method" in spec or "quant_method" in spec):
        raise ConfigError(f"With a configuration per component, write {', '.join(options)} into it")
    return {**spec, **options} if options else spec


def attention_spec(text: str | None, option: str = "--attention-quantization") -> str | dict[str, Any] | None:
    """Return what ``Omni`` takes as ``attention_quantization``.

    Raises:
        ConfigError: an unknown kind, or JSON that can't be read.
    """
    if text is not None and text.lstrip().startswith("{"):
        return read_json(text, option)
    return None if text is None else check_kind(text, option)


def read_json(text: str, option: str = "--quantization-config") -> dict[str, Any]:
    """Return the dictionary that ``text`` is, or that the file ``text`` holds."""
    source = text
    if not text.lstrip().startswith("{"):
        path = Path(text)
        if not path.is_file():
            raise ConfigError(f"{option}: {text!r} is neither a JSON dictionary nor a file")
        source = path.read_text()
    try:
        value = json.loads(source)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{option}: {text!r} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{option}: {text!r} is not a JSON dictionary")
    return value


def read_prompts(
    prompts: Sequence[str] | None, file: Path | None, default: Sequence[str] = (), option: str = "--prompts-file"
) -> list[str]:
    """Return the prompts of the command line and of the file, in this order, or else the default ones.

    Raises:
        ConfigError: the file is missing or not text, or there is no prompt.
    """
    found = list(prompts or ())
    if file is not None:
        if not file.is_file():
            raise ConfigError(f"{option}: there is no file {file}")
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{option}: {file} is not UTF-8 text") from error
        found += [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not found and file is None:
        found = list(default)
    if not found:
        raise ConfigError(f"{option}: {file} holds no prompt" if file else "Give a prompt: --prompt or --prompts-file")
    return found
