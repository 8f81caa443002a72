"""What AutoRound does to a linear layer: integers of 2 to 8 bits in groups, and NVFP4 with its own names.

See ``lowbit.quantization.methods.auto_round`` for the tensors on disk and in a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lowbit.errors import CheckpointError, ConfigError, UnsupportedError
from lowbit.ops import auto_round, nvfp4, w4a16, w8a16
from lowbit.ops.integer_groups import GROUP_MULTIPLE, dequantize_groups, quantize_per_group, symmetric_zero_point
from lowbit.ops.weight_format import Prepared
from lowbit.quantization.base import LinearMethod, check_tensor
from lowbit.quantization.methods.mxfp4 import Mxfp4LinearMethod
from lowbit.quantization.methods.nvfp4 import NvFp4LinearMethod
from lowbit.quantization.scales import finite, finite_and_positive
from lowbit.quantization.tensors import Along, K, N, TensorSpec, fixed, groups

if TYPE_CHECKING:
    from lowbit.quantization.linear import QuantizedLinear

UNQUANTIZED_BITS = 16
SCALE_DTYPE = torch.float16


@dataclass(frozen=True)
class Scheme:
    """How one layer is quantized: the keys of ``extra_config`` that count.

    Attributes:
        bits: of a weight; 16 and more: not quantized.
        group_size: inputs that share a scale; -1: all.
        sym: zero points are the middle of the codes.
        data_type: ``int``, ``mx_fp``, ``nv_fp`` and what AutoRound appends to them.
        act_bits: of activations; ``None`` or 16: left as they are.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    data_type: str = "int"
    act_bits: int | None = None

    def __post_init__(self) -> None:
        for name, kinds in (("bits", (int,)), ("group_size", (int,)), ("act_bits", (int, type(None)))):
            if type(getattr(self, name)) not in kinds:
                raise ConfigError(f"auto-round: {name} must be a whole number, not {getattr(self, name)!r}")
        if not isinstance(self.sym, bool) or not isinstance(self.data_type, str):
            raise ConfigError(f"auto-round: sym must be true or false and data_type a name: {self}")

    @property
    def kind(self) -> str | None:
        """``int``, ``mx_fp8``, ``mx_fp4`` or ``nv_fp4``; ``None`` for a layer that is not quantized.

        Raises:
            UnsupportedError: another one.
            ConfigError: a group size that does not fit the kind.
        """
        if self.bits >= UNQUANTIZED_BITS:
            return None
        found = next((kind for kind, fits in _KINDS.items() if fits(self)), None)
        if found is None:
            raise UnsupportedError(f"auto-round: {self} is not supported", [f"supported: {_SUPPORTED}"])
        if found == "int" and self.group_size != -1 and (self.group_size <= 0 or self.group_size % GROUP_MULTIPLE):
            raise ConfigError(
                f"auto-round: group_size must be -1 or a multiple of {GROUP_MULTIPLE}, not {self.group_size}"
            )
        return found


def activations_kept(scheme: Scheme) -> bool:
    """Tell whether a scheme leaves activations as they are."""
    return scheme.act_bits is None or scheme.act_bits >= UNQUANTIZED_BITS


_SUPPORTED = "data_type int with bits 2 to 8 and activations as they are; mx_fp with bits 4 or 8; nv_fp with bits 4"
_KINDS: Mapping[str, Callable[[Scheme], bool]] = {
    "int": lambda scheme: (
        scheme.data_type.startswith("int") and scheme.bits in auto_round.BITS and activations_kept(scheme)
    ),
    "mx_fp8": lambda scheme: scheme.data_type.startswith("mx_fp") and scheme.bits == 8 and scheme.group_size == 32,
    "mx_fp4": lambda scheme: scheme.data_type.startswith("mx_fp") and scheme.bits == 4 and scheme.group_size == 32,
    "nv_fp4": lambda scheme: scheme.data_type.startswith("nv_fp") and scheme.bits == 4 and scheme.group_size == 16,
}


class AutoRoundLinearMethod(LinearMethod):
    """Integers of 2 to 8 bits of a linear layer.

    Attributes:
        scheme: of the layer.
        packing: of its words on disk.
        bits_held: 4 or 8: those of the family that computes.
    """

    activation_scheme = "none"
    stored_names: ClassVar[Mapping[str, str]] = {
        "weight": "qweight",
        "weight_scale": "scales",
        "zero_point": "qzeros",
    }

    def __init__(self, scheme: Scheme, packing: auto_round.Packing, kernel: str, is_serialized: bool = False) -> None:
        super().__init__(kernel)
        # The order of the inputs: some checkpoints have it, and it is checked.
        self.optional = frozenset({"g_idx"} if is_serialized else ())
        self.scheme, self.packing = scheme, packing
        self.bits_held = 4 if scheme.bits <= 4 else 8
        module = w4a16 if self.bits_held == 4 else w8a16
        self.family, self.table = f"w{self.bits_held}a16", module.IMPLEMENTATIONS
        self.name = f"auto-round W{scheme.bits}A16"

    def specs(self, out_features: int, in_features: int) -> tuple[TensorSpec, ...]:
        """Return ``weight``, ``weight_scale``, ``zero_point`` and, of a checkpoint, ``g_idx``."""
        is_packed = self.bits_held == 4
        size = self._held_group(in_features)
        held = (N, fixed(1) if size == in_features else groups(K, size))  # one group is as good for each slice of it
        order = (TensorSpec("g_idx", torch.int32, (K,), counts_groups=True),) if "g_idx" in self.optional else ()
        return (
            TensorSpec("weight", torch.uint8 if is_packed else torch.int8, (N, groups(K, 2 if is_packed else 1))),
            TensorSpec("weight_scale", torch.float32, held),
            TensorSpec("zero_point", torch.uint8 if is_packed else torch.int16, held),
            *order,
        )

    def cut_step(self, out_features: int, in_features: int, along: Along) -> int:
        """Keep whole the words and groups of the checkpoint, to which a slice can be written again."""
        step = super().cut_step(out_features, in_features, along)
        group = self._group_size(in_features)
        return math.lcm(step, auto_round.BLOCK, group if along == "k" and group < in_features else 1)

    def _group_size(self, columns: int) -> int:
        return columns if self.scheme.group_size == -1 else min(self.scheme.group_size, columns)

    def _held_group(self, columns: int) -> int:
        """Return the largest group that divides the rows where the last of the checkpoint's is short."""
        return math.gcd(self._group_size(columns), columns)

    def refusal(self, layer: torch.nn.Linear) -> str | None:
        """Refuse channels that are not whole blocks of 32."""
        if layer.in_features % auto_round.BLOCK or layer.out_features % auto_round.BLOCK:
            return f"{layer.out_features} x {layer.in_features} channels are not whole blocks of {auto_round.BLOCK}"
        return None

    def canonical_tensor(self, layer: QuantizedLinear, name: str, tensor: Tensor) -> Tensor:
        """Unpack the tensors of a checkpoint."""
        columns, held = layer.in_features, layer.expected[name]
        size = self._group_size(columns)
        shape, dtypes = self._stored_layout(layer, name)
        check_tensor(f"{layer.prefix}.{self.stored_names.get(name, name)}", tensor, shape, dtypes, self.name)
        if tensor.is_meta:
            return torch.empty(held[0], dtype=held[1], device="meta")
        if name == "weight":
            return self._held_codes(auto_round.unpack_weight(tensor, self.scheme.bits, self.packing))
        if name == "g_idx":
            return _trivial_order(layer, tensor, size)
        if name == "zero_point":
            values = auto_round.unpack_zero_points(tensor, self.scheme.bits, self.packing)
            values = (values - self._code_offset()).to(held[1])
        else:
            values = finite(layer, name, tensor.float().t())
        return auto_round.expand_groups(values, columns, size, self._held_group(columns))

    def _code_offset(self) -> int:
        """Return what is taken from codes and zero points to hold them: 8-bit integers are signed."""
        return 0 if self.bits_held == 4 else symmetric_zero_point(self.scheme.bits)

    def _held_codes(self, codes: Tensor) -> Tensor:
        if self.bits_held == 4:
            return w4a16.pack_int4(codes)
        return (codes.to(torch.int16) - self._code_offset()).to(torch.int8)

    def _codes(self, weight: Tensor) -> Tensor:
        """Undo ``_held_codes``."""
        if self.bits_held == 4:
            return w4a16.unpack_int4(weight)
        return weight.to(torch.int16) + self._code_offset()

    def _stored_layout(self, layer: QuantizedLinear, name: str) -> tuple[tuple[int, ...], tuple[torch.dtype, ...]]:
        """Return the shape on disk of the parameter ``name`` and the dtypes it may have there."""
        rows, columns = layer.out_features, layer.in_features
        groups = -(-columns // self._group_size(columns))
        if name == "weight_scale":
            return (groups, rows), _SCALES
        words, zeros = auto_round.word_shapes(rows, columns, groups, self.scheme.bits, self.packing)
        return {"weight": words, "zero_point": zeros}.get(name, layer.expected[name][0]), (torch.int32,)

    def stored_tensor(self, layer: QuantizedLinear, name: str, tensor: Tensor) -> Tensor:
        """Return the tensor as on disk, scales in the narrowest dtype that has them."""
        if tensor.is_meta:
            shape, dtypes = self._stored_layout(layer, name)
            return torch.empty(shape, dtype=dtypes[0], device="meta")
        if name == "weight":
            return auto_round.pack_weight(self._codes(tensor), self.scheme.bits, self.packing)
        if name == "g_idx":
            return tensor
        columns = layer.in_features
        first = tensor[:, :: self._group_size(columns) // self._held_group(columns)]
        if name == "weight_scale":
            return _narrowest(first.t().contiguous())
        zeros = first.to(torch.int32) + self._code_offset()
        return auto_round.pack_zero_points(zeros, self.scheme.bits, self.packing)

    def quantize_weight(self, weight: Tensor) -> dict[str, Tensor]:
        """Round [N, K] to the nearest codes, with scales that float16 has."""
        columns = weight.shape[1]
        size, held = self._group_size(columns), self._held_group(columns)
        # Zeros change neither end of a group's range.
        padded = torch.nn.functional.pad(weight, (0, -columns % size))
        codes, scale, zero = quantize_per_group(padded, self.scheme.bits, size, self.scheme.sym, SCALE_DTYPE)
        zero = zero.to(torch.int16) - self._code_offset()
        return {
            "weight": self._held_codes(codes[:, :columns]),
            "weight_scale": auto_round.expand_groups(scale.float(), columns, size, held),
            "zero_point": auto_round.expand_groups(zero, columns, size, held).to(
                torch.uint8 if self.bits_held == 4 else torch.int16
            ),
        }

    def dequantize_weight(self, layer: QuantizedLinear) -> Tensor:
        """Return what the codes stand for."""
        weight, scale, zero = (layer.get_parameter(name) for name in self.stored_names)
        codes = w4a16.unpack_int4(weight) if self.bits_held == 4 else weight
        return dequantize_groups(codes, scale, zero)

    def facts(self, layer: QuantizedLinear) -> bool:
        """Return whether there is no zero point to subtract: all are the middle of the codes."""
        zero_point = layer.get_parameter("zero_point")
        middle = w4a16.SYMMETRIC_ZERO_POINT if self.bits_held == 4 else 0
        return not zero_point.is_meta and not bool((zero_point != middle).any())

    def tensors(self, layer: QuantizedLinear) -> Prepared:
        """Return the weight, its scales and, unless a kernel was bound that needs none, its zero points."""
        is_symmetric = layer.binding is not None and layer.binding.facts
        zero_point = None if is_symmetric else layer.get_parameter("zero_point")
        weight, scale = layer.get_parameter("weight"), layer.get_parameter("weight_scale")
        return Prepared(weight, scale, zero_point, format=self.format)


_SCALES = (torch.float16, torch.bfloat16, torch.float32)


def _narrowest(scale: Tensor) -> Tensor:
    return next(scale.to(dtype) for dtype in _SCALES if torch.equal(scale.to(dtype).float(), scale))


def _trivial_order(layer: QuantizedLinear, order: Tensor, group_size: int) -> Tensor:
    if not torch.equal(order.long(), torch.arange(len(order), device=order.device) // group_size):
        raise CheckpointError(f"{layer.prefix}.g_idx: inputs in another order than the groups' (desc_act) are not read")
    return order


class AutoRoundMxFp4Method(Mxfp4LinearMethod):
    """MXFP4 whose weight is called ``weight_packed`` on disk."""

    stored_names: ClassVar[Mapping[str, str]] = {"weight": "weight_packed"}


class AutoRoundNvFp4Method(NvFp4LinearMethod):
    """NVFP4 with global scales that are divided by: ``weight_global_scale`` and ``input_global_scale`` float32 [1]."""

    stored_names: ClassVar[Mapping[str, str]] = {"weight": "weight_packed"}

    def specs(self, out_features: int, in_features: int) -> tuple[TensorSpec, ...]:
        """Return AutoRound's tensors."""
        names = ("weight_global_scale", *(("input_global_scale",) if self.has_input_scale else ()))
        weight, scale, *_ = super().specs(out_features, in_features)
        return (weight, scale, *(TensorSpec(name, torch.float32, (fixed(1),)) for name in names))

    def canonical_tensor(self, layer: QuantizedLinear, name: str, tensor: Tensor) -> Tensor:
        """Accept global scales [] and [1]."""
        if name.endswith("global_scale"):
            tensor = tensor.float().reshape(1) if tensor.numel() == 1 else tensor
            return finite_and_positive(layer, name, LinearMethod.canonical_tensor(self, layer, name, tensor))
        return super().canonical_tensor(layer, name, tensor)

    def quantize_weight(self, weight: Tensor) -> dict[str, Tensor]:
        """Refuse: only checkpoints are read."""
        raise UnsupportedError("auto-round: nv_fp is read, not made: quantize with nvfp4")

    def _scale(self, layer: QuantizedLinear, name: str) -> Tensor:
        return layer.get_parameter(name).reciprocal().reshape(())

    def dequantize_weight(self, layer: QuantizedLinear) -> Tensor:
        """Return ``weight`` times its groups' scales, over the global one."""
        scales = layer.get_parameter("weight_scale"), self._scale(layer, "weight_global_scale")
        return nvfp4.dequantize_nvfp4(layer.get_parameter("weight"), *scales)

    def tensors(self, layer: QuantizedLinear) -> Prepared:
        """Return the weight and its scales, global ones to multiply by."""
        input_scale = self._scale(layer, "input_global_scale") if self.has_input_scale else None
        return Prepared(
            layer.get_parameter("weight"),
            layer.get_parameter("weight_scale"),
            outer_scale=self._scale(layer, "weight_global_scale"),
            input_scale=input_scale,
            format=self.format,
        )
