"""``quantization_config`` of compressed-tensors: which layers are in which scheme."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from lowbit.errors import ConfigError, UnsupportedError, expected_one_of
from lowbit.models.expressions import check_expressions, expression_matches
from lowbit.quantization.base import LinearMethod, QuantizationConfig
from lowbit.quantization.methods.compressed_tensors.presets import PRESETS
from lowbit.quantization.methods.compressed_tensors.scheme import KINDS, MIXED, NAME, Scheme

if TYPE_CHECKING:
    from typing_extensions import Self

_SERIALIZED = "is_checkpoint_compressed_tensors_serialized"
# Keys that tell how a checkpoint came to be.
_UNREAD = ("version", "global_compression_ratio", "packed_modules_mapping", "quantization_status")
# Keys of things that lowbit does not compute, and what they are where nothing is asked for.
_UNSUPPORTED: Mapping[str, str] = {
    "kv_cache_scheme": "a quantized cache of keys and values",
    "sparsity_config": "sparse weights",
    "transform_config": "transformed weights and activations",
    "moe_sparsity_config": "sparse experts",
}
_AT_REST: tuple[Any, ...] = (None, {}, [], "")


@dataclass(frozen=True, kw_only=True)
class CompressedTensorsConfig(QuantizationConfig):
    """Configuration of ``compressed-tensors``.

    Attributes:
        scheme: a preset of llm-compressor's to quantize with.
        config_groups: of a checkpoint: name -> targets, weights, input_activations, format.
        ignore: of a checkpoint: layers that no group is for: names, ``re:`` patterns matched from the start, classes.
        format: of a checkpoint, of all groups that name none.
        name_prefix: of the checkpoint's names, which a model's names lack.
        is_checkpoint_compressed_tensors_serialized: the checkpoint's weights are quantized already.
    """

    scheme: str = "W4A16"
    config_groups: dict[str, Any] | None = None
    ignore: list[str] | None = None
    format: str | None = None
    name_prefix: str = ""
    is_checkpoint_compressed_tensors_serialized: bool = False

    runtime_options: ClassVar[frozenset[str]] = frozenset({"kernel", "name_prefix"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if str(self.scheme).upper() not in PRESETS:
            raise ConfigError(f"{NAME}: no scheme {self.scheme!r} to quantize with. {expected_one_of(PRESETS)}")
        object.__setattr__(self, "scheme", str(self.scheme).upper())
        check_expressions("ignore", [name.removeprefix("re:") for name in _names("ignore", self.ignore)])
        if not isinstance(self.format, str | None):
            raise ConfigError(f"{NAME}: format must be a name, not {self.format!r:.100}")
        _ = self._schemes

    @cached_property
    def _schemes(self) -> Mapping[str, tuple[str, Scheme | None]]:
        """Target -> group's name and scheme; of a target named twice the last, as in the package."""
        found: dict[str, tuple[str, Scheme | None]] = {}
        groups = self.config_groups if self.config_groups is not None else self._preset_groups()
        if not isinstance(groups, Mapping):
            raise ConfigError(f"{NAME}: config_groups must map names to groups, not {groups!r:.200}")
        for name, group in groups.items():
            whole = {"targets": group, **_preset(name)} if isinstance(group, list) else group
            if not isinstance(whole, Mapping):
                raise ConfigError(f"{NAME}: config_groups.{name} must be a dictionary, not {group!r:.200}")
            targets = _names(f"config_groups.{name}.targets", whole.get("targets"))
            check_expressions(f"config_groups.{name}.targets", [t.removeprefix("re:") for t in targets])
            found.update(dict.fromkeys(targets, (name, Scheme.read(name, whole, self.format))))
        return found

    def _preset_groups(self) -> dict[str, Any]:
        return {"group_0": {"targets": ["Linear"], **_preset(self.scheme)}}

    @classmethod
    def get_name(cls) -> str:
        """Return ``"compressed-tensors"``."""
        return NAME

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        """Take every checkpoint's dictionary: transformers needs the package of that name to read it."""
        return True

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build from a dictionary, such as a checkpoint's ``quantization_config``.

        Raises:
            ConfigError: keys that do not exist, or weights that were not compressed.
            UnsupportedError: what lowbit does not compute.
        """
        if "config_groups" not in config:
            return super().from_config(config)
        for key, what in _UNSUPPORTED.items():
            value = config.get(key)
            if value not in _AT_REST and not (isinstance(value, Mapping) and value.get("format") == "dense"):
                raise UnsupportedError(f"{NAME}: {key}: {what} are not supported: {value!r:.200}")
        status = config.get("quantization_status", "compressed")
        if status != "compressed" or config.get("format") in ("dense", "fakequant"):
            raise ConfigError(
                f"{NAME}: quantization_status {status!r}, format {config.get('format')!r}: the weights are not"
                " compressed. Save the checkpoint with save_compressed=True"
            )
        passed_over = {*_UNREAD, *_UNSUPPORTED}
        options = {key: value for key, value in config.items() if key not in passed_over and value is not None}
        return super().from_config({**options, _SERIALIZED: True})

    @property
    def is_serialized(self) -> bool:
        """Whether the checkpoint's weights are quantized already."""
        return self.is_checkpoint_compressed_tensors_serialized

    def linear_method(self) -> LinearMethod:
        """Return the method of ``scheme``, or of the first group."""
        name, scheme = next((entry for entry in self._schemes.values() if entry[1] is not None), ("", None))
        if scheme is None:
            raise ConfigError(f"{NAME}: config_groups quantizes no weights")
        return scheme.method(name, self.kernel, self.is_serialized)

    def scheme_of(self, layer: torch.nn.Module, name: str) -> tuple[str, Scheme | None]:
        """Return the group of a layer and its scheme; names go before patterns, patterns before classes."""
        full = f"{self.name_prefix}{name}"
        classes = {kind.__name__ for kind in type(layer).__mro__}
        if any(_is_named(full, each) or each in classes for each in self.ignore or ()):
            return "", None
        found = next(self._matching(full, classes), None)
        return ("", None) if found is None else self._schemes[found]

    def _matching(self, full: str, classes: set[str]) -> Iterator[str]:
        targets = sorted(self._schemes, key=lambda target: ("re:" in target, target))
        yield from (target for target in targets if _is_named(full, target))
        yield from (target for target in targets if target in classes)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> LinearMethod | None:
        """Return what to do with ``layer``; ``None`` for layers that no group is for.

        Raises:
            UnsupportedError: a checkpoint's layer has a shape that can't be read.
        """
        if not isinstance(layer, torch.nn.Linear) or self.is_ignored(prefix):
            return None
        name, scheme = self.scheme_of(layer, prefix)
        method = None if scheme is None else scheme.method(name, self.kernel, self.is_serialized)
        refusal = method.refusal(layer) if method is not None and self.is_serialized else None
        if refusal:
            raise UnsupportedError(f"{NAME}: {prefix} can't be read: {refusal}")
        return method

    def kept_reason(self, name: str) -> str:
        """Return why a layer is left as it is."""
        return "ignored_layers" if self.is_ignored(name) else "in no group of the checkpoint"

    def without_prefix(self, prefix: str) -> Self:
        """Return the configuration for a model whose names lack ``prefix``."""
        return replace(super().without_prefix(prefix), name_prefix=f"{self.name_prefix}{prefix}")

    def as_serialized(self, ignored_layers: Sequence[str]) -> Self:
        """Return the configuration to write beside the tensors: kept layers are in ``ignore``."""
        if self.config_groups is not None:
            return replace(self, is_checkpoint_compressed_tensors_serialized=True)
        groups = self._preset_groups()
        kind = KINDS[next(scheme.kind(name) for name, scheme in self._schemes.values() if scheme is not None)]
        return replace(
            self,
            is_checkpoint_compressed_tensors_serialized=True,
            config_groups=groups,
            format=kind.formats[0],
            ignore=list(ignored_layers),
            ignored_layers=[],
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what ``config.json`` holds: of a checkpoint, the package's own keys."""
        if not self.is_serialized:
            return {**super().to_dict(), "scheme": self.scheme}
        return {
            "quant_method": NAME,
            "quantization_status": "compressed",
            "format": self.format or MIXED,
            "config_groups": self.config_groups,
            "ignore": self.ignore or [],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }


def _preset(name: str) -> dict[str, Any]:
    found = PRESETS.get(name.upper())
    if found is None:
        raise UnsupportedError(f"{NAME}: config_groups.{name} is no preset lowbit reads", [expected_one_of(PRESETS)])
    return dict(found)


def _names(option: str, given: Any) -> list[str]:
    names = [] if given is None else given
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{NAME}: {option} must be a list of names, not {given!r:.200}")
    return list(names)


def _is_named(name: str, target: str) -> bool:
    if target.startswith("re:"):
        return expression_matches(target.removeprefix("re:"), name, anywhere=False)
    return name == target
