"""What writing a transformer as a single file, in the names of its reference implementation, takes in every format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from lowbit.checkpoints.checks import TensorHeader, read_headers, weight_files
from lowbit.checkpoints.single_file import Rows, find_recipe
from lowbit.checkpoints.skeleton import empty_component
from lowbit.compat.parts.modules import float32_modules
from lowbit.containers.json_file import read_json
from lowbit.errors import ConfigError, UnsupportedError, expected_one_of
from lowbit.models.patterns import matches_any
from lowbit.models.reference_names import LAYOUTS, Fused, Layout, reference_tensors
from lowbit.quantization.base import QuantizationConfig
from lowbit.quantization.plan import Plan, plan_layers

# Tensors that small stay in float32 (ComfyUI-GGUF's convention), as do those with one dimension.
SMALL_TENSOR = 1024


def prepare_export(
    folder: Path, class_name: str, config: QuantizationConfig
) -> tuple[Layout, Plan, dict[str, TensorHeader], dict[str, Fused]]:
    """Plan an export.

    Args:
        folder: of the component, with ``config.json`` and safetensors.
        class_name: of the component, in diffusers.
        config: to plan with.

    Returns:
        The layout, what becomes of every linear layer, the headers of the folder's tensors, and the file's tensors by
        name.

    Raises:
        UnsupportedError: the layout of the class's single files is not known.
        ConfigError: the component is quantized already.
        CheckpointError: its files are damaged.
    """
    layout = LAYOUTS.get(class_name)
    if layout is None:
        raise UnsupportedError(f"The layout of single files of {class_name} is not known. {expected_one_of(LAYOUTS)}")
    if read_json(folder / "config.json").get("quantization_config") is not None:
        raise ConfigError(f"{folder} is quantized already; export from the unquantized model")
    model = empty_component(str(folder.parent), folder.name, "diffusers", class_name)
    headers = read_headers(weight_files(folder))
    plan = _with_float32_modules(plan_layers(model, config), model)
    fused = reference_tensors(layout, model.state_dict())
    _check_layout(model, layout, fused)
    return layout, plan, headers, fused


def fused_shape(fused: Fused, headers: Mapping[str, TensorHeader]) -> tuple[int, ...]:
    """Return the shape of a tensor of the file."""
    return (sum(headers[part].shape[0] for part in fused.parts), *headers[fused.parts[0]].shape[1:])


def read_fused(fused: Fused, headers: Mapping[str, TensorHeader]) -> torch.Tensor:
    """Return the values of a tensor of the file, in the folder's dtype."""
    values = torch.cat([_read(headers[part], part) for part in fused.parts])
    return torch.cat(values.chunk(2)[::-1]) if fused.swapped else values


def _read(header: TensorHeader, name: str) -> torch.Tensor:
    with safe_open(str(header.file), framework="pt") as opened:
        tensor: torch.Tensor = opened.get_tensor(name)
    return tensor


def _with_float32_modules(plan: Plan, model: nn.Module) -> Plan:
    kept = tuple(float32_modules(model))
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
