"""Checking a local pipeline or component before anything is loaded, so that no work is wasted on a broken one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import nn

from lowbit.checkpoints import codes
from lowbit.checkpoints import component as loading
from lowbit.checkpoints.checks import (
    TensorHeader,
    check_tensors,
    read_headers,
    separate_config,
    weight_files,
)
from lowbit.compat.parts.modules import ignored_keys, key_renaming
from lowbit.compat.patches.codes import LOST
from lowbit.containers.json_file import read_json
from lowbit.errors import CheckpointError, ConfigError, located
from lowbit.hosts import routing as dispatch
from lowbit.quantization.base import QuantizationConfig


def check_pipeline(
    folder: str | Path,
    quant_mapping: Mapping[str, QuantizationConfig | None] | None = None,
    *,
    variant: str | None = None,
    components: Collection[str] | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Check every model in a pipeline's folder.

    Args:
        folder: with ``model_index.json``.
        quant_mapping: component -> configuration to quantize it with, as ``PipelineQuantizationConfig`` takes it.
        variant: of the weight files, such as ``"fp16"``.
        components: only these; ``None`` for all.
        device: the quantized components will run on.

    Raises:
        CheckpointError: files or tensors are not what the pipeline needs; one message for all components.
        ConfigError: a component of ``quant_mapping`` does not exist, is quantized another way already, or an option
            of its configuration is wrong.
        UnsupportedError: no kernel can run a layer.
    """
    folder, quant_mapping = Path(folder), quant_mapping or {}
    entries = _pipeline_entries(folder)
    unknown = [name for name in [*quant_mapping, *(components or ())] if name not in entries]
    if unknown:
        raise ConfigError(f"{folder} has no component {', '.join(unknown)}; it has: {', '.join(entries)}")
    problems = []
    for name, entry in entries.items():
        if components is not None and name not in components:
            continue
        try:
            _check_entry(folder / name, entry, quant_mapping.get(name), variant, device)
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("\n".join(problems))


def check_component(
    folder: str | Path,
    quantization: QuantizationConfig | None = None,
    *,
    variant: str | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Check the files of one model; for a model of diffusers also every tensor's name, shape and dtype.

    transformers renames and splits tensors while it loads them, so only the files of its models are checked here.

    Raises:
        CheckpointError: files or tensors are not what the model needs.
        ConfigError: it is quantized another way already, or an option of ``quantization`` is wrong.
        UnsupportedError: no kernel can run a layer.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    config = read_json(folder / "config.json")
    stored = config.get("quantization_config") or separate_config(folder)
    quantization = _effective(folder, stored, quantization)
    headers = read_headers(weight_files(folder, variant))
    if stored is None or quantization is not None:
        model = _empty_model(config)
        with located(str(folder)):
            if model is not None:
                _check_diffusers_model(model, quantization, headers, device)
            elif stored is None:
                _refuse_codes(str(config.get("architectures") or "model"), headers)


def _refuse_codes(model: str, headers: Mapping[str, TensorHeader]) -> None:
    """Refuse weights in codes, of a model whose names and shapes are not checked here and that is not quantized."""
    weights = codes.of_values(headers, lambda name: name.endswith(".weight"))
    codes.refuse(model, codes.problems(weights, headers.keys()), LOST)


def _pipeline_entries(folder: Path) -> dict[str, tuple[str, str]]:
    """Return component -> (library, class) from ``model_index.json``, without those that are left out."""
    index = folder / "model_index.json"
    if not index.is_file():
        found = "it is the folder of one model" if (folder / "config.json").is_file() else "it is no pipeline"
        raise CheckpointError(f"{folder}: has no model_index.json: {found if folder.is_dir() else 'no such folder'}")
    return {
        name: (entry[0], entry[1])
        for name, entry in read_json(index).items()
        if isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)
    }


def _check_entry(
    folder: Path,
    entry: tuple[str, str],
    quantization: QuantizationConfig | None,
    variant: str | None,
    device: torch.device | str,
) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder, but model_index.json names {'.'.join(entry)}")
    # Tokenizers, processors and schedulers call their configuration otherwise.
    if (folder / "config.json").is_file() or quantization is not None or _is_model_class(*entry):
        check_component(folder, quantization, variant=variant, device=device)


def _is_model_class(library: str, name: str) -> bool:
    # Of transformers the name must do: importing the class would import a model's code.
    kind = getattr(diffusers, name, None) if library == "diffusers" else None
    return (isinstance(kind, type) and issubclass(kind, nn.Module)) or (
        library == "transformers" and name.endswith(("Model", "ForCausalLM", "ForConditionalGeneration", "Projection"))
    )


def _effective(folder: Path, stored: Any, requested: QuantizationConfig | None) -> QuantizationConfig | None:
    """Return lowbit's configuration to load a component with; ``None`` for none or for somebody else's."""
    if stored is None:
        return requested
    with located(str(folder)):
        if requested is None and not dispatch.claims(stored):
            return None
        return dispatch.merge_configs(stored, requested)


def _empty_model(config: Mapping[str, Any]) -> nn.Module | None:
    """Return a model of diffusers on the meta device; ``None`` for models of others."""
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        return None
    with init_empty_weights():
        model: nn.Module = kind.from_config({k: v for k, v in config.items() if k != "quantization_config"})  # type: ignore[attr-defined]
    return model


def _check_diffusers_model(
    model: nn.Module,
    quantization: QuantizationConfig | None,
    headers: dict[str, TensorHeader],
    device: torch.device | str,
) -> None:
    rename = key_renaming(model)
    if rename is not None:
        rename(headers)  # the attention layers of old checkpoints have other names
    preparation = None
    if quantization is not None:
        config = quantization.of_checkpoint(headers)
        preparation = loading.prepare(model, config, torch.bfloat16, device=device)
    ignored = ignored_keys(model)
    check_tensors(model, preparation, headers, ignored=ignored)
