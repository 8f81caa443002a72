"""What a layer of a compressed-tensors checkpoint holds: lowbit's methods under the format's names and dtypes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.ops import int8_static, w4a16, w8a16
from lowbit.ops.integer_groups import dequantize_groups, quantize_per_group, symmetric_zero_point
from lowbit.ops.weight_format import Prepared
from lowbit.quantization.base import LinearMethod, check_tensor
from lowbit.quantization.methods.auto_round_linear import AutoRoundMxFp4Method, AutoRoundNvFp4Method
from lowbit.quantization.methods.compressed_tensors.packing import WORD, pack_codes, unpack_codes, words_of
from lowbit.quantization.methods.fp8 import Fp8LinearMethod
from lowbit.quantization.methods.int8 import Int8LinearMethod
from lowbit.quantization.methods.mxfp8 import Mxfp8LinearMethod
from lowbit.quantization.methods.nvfp4 import NvFp4LinearMethod
from lowbit.quantization.scales import finite, finite_and_positive, per_channel_scale, per_tensor_scale
from lowbit.quantization.tensors import Along, K, N, TensorSpec, fixed, groups

if TYPE_CHECKING:
    from lowbit.quantization.linear import QuantizedLinear

PACKED_BITS = range(2, 9)
SCALES = (torch.bfloat16, torch.float16, torch.float32)
READ_ONLY = "compressed-tensors: static activations are read, not made: quantize with llm-compressor"


class _Operand(Protocol):
    @property
    def num_bits(self) -> int: ...
    @property
    def symmetric(self) -> bool: ...
    @property
    def group_size(self) -> int | None: ...
    @property
    def granularity(self) -> str: ...
    @property
    def block_structure(self) -> tuple[int, int] | None: ...
    @property
    def dynamic(self) -> bool | str: ...


class _KeepsSpelling(LinearMethod):
    """Keeps the dtype and shape in which a checkpoint has small tensors, to write them so again."""

    @cached_property
    def spelled(self) -> dict[str, tuple[torch.dtype, torch.Size]]:
        """Name -> dtype and shape in the checkpoint."""
        return {}

    def spell(self, name: str, tensor: Tensor) -> None:
        """Note how ``name`` is written."""
        self.spelled[name] = (tensor.dtype, tensor.shape)

    def as_spelled(self, name: str, tensor: Tensor) -> Tensor:
        """Return ``tensor`` so; one that was expanded from a single number is that number again."""
        dtype, shape = self.spelled.get(name, (tensor.dtype, tensor.shape))
        single = tensor.flatten()[:1] if shape.numel() == 1 else tensor
        return single.reshape(shape).to(dtype)


class PackedMethod(_KeepsSpelling):
    """``pack-quantized``: integers of 2 to 8 bits with activations left as they are.

    Held as the families ``w4a16`` (2 to 4 bits) and ``w8a16`` have them.
    """

    activation_scheme = "none"
    stored_names: ClassVar[Mapping[str, str]] = {"weight": "weight_packed"}

    def __init__(self, weights: _Operand, kernel: str, is_serialized: bool) -> None:
        super().__init__(kernel)
        # The order of the inputs: older checkpoints have it, and it is checked.
        self.optional = frozenset({"weight_g_idx"} if is_serialized else ())
        self.bits, self.symmetric = weights.num_bits, weights.symmetric
        self.group_size = weights.group_size if weights.granularity == "group" else None
        self.bits_held = 4 if self.bits <= 4 else 8
        module = w4a16 if self.bits_held == 4 else w8a16
        self.family, self.table = f"w{self.bits_held}a16", module.IMPLEMENTATIONS
        self.name = f"compressed-tensors W{self.bits}A16"

    def specs(self, out_features: int, in_features: int) -> tuple[TensorSpec, ...]:
        """Return ``weight``, its scale, its shape, the order of inputs and, if asymmetric, ``zero_point``."""
        is_packed = self.bits_held == 4
        held = (N, fixed(1) if self.group_size is None else groups(K, self.group_size))
        zero = () if self.symmetric else (TensorSpec("zero_point", torch.uint8 if is_packed else torch.int16, held),)
        return (
            TensorSpec("weight", torch.uint8 if is_packed else torch.int8, (N, groups(K, 2 if is_packed else 1))),
            TensorSpec("weight_scale", torch.float32, held),
            TensorSpec("weight_shape", torch.int64, (fixed(2),)),
            *zero,
            *(TensorSpec(name, torch.int32, (K,), counts_groups=True) for name in self.optional),
        )

    def cut_step(self, out_features: int, in_features: int, along: Along) -> int:
        """Keep whole the words of the checkpoint, to which a slice can be written again."""
        return math.lcm(super().cut_step(out_features, in_features, along), WORD)

    def refusal(self, layer: torch.nn.Linear) -> str | None:
        """Refuse input channels that are no whole groups, or not even."""
        if self.group_size is not None and layer.in_features % self.group_size:
            return f"{layer.in_features} input channels are not whole groups of {self.group_size}"
        return f"an odd number of input channels, {layer.in_features}" if layer.in_features % 2 else None

    def _groups(self, columns: int) -> int:
        return 1 if self.group_size is None else columns // self.group_size

    def _stored_layout(self, layer: QuantizedLinear, name: str) -> tuple[tuple[int, ...], tuple[torch.dtype, ...]]:
        rows, columns = layer.out_features, layer.in_features
        layouts: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
            "weight": ((rows, words_of(columns, self.bits)), (torch.int32,)),
            "weight_scale": ((rows, self._groups(columns)), SCALES),
            "weight_shape": ((2,), (torch.int64, torch.int32)),
            "zero_point": ((words_of(rows, self.bits), self._groups(columns)), (torch.int32,)),
            "weight_g_idx": ((columns,), (torch.int32, torch.int64)),
        }
        return layouts[name]

    def canonical_tensor(self, layer: QuantizedLinear, name: str, tensor: Tensor) -> Tensor:
        """Unpack the tensors of a checkpoint."""
        shape, dtypes = self._stored_layout(layer, name)
        check_tensor(f"{layer.prefix}.{self.stored_names.get(name, name)}", tensor, shape, dtypes, self.name)
        self.spell(name, tensor)
        held = layer.expected[name]
        if tensor.is_meta:
            return torch.empty(held[0], dtype=held[1], device="meta")
        if name == "weight":
            return self._hold(unpack_codes(tensor, self.bits, layer.in_features))
        if name == "zero_point":
            codes = unpack_codes(tensor.t().contiguous(), self.bits, layer.out_features).t().contiguous()
            return self._shifted(codes).to(held[1])
        if name == "weight_scale":
            return finite(layer, name, tensor.float())
        check = _check_shape if name == "weight_shape" else _check_order
        return check(layer, tensor, self.group_size or layer.in_features).to(held[1])

    def _shift(self) -> int:
        """Return what is added to codes to hold them: the middle of 4 bits is 8, 8-bit integers are signed."""
        middle = w4a16.SYMMETRIC_ZERO_POINT if self.bits_held == 4 else 0
        return middle - symmetric_zero_point(self.bits)

    def _shifted(self, codes: Tensor) -> Tensor:
        return codes.to(torch.int16) + self._shift()

    def _hold(self, codes: Tensor) -> Tensor:
        held = self._shifted(codes)
        return w4a16.pack_int4(held.to(torch.uint8)) if self.bits_held == 4 else held.to(torch.int8)

    def _codes(self, weight: Tensor) -> Tensor:
        held = w4a16.unpack_int4(weight) if self.bits_held == 4 else weight
        return (held.to(torch.int16) - self._shift()).to(torch.uint8)

    def stored_tensor(self, layer: QuantizedLinear, name: str, tensor: Tensor) -> Tensor:
        """Pack the parameter ``name`` again."""
        if tensor.is_meta:
            shape, dtypes = self._stored_layout(layer, name)
            return torch.empty(shape, dtype=self.spelled.get(name, (dtypes[0],))[0], device="meta")
        if name == "weight":
            return pack_codes(self._codes(tensor), self.bits)
        if name == "zero_point":
            codes = (tensor.to(torch.int16) - self._shift()).to(torch.uint8)
            return pack_codes(codes.t().contiguous(), self.bits).t().contiguous()
        if name == "weight_shape":  # of a slice, its own
            tensor = tensor.new_tensor([layer.out_features, layer.in_features])
        if name == "weight_scale" and name not in self.spelled:
            return tensor.to(SCALES[0])
        return self.as_spelled(name, tensor)

    def quantize_weight(self, weight: Tensor) -> dict[str, Tensor]:
        """Round [N, K] to the nearest codes, with scales that bfloat16 has."""
        size = self.group_size or weight.shape[1]
        codes, scale, zero = quantize_per_group(weight, self.bits, size, self.symmetric, SCALES[0])
        tensors = {
            "weight": self._hold(codes),
            "weight_scale": scale.float(),
            "weight_shape": torch.tensor(weight.shape, dtype=torch.int64, device=weight.device),
        }
        if not self.symmetric:
            tensors["zero_point"] = self._shifted(zero).to(torch.uint8 if self.bits_held == 4 else torch.int16)
        return tensors

    def dequantize_weight(self, layer: QuantizedLinear) -> Tensor:
        """Return what the codes stand for."""
        weight = layer.get_parameter("weight")
        codes = w4a16.unpack_int4(weight) if self.bits_held == 4 else weight
        middle = float(w4a16.SYMMETRIC_ZERO_POINT if self.bits_held == 4 else 0)
        zero = middle if self.symmetric else layer.get_parameter("zero_point")
        return dequantize_groups(codes, layer.get_parameter("weight_scale"), zero)

    def tensors(self, layer: QuantizedLinear) -> Prepared:
        """Return the weight, its scales and, if asymmetric, its zero points."""
        zero_point = None if self.symmetric else layer.get_parameter("zero_point")
        weight, scale = layer.get_parameter("weight"), layer.get_parameter("weight_scale")
        return Prepared(weight, scale, zero_point, format=self.format)


class AsymmetricPackedMethod(PackedMethod):
    """The same with zero points."""

    stored_names: ClassVar[Mapping[str, str]] = {"weight": "weight_packed", "zero_point": "weight_zero_point"}


def packed_method(weights: _Operand, kernel: str, is_serialized: bool) -> LinearMethod:
    """Return the method of integers with activations left as they are."""
    return (PackedMethod if weights.symmetric else AsymmetricPackedMethod)(weights, kernel, is_serialized)


def _check_shape(layer: QuantizedLinear, found: Tensor, _: int) -> Tensor:
    shape = [layer.out_features, layer.in_features]
    if found.tolist() != shape:
        raise CheckpointError(f"{layer.prefix}.weight_shape: found {found.tolist()}, the model's layer is {shape}")
    return found


def _check_order(layer: QuantizedLinear, order: Tensor, group_size: int) -> Tensor:
    if not torch.equal(order.long(), torch.arange(len(order), device=order.device) // group_size):
        raise CheckpointError(
            f"{layer.prefix}.weight_g_idx: inputs in another order than the groups' (actorder 'group') are not read:"
            " quantize with actorder 'weight'"
        )
    return order


class Int8Method(_KeepsSpelling, Int8LinearMethod):
    """Int8 W8A8 with dynamic activations."""

    stored_names: ClassVar[Mapping[str, str]] = {"weight_scale": "weight_scale"}

    def canonical_tensor(self, layer: QuantizedLinear, name: str, tensor: Tensor) -> Tensor:
        """Accept scales [N, 1] and [1] in three dtypes."""
        self.spell(name, tensor)
        found = super().canonical_tensor(layer, name, tensor)
        return finite_and_positive(layer, name, found) if name == "weight_scale" else found

    def stored_tensor(self, layer: QuantizedLinear, name: str, tensor: Tensor) -> Tensor:
        """Return the tensor in the checkpoint's dtype and shape."""
        return self.as_spelled(name, tensor)


class Int8StaticMethod(_KeepsSpelling):
    """Int8 W8A8 with one scale, and one zero point, for all activations."""

    name = "compressed-tensors W8A8 static"
    family = "int8_static"
    activation_scheme = "static"
    table = int8_static.IMPLEMENTATIONS
    stored_names: ClassVar[Mapping[str, str]] = {"weight_scale": "weight_scale"}

    def __init__(self, symmetric: bool, kernel: str) -> None:
        super().__init__(kernel)
        self.symmetric = symmetric

    def specs(self, out_features: int, in_features: int) -> tuple[TensorSpec, ...]:
        """Return ``weight``, its scale and those of activations."""
        zero = () if self.symmetric else (TensorSpec("input_zero_point", torch.int8),)
        return (
            TensorSpec("weight", torch.int8, (N, K)),
            TensorSpec("weight_scale", torch.float32, (N, fixed(1))),
            TensorSpec("input_scale", torch.float32),
            *zero,
        )

    def canonical_tensor(self, layer: QuantizedLinear, name: str, tensor: Tensor) -> Tensor:
        """Accept numbers of the whole layer as [] and [1], scales in three dtypes."""
        self.spell(name, tensor)
        if name == "weight_scale":
            tensor = per_channel_scale(tensor, layer.out_features)
        elif name == "input_scale":
            tensor = per_tensor_scale(tensor)
        elif name == "input_zero_point" and tensor.numel() == 1:
            tensor = tensor.reshape(())
        found = super().canonical_tensor(layer, name, tensor)
        return finite_and_positive(layer, name, found) if name.endswith("_scale") else found

    def stored_tensor(self, layer: QuantizedLinear, name: str, tensor: Tensor) -> Tensor:
        """Return the tensor in the checkpoint's dtype and shape."""
        return self.as_spelled(name, tensor)

    def quantize_weight(self, weight: Tensor) -> dict[str, Tensor]:
        """Refuse: only checkpoints are read."""
        raise UnsupportedError(READ_ONLY)

    def dequantize_weight(self, layer: QuantizedLinear) -> Tensor:
        """Return ``weight * weight_scale``."""
        return layer.get_parameter("weight").float() * layer.get_parameter("weight_scale")

    def tensors(self, layer: QuantizedLinear) -> Prepared:
        """Return what ``lowbit.ops.int8_static`` multiplies by; what the zero point adds is in ``quant_bias``."""
        weight, scale, input_scale = (layer.get_parameter(name) for name in ("weight", "weight_scale", "input_scale"))
        zero = torch.zeros_like(input_scale) if self.symmetric else layer.get_parameter("input_zero_point").float()
        sums = weight.sum(dim=1, dtype=torch.int32)
        return Prepared(
            weight,
            scale.squeeze(1) * input_scale,
            input_scale=input_scale,
            input_offset=zero,
            quant_bias=-sums * zero.to(torch.int32),
            format=self.format,
        )

    def apply(self, layer: QuantizedLinear, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the layer; the kernel adds no bias."""
        result = layer.multiply(x, None)
        return result if bias is None else result + bias


class Fp8Method(_KeepsSpelling, Fp8LinearMethod):
    """FP8 per tensor, channel or block, under one name of the scale."""

    stored_names: ClassVar[Mapping[str, str]] = {"weight_scale": "weight_scale"}

    def __init__(self, activation_scheme: str, block: tuple[int, int] | None, kernel: str) -> None:
        super().__init__(activation_scheme, block, kernel)
        self.scale_name = "weight_scale"

    def canonical_tensor(self, layer: QuantizedLinear, name: str, tensor: Tensor) -> Tensor:
        """Accept scales [N, 1], [1] and per block in three dtypes."""
        self.spell(name, tensor)
        if name == "weight_scale" and self.block_size is not None:
            tensor = tensor.float() if tensor.dtype in SCALES else tensor
            return finite_and_positive(layer, name, LinearMethod.canonical_tensor(self, layer, name, tensor))
        found = super().canonical_tensor(layer, name, tensor)
        return finite_and_positive(layer, name, found) if name == "weight_scale" else found

    def stored_tensor(self, layer: QuantizedLinear, name: str, tensor: Tensor) -> Tensor:
        """Return the tensor in the checkpoint's dtype and shape."""
        return self.as_spelled(name, tensor)

    def quantize_weight(self, weight: Tensor) -> dict[str, Tensor]:
        """Quantize [N, K]; refuse static activations."""
        if self.activation_scheme == "static":
            raise UnsupportedError(READ_ONLY)
        return super().quantize_weight(weight)


class Fp8WeightOnlyMethod(Fp8Method):
    """FP8 weights with activations left as they are."""

    name = "fp8_weight_only"
    weight_only = True

    def __init__(self, block: tuple[int, int] | None) -> None:
        super().__init__("none", block, "weight_only")


def fp8_method(weights: _Operand, activations: _Operand | None, kernel: str) -> LinearMethod:
    """Return the FP8 method of a scheme; dynamic activations have a scale per token, or per group of a block."""
    block = weights.block_structure if weights.granularity == "block" else None
    if activations is None:
        return Fp8WeightOnlyMethod(block)
    return Fp8Method("dynamic" if activations.dynamic is True else "static", block, kernel)


class Mxfp8Method(Mxfp8LinearMethod):
    """MXFP8."""


class Mxfp4Method(AutoRoundMxFp4Method):
    """MXFP4."""


class NvFp4Method(AutoRoundNvFp4Method):
    """NVFP4 with global scales that are divided by."""

    def quantize_weight(self, weight: Tensor) -> dict[str, Tensor]:
        """Quantize [N, K]; refuse static activations."""
        if self.has_input_scale:
            raise UnsupportedError(READ_ONLY)
        tensors = NvFp4LinearMethod.quantize_weight(self, weight)
        global_scale = tensors.pop("weight_scale_2").reciprocal().reshape(1)
        return {**tensors, "weight_global_scale": global_scale}
