"""``lowbit quantize``: a checkpoint to a smaller one."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli import options
from lowbit.cli.messages import bar, say, silence_libraries
from lowbit.errors import ConfigError
from lowbit.evaluation.model_card import model_card, read_validation
from lowbit.quantization.backends import BackendConfig
from lowbit.quantization.base import QuantizationConfig
from lowbit.quantization.component import ComponentQuantizationConfig
from lowbit.quantization.factory import build_quant_config
from lowbit.quantization.manifest import Manifest
from lowbit.quantization.methods.comfyui import ComfyUiConfig
from lowbit.quantization.methods.gguf import GgufConfig

# Suffix -> the method that writes such files, and the module and the function that do.
_SINGLE_FILES: dict[str, tuple[type[QuantizationConfig], str, str]] = {
    ".gguf": (GgufConfig, "lowbit.checkpoints.gguf.write", "export_gguf"),
    ".safetensors": (ComfyUiConfig, "lowbit.checkpoints.comfyui.write", "export_comfyui"),
}

EXAMPLES = """Examples:

  lowbit quantize --quantization int8 --output ./embedded-int8

  lowbit quantize Tongyi-MAI/Z-Image-Turbo -q int8 --output ./z-image-int8

  lowbit quantize ./z-image -q int8 --validation-json z-image-int8.json --output ./z-image-int8

  lowbit quantize ./z-image -q gguf --gguf-type Q4_K --output z-image-Q4_K.gguf

  lowbit quantize ./z-image -q comfyui --output z-image-fp8.safetensors
"""


def quantize(
    output: Annotated[str, typer.Option("--output", "-o", help="Folder to create, or a .gguf or .safetensors file.")],
    model_argument: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A folder or a Hub id. Default: the embedded model.")
    ] = None,
    model: options.Model = None,
    quantization: options.Quantization = None,
    quantization_config: options.QuantizationConfigText = None,
    ignored_layers: options.IgnoredLayers = None,
    gguf_type: options.GgufType = None,
    dtype: options.Dtype = "bfloat16",
    device: options.Device = None,
    calibration_prompt: options.CalibrationPrompts = None,
    calibration_prompts: Annotated[
        Path | None, typer.Option(help="A text file with a calibration prompt per line.")
    ] = None,
    validation_json: Annotated[
        list[Path] | None,
        typer.Option(help="What lowbit validate wrote, for the model card; may be given several times."),
    ] = None,
) -> None:
    """Quantize a pipeline and write it, in diffusers' format with vLLM-Omni's tensors; or one GGUF or ComfyUI file.

    A folder gets a model card, README.md. Until it is whole it is called OUTPUT.partial; the same command again goes on
    with the components that are not finished there.
    """
    if model is not None and model_argument is not None:
        raise ConfigError("Name the model once: as MODEL or with --model")
    model = model if model is not None else model_argument
    target = check_new_folder(output)
    validations = [read_validation(file) for file in validation_json or ()]
    prompts = list(calibration_prompt or ())
    if calibration_prompts:
        prompts = options.read_prompts(prompts, calibration_prompts, option="--calibration-prompts")
    spec = options.quantization_spec(quantization, quantization_config, ignored_layers, gguf_type=gguf_type)
    if spec is None:
        raise ConfigError("Say how to quantize: --quantization or --quantization-config")
    if target.suffix in _SINGLE_FILES:
        write_single_file(model, spec, target)
        return
    refuse_other_backends(spec)
    write_folder(model, spec, target, validations, dtype=dtype, device=device, calibration_prompts=prompts)


def write_folder(
    model: str | None, spec: Any, target: Path, validations: Sequence[Mapping[str, Any]], **settings: Any
) -> None:
    """Write the pipeline of ``model`` with its components quantized and a model card; tell how it goes."""
    from lowbit.engine.export import export_pipeline
    from lowbit.engine.partial_folder import partial_path

    silence_libraries()
    with bar("component") as shown:

        def begin(component: str, done: int, total: int) -> None:
            shown.set_description_str(component, refresh=False)
            shown.total, shown.n = total, done
            shown.refresh()

        def report(component: str, manifest: Manifest | None) -> None:
            with shown.external_write_mode():
                say(f"quantized   {manifest.summary()}" if manifest is not None else f"written     {component}")

        def resumed(names: Sequence[str]) -> None:
            say(f"resuming    {partial_path(target)}: there already: {', '.join(names)}")

        export_pipeline(
            model,
            target,
            quantization_config=spec,
            card=lambda manifests: model_card(target.name, model, manifests, validations),
            report=report,
            resumed=resumed,
            begin=begin,
            **settings,
        )
    typer.echo(f"wrote       {target}")


def refuse_other_backends(spec: Any) -> None:
    """Raise ``ConfigError`` for methods of other libraries: their own tools write their checkpoints."""
    config = build_quant_config(spec)
    parts = [config]
    if isinstance(config, ComponentQuantizationConfig):
        parts = [*config.component_configs.values(), config.default_config]
    others = sorted({part.backend for part in parts if isinstance(part, BackendConfig)})
    if others:
        raise ConfigError(
            f"lowbit writes checkpoints of its own methods, not of {', '.join(others)}: use save_pretrained of"
            " Omni(...).pipeline, which writes what diffusers' backend can"
        )


def write_single_file(model: str | None, spec: Any, target: Path) -> None:
    """Write the transformer of ``model`` as one file, in the format that its suffix stands for.

    Raises:
        ConfigError: a method that does not write such files, or several components.
    """
    from lowbit.engine.loading import local_component, read_components, resolve_model, route

    kind, module, function = _SINGLE_FILES[target.suffix]
    source = resolve_model(model)
    components = read_components(source)
    chosen = route(build_quant_config(spec), components)
    if len(chosen) != 1:
        raise ConfigError(
            f"{target} holds one component, and {', '.join(chosen)} are to be quantized: name one with"
            f' --quantization-config \'{{"transformer": {{"method": "{kind.get_name()}", ...}}}}\''
        )
    name, config = next(iter(chosen.items()))
    if not isinstance(config, kind):
        raise ConfigError(
            f"{target} would be a {target.suffix} file, and the method is {config.get_name()}: use --quantization"
            f" {kind.get_name()}"
        )
    with bar("tensor") as shown:
        shown.set_description_str("writing", refresh=False)

        def show(done: int, total: int) -> None:
            shown.total, shown.n = total, done
            shown.refresh()

        export = getattr(importlib.import_module(module), function)
        manifest = export(local_component(source, name), components[name][1], config, target, show)
    say(f"quantized   {manifest.summary()}")
    typer.echo(f"wrote       {target}")


def check_new_folder(path: str) -> Path:
    """Return ``path`` if a file or folder can be created there; raises ``ConfigError`` otherwise."""
    target = Path(path)
    if target.exists():
        raise ConfigError(f"{target} exists already; name a new folder or file")
    parent = target.absolute().parent
    if not parent.is_dir():
        raise ConfigError(f"Can't write {target}: the folder {parent} does not exist")
    if not os.access(parent, os.W_OK):
        raise ConfigError(f"Can't write {target}: no permission in {parent}")
    return target
