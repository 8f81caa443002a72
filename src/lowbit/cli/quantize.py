"""``lowbit quantize``: a checkpoint to a smaller one."""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm import tqdm

from lowbit.cli import options
from lowbit.errors import ConfigError
from lowbit.evaluation.model_card import model_card, read_validation
from lowbit.quantization.backends import BackendConfig
from lowbit.quantization.base import QuantizationConfig
from lowbit.quantization.comfyui import ComfyUiConfig
from lowbit.quantization.component import ComponentQuantizationConfig
from lowbit.quantization.factory import build_quant_config
from lowbit.quantization.gguf import GgufConfig

if TYPE_CHECKING:
    from lowbit.engine import Omni

# Suffix -> the method that writes such files, and the module and the function that do.
_SINGLE_FILES: dict[str, tuple[type[QuantizationConfig], str, str]] = {
    ".gguf": (GgufConfig, "lowbit.integrations.gguf_export", "export_gguf"),
    ".safetensors": (ComfyUiConfig, "lowbit.integrations.comfyui_export", "export_comfyui"),
}

EXAMPLES = """Examples:

  lowbit quantize --quantization int8 --output ./embedded-int8

  lowbit quantize --model Tongyi-MAI/Z-Image-Turbo -q int8 --output ./z-image-int8

  lowbit quantize --model ./z-image -q int8 --validation-json z-image-int8.json --output ./z-image-int8

  lowbit quantize --model ./z-image -q gguf --gguf-type Q4_K --output z-image-Q4_K.gguf

  lowbit quantize --model ./z-image -q comfyui --output z-image-fp8.safetensors
"""


def quantize(
    output: Annotated[str, typer.Option("--output", "-o", help="Folder to create, or a .gguf or .safetensors file.")],
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

    A folder gets a model card, README.md.
    """
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
    from lowbit.engine import Omni

    omni = Omni(model, quantization_config=spec, dtype=dtype, device=device, calibration_prompts=prompts)
    for manifest in omni.manifests.values():
        typer.echo(f"quantized   {manifest.summary()}")
    write_folder(omni, target, model_card(target.name, model, omni.manifests, validations))
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
    with tqdm(desc="writing", unit="tensor", leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        export = getattr(importlib.import_module(module), function)
        manifest = export(local_component(source, name), components[name][1], config, target, show)
    typer.echo(f"quantized   {manifest.summary()}")
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


def write_folder(omni: Omni, target: Path, card: str) -> None:
    """Save pipeline and model card under a temporary name and rename it: no half of it is ever found at ``target``."""
    temporary = Path(tempfile.mkdtemp(dir=target.absolute().parent, prefix=f".{target.name}."))
    try:
        omni.save_pretrained(str(temporary))
        (temporary / "README.md").write_text(card, encoding="utf-8")
        temporary.chmod(0o755)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
