"""``lowbit quantize``: a checkpoint to a smaller one."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli import options
from lowbit.errors import ConfigError

EXAMPLES = """Examples:

  lowbit quantize --quantization int8 --output ./embedded-int8

  lowbit quantize --model Tongyi-MAI/Z-Image-Turbo -q int8 --output ./z-image-int8
"""


def quantize(
    output: Annotated[str, typer.Option("--output", "-o", help="Folder to create.")],
    model: options.Model = None,
    quantization: options.Quantization = None,
    quantization_config: options.QuantizationConfigText = None,
    ignored_layers: options.IgnoredLayers = None,
    dtype: options.Dtype = "bfloat16",
    device: options.Device = None,
    calibration_prompt: Annotated[
        list[str] | None, typer.Option(help="For FP8's static activation scheme; may be given several times.")
    ] = None,
) -> None:
    """Quantize a pipeline and write it, in diffusers' format with vLLM-Omni's tensors."""
    target = check_new_folder(output)
    spec = options.quantization_spec(quantization, quantization_config, ignored_layers)
    if spec is None:
        raise ConfigError("Say how to quantize: --quantization or --quantization-config")
    from lowbit.engine import Omni

    omni = Omni(
        model, quantization_config=spec, dtype=dtype, device=device, calibration_prompts=calibration_prompt or ()
    )
    for manifest in omni.manifests.values():
        typer.echo(f"quantized   {manifest.summary()}")
    write_folder(omni, target)
    typer.echo(f"wrote       {target}")


def check_new_folder(path: str) -> Path:
    """Return ``path`` if a folder can be created there; raises ``ConfigError`` otherwise."""
    target = Path(path)
    if target.exists():
        raise ConfigError(f"{target} exists already; name a new folder")
    parent = target.absolute().parent
    if not parent.is_dir():
        raise ConfigError(f"Can't write {target}: the folder {parent} does not exist")
    if not os.access(parent, os.W_OK):
        raise ConfigError(f"Can't write {target}: no permission in {parent}")
    return target


def write_folder(omni: object, target: Path) -> None:
    """Save the pipeline under a temporary name and rename it, so that no half of it is ever found at ``target``."""
    temporary = Path(tempfile.mkdtemp(dir=target.absolute().parent, prefix=f".{target.name}."))
    try:
        omni.save_pretrained(str(temporary))  # type: ignore[attr-defined]
        temporary.chmod(0o755)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
