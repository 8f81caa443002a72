"""lowbit as a quantizer of transformers: ``from_pretrained`` and ``save_pretrained`` of models such as text encoders.

transformers calls a quantizer of its own ``"fp8"``; ``dispatch.claims`` says which of the two a configuration means.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer

from lowbit.checkpoints import component as loading
from lowbit.checkpoints.checks import TensorHeader, read_headers, refuse_pickles, wrong_shape
from lowbit.compat.parts.modules import absent_keys, float32_modules, may_lack, strict_float32_modules
from lowbit.compat.patches.codes import is_router, refuse_codes
from lowbit.compat.patches.renaming import Names
from lowbit.errors import CheckpointError, located
from lowbit.hosts import registration
from lowbit.hosts import routing as dispatch
from lowbit.quantization import plan as quantization_plan
from lowbit.quantization.base import QuantizationConfig
from lowbit.quantization.linear import QuantizedLinear

# transformers' mark on parameters that came from a checkpoint, and on modules it need not initialize.
_LOADED = "_is_hf_initialized"


def register(auto: ModuleType) -> None:
    """Register with transformers; ``auto`` is ``transformers.quantizers.auto``."""
    dispatch.connect(auto, auto.AutoQuantizationConfig, auto.AutoHfQuantizer, LowbitTransformersQuantizer)
    if attach not in quantization_plan.AFTER_QUANTIZING:
        quantization_plan.AFTER_QUANTIZING.append(attach)
        quantization_plan.KEPT_BY_HOSTS.append(kept_in_memory)


def attach(model: nn.Module) -> None:
    """Make a transformers model that was quantized in memory savable: give it its quantizer and configuration.

    Other models are left alone.
    """
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        model.hf_quantizer = LowbitTransformersQuantizer(model.lowbit_config, pre_quantized=False)
        model.config.quantization_config = loading.serialized_config(model)


class QuantizeOnLoad:
    """Turns one weight [N, K] into its quantized tensors while transformers loads it.

    It is called as a ``ConversionOps`` of transformers is. It does not inherit from that: importing it here would be
    circular when ``transformers.quantizers`` is what is being imported.
    """

    def __init__(self, quantizer: LowbitTransformersQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the tensors of ``input_dict`` by full name, those of quantized layers replaced by several."""
        converted: dict[str, Any] = {}
        for name in list(input_dict):
            value = input_dict.pop(name)
            tensor = value[0] if isinstance(value, list) else value
            converted.update(self.quantizer.quantize(name, tensor))
        return converted


class LowbitTransformersQuantizer(HfQuantizer):  # type: ignore[misc]
    """Quantizes a model's weights while transformers loads them, or reads those that are quantized already.

    transformers reads one tensor, hands it to ``QuantizeOnLoad`` and sets what comes back before it reads the next.
    """

    quantization_config: QuantizationConfig

    def __init__(self, quantization_config: QuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.preparation: loading.Preparation | None = None
        self.files: list[str] = []
        self.location = ""  # of the checkpoint, for messages
        self.find_wrong: Callable[[Sequence[Any]], dict[str, str]] | None = None
        self.wrong: Mapping[str, str] = {}  # tensor -> what it is instead of what is needed

    # What transformers asks, in the order in which it asks.

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse device maps that can't work."""
        loading.check_device_map(device_map)

    def _process_model_before_weight_loading(
        self,
        model: Any,
        device_map: Any = None,
        checkpoint_files: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Check the files and replace the linear layers.

        Which tensors are missing or wrong is known only later: transformers renames and splits them while it loads.
        """
        files = list(checkpoint_files or ())
        refuse_pickles(files)
        headers = read_headers(file for file in files if str(file).endswith(".safetensors"))
        self.files, self.location = files, str(Path(files[0]).parent) if files else ""
        name_of = Names.of(model)
        names = {name_of(stored)[0]: header for stored, header in headers.items()}
        config = for_base_model(self.quantization_config.of_checkpoint(names), model)
        self.quantization_config, self.pre_quantized = config, config.is_serialized
        self.preparation = loading.prepare(
            model,
            config,
            model.dtype,
            device=loading.first_device(device_map),
            kept=kept_by_model(model),
        )
        self.find_wrong = partial(_wrong_tensors, model, self.preparation, headers)
        for layer in self.preparation.layers.values():
            setattr(layer, _LOADED, True)  # or transformers would initialize it as a linear layer
        optional = sorted({name for layer in self.preparation.layers.values() for name in layer.method.optional})
        may_lack(model, [rf"\.{name}$" for name in optional])

    def update_weight_conversions(self, weight_conversions: Sequence[Any], *args: Any) -> Sequence[Any]:
        """Find the tensors of a wrong shape, now that it is known how transformers renames them; change nothing.

        Raises:
            CheckpointError: codes would be taken for values, of experts or of layers to be kept.
        """
        conversions: Sequence[Any] = super().update_weight_conversions(weight_conversions, *args)
        if self.find_wrong is not None:
            with located(self.location):
                self.wrong = self.find_wrong(conversions)
        return conversions

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Tell whether to quantize a tensor, or whether its shape is not for transformers to check.

        That is so for a quantized checkpoint's, and for those that are known to be wrong: they are taken, so that all
        that is wrong and missing comes in one error after loading. transformers' ``ignore_mismatched_sizes``, which
        puts random weights in their place to be trained, does not apply to a model that can't be.
        """
        if param_name in self.wrong:
            return True
        found = self.preparation.find(param_name) if self.preparation is not None else None
        return found is not None and (self.pre_quantized or found[1] == "weight")

    def param_element_size(self, model: nn.Module, param_name: str, param: torch.Tensor) -> float:
        """Return the bytes of one element as it will be held, for device maps and for allocating ahead."""
        if not self.pre_quantized and self.param_needs_quantization(model, param_name):
            return 1
        return param.element_size()

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Return what to cast a quantized checkpoint's tensor to: quantized data, whatever type it is in, to nothing.

        A checkpoint may hold it in another type than the layer does: unpacked codes, scales as ``float8_e8m0fnu``.
        """
        names = getattr(converter, "target_patterns", ())
        if self.preparation is not None and any(self.preparation.find(name) is not None for name in names):
            return None
        return super().get_new_dtype(converter, param, dtype)  # type: ignore[no-any-return]

    def get_quantize_ops(self) -> QuantizeOnLoad:
        """Return what to do with a weight that is to be quantized."""
        return QuantizeOnLoad(self)

    def quantize(self, name: str, tensor: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Return the tensors to set for the one called ``name``, by full name.

        Raises:
            CheckpointError: it has not the layer's shape, or is quantized already.
        """
        found = self.preparation.find(name) if self.preparation is not None else None
        if found is None or name in self.wrong:
            return {name: tensor}
        layer, _ = found
        if tensor.shape != (layer.out_features, layer.in_features) or tensor.dtype not in loading.COMPUTE_DTYPES:
            raise CheckpointError(
                f"{name}: found {tensor.dtype} {list(tensor.shape)}, needs an unquantized"
                f" [{layer.out_features}, {layer.in_features}]"
            )
        quantized = layer.method.quantize_weight(tensor)
        return {f"{layer.prefix}.{key}": nn.Parameter(value, requires_grad=False) for key, value in quantized.items()}

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        """Check that all arrived, pack for the kernels, and leave the manifest and what saving needs."""
        assert self.preparation is not None
        with located(self.location):
            self._settle_layers(model, self.preparation)
            loading.finish(model, self.preparation, self.files)
        model.config.quantization_config = loading.serialized_config(model)  # type: ignore[union-attr]
        self.preparation = self.find_wrong = None

    def _settle_layers(self, model: nn.Module, preparation: loading.Preparation) -> None:
        """Check that all of the layers' tensors arrived, and bring them to what the methods registered."""
        layers = preparation.layers
        for layer in layers.values():
            _take_stored(layer)
        absent = [name for layer in layers.values() for name in _missing(layer)]
        missing = [name for name in absent if not preparation.may_be_absent(name)]
        if self.pre_quantized:
            missing += _missing_of_kept(model)
        for name in absent:
            found = preparation.find(name)
            if found is not None and found[1] in found[0].method.optional and self.pre_quantized:
                found[0].drop_tensor(found[1])
        loading.check_loaded(model, missing, self.wrong)
        for layer in layers.values():
            _settle(layer, self.pre_quantized)
            layer.owns_weight = not self.pre_quantized

    # What transformers asks of a loaded model.

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """Return the tensors to write, ``None`` for those of ``state_dict`` as they are.

        Raises:
            ConfigError: before calibration.
        """
        loading.check_saveable(dict(model.named_parameters()))
        tensors = model.state_dict()
        stored = self.quantization_config.stored_tensors(tensors)
        return (None if stored is tensors else dict(stored)), {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        loading.dequantize(model)
        return model if dtype is None else model.to(dtype)

    def is_serializable(self) -> bool:
        """Whether ``save_pretrained`` works: yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on top: yes, gradients pass through the dequantized weights."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether ``torch.compile`` works: yes."""
        return True


def for_base_model(config: QuantizationConfig, model: Any) -> QuantizationConfig:
    """Return the configuration of a checkpoint of a model with a head (``model.layers.0``) for the model without."""
    prefix = f"{model.base_model_prefix}."
    if not config.is_serialized or prefix == "." or hasattr(model, model.base_model_prefix):
        return config
    return config.without_prefix(prefix)


def kept_in_memory(model: nn.Module) -> Mapping[str, list[str]]:
    """Return ``kept_by_model`` of a transformers model, nothing of others."""
    from transformers import PreTrainedModel

    return kept_by_model(model) if isinstance(model, PreTrainedModel) else {}


def kept_by_model(model: Any) -> dict[str, list[str]]:
    """Return reason -> names of the layers that a model itself wants in float32, tied, or as its output."""
    tied = {**getattr(model, "all_tied_weights_keys", {})}
    output = model.get_output_embeddings()
    float32 = [*float32_modules(model), *strict_float32_modules(model)]
    return {
        "float32 module": float32,
        "tied weight": sorted({name.removesuffix(".weight") for name in [*tied.keys(), *tied.values()]}),
        "last projection": [name for name, module in model.named_modules() if output is not None and module is output],
    }


def _wrong_tensors(
    model: Any, preparation: loading.Preparation, headers: Mapping[str, TensorHeader], conversions: Sequence[Any]
) -> dict[str, str]:
    """Return tensor -> what it is instead of what the model needs.

    Those that transformers splits or merges are left to it.
    """
    names = Names.of(model, conversions)
    is_read = partial(_takes_codes, preparation)
    refuse_codes(type(model).__name__, headers, names, is_read)
    expected, found = names.expected, {}
    for stored, header in headers.items():
        name, is_converted = names(stored)
        if name not in expected or is_converted or preparation.is_made_here(name):
            continue
        problem = wrong_shape(name, expected[name], header, preparation)
        if problem is not None:
            found[name] = f"{problem} ({header.file.name})"
    return found


def _takes_codes(preparation: loading.Preparation, name: str) -> bool:
    """Tell whether a quantized layer reads the tensor as codes; a router never is one."""
    return preparation.config.is_serialized and preparation.find(name) is not None and not is_router(name)


def _take_stored(layer: QuantizedLinear) -> None:
    """Move the tensors that transformers set under a checkpoint's names to the parameters, as they are."""
    for name, stored in layer.method.stored_names.items():
        if stored in layer._parameters:
            layer._parameters[name] = layer._parameters.pop(stored)
    layer.forget_stored()


def _missing(layer: QuantizedLinear) -> list[str]:
    """Return the names of a layer's tensors that did not come from the checkpoint."""
    return [
        f"{layer.prefix}.{layer.stored_name(name)}"
        for name, tensor in layer.named_parameters()
        if not getattr(tensor, _LOADED, False)
    ]


def _missing_of_kept(model: Any) -> list[str]:
    """Return the names of the other parameters that transformers made up as they did not come from the checkpoint.

    Those of a head are not among them: transformers puts a new one on a model without.
    """
    expected = re.compile("|".join(absent_keys(model)) or "$^")
    base = model.base_model
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is base)
    return [
        f"{prefix}{name}.{parameter}" if name else f"{prefix}{parameter}"
        for name, module in base.named_modules()
        if not isinstance(module, QuantizedLinear)
        for parameter, tensor in module.named_parameters(recurse=False)
        if not getattr(tensor, _LOADED, False) and not expected.search(f"{prefix}{name}.{parameter}")
    ]


def _settle(layer: QuantizedLinear, from_checkpoint: bool) -> None:
    """Bring what transformers set to what the method registered: dtypes, shapes, no gradients.

    Args:
        layer: with its tensors.
        from_checkpoint: they came from a file, not from the method.

    Raises:
        CheckpointError: a tensor is not what the method reads.
    """
    for name in layer.quantized_names:
        tensor = layer.get_parameter(name).data
        layer.replace_tensor(name, layer.method.canonical_tensor(layer, name, tensor) if from_checkpoint else tensor)
    if layer.bias is not None:
        layer.bias.requires_grad_(False)


# Where this module is imported first, it brings the library's, which can't be registered with before here.
registration.install()
