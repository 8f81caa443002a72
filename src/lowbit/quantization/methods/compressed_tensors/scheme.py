"""What ``config_groups`` says of a layer, and what computes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from lowbit.errors import ConfigError, UnsupportedError, expected_one_of
from lowbit.ops.integer_groups import GROUP_MULTIPLE
from lowbit.quantization.base import LinearMethod
from lowbit.quantization.methods.compressed_tensors import linear

NAME = "compressed-tensors"
# Keys of an operand that say how numbers were found and not what they are. ``actorder`` changed the order in which
# GPTQ went through the inputs; the one that changed their groups shows in ``weight_g_idx``.
_UNREAD = ("observer", "observer_kwargs", "actorder", "scale_dtype", "zp_dtype")
_STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group")


@dataclass(frozen=True)
class Operand:
    """Weights or activations, in the words of compressed-tensors' ``QuantizationArgs``."""

    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    group_size: int | None = None
    strategy: str | None = None
    block_structure: tuple[int, int] | None = None
    dynamic: bool | str = False

    @classmethod
    def read(cls, where: str, given: Any) -> Operand | None:
        """Return an operand of a configuration, ``None`` for none.

        Raises:
            ConfigError: a key or a value that does not exist.
        """
        if given is None:
            return None
        if not isinstance(given, Mapping):
            raise ConfigError(f"{NAME}: {where} must be a dictionary, not {given!r:.200}")
        known = {item.name for item in fields(cls)}
        unknown = sorted(given.keys() - known - set(_UNREAD))
        if unknown:
            raise ConfigError(f"{NAME}: {where} has no key {unknown[0]!r}. {expected_one_of([*known, *_UNREAD])}")
        values = {key: value for key, value in given.items() if key in known and value is not None}
        values["block_structure"] = _block(where, values.get("block_structure"))
        found = cls(**values)
        found._check(where)
        return found

    def _check(self, where: str) -> None:
        if type(self.num_bits) is not int or self.type not in ("int", "float") or type(self.symmetric) is not bool:
            raise ConfigError(f"{NAME}: {where}: num_bits must be a number, type int or float, symmetric true or false")
        if self.group_size is not None and type(self.group_size) is not int:
            raise ConfigError(f"{NAME}: {where}: group_size must be a whole number, not {self.group_size!r}")
        if self.dynamic not in (True, False, "local"):
            raise ConfigError(f"{NAME}: {where}: dynamic must be true, false or 'local', not {self.dynamic!r}")
        if self.strategy is not None and self.strategy not in _STRATEGIES:
            raise ConfigError(f"{NAME}: {where}: no strategy {self.strategy!r}. {expected_one_of(_STRATEGIES)}")

    @property
    def granularity(self) -> str:
        """The strategy, told by the group size where it is not named."""
        if self.strategy is not None:
            return self.strategy
        return "tensor" if self.group_size is None else "channel" if self.group_size == -1 else "group"

    def is_in_groups(self, kind: str, bits: int, size: int) -> bool:
        """Tell whether these are symmetric numbers of this type in groups of ``size``."""
        return (self.type, self.num_bits, self.group_size, self.symmetric) == (kind, bits, size, True)


def _block(where: str, given: Any) -> tuple[int, int] | None:
    edges = given.split("x") if isinstance(given, str) else given
    if edges is None:
        return None
    try:
        rows, columns = (int(edge) for edge in edges)
    except (TypeError, ValueError):
        rows = columns = 0
    if rows <= 0 or columns <= 0:
        raise ConfigError(f"{NAME}: {where}: block_structure must be [rows, columns], not {given!r:.100}")
    return rows, columns


@dataclass(frozen=True)
class Scheme:
    """A group of ``config_groups``: weights, and activations or ``None`` for those left as they are."""

    weights: Operand
    activations: Operand | None = None
    format: str | None = None

    @classmethod
    def read(cls, name: str, given: Mapping[str, Any], model_format: str | None) -> Scheme | None:
        """Return the scheme of a group, ``None`` where its weights are not quantized.

        Raises:
            ConfigError: keys or values that do not exist.
            UnsupportedError: numbers that no kernel computes, or a format that does not hold them.
        """
        unknown = sorted(given.keys() - {"targets", "weights", "input_activations", "output_activations", "format"})
        if unknown:
            raise ConfigError(f"{NAME}: config_groups.{name} has no key {unknown[0]!r}")
        if given.get("output_activations") is not None:
            raise UnsupportedError(f"{NAME}: config_groups.{name}: outputs are not quantized here")
        weights = Operand.read(f"config_groups.{name}.weights", given.get("weights"))
        activations = Operand.read(f"config_groups.{name}.input_activations", given.get("input_activations"))
        if weights is None:
            if activations is not None:
                raise UnsupportedError(f"{NAME}: config_groups.{name}: activations alone are not quantized here")
            return None
        own = given.get("format") or (model_format if model_format != MIXED else None)
        found = cls(weights, activations, own)
        kind = found.kind(name)
        if own is not None and own not in KINDS[kind].formats:
            raise UnsupportedError(
                f"{NAME}: config_groups.{name}: format {own!r} with {kind}",
                [f"lowbit reads {kind} in {' and '.join(KINDS[kind].formats)}"],
            )
        return found

    def kind(self, name: str) -> str:
        """Return which of ``KINDS`` it is.

        Raises:
            UnsupportedError: none of them.
        """
        found = next((kind for kind, entry in KINDS.items() if entry.fits(self)), None)
        if found is None:
            raise UnsupportedError(
                f"{NAME}: config_groups.{name} has numbers that no kernel computes: {self.weights} with activations"
                f" {self.activations}",
                [f"those computed: {', '.join(KINDS)}"],
            )
        return found

    def method(self, name: str, kernel: str, is_serialized: bool) -> LinearMethod:
        """Return what computes a layer of group ``name``, of a checkpoint or quantized here."""
        return KINDS[self.kind(name)].make(self, kernel, is_serialized)

    @property
    def has_static_activations(self) -> bool:
        """Whether an ``input_scale`` is in the checkpoint, or would have to be calibrated."""
        return self.activations is not None and self.activations.dynamic is not True


MIXED = "mixed-precision"


@dataclass(frozen=True)
class Kind:
    """Numbers that a kernel computes.

    Attributes:
        fits: tells whether a scheme is of this kind.
        make: (scheme, kernel, whether the weights are a checkpoint's) -> the method.
        formats: that hold them.
    """

    fits: Callable[[Scheme], bool]
    make: Callable[[Scheme, str, bool], LinearMethod]
    formats: tuple[str, ...]


def _is_packed(scheme: Scheme) -> bool:
    weights, size = scheme.weights, scheme.weights.group_size
    is_group = weights.granularity == "group" and size is not None and size > 0 and size % GROUP_MULTIPLE == 0
    return (
        weights.type == "int"
        and weights.num_bits in linear.PACKED_BITS
        and scheme.activations is None
        and (is_group or weights.granularity == "channel")
    )


def _is_int8(scheme: Scheme) -> bool:
    weights, activations = scheme.weights, scheme.activations
    return (
        (weights.type, weights.num_bits, weights.symmetric) == ("int", 8, True)
        and weights.granularity in ("channel", "tensor")
        and activations is not None
        and (activations.type, activations.num_bits) == ("int", 8)
        and (
            (activations.dynamic is True and activations.symmetric and activations.granularity == "token")
            or (activations.dynamic is False and activations.granularity == "tensor")
        )
    )


def _is_fp8(scheme: Scheme) -> bool:
    weights, activations = scheme.weights, scheme.activations
    if (weights.type, weights.num_bits, weights.symmetric) != ("float", 8, True):
        return False
    if weights.granularity == "block":
        columns = weights.block_structure[1] if weights.block_structure else None
        grouped = activations is not None and activations.is_in_groups("float", 8, columns or 0)
        return columns is not None and (activations is None or (grouped and activations.dynamic is True))
    if weights.granularity not in ("channel", "tensor"):
        return False
    if activations is None:
        return True
    is_e4m3 = (activations.type, activations.num_bits, activations.symmetric) == ("float", 8, True)
    granularity = ("token", "tensor") if activations.dynamic is True else ("tensor",)
    return is_e4m3 and activations.dynamic != "local" and activations.granularity in granularity


def _is_mx(bits: int) -> Callable[[Scheme], bool]:
    def fits(scheme: Scheme) -> bool:
        operands = [scheme.weights, *([scheme.activations] if scheme.activations is not None else [])]
        dynamic = scheme.activations is None or scheme.activations.dynamic is True
        return dynamic and all(operand.is_in_groups("float", bits, 32) for operand in operands)

    return fits


def _is_nvfp4(scheme: Scheme) -> bool:
    operands = [scheme.weights, *([scheme.activations] if scheme.activations is not None else [])]
    return all(operand.is_in_groups("float", 4, 16) for operand in operands)


def _make_packed(scheme: Scheme, kernel: str, is_serialized: bool) -> LinearMethod:
    return linear.packed_method(scheme.weights, kernel, is_serialized)


def _make_int8(scheme: Scheme, kernel: str, _: bool) -> LinearMethod:
    if scheme.activations is None or scheme.activations.dynamic is True:
        return linear.Int8Method(kernel)
    return linear.Int8StaticMethod(scheme.activations.symmetric, kernel)


def _make_fp8(scheme: Scheme, kernel: str, _: bool) -> LinearMethod:
    return linear.fp8_method(scheme.weights, scheme.activations, kernel)


def _make_mx(method: type[LinearMethod]) -> Callable[[Scheme, str, bool], LinearMethod]:
    return lambda scheme, kernel, _: method("weight_only" if scheme.activations is None else kernel)


def _make_nvfp4(scheme: Scheme, kernel: str, _: bool) -> LinearMethod:
    if scheme.activations is None:
        return linear.NvFp4Method("none", kernel)
    return linear.NvFp4Method("dynamic" if scheme.activations.dynamic is True else "static", kernel)


_INT8_FORMATS, _FP8_FORMATS = ("int-quantized", "naive-quantized"), ("float-quantized", "naive-quantized")
# The first that fits is taken.
KINDS: Mapping[str, Kind] = {
    "integers of 2 to 8 bits per channel or in groups of 32 or a multiple, 16-bit activations": Kind(
        _is_packed, _make_packed, ("pack-quantized",)
    ),
    "int8 W8A8, activations per token or static": Kind(_is_int8, _make_int8, _INT8_FORMATS),
    "MXFP8": Kind(_is_mx(8), _make_mx(linear.Mxfp8Method), ("mxfp8-quantized",)),
    "FP8 per tensor, channel or block": Kind(_is_fp8, _make_fp8, _FP8_FORMATS),
    "MXFP4": Kind(_is_mx(4), _make_mx(linear.Mxfp4Method), ("mxfp4-pack-quantized",)),
    "NVFP4": Kind(_is_nvfp4, _make_nvfp4, ("nvfp4-pack-quantized",)),
}
