"""ComfyUI's single files: every layer in a format of its own, which the file names.

What the formats hold is in ``lowbit.checkpoints.comfyui.read``; in memory each layer has the tensors of the method that
computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from lowbit.errors import ConfigError
from lowbit.ops import fp8
from lowbit.ops.dispatch import AUTO
from lowbit.quantization.base import LinearMethod, QuantizationConfig
from lowbit.quantization.methods.fp8 import Fp8LinearMethod
from lowbit.quantization.methods.int8 import Int8LinearMethod
from lowbit.quantization.methods.mxfp8 import Mxfp8LinearMethod
from lowbit.quantization.methods.nvfp4 import NvFp4LinearMethod
from lowbit.quantization.transforms import ROTATIONS, with_transforms

if TYPE_CHECKING:
    from typing_extensions import Self

WRITTEN = "float8_e4m3fn"


@dataclass(frozen=True)
class LayerFormat:
    """How a layer is stored.

    Attributes:
        format: as ComfyUI spells it.
        rotation: size of the rotated groups of int8 ("convrot"), ``None`` for none.
        has_input_scale: activations have one scale, which the file holds.
        has_mul_scale: the input is multiplied by a vector first (``pre_quant_scale``).
        block: rows and columns of e4m3 weights that share a scale; ``None``: rows, or the whole weight.
    """

    format: str
    rotation: int | None = None
    has_input_scale: bool = False
    has_mul_scale: bool = False
    block: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS and self.format not in DECODED:
            raise ConfigError(f"comfyui: format {self.format!r} is not read; those read are {', '.join(FORMATS)}")
        if self.rotation is not None and (type(self.rotation) is not int or self.rotation not in ROTATIONS):
            known = ", ".join(map(str, ROTATIONS))
            raise ConfigError(f"comfyui: convrot_groupsize must be one of {known}, not {self.rotation!r}")
        if self.block is not None:
            object.__setattr__(self, "block", tuple(self.block))

    def method(self, kernel: str) -> LinearMethod:
        """Return what computes the layer."""
        scheme = "static" if self.has_input_scale else "dynamic"
        method = FORMATS[self.format](scheme, kernel) if self.block is None else _in_blocks(self.block, kernel)
        return with_transforms(method, None, self.rotation, self.has_mul_scale)

    @classmethod
    def from_dict(cls, layer: str, values: Any) -> LayerFormat:
        """Return the format that ``layer_formats`` has for a layer; raises ``ConfigError``."""
        try:
            found = cls(**values)
            if found.format in FORMATS:
                return found
            raise TypeError(f"no kernel computes {found.format}")
        except TypeError as error:
            raise ConfigError(f"comfyui: layer_formats of {layer}: {values!r} is no format") from error


class ComfyUiFp8LinearMethod(Fp8LinearMethod):
    """FP8 with one scale per weight, held once per output channel."""

    def __init__(self, activation_scheme: str = "dynamic", kernel: str = AUTO) -> None:
        super().__init__(activation_scheme, None, kernel)

    def quantize_weight(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Quantize [N, K] under the scale of its largest magnitude."""
        elements, scale = quantize_per_tensor(weight)
        return {"weight": elements, "weight_scale": scale.expand(weight.shape[0], 1).contiguous()}


def quantize_per_tensor(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight [N, K] in e4m3 and its scale, float32 []: the largest magnitude over 448."""
    scale = weight.abs().amax().float().clamp(min=fp8.SMALLEST_ABSMAX) / fp8.E4M3_MAX
    return fp8.quantize_per_tensor_operator(weight, scale), scale


def _in_blocks(block: tuple[int, int], kernel: str) -> LinearMethod:
    return Fp8LinearMethod("dynamic", block, kernel)


# What files hold and no kernel computes: read as values.
DECODED = ("float8_e5m2", "values")
FORMATS: Mapping[str, Callable[[str, str], LinearMethod]] = {
    "float8_e4m3fn": ComfyUiFp8LinearMethod,
    "int8_tensorwise": lambda scheme, kernel: Int8LinearMethod(kernel),
    "nvfp4": NvFp4LinearMethod,
    "mxfp8": lambda scheme, kernel: Mxfp8LinearMethod(kernel),
}


@dataclass(frozen=True, kw_only=True)
class ComfyUiConfig(QuantizationConfig):
    """Configuration of ``comfyui``.

    Attributes:
        comfyui_model: the file that the weights come from: a local file or ``owner/repo/file.safetensors``. Other
            components come from the base model.
        layer_formats: of weights that are quantized already: layer -> the attributes of ``LayerFormat``.
        is_checkpoint_comfyui_serialized: the checkpoint's weights are quantized already.
    """

    comfyui_model: str | None = None
    layer_formats: dict[str, dict[str, Any]] | None = None
    is_checkpoint_comfyui_serialized: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.comfyui_model is not None and not (isinstance(self.comfyui_model, str) and self.comfyui_model):
            raise ConfigError(f"comfyui_model must be a file or a name on the Hub, not {self.comfyui_model!r}")
        if self.layer_formats is not None and not isinstance(self.layer_formats, Mapping):
            raise ConfigError(f"layer_formats must map layers to formats, not {self.layer_formats!r}")
        for layer, values in (self.layer_formats or {}).items():
            LayerFormat.from_dict(layer, values)

    @classmethod
    def get_name(cls) -> str:
        """Return ``"comfyui"``."""
        return "comfyui"

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        """No other library has a method of this name."""
        return True

    @property
    def is_serialized(self) -> bool:
        """Whether the weights are quantized already, in the checkpoint or in ``comfyui_model``."""
        is_known = self.layer_formats is not None or self.comfyui_model is not None
        return is_known or self.is_checkpoint_comfyui_serialized

    def of_checkpoint(self, tensor_names: Collection[str]) -> Self:
        """Take layers with a scale as those that are quantized, where the configuration does not list them."""
        scales = sorted(name for name in tensor_names if name.endswith(".weight_scale"))
        if self.layer_formats is not None or self.comfyui_model is not None or not scales:
            return self
        formats = {name.removesuffix(".weight_scale"): {"format": WRITTEN} for name in scales}
        return replace(self, layer_formats=formats)

    @property
    def weights_from(self) -> str | None:
        """The file that ``comfyui_model`` names."""
        return self.comfyui_model

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> LinearMethod | None:
        """Return the method of the layer's format; ``None`` for layers that have none and ``ignored_layers``."""
        if not isinstance(layer, torch.nn.Linear) or self.is_ignored(prefix):
            return None
        if self.layer_formats is None:
            return self.linear_method()
        values = self.layer_formats.get(prefix)
        return None if values is None else LayerFormat.from_dict(prefix, values).method(self.kernel)

    def kept_reason(self, name: str) -> str:
        """Return why a layer is left as it is."""
        return "ignored_layers" if self.is_ignored(name) else "not quantized in the file"

    def linear_method(self) -> LinearMethod:
        """Return the method of layers that are quantized here: e4m3 with one scale per weight."""
        return ComfyUiFp8LinearMethod(kernel=self.kernel)

    def as_serialized(self, ignored_layers: Sequence[str]) -> Self:
        """Return the configuration to write beside the quantized tensors."""
        return replace(
            self, comfyui_model=None, is_checkpoint_comfyui_serialized=True, ignored_layers=list(ignored_layers)
        )
