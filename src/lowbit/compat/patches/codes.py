"""diffusers and transformers take codes for values: they cast float8 and integer tensors to a parameter's dtype.

They do so for checkpoints whose ``quantization_config`` was lost or names a method that transformers does not know (it
warns and goes on), and say no more than that scales were not used. Where no quantizer is at work, such a checkpoint is
refused here before its tensors are read.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lowbit.checkpoints import codes
from lowbit.checkpoints.checks import TensorHeader, read_headers
from lowbit.compat.parts.overrides import override
from lowbit.compat.patches.renaming import Names
from lowbit.errors import located

LOST = (
    "The configuration that says how to read them (quantization_config in config.json) is missing, unknown, or does not"
    " cover these layers: restore it, or load the unquantized checkpoint"
)
EXPERTS = (
    "Quantized experts that are loaded into one parameter, and routers in 8 bits, are not read: load a checkpoint whose"
    " experts and routers are not quantized"
)
_SINGLE_FILE = "Load it with lowbit's method 'comfyui' and comfyui_model, which applies the scales"
_SPELLINGS = {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8", torch.uint8: "U8"}


def register(module: ModuleType) -> None:
    """Prepare the modules of diffusers and transformers that load weights."""
    if module.__name__ == "transformers.modeling_utils":
        override(module.PreTrainedModel, "_load_pretrained_model", _load_transformers)
    elif module.__name__ == "diffusers.models.modeling_utils":
        override(module.ModelMixin, "_load_pretrained_model", _load_diffusers)
    else:
        override(module, "load_model_dict_into_meta", _load_single_file)


def refuse_codes(
    where: str,
    headers: Mapping[str, TensorHeader],
    names: Names,
    is_read: Callable[[str], bool] = lambda name: False,
) -> None:
    """Refuse codes that transformers would put into parameters of values.

    Args:
        where: the model, for the message.
        headers: of the checkpoint.
        names: to the model's.
        is_read: tells whether a quantized layer reads the tensor of the model's name.

    Raises:
        CheckpointError: names the tensors and why they are no values.
    """
    targets = {name: names(name) for name in headers}

    def floating(stored: str) -> bool:
        name, _ = targets[stored]
        parameter = names.expected.get(name)
        return parameter is not None and parameter.is_floating_point() and not is_read(name)

    found = codes.problems(codes.of_values(headers, floating), headers.keys())
    found.update(codes.stand_ins(headers, {stored: name for stored, (name, _) in targets.items()}, names.expected))
    is_expert = any(targets[name][1] or is_router(targets[name][0]) for name in found)
    codes.refuse(where, found, EXPERTS if is_expert else LOST)


def is_router(name: str) -> bool:
    """Tell whether a weight chooses experts: too few numbers to save, and each error sends tokens elsewhere."""
    return name.removesuffix(".weight").rpartition(".")[2] in ("gate", "router", "shared_expert_gate")


def _load_transformers(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    given = inspect.signature(original).bind(*args, **kwargs).arguments
    headers, model = _headers(given.get("checkpoint_files")), given["model"]
    if given["load_config"].hf_quantizer is None and any(map(codes.is_codes, headers.values())):
        with located(_location(headers)):
            refuse_codes(type(model).__name__, headers, Names.of(model, given["load_config"].weight_mapping))
    return original(*args, **kwargs)


def _load_diffusers(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    given = inspect.signature(original).bind(*args, **kwargs).arguments
    headers, model = _headers(given.get("resolved_model_file")), given["model"]
    if given.get("hf_quantizer") is None and any(map(codes.is_codes, headers.values())):
        expected = model.state_dict()
        wanted = codes.of_values(headers, lambda name: name in expected and expected[name].is_floating_point())
        found = codes.problems(wanted, headers.keys())
        found.update(codes.stand_ins(headers, {name: name for name in headers}, expected))
        with located(_location(headers)):
            codes.refuse(type(model).__name__, found, LOST)
    return original(*args, **kwargs)


def _load_single_file(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    given = inspect.signature(original).bind(*args, **kwargs).arguments
    tensors, model = given["state_dict"], given["model"]
    if given.get("hf_quantizer") is None:
        expected = model.state_dict()
        headers = {
            name: TensorHeader(Path(), _SPELLINGS[tensor.dtype], tuple(tensor.shape))
            for name, tensor in tensors.items()
            if tensor.dtype in _SPELLINGS and name in expected and expected[name].is_floating_point()
        }
        codes.refuse(type(model).__name__, codes.problems(headers, tensors.keys(), tensors.get), _SINGLE_FILE)
    return original(*args, **kwargs)


def _headers(files: Any) -> dict[str, TensorHeader]:
    """Return the headers of the safetensors files among ``files``, which may also be tensors or pickles."""
    listed = files if isinstance(files, list | tuple) else [files]
    return read_headers(file for file in listed if isinstance(file, str | Path) and str(file).endswith(".safetensors"))


def _location(headers: Mapping[str, TensorHeader]) -> str:
    return ", ".join(sorted({str(header.file.parent) for header in headers.values()}))
