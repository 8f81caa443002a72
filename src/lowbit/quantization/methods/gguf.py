"""GGUF: weights in ggml's block types, activations as they are. Every layer may have a type of its own.

The weights come from a GGUF file (``gguf_model``), whose types are kept; or they are quantized while loading
(``gguf_type``). In a state dict and in a folder written by ``save_pretrained``, ``weight`` is uint8 [N, bytes per row]:
the blocks as a GGUF file has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from lowbit.errors import ConfigError
from lowbit.ops import gguf
from lowbit.ops.dispatch import AUTO
from lowbit.ops.gguf_types import BLOCK_TYPES, block_type
from lowbit.ops.weight_format import Prepared
from lowbit.quantization.base import LinearMethod, QuantizationConfig
from lowbit.quantization.tensors import K, N, TensorSpec, blocks

if TYPE_CHECKING:
    from typing_extensions import Self

    from lowbit.quantization.linear import QuantizedLinear

# What rows that are not whole blocks of 256 take instead (llama.cpp's convention), in blocks of 32.
FALLBACK_TYPES: Mapping[str, str] = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def fitting_type(weight_type: str, columns: int) -> str | None:
    """Return the type for rows of ``columns`` elements: the one asked for, its stand-in, or ``None``: neither fits."""
    for name in (weight_type, FALLBACK_TYPES.get(weight_type)):
        if name is not None and columns % BLOCK_TYPES[name].elements == 0:
            return name
    return None


@dataclass(frozen=True, kw_only=True)
class GgufConfig(QuantizationConfig):
    """Configuration of ``gguf``.

    Attributes:
        gguf_model: the file that the weights come from: a local file, ``owner/repo/file.gguf`` or
            ``owner/repo:Q4_K_M``. Other components come from the base model.
        gguf_type: quantize the base model's weights to this type instead: a name of
            ``lowbit.ops.gguf.QUANTIZABLE_TYPES``.
        layer_types: of a checkpoint that is in GGUF's types already: layer -> type.
        is_checkpoint_gguf_serialized: the checkpoint's weights are blocks already.
    """

    gguf_model: str | None = None
    gguf_type: str | None = None
    layer_types: dict[str, str] | None = None
    is_checkpoint_gguf_serialized: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gguf_model is not None and not (isinstance(self.gguf_model, str) and self.gguf_model.strip()):
            raise ConfigError(f"gguf_model must be a file or a name on the Hub, not {self.gguf_model!r}")
        if self.gguf_model is not None and self.gguf_type is not None:
            raise ConfigError("gguf takes gguf_model (a file, with its types) or gguf_type (to quantize to), not both")
        if not isinstance(self.is_checkpoint_gguf_serialized, bool):
            raise ConfigError("is_checkpoint_gguf_serialized must be true or false")
        if self.gguf_type is not None:
            self._check_type(self.gguf_type)
        if self.layer_types is not None:
            if not isinstance(self.layer_types, Mapping):
                raise ConfigError(f"layer_types must map layers to types, not {self.layer_types!r}")
            known = {name: block_type(str(kind)).name for name, kind in self.layer_types.items()}
            object.__setattr__(self, "layer_types", known)

    def _check_type(self, name: str) -> None:
        kind = name.upper() if isinstance(name, str) else name
        if kind not in gguf.QUANTIZABLE_TYPES or BLOCK_TYPES[kind].is_plain:
            written = ", ".join(kind for kind in gguf.QUANTIZABLE_TYPES if not BLOCK_TYPES[kind].is_plain)
            raise ConfigError(f"gguf_type {name!r} can't be quantized to; use one of {written}")
        object.__setattr__(self, "gguf_type", kind)

    @classmethod
    def get_name(cls) -> str:
        """Return ``"gguf"``."""
        return "gguf"

    @property
    def is_serialized(self) -> bool:
        """Whether the weights are blocks already, in the checkpoint or in ``gguf_model``."""
        return self.is_checkpoint_gguf_serialized or self.gguf_model is not None

    @property
    def weights_from(self) -> str | None:
        """The file that ``gguf_model`` names."""
        return self.gguf_model

    def with_layer_types(self, layer_types: Mapping[str, str]) -> Self:
        """Return the configuration for a file whose linear layers have these types."""
        return replace(self, layer_types=dict(layer_types))

    def type_of(self, prefix: str, columns: int) -> str | None:
        """Return the type of a layer with ``columns`` input features, ``None`` when it is not in blocks."""
        if self.layer_types is not None:
            return self.layer_types.get(prefix)
        if self.gguf_type is None:
            raise ConfigError(
                "gguf needs to know the weights: give gguf_model (a file, owner/repo/file.gguf or owner/repo:Q4_K_M),"
                " or gguf_type to quantize the model's own"
            )
        return fitting_type(self.gguf_type, columns)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> LinearMethod | None:
        """Return the method for the layer's type; ``None`` for plain floating-point numbers and ``ignored_layers``."""
        if not isinstance(layer, torch.nn.Linear) or self.is_ignored(prefix):
            return None
        kind = self.type_of(prefix, layer.in_features)
        return None if kind is None or BLOCK_TYPES[kind].is_plain else GgufLinearMethod(kind, self.kernel)

    def kept_reason(self, name: str) -> str:
        """Name the type in the file, if that is the reason."""
        if self.is_ignored(name):
            return "ignored_layers"
        if self.layer_types is not None:
            return f"{self.layer_types.get(name, 'not quantized')} in the file"
        return f"input features are no multiple of 32, the smallest block of {self.gguf_type}"

    def linear_method(self) -> LinearMethod:
        """Return the method of ``gguf_type``, by default Q8_0; what a layer gets is up to ``get_quant_method``."""
        return GgufLinearMethod(self.gguf_type or "Q8_0", self.kernel)

    def as_serialized(self, ignored_layers: Sequence[str]) -> Self:
        """Return the configuration to write beside the blocks."""
        return replace(self, gguf_model=None, is_checkpoint_gguf_serialized=True, ignored_layers=list(ignored_layers))


class GgufLinearMethod(LinearMethod):
    """A linear layer whose weight is in one of GGUF's types."""

    name = "gguf"
    family = "gguf"
    activation_scheme = "none"
    table = gguf.IMPLEMENTATIONS

    def __init__(self, weight_type: str, kernel: str = AUTO) -> None:
        super().__init__(kernel)
        self.weight_type = weight_type
        self.name = f"gguf {weight_type}"

    def specs(self, out_features: int, in_features: int) -> tuple[TensorSpec, ...]:
        """Return ``weight`` uint8 [N, bytes per row]."""
        kind = BLOCK_TYPES[self.weight_type]
        kind.row_bytes(in_features)  # refuses rows that are not whole blocks
        return (TensorSpec("weight", torch.uint8, (N, blocks(K, kind.elements, kind.bytes))),)

    def quantize_weight(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Quantize [N, K] to blocks; see ``lowbit.ops.gguf``."""
        return {"weight": gguf.quantize_operator(weight, self.weight_type)}

    def dequantize_weight(self, layer: QuantizedLinear) -> torch.Tensor:
        """Return the blocks' values."""
        values: torch.Tensor = gguf.dequantize_operator(
            layer.get_parameter("weight").data, self.weight_type, torch.float32
        )
        return values

    @property
    def weight_format(self) -> str:
        """The type, such as ``"Q4_K"``."""
        return self.weight_type

    def tensors(self, layer: QuantizedLinear) -> Prepared:
        """Return the blocks."""
        return Prepared(layer.get_parameter("weight"), format=self.format)
