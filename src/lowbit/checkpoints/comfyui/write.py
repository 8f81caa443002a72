"""Writing the transformer of a pipeline as a single file in ComfyUI's fp8, one tensor at a time.

The file has ``_quantization_metadata`` in its header; each layer's ``weight`` in e4m3 and ``weight_scale`` float32 []
(``lowbit.ops.comfyui``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from lowbit.checkpoints.checks import TensorHeader
from lowbit.checkpoints.comfyui.read import METADATA
from lowbit.checkpoints.single_file_export import fused_shape, prepare_export, read_fused
from lowbit.containers.safetensors_writer import TensorToWrite, write_safetensors
from lowbit.errors import ConfigError
from lowbit.models.reference_names import Fused
from lowbit.quantization.manifest import LayerRecord, Manifest
from lowbit.quantization.methods.comfyui import WRITTEN, ComfyUiConfig, quantize_per_tensor
from lowbit.quantization.plan import Plan

FORMAT_VERSION = "1.0"


def export_comfyui(
    folder: str | Path,
    class_name: str,
    config: ComfyUiConfig,
    path: str | Path,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Write a diffusion transformer as a single file in fp8.

    Layers that the model's family keeps, and those of ``ignored_layers``, keep the dtype they have, as do other
    tensors. The layers that a fused one holds are quantized under one scale. Names are the reference implementation's.

    Args:
        folder: of the component, with ``config.json`` and safetensors.
        class_name: of the component, in diffusers.
        config: without a file.
        path: to write.
        progress: called with (tensors done, tensors to do).

    Returns:
        What was done, layer by layer.

    Raises:
        UnsupportedError: the layout of the class's single files is not known.
        ConfigError: the weights are quantized already, by ``config`` or in the folder.
        CheckpointError: its files are damaged.
    """
    if config.is_serialized:
        raise ConfigError("comfyui writes fp8 from unquantized weights: leave comfyui_model and layer_formats out")
    _, plan, headers, fused = prepare_export(Path(folder), class_name, config)
    quantized = {name for name, tensor in fused.items() if _is_quantized(tensor, plan)}
    tensors = [each for name in fused for each in _to_write(name, fused[name], name in quantized, headers)]
    layers = {name.removesuffix(".weight"): {"format": WRITTEN} for name in fused if name in quantized}
    metadata = {"format": "pt", METADATA: json.dumps({"format_version": FORMAT_VERSION, "layers": layers})}
    write_safetensors(path, metadata, tensors, progress)
    return _manifest(class_name, plan, {part for name in quantized for part in fused[name].parts}, headers)


def _is_quantized(tensor: Fused, plan: Plan) -> bool:
    decisions = [plan.get(part.removesuffix(".weight")) for part in tensor.parts if part.endswith(".weight")]
    return bool(decisions) and all(decision is not None and decision.method is not None for decision in decisions)


def _to_write(name: str, fused: Fused, is_quantized: bool, headers: Mapping[str, TensorHeader]) -> list[TensorToWrite]:
    shape = fused_shape(fused, headers)
    if not is_quantized:
        dtype = headers[fused.parts[0]].empty().dtype
        return [TensorToWrite(name, dtype, shape, lambda: read_fused(fused, headers))]
    scales: list[torch.Tensor] = []

    def elements() -> torch.Tensor:
        weight, scale = quantize_per_tensor(read_fused(fused, headers))
        scales.append(scale)
        return weight

    # Written in this order: the scale is there when it is asked for.
    return [
        TensorToWrite(name, torch.float8_e4m3fn, shape, elements),
        TensorToWrite(f"{name}_scale", torch.float32, (), scales.pop),
    ]


def _manifest(class_name: str, plan: Plan, quantized: set[str], headers: Mapping[str, TensorHeader]) -> Manifest:
    records = []
    for name, decision in plan.items():
        header = headers[f"{name}.weight"]
        elements = torch.Size(header.shape).numel()
        before = elements * header.empty().element_size()
        is_quantized = f"{name}.weight" in quantized
        # A layer that is fused with one that is kept is kept too.
        reason = "" if is_quantized else decision.reason or "fused with a layer that is kept"
        method = f"comfyui {WRITTEN}" if is_quantized else None
        records.append(LayerRecord(name, method, None, reason, before, elements if is_quantized else before))
    linear = {f"{name}.weight" for name in plan}
    return Manifest(class_name, records, sum(_bytes(headers[name]) for name in headers if name not in linear))


def _bytes(header: TensorHeader) -> int:
    return torch.Size(header.shape).numel() * header.empty().element_size()
