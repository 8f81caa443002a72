"""AutoRound (``auto-round``): integer weights of 2 to 8 bits in groups with activations left as they are, MX and NVFP4.

On disk, with N output and K input channels and groups of g inputs (``lowbit.ops.auto_round`` has the packings):

=========================  ==========================================================================================
data type                  tensors
=========================  ==========================================================================================
int                        ``qweight``, ``qzeros`` int32, ``scales`` float16 [ceil(K / g), N], sometimes ``g_idx``
mx_fp, 8 bits              ``weight`` e4m3 [N, K], ``weight_scale`` E8M0 uint8 [N, K / 32]
mx_fp, 4 bits              ``weight_packed`` uint8 [N, K / 2], ``weight_scale`` E8M0 uint8 [N, K / 32]
nv_fp                      ``weight_packed`` uint8 [N, K / 2], ``weight_scale`` e4m3 [N, K / 16],
                           ``weight_global_scale``, ``input_global_scale`` float32 [1]: reciprocals
=========================  ==========================================================================================

In a layer integers are what the families ``w4a16`` (2 to 4 bits, held in 4) and ``w8a16`` (5 to 8, held in 8)
compute with: ``weight``, ``weight_scale`` float32 [N, groups] and ``zero_point`` [N, groups].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from lowbit.errors import ConfigError, UnsupportedError
from lowbit.models.expressions import check_expressions, expression_matches
from lowbit.ops import auto_round
from lowbit.quantization.base import LinearMethod, QuantizationConfig
from lowbit.quantization.methods.auto_round_linear import (
    UNQUANTIZED_BITS,
    AutoRoundLinearMethod,
    AutoRoundMxFp4Method,
    AutoRoundNvFp4Method,
    Scheme,
    activations_kept,
)
from lowbit.quantization.methods.mxfp8 import Mxfp8LinearMethod

if TYPE_CHECKING:
    from typing_extensions import Self

# A checkpoint's keys that change what its tensors mean and are not read.
_UNSUPPORTED_KEYS = ("rotation_config", "super_bits", "super_group_size")
_SERIALIZED = "is_checkpoint_auto_round_serialized"


@dataclass(frozen=True, kw_only=True)
class AutoRoundConfig(QuantizationConfig):
    """Configuration of ``auto-round``.

    Attributes:
        bits, group_size, sym, data_type, act_bits: of every layer that ``extra_config`` does not name; see ``Scheme``,
            whose ``group_size`` is AutoRound's for a checkpoint that names none. Smaller groups are closer to the
            weight for hardly more bytes, so that here they are the default.
        packing_format: order of the codes; ``None``: ``auto_round:auto_gptq`` for symmetric codes, else ``auto_round``,
            as AutoRound chooses.
        block_name_to_quantize: prefixes of the layers that are quantized; ``None``: all in numbered blocks.
        extra_config: layer or regular expression -> keys of ``Scheme`` that are others there.
        is_checkpoint_auto_round_serialized: the checkpoint's weights are quantized already.
    """

    bits: int = 4
    group_size: int = 32
    sym: bool = True
    data_type: str = "int"
    act_bits: int | None = None
    packing_format: str | None = None
    block_name_to_quantize: list[str] | None = None
    extra_config: dict[str, dict[str, Any]] | None = None
    is_checkpoint_auto_round_serialized: bool = False

    aliases: ClassVar[Mapping[str, str]] = {
        **QuantizationConfig.aliases,
        "to_quant_block_names": "block_name_to_quantize",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.is_checkpoint_auto_round_serialized, bool):
            raise ConfigError("is_checkpoint_auto_round_serialized must be true or false")
        if self.packing_format is not None and not isinstance(self.packing_format, str):
            raise ConfigError(f"auto-round: packing_format must be a name, not {self.packing_format!r}")
        object.__setattr__(self, "block_name_to_quantize", _block_names(self.block_name_to_quantize))
        object.__setattr__(self, "extra_config", _checked_extra(self.extra_config))
        kinds = {self.scheme.kind, *(self.scheme_of(name).kind for name in self.extra_config or {})}
        if "int" in kinds:
            offset = self.packing.zero_offset
            if not self.is_serialized and offset and not self.sym:
                raise ConfigError("auto-round: packing_format auto_gptq can't hold zero points of 0: use auto_round")
        if not self.is_serialized and kinds - {"int", None}:
            raise ConfigError(
                f"auto-round: data_type {self.data_type} is read, not made: quantize with mxfp8, mxfp4 or nvfp4"
            )

    @classmethod
    def get_name(cls) -> str:
        """Return ``"auto-round"``."""
        return "auto-round"

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        """Take every checkpoint's dictionary: diffusers and transformers need the ``auto-round`` package to read it."""
        return True

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build from a dictionary; of a checkpoint's the many keys that say how AutoRound tuned are passed over."""
        options = dict(config)
        is_written = "autoround_version" in options or {"packing_format", "quant_method"} <= options.keys()
        if options.get(_SERIALIZED, is_written) is True:
            changed = [key for key in _UNSUPPORTED_KEYS if options.get(key)]
            if changed:
                raise UnsupportedError(f"auto-round: {', '.join(changed)} of the checkpoint is not supported")
            known = {item.name for item in fields(cls)} | cls.aliases.keys()
            options = {key: value for key, value in options.items() if key in known and value is not None}
            options = {"group_size": Scheme.group_size, **options, _SERIALIZED: True}
        return super().from_config(options)

    @property
    def is_serialized(self) -> bool:
        """Whether the checkpoint's weights are quantized already."""
        return self.is_checkpoint_auto_round_serialized

    @property
    def packing(self) -> auto_round.Packing:
        """The order of the codes.

        Raises:
            UnsupportedError: ``packing_format`` is unknown.
        """
        return auto_round.packing_of(self._packing_format())

    def _packing_format(self) -> str:
        return self.packing_format or ("auto_round:auto_gptq" if self.sym else "auto_round")

    @property
    def scheme(self) -> Scheme:
        """That of layers which ``extra_config`` does not name."""
        return Scheme(self.bits, self.group_size, self.sym, self.data_type, self.act_bits)

    def scheme_of(self, name: str) -> Scheme:
        """Return how the layer of this full name is quantized."""
        extra = self.extra_config or {}
        found = extra.get(name)
        if found is None:
            expressions = (key for key, keys in extra.items() if keys)
            match = next((key for key in expressions if expression_matches(key, name, anywhere=True)), None)
            found = {} if match is None else extra[match]
        return replace(self.scheme, **{key: found[key] for key in _SCHEME_KEYS if found.get(key) is not None})

    def is_in_blocks(self, name: str) -> bool:
        """Tell whether a layer is in a block that is quantized, or named by itself in ``extra_config``."""
        if name in (self.extra_config or {}):
            return True
        if self.block_name_to_quantize is None:
            return any(part.isdigit() for part in name.split("."))
        return name.startswith(tuple(self.block_name_to_quantize))

    def _quantizes(self, name: str) -> bool:
        return self.scheme_of(name).kind is not None

    def linear_method(self) -> LinearMethod:
        """Return the method of layers which ``extra_config`` does not name."""
        return self._method(self.scheme) or AutoRoundLinearMethod(Scheme(), self.packing, self.kernel)

    def _method(self, scheme: Scheme) -> LinearMethod | None:
        kind = scheme.kind
        if kind is None:
            return None
        kernel = "weight_only" if kind.startswith("mx") and activations_kept(scheme) else self.kernel
        makers: dict[str, Callable[[], LinearMethod]] = {
            "int": lambda: AutoRoundLinearMethod(scheme, self.packing, self.kernel, self.is_serialized),
            "mx_fp8": lambda: Mxfp8LinearMethod(kernel),
            "mx_fp4": lambda: AutoRoundMxFp4Method(kernel),
            "nv_fp4": lambda: AutoRoundNvFp4Method("none" if activations_kept(scheme) else "static", self.kernel),
        }
        return makers[kind]()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> LinearMethod | None:
        """Return what to do with ``layer``; ``None`` outside of the blocks, with 16 bits, and for ignored layers.

        Raises:
            UnsupportedError: a checkpoint's layer has a shape that can't be read.
        """
        if not isinstance(layer, torch.nn.Linear) or self.is_ignored(prefix) or not self.is_in_blocks(prefix):
            return None
        method = self._method(self.scheme_of(prefix))
        refusal = method.refusal(layer) if method is not None and self.is_serialized else None
        if refusal:
            raise UnsupportedError(f"auto-round: {prefix} can't be read: {refusal}")
        return method

    def kept_reason(self, name: str) -> str:
        """Return why a layer is left as it is."""
        if self.is_ignored(name):
            return "ignored_layers"
        return "16 bits in extra_config" if self.is_in_blocks(name) else "not in a block that is quantized"

    def without_prefix(self, prefix: str) -> Self:
        """Return the configuration for a model whose names lack ``prefix``."""
        blocks = self.block_name_to_quantize
        return replace(
            super().without_prefix(prefix),
            block_name_to_quantize=blocks and [name.removeprefix(prefix) for name in blocks],
            extra_config={name.removeprefix(prefix): keys for name, keys in (self.extra_config or {}).items()},
        )

    def as_serialized(self, ignored_layers: Sequence[str]) -> Self:
        """Return the configuration to write beside the tensors: kept layers have 16 bits in ``extra_config``."""
        kept = {"bits": UNQUANTIZED_BITS, "act_bits": UNQUANTIZED_BITS}
        extra = {name: kept for name in ignored_layers if self.is_in_blocks(name) and self._quantizes(name)}
        return replace(
            self,
            is_checkpoint_auto_round_serialized=True,
            ignored_layers=[],
            extra_config={**(self.extra_config or {}), **extra},
            packing_format=self._packing_format(),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what ``config.json`` holds: of a checkpoint, AutoRound's own keys."""
        if not self.is_serialized:
            return {**super().to_dict(), _SERIALIZED: False}
        values: dict[str, Any] = {
            **{key: getattr(self, key) for key in _SCHEME_KEYS},
            "packing_format": self._packing_format(),
            "block_name_to_quantize": self.block_name_to_quantize and ",".join(self.block_name_to_quantize),
            "extra_config": self.extra_config,
            "modules_to_not_convert": self.ignored_layers,
        }
        return {
            "quant_method": self.get_name(),
            **{key: value for key, value in values.items() if value not in (None, [])},
        }


_SCHEME_KEYS = tuple(item.name for item in fields(Scheme))


def _block_names(names: Any) -> list[str] | None:
    """Return names from a string with commas, a list of names, or lists of them."""
    if names is None:
        return None
    listed = [part.strip() for part in names.split(",") if part.strip()] if isinstance(names, str) else names
    if not isinstance(listed, list | tuple):
        raise ConfigError(f"block_name_to_quantize must be names of blocks, not {names!r}")
    flat = [name for part in listed for name in (part if isinstance(part, list) else [part])]
    if not _are_names(flat):
        raise ConfigError(f"block_name_to_quantize must be names of blocks, not {names!r}")
    return flat


def _are_names(names: Sequence[Any]) -> bool:
    return all(isinstance(name, str) for name in names)


def _checked_extra(extra: Any) -> dict[str, dict[str, Any]] | None:
    """Return ``extra_config``; raises ``ConfigError`` when it does not map names or expressions to keys."""
    if not extra:
        return None
    if not isinstance(extra, Mapping) or not (
        _are_names(list(extra)) and all(isinstance(keys, Mapping) for keys in extra.values())
    ):
        raise ConfigError(f"extra_config must map layers to their keys, such as {{'bits': 16}}, not {extra!r:.200}")
    check_expressions("extra_config", extra)
    return {name: dict(keys) for name, keys in extra.items()}
