"""Checkpoints of NVIDIA's ModelOpt (``nvidia-modelopt``): FP8, NVFP4, MXFP8 and mixtures of them.

The algorithm is named in ``quantization_config`` of the component's ``config.json``, or, as older exports and those of
language models have it, in a file ``hf_quant_config.json`` beside it. On disk, with N output and K input channels:

=========================  ==============================================================================
algorithm                  tensors beside ``weight``
=========================  ==============================================================================
FP8                        ``weight_scale``, ``input_scale`` float32 []: largest magnitudes over 448
FP8_PER_CHANNEL_PER_TOKEN  ``weight_scale`` float32 [N]
NVFP4                      ``weight_scale`` e4m3 [N, K/16], ``weight_scale_2``, ``input_scale`` float32 []
W4A16_NVFP4                the same without ``input_scale``
NVFP4_SVD                  NVFP4's, ``pre_quant_scale`` [K], ``svdquant_lora_a`` [r, K], ``svdquant_lora_b`` [N, r]
MXFP8                      ``weight_scale`` E8M0 uint8 [N, K/32]
MIXED_PRECISION            each layer's own; ``quantized_layers`` names the algorithms
=========================  ==============================================================================

diffusers has a configuration of its own under the same ``quant_method``, with other keys; that is left to diffusers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from lowbit.errors import ConfigError, UnsupportedError
from lowbit.ops import fp8, mx, nvfp4
from lowbit.ops.svdquant import nvfp4_svd_dequantize
from lowbit.quantization.base import LinearMethod, QuantizationConfig
from lowbit.quantization.methods.fp8 import UNCALIBRATED, Fp8LinearMethod
from lowbit.quantization.methods.mxfp8 import Mxfp8LinearMethod
from lowbit.quantization.methods.nvfp4 import NvFp4LinearMethod
from lowbit.quantization.scales import finite_and_positive
from lowbit.quantization.tensors import Dim, K, N, TensorSpec, fixed

if TYPE_CHECKING:
    from typing_extensions import Self

    from lowbit.quantization.linear import QuantizedLinear

MIXED_PRECISION = "MIXED_PRECISION"
LARGEST_RANK = 1 << 16
DEFAULT_RANK = 32
# Keys of ModelOpt's that say nothing a reader of weights needs.
_UNREAD = ("config_groups", "producer", "kv_cache_scheme", "kv_cache_quant_algo", "group_size", "has_zero_point")
_MARKS = ("quant_algo", "config_groups", "producer", "quantization")
_NO_KERNEL_TWICE = "is read, not made: quantize with ModelOpt, or choose another quant_algo"


@dataclass(frozen=True, kw_only=True)
class ModelOptConfig(QuantizationConfig):
    """Configuration of ``modelopt``.

    Attributes:
        quant_algo: of the table above.
        quantized_layers: full name -> {"quant_algo": ...} of MIXED_PRECISION.
        lora_rank: of NVFP4_SVD.
        is_checkpoint_modelopt_serialized: the checkpoint's weights are quantized already.
    """

    quant_algo: str = "FP8"
    quantized_layers: Mapping[str, Mapping[str, Any]] | None = None
    lora_rank: int | None = None
    is_checkpoint_modelopt_serialized: bool = False

    aliases: ClassVar[Mapping[str, str]] = {
        "ignore": "ignored_layers",
        "exclude_modules": "ignored_layers",
        "modules_to_not_convert": "ignored_layers",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "quant_algo", str(self.quant_algo).upper())
        names = [self.quant_algo, *(algorithm for _, algorithm in self._named())]
        unknown = [name for name in names if name not in ALGORITHMS and name != MIXED_PRECISION]
        if unknown or MIXED_PRECISION in names[1:]:
            known = ", ".join([*ALGORITHMS, MIXED_PRECISION])
            raise UnsupportedError(f"modelopt: quant_algo {unknown or MIXED_PRECISION} is not supported", [known])
        if self.quant_algo == MIXED_PRECISION and not self.quantized_layers:
            raise ConfigError("modelopt: MIXED_PRECISION needs quantized_layers, from layers' names to algorithms")
        if self.lora_rank is not None and (type(self.lora_rank) is not int or not 0 < self.lora_rank <= LARGEST_RANK):
            raise ConfigError(f"modelopt: lora_rank must be from 1 to {LARGEST_RANK}, not {self.lora_rank!r:.200}")
        if not self.is_serialized and self.quant_algo in (MIXED_PRECISION, "NVFP4_SVD"):
            raise ConfigError(f"modelopt: {self.quant_algo} {_NO_KERNEL_TWICE}")

    def _named(self) -> list[tuple[str, str]]:
        layers = self.quantized_layers or {}
        if not isinstance(layers, Mapping) or not all(
            isinstance(entry, Mapping) and isinstance(entry.get("quant_algo"), str) for entry in layers.values()
        ):
            raise ConfigError("modelopt: quantized_layers must map names of layers to {'quant_algo': ...}")
        return [(name, entry["quant_algo"]) for name, entry in layers.items()]

    @cached_property
    def _algorithms(self) -> Mapping[str, str]:
        return dict(self._named())

    @classmethod
    def get_name(cls) -> str:
        """Return ``"modelopt"``."""
        return "modelopt"

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        """Tell ModelOpt's own dictionary from that of diffusers, which has ``quant_type`` and no ``quant_algo``."""
        return any(mark in config for mark in _MARKS)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build from ``quantization_config`` or the content of ``hf_quant_config.json``; see the base class."""
        nested = config.get("quantization")
        if isinstance(nested, Mapping):
            rest = {name: value for name, value in config.items() if name != "quantization"}
            return cls.from_config({**rest, **nested, "producer": config.get("producer")})
        options = dict(config)
        is_checkpoint = "producer" in options or "config_groups" in options
        if is_checkpoint and "quant_algo" not in options:
            raise ConfigError("modelopt: the configuration names no quant_algo")
        groups = options.get("config_groups") or {}
        if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
            raise ConfigError(f"modelopt: config_groups must map names to dictionaries, not {groups!r:.200}")
        for group in groups.values():
            options.setdefault("lora_rank", group.get("lora_rank"))
        options = {name: value for name, value in options.items() if name not in _UNREAD and value is not None}
        options.pop("pre_quant_scale", None)
        if is_checkpoint:
            options["is_checkpoint_modelopt_serialized"] = True
            for name in ("ignore", "exclude_modules"):
                options[name] = _whole_names(name, options.get(name) or [])
        return super().from_config({name: value for name, value in options.items() if value is not None})

    @property
    def is_serialized(self) -> bool:
        """Whether the checkpoint's weights are quantized already."""
        return self.is_checkpoint_modelopt_serialized

    def linear_method(self) -> LinearMethod:
        """Return the method of ``quant_algo``."""
        return self._method(self.quant_algo)

    def _method(self, algorithm: str) -> LinearMethod:
        return ALGORITHMS[algorithm](self)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> LinearMethod | None:
        """Return what to do with ``layer``; in a mixture only the layers that are named take a method."""
        found = super().get_quant_method(layer, prefix) if self.quant_algo != MIXED_PRECISION else None
        if self.quant_algo != MIXED_PRECISION or not isinstance(layer, torch.nn.Linear):
            return found
        algorithm = self._algorithms.get(prefix)
        return None if algorithm is None or self.is_ignored(prefix) else self._method(algorithm)

    def kept_reason(self, name: str) -> str:
        """Return why a layer is left as it is."""
        return super().kept_reason(name) if self.is_ignored(name) else "not in quantized_layers"

    def as_serialized(self, ignored_layers: Sequence[str]) -> Self:
        """Return the configuration to write beside the quantized tensors."""
        names = [_whole_name(name) for name in ignored_layers]
        return replace(self, is_checkpoint_modelopt_serialized=True, ignored_layers=names)

    def to_dict(self) -> dict[str, Any]:
        """Return what ``config.json`` holds: of a checkpoint, ModelOpt's own keys."""
        if not self.is_serialized:
            return super().to_dict()
        values: dict[str, Any] = {
            "config_groups": self._groups(),
            "ignore": [_plain(p) for p in self.ignored_layers or ()],
        }
        if self.quantized_layers:
            values["quantized_layers"] = {name: dict(entry) for name, entry in self.quantized_layers.items()}
        producer = {"name": "lowbit", "version": import_module("lowbit").__version__}
        return {**values, "quant_algo": self.quant_algo, "producer": producer, "quant_method": self.get_name()}

    def _groups(self) -> dict[str, Any]:
        if self.quant_algo != MIXED_PRECISION:
            return {"group_0": {**self._group(self.quant_algo), "targets": ["Linear"]}}
        named = self._named()
        algorithms = sorted({algorithm for _, algorithm in named})
        return {
            f"group_{place}": {**self._group(wanted), "targets": sorted(name for name, have in named if have == wanted)}
            for place, wanted in enumerate(algorithms)
        }

    def _group(self, algorithm: str) -> dict[str, Any]:
        bits, size = _WIDTHS[algorithm]
        operand = {"dynamic": False, "num_bits": bits, "type": "float", **({"group_size": size} if size else {})}
        group: dict[str, Any] = {"weights": operand}
        if algorithm != "W4A16_NVFP4":
            group["input_activations"] = dict(operand)
        if algorithm == "NVFP4_SVD":
            group.update({"has_zero_point": False, "pre_quant_scale": True, "lora_rank": self.lora_rank})
        return group


# Bits of weights, columns of a group.
_WIDTHS = {
    "FP8": (8, None),
    "FP8_PER_CHANNEL_PER_TOKEN": (8, None),
    "NVFP4": (4, nvfp4.GROUP_SIZE),
    "W4A16_NVFP4": (4, nvfp4.GROUP_SIZE),
    "NVFP4_SVD": (4, nvfp4.GROUP_SIZE),
    "MXFP8": (8, mx.GROUP_SIZE),
}


def _whole_names(option: str, patterns: Any) -> list[str] | None:
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(f"modelopt: {option} must be a list of layer names or patterns, not {patterns!r:.200}")
    return [_whole_name(pattern) for pattern in patterns] or None


def _whole_name(pattern: str) -> str:
    """Return ModelOpt's pattern, which must match a layer's or its module's full name, as one of lowbit's."""
    if pattern.startswith("re:"):
        return pattern
    expression = re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")
    return rf"re:{expression}(\..*)?$"


def _plain(pattern: str) -> str:
    """Undo ``_whole_name``."""
    if not (pattern.startswith("re:") and pattern.endswith(r"(\..*)?$")):
        return pattern
    expression = pattern.removeprefix("re:").removesuffix(r"(\..*)?$")
    return re.sub(r"\\(.)", r"\1", expression.replace(".*", "*"))


class ModelOptFp8LinearMethod(Fp8LinearMethod):
    """FP8 with one scale per weight and static activations, or with [N] scales and activations per token."""

    def __init__(self, activation_scheme: str, kernel: str) -> None:
        super().__init__(activation_scheme, None, kernel)
        self.per_tensor = activation_scheme == "static"

    def _scale_dims(self) -> tuple[Dim, ...]:
        return () if self.per_tensor else (N,)

    def canonical_tensor(self, layer: QuantizedLinear, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Accept scales [], [1], [N] and [N, 1]."""
        if name == "weight_scale":
            shape, _ = layer.expected[name]
            same = tensor.numel() == math.prod(shape) and tensor.is_floating_point()
            tensor = tensor.float().reshape(shape) if same else tensor
            return finite_and_positive(layer, name, LinearMethod.canonical_tensor(self, layer, name, tensor))
        return super().canonical_tensor(layer, name, tensor)

    def quantize_weight(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Quantize [N, K]; an ``input_scale`` still to be calibrated is ``UNCALIBRATED``."""
        if not self.per_tensor:
            tensors = super().quantize_weight(weight)
            return {**tensors, "weight_scale": tensors["weight_scale"].flatten()}
        scale = weight.abs().amax().float().clamp(min=fp8.SMALLEST_ABSMAX) / fp8.E4M3_MAX
        input_scale = torch.tensor(UNCALIBRATED, dtype=torch.float32, device=weight.device)
        elements = fp8.quantize_per_tensor_operator(weight, scale)
        return {"weight": elements, "weight_scale": scale, "input_scale": input_scale}

    def _scale(self, layer: QuantizedLinear) -> torch.Tensor:
        scale = layer.get_parameter("weight_scale")
        return scale if self.per_tensor else scale.unsqueeze(1)


class NvFp4SvdLinearMethod(NvFp4LinearMethod):
    """NVFP4 of what a low-rank product leaves: ``y = nvfp4(z) + (z A^T) B^T`` of ``z = x * pre_quant_scale``."""

    LOW_RANK = ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")

    def __init__(self, rank: int, kernel: str) -> None:
        super().__init__("static", kernel)
        self.rank = rank

    def specs(self, out_features: int, in_features: int) -> tuple[TensorSpec, ...]:
        """Return NVFP4's tensors, ``pre_quant_scale`` and the two factors, in bfloat16 as ModelOpt has them."""
        rank = fixed(self.rank)
        dims = {"pre_quant_scale": (K,), "svdquant_lora_a": (rank, K), "svdquant_lora_b": (N, rank)}
        low_rank = (TensorSpec(name, torch.bfloat16, dims[name]) for name in self.LOW_RANK)
        return (*super().specs(out_features, in_features), *low_rank)

    def canonical_tensor(self, layer: QuantizedLinear, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Accept the low-rank tensors in any floating dtype, which they keep."""
        if name not in self.LOW_RANK:
            return super().canonical_tensor(layer, name, tensor)
        if tensor.is_floating_point():
            layer.expected[name] = (layer.expected[name][0], tensor.dtype)
        found = LinearMethod.canonical_tensor(self, layer, name, tensor)
        return finite_and_positive(layer, name, found) if name == "pre_quant_scale" else found

    def quantize_weight(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Refuse: only checkpoints are read."""
        raise UnsupportedError(f"NVFP4_SVD {_NO_KERNEL_TWICE}", [])

    def dequantize_weight(self, layer: QuantizedLinear) -> torch.Tensor:
        """Return the weight for the input as it comes, the low-rank part included."""
        names = ("weight", "weight_scale", "weight_scale_2", *self.LOW_RANK)
        return nvfp4_svd_dequantize(*(layer.get_parameter(name) for name in names))

    def apply(self, layer: QuantizedLinear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Scale x, multiply by both parts and add."""
        scale, a, b = (layer.get_parameter(name).to(x.dtype) for name in self.LOW_RANK)
        scaled = x * scale
        linear = torch.nn.functional.linear
        return super().apply(layer, scaled, bias) + linear(linear(scaled, a), b)


ALGORITHMS: Mapping[str, Callable[[ModelOptConfig], LinearMethod]] = {
    "FP8": lambda config: ModelOptFp8LinearMethod("static", config.kernel),
    "FP8_PER_CHANNEL_PER_TOKEN": lambda config: ModelOptFp8LinearMethod("dynamic", config.kernel),
    "NVFP4": lambda config: NvFp4LinearMethod("static", config.kernel),
    "W4A16_NVFP4": lambda config: NvFp4LinearMethod("none", config.kernel),
    "NVFP4_SVD": lambda config: NvFp4SvdLinearMethod(config.lora_rank or DEFAULT_RANK, config.kernel),
    "MXFP8": lambda config: Mxfp8LinearMethod(config.kernel),
}
