"""Writing the transformer of a pipeline as a GGUF file, in the names its readers expect, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from lowbit.checkpoints.checks import TensorHeader
from lowbit.checkpoints.single_file_export import SMALL_TENSOR, fused_shape, prepare_export, read_fused
from lowbit.containers.gguf_writer import TensorToWrite, Value, write_gguf
from lowbit.errors import ConfigError
from lowbit.models.reference_names import Fused, Layout
from lowbit.ops.gguf import quantize_operator
from lowbit.ops.gguf_types import BLOCK_TYPES
from lowbit.quantization.manifest import LayerRecord, Manifest
from lowbit.quantization.methods.gguf import GgufConfig, GgufLinearMethod
from lowbit.quantization.plan import Plan

QUANTIZATION_VERSION = 2  # of ggml's blocks
# general.file_type, llama.cpp's numbers of "mostly" that type.
FILE_TYPES: Mapping[str, int] = {
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q4_K": 14,
    "Q5_K": 16,
    "Q6_K": 18,
}
_PLAIN = {"F32": "F32", "F16": "F16", "BF16": "BF16"}


def export_gguf(
    folder: str | Path,
    class_name: str,
    config: GgufConfig,
    path: str | Path,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Write a diffusion transformer as a GGUF file.

    Layers that the model's family keeps, and those of ``ignored_layers``, stay in the precision they have; norms,
    biases and other small tensors are in float32.

    Args:
        folder: of the component, with ``config.json`` and safetensors.
        class_name: of the component, in diffusers.
        config: with ``gguf_type``.
        path: to write.
        progress: called with (tensors done, tensors to do).

    Returns:
        What was done, layer by layer.

    Raises:
        UnsupportedError: the layout of the class's single files is not known.
        ConfigError: no ``gguf_type``, or the component is quantized already.
        CheckpointError: its files are damaged.
    """
    folder = Path(folder)
    if config.gguf_type is None:
        raise ConfigError("Say which type to write: gguf_type (--gguf-type), such as Q4_K")
    layout, plan, headers, fused = prepare_export(folder, class_name, config)
    types = {name: _type_of(tensor, plan, headers) for name, tensor in fused.items()}
    tensors = [_to_write(name, fused[name], types[name], headers) for name in fused]
    write_gguf(path, _metadata(layout, config.gguf_type, folder), tensors, progress)
    return _manifest(class_name, plan, fused, types, headers)


def _type_of(tensor: Fused, plan: Plan, headers: Mapping[str, TensorHeader]) -> str:
    """Return the type for a tensor: of its layers if they agree, else that of the file, float32 if it is small."""
    found = [headers[name] for name in tensor.parts]
    elements = sum(torch.Size(header.shape).numel() for header in found)
    decisions = [plan.get(name.removesuffix(".weight")) for name in tensor.parts]
    if len(found[0].shape) < 2 or elements <= SMALL_TENSOR or None in decisions:
        return "F32"
    methods = [decision.method for decision in decisions if decision is not None]
    wanted = {method.weight_type if isinstance(method, GgufLinearMethod) else "" for method in methods}
    if len(wanted) == 1 and "" not in wanted:
        return wanted.pop()
    return _PLAIN.get(found[0].dtype, "F32")


def _to_write(name: str, fused: Fused, weight_type: str, headers: Mapping[str, TensorHeader]) -> TensorToWrite:
    shape = fused_shape(fused, headers)

    def make() -> torch.Tensor:
        raw: torch.Tensor = quantize_operator(read_fused(fused, headers).reshape(-1, shape[-1]), weight_type)
        return raw

    return TensorToWrite(name, weight_type, shape, make)


def _metadata(layout: Layout, weight_type: str, folder: Path) -> dict[str, Value]:
    return {
        "general.architecture": layout.architecture,
        "general.type": "model",
        "general.name": folder.parent.name or folder.name,
        "general.quantization_version": QUANTIZATION_VERSION,
        "general.file_type": FILE_TYPES[weight_type],
    }


def _manifest(
    class_name: str,
    plan: Plan,
    fused: Mapping[str, Fused],
    types: Mapping[str, str],
    headers: Mapping[str, TensorHeader],
) -> Manifest:
    written = {part: types[name] for name, tensor in fused.items() for part in tensor.parts}
    records: Sequence[LayerRecord] = [
        _record(name, decision.reason, written[f"{name}.weight"], headers[f"{name}.weight"])
        for name, decision in plan.items()
    ]
    linear = {f"{name}.weight" for name in plan}
    others = sum(4 * torch.Size(headers[name].shape).numel() for name in written if name not in linear)
    return Manifest(class_name, records, others)


def _record(name: str, reason: str, weight_type: str, header: TensorHeader) -> LayerRecord:
    rows, columns = header.shape
    kind = BLOCK_TYPES[weight_type]
    before = rows * columns * header.empty().element_size()
    after = rows * kind.row_bytes(columns)
    method = None if kind.is_plain else f"gguf {weight_type}"
    return LayerRecord(name, method, None, "" if method else reason or "too small", before, after)
