"""Writing the transformer of a pipeline as a GGUF file, in the names its readers expect, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from lowbit.errors import ConfigError, UnsupportedError
from lowbit.formats.gguf_writer import TensorToWrite, Value, write_gguf
from lowbit.integrations.checks import TensorHeader, read_headers, read_json, weight_files
from lowbit.integrations.reference_names import LAYOUTS, Fused, Layout, reference_tensors
from lowbit.integrations.single_file import Rows, find_recipe
from lowbit.integrations.skeleton import empty_component
from lowbit.models.patterns import matches_any
from lowbit.ops.gguf import quantize_operator
from lowbit.ops.gguf_types import BLOCK_TYPES
from lowbit.quantization.gguf import GgufConfig, GgufLinearMethod
from lowbit.quantization.manifest import LayerRecord, Manifest
from lowbit.quantization.plan import Plan, plan_layers

# Tensors that small stay in float32 (ComfyUI-GGUF's convention), as do those with one dimension.
SMALL_TENSOR = 1024
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
    layout = LAYOUTS.get(class_name)
    if layout is None:
        raise UnsupportedError(f"The layout of GGUF files of {class_name} is not known. Known: {', '.join(LAYOUTS)}")
    if config.gguf_type is None:
        raise ConfigError("Say which type to write: gguf_type (--gguf-type), such as Q4_K")
    if read_json(folder / "config.json").get("quantization_config") is not None:
        raise ConfigError(f"{folder} is quantized already; export from the unquantized model")
    model = empty_component(str(folder.parent), folder.name, "diffusers", class_name)
    headers = read_headers(weight_files(folder))
    plan = _with_float32_modules(plan_layers(model, config), model)
    fused = reference_tensors(layout, model.state_dict())
    _check_layout(model, layout, fused)
    types = {name: _type_of(tensor, plan, headers) for name, tensor in fused.items()}
    tensors = [_to_write(name, fused[name], types[name], headers) for name in fused]
    write_gguf(path, _metadata(layout, config.gguf_type, folder), tensors, progress)
    return _manifest(class_name, plan, fused, types, headers)


def _with_float32_modules(plan: Plan, model: nn.Module) -> Plan:
    kept = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    return {
        name: replace(decision, method=None, reason="float32 module") if matches_any(kept, name) else decision
        for name, decision in plan.items()
    }


def _check_layout(model: nn.Module, layout: Layout, fused: Mapping[str, Fused]) -> None:
    """Convert the names back as diffusers does, and see that every row comes to its place.

    Raises:
        UnsupportedError: it does not: this version of diffusers has other names.
    """
    shapes = {name: tensor.shape[0] for name, tensor in model.state_dict().items()}
    recipe, missing = find_recipe(
        model, {name: sum(shapes[part] for part in tensor.parts) for name, tensor in fused.items()}
    )
    wrong = sorted(set(shapes) ^ set(recipe))
    for name, tensor in fused.items():
        first = 0
        for part in tensor.parts:
            height = shapes[part]
            rows: tuple[Rows, ...] = (Rows(name, first, first + height),)
            if tensor.swapped:
                rows = (Rows(name, height // 2, height), Rows(name, 0, height // 2))
            if recipe.get(part) != rows:
                wrong.append(part)
            first += height
    if wrong or missing:
        raise UnsupportedError(
            f"{layout.architecture}: diffusers reads single files of {type(model).__name__} in another way than lowbit"
            f" writes them: {', '.join(sorted({*wrong, *missing})[:8])}"
        )


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
    first = headers[fused.parts[0]].shape
    shape = (sum(headers[part].shape[0] for part in fused.parts), *first[1:])

    def make() -> torch.Tensor:
        values = torch.cat([_read(headers[part], part) for part in fused.parts])
        if fused.swapped:
            values = torch.cat(values.chunk(2)[::-1])
        raw: torch.Tensor = quantize_operator(values.reshape(-1, shape[-1]), weight_type)
        return raw

    return TensorToWrite(name, weight_type, shape, make)


def _read(header: TensorHeader, name: str) -> torch.Tensor:
    with safe_open(str(header.file), framework="pt") as opened:
        tensor: torch.Tensor = opened.get_tensor(name)
    return tensor


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
