"""What the quantizers of diffusers and of transformers have in common: before, during and after the tensors arrive."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.compat.parts.modules import persistent_tensors
from lowbit.errors import CheckpointError, ConfigError
from lowbit.ops.dispatch import ANY_DEVICE, requested_kernel
from lowbit.quantization.base import LinearMethod, QuantizationConfig
from lowbit.quantization.calibration.static import uncalibrated_layers
from lowbit.quantization.linear import QuantizedLinear, State
from lowbit.quantization.manifest import Manifest
from lowbit.quantization.methods.fp8 import UNCALIBRATED
from lowbit.quantization.plan import (
    Plan,
    check_kernels,
    keep,
    make_manifest,
    plan_layers,
    quantized_layers,
    replace_layers,
)

logger = logging.getLogger(__name__)

COMPUTE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
AUTOMATIC_DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True)
class Preparation:
    """A model whose linear layers were replaced and that waits for its tensors.

    Attributes:
        config: with which they will be read or quantized.
        plan: what was decided for every linear layer.
        layers: the empty quantized layers, by name.
    """

    config: QuantizationConfig
    plan: Plan
    layers: Mapping[str, QuantizedLinear]

    def find(self, tensor_name: str) -> tuple[QuantizedLinear, str] | None:
        """Return the layer and its parameter that ``tensor_name`` names, if it is quantized data or becomes such."""
        prefix, _, stored_name = tensor_name.rpartition(".")
        layer = self.layers.get(prefix)
        name = layer.parameter_of(stored_name) if layer is not None else None
        return (layer, name) if layer is not None and name is not None else None

    def is_made_here(self, tensor_name: str) -> bool:
        """Tell whether quantizing makes this tensor, so that no unquantized checkpoint has it."""
        found = self.find(tensor_name)
        return found is not None and found[1] != "weight" and not self.config.is_serialized

    def may_be_absent(self, tensor_name: str) -> bool:
        """Tell whether a checkpoint is whole without this tensor: quantizing makes it, or it is optional."""
        found = self.find(tensor_name)
        return self.is_made_here(tensor_name) or (found is not None and found[1] in found[0].method.optional)


def prepare(
    model: nn.Module,
    config: QuantizationConfig,
    dtype: torch.dtype,
    *,
    device: torch.device | str | None = None,
    kept: Mapping[str, Collection[str]] | None = None,
) -> Preparation:
    """Replace the linear layers of ``model`` (on the meta device) that take the method by empty quantized ones.

    Args:
        model: as the library made it.
        config: online or serialized.
        dtype: the model computes in.
        device: the layers will be loaded to, to refuse what no kernel can run before any work is done; ``None`` when
            that is not known.
        kept: reason -> patterns of layers to keep beyond those of ``config`` and of the model's family; not used for
            a checkpoint that is already quantized, which says itself what it keeps.

    Raises:
        ConfigError: a wrong option, or nothing to quantize.
        UnsupportedError: no kernel can run a layer.
    """
    if dtype not in COMPUTE_DTYPES:
        raise ConfigError(f"{config.get_name()} computes in bfloat16, float16 or float32, not in {dtype}")
    if config.needs_calibration:
        raise ConfigError(
            "smoothing is found on prompts before quantizing: use Omni(..., calibration_prompts=[...]), or"
            " quantize_model with seen_inputs"
        )
    plan = plan_layers(model, config)
    if not config.is_serialized or config.weights_from is not None:
        plan = keep(plan, kept or {})
    replace_layers(model, plan, dtype)
    layers = quantized_layers(model)
    for layer in layers.values():
        layer.state = State.AWAITING_TENSORS
        if config.is_serialized:
            layer.expect_stored()
        else:
            layer.expect_unquantized()
    if device is not None:
        target = torch.device(device)
        check_kernels((layer for layer in layers.values() if not _is_for_other_device(layer.method, target)), target)
    return Preparation(config, plan, layers)


def _is_for_other_device(method: LinearMethod, device: torch.device) -> bool:
    """Tell whether the user named a kernel of another device: a model may be loaded on the CPU and moved later."""
    name = requested_kernel(method.family, method.kernel)
    named = [entry for entry in method.table if entry.name == name]
    return device.type == "cpu" and bool(named) and not named[0].devices & {"cpu", *ANY_DEVICE}


def weight_bytes(layer: QuantizedLinear, headers: Mapping[str, Any]) -> int:
    """Return the bytes of a layer's unquantized weight: as its checkpoint's header says, else in the compute dtype.

    Args:
        layer: to be quantized.
        headers: tensor's name -> ``checks.TensorHeader``; names may differ from the layer's.
    """
    header = headers.get(f"{layer.prefix}.weight")
    if header is not None:
        return int(header.empty().nbytes)
    return layer.out_features * layer.in_features * layer.compute_dtype.itemsize


def check_device_map(device_map: object) -> None:
    """Refuse placements that move tensors behind a layer's back.

    Raises:
        ConfigError: layers on the disk, or some on the CPU and some on an accelerator.
    """
    if not isinstance(device_map, Mapping):
        return
    devices = {str(device) for device in device_map.values()}
    if "disk" in devices or ("cpu" in devices and len(devices) > 1):
        raise ConfigError(
            f"A quantized model can't be spread over {', '.join(sorted(devices))}: choose one device, or offload whole"
            " components with enable_model_cpu_offload()"
        )


def first_device(device_map: object) -> torch.device | None:
    """Return a device that ``device_map`` names; the CPU without one, ``None`` when it is still to be chosen."""
    device: Any = next(iter(device_map.values()), None) if isinstance(device_map, Mapping) else device_map or "cpu"
    return None if device in (None, *AUTOMATIC_DEVICE_MAPS) else torch.device(device)


def drop_absent(layers: Iterable[QuantizedLinear]) -> None:
    """Let layers do without the optional tensors that did not arrive."""
    for layer in layers:
        for name in layer.method.optional & set(layer.quantized_names):
            if layer.get_parameter(name).is_meta:
                layer.drop_tensor(name)


def check_loaded(model: nn.Module, missing: Iterable[str] = (), wrong: Mapping[str, str] | None = None) -> None:
    """Check that everything arrived.

    Args:
        model: after its tensors were loaded.
        missing: further names known not to have arrived.
        wrong: name -> what it is instead of what is needed.

    Raises:
        CheckpointError: tensors are missing or wrong, or linear layers that should be unquantized are not; names them
            all.
    """
    absent = {*_absent(model), *_absent_here_only(model), *missing}
    problems = [f"{len(absent)} tensors are missing: {', '.join(sorted(absent))}"] if absent else []
    if wrong:
        problems += [f"{len(wrong)} tensors are wrong:", *(f"  {name}: {wrong[name]}" for name in sorted(wrong))]
    if problems:
        raise CheckpointError(f"{type(model).__name__}: " + "\n  ".join(problems))
    foreign = [
        f"{name}.weight ({str(layer.weight.dtype).removeprefix('torch.')})"
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear and layer.weight.dtype not in (*COMPUTE_DTYPES, torch.float64)
    ]
    if foreign:
        raise CheckpointError(
            f"{type(model).__name__}: layers to be kept in high precision are not: {', '.join(foreign)}. Does"
            " ignored_layers in config.json name layers that were quantized?"
        )


def _absent_here_only(model: nn.Module) -> Iterator[str]:
    """Yield the names, as on disk, of optional tensors that other layers of the same method have."""
    layers = quantized_layers(model).values()
    present = {(layer.method.name, name) for layer in layers for name in layer.quantized_names}
    for layer in layers:
        for name in sorted(layer.method.all_or_none - set(layer.quantized_names)):
            if (layer.method.name, name) in present:
                yield f"{layer.prefix}.{layer.stored_name(name)}"


def _absent(model: nn.Module) -> Iterator[str]:
    """Yield the names, as on disk, of parameters and of buffers in the state dict that have no values."""
    for prefix, module in model.named_modules():
        for name, tensor in persistent_tensors(module):
            if tensor.is_meta:
                stored = module.stored_name(name) if isinstance(module, QuantizedLinear) else name
                yield f"{prefix}.{stored}" if prefix else stored


def finish(model: nn.Module, preparation: Preparation, files: Iterable[str | Path] = ()) -> Manifest:
    """Bring the loaded layers to their kernels' layouts, one at a time, and record what was done.

    Sets ``model.lowbit_manifest`` and ``model.lowbit_config``, as ``quantize_model`` does.

    Args:
        model: with all its tensors.
        preparation: that it was loaded with.
        files: that the tensors came from.
    """
    for layer in preparation.layers.values():
        layer.arrive()
        layer.forget_stored()
        if not _is_for_other_device(layer.method, layer.weight.device):
            layer.process_weights_after_loading()
    manifest = make_manifest(model, preparation.plan)
    manifest = replace(manifest, notes=_expert_notes(model), bytes_on_disk=bytes_on_disk(files))
    model.lowbit_manifest = manifest  # type: ignore[assignment]
    model.lowbit_config = preparation.config  # type: ignore[assignment]
    logger.info("%s", manifest.summary())
    for note in manifest.notes:
        logger.info("%s: %s", manifest.component, note)
    waiting = uncalibrated_layers(model)
    if waiting:
        logger.warning("%s: %d layers need calibration before use", manifest.component, len(waiting))
    return manifest


def bytes_on_disk(files: Iterable[str | Path]) -> int | None:
    """Return the size of ``files``, ``None`` if there are none."""
    sizes = [Path(file).stat().st_size for file in files]
    return sum(sizes) if sizes else None


def _expert_notes(model: nn.Module) -> tuple[str, ...]:
    # Mixtures of experts hold the weights of all experts in one parameter that no linear layer owns.
    experts = [name for name, tensor in model.named_parameters() if tensor.ndim == 3 and "expert" in name]
    return (f"kept {len(experts)} fused expert weights, which are not linear layers",) if experts else ()


def serialized_config(model: nn.Module) -> QuantizationConfig:
    """Return the ``quantization_config`` of a checkpoint written from a model that lowbit quantized or loaded."""
    config: Any = model.lowbit_config
    manifest: Any = model.lowbit_manifest
    assert isinstance(config, QuantizationConfig)
    methods = {name: layer.method for name, layer in quantized_layers(model).items()}
    weight_only = [name for name, method in methods.items() if method.weight_only]
    return replace(config.as_serialized([record.name for record in manifest.kept]), weight_only_layers=weight_only)


def check_saveable(state_dict: Mapping[str, torch.Tensor]) -> None:
    """Raise ``ConfigError`` for a checkpoint that would be of no use: static scales that were never found."""
    waiting = [
        name
        for name, tensor in state_dict.items()
        if name.endswith(".input_scale") and tensor.numel() == 1 and float(tensor) == UNCALIBRATED
    ]
    if waiting:
        raise ConfigError(
            f"{len(waiting)} layers with activation_scheme 'static' have no input_scale yet: run"
            f" lowbit.quantization.calibration.static.calibration before saving ({', '.join(waiting)})"
        )


def dequantize(model: nn.Module) -> None:
    """Replace every quantized layer of ``model`` by an ``nn.Linear`` in the compute dtype, one at a time."""
    for name, layer in quantized_layers(model).items():
        model.set_submodule(name, dequantize_layer(layer))
    for attribute in ("lowbit_manifest", "lowbit_config"):
        if hasattr(model, attribute):
            delattr(model, attribute)


@torch.no_grad()
def dequantize_layer(layer: QuantizedLinear) -> nn.Linear:
    """Return the ``nn.Linear`` whose weight [N, K] is what the quantized one stands for."""
    layer.leave_kernel()
    weight = layer.method.dequantize_weight(layer)
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.to(layer.compute_dtype), requires_grad=False)
    linear.bias = layer.bias
    return linear.train(layer.training)


def manifests(pipeline: Any) -> dict[str, Manifest]:
    """Return the manifest of every component of a diffusers pipeline that lowbit quantized or loaded, by its name."""
    found = {
        name: getattr(component, "lowbit_manifest", None)
        for name, component in pipeline.components.items()
        if isinstance(component, nn.Module)
    }
    return {name: replace(manifest, component=name) for name, manifest in found.items() if manifest is not None}
