"""Deciding what is lowbit's among the quantization configurations that pass through diffusers and transformers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, replace
from types import ModuleType
from typing import Any

from lowbit.compat.parts.overrides import override
from lowbit.errors import ConfigError
from lowbit.quantization.base import QuantizationConfig
from lowbit.quantization.factory import (
    ON_REGISTRATION,
    SUPPORTED_QUANTIZATION_METHODS,
    build_quant_config,
    canonical_name,
    config_class,
)

logger = logging.getLogger(__name__)


def connect(auto: ModuleType, from_dict_owner: type, factory: type, quantizer: type) -> None:
    """Teach a library's ``quantizers.auto`` module to hand lowbit's configurations to lowbit's quantizer.

    Methods the library has no quantizer for get an entry in its tables. What it decides by a method's name alone
    (``"fp8"`` is also a name of transformers') is decided by ``claims`` first.

    Args:
        auto: the module, with ``AUTO_QUANTIZER_MAPPING`` and ``AUTO_QUANTIZATION_CONFIG_MAPPING``.
        from_dict_owner: its class with ``from_dict``.
        factory: its class with ``from_config`` and ``merge_quantization_configs``.
        quantizer: lowbit's for this library.
    """
    configs, quantizers = auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING
    theirs = frozenset(name for name, kind in configs.items() if not issubclass(kind, QuantizationConfig))

    def add(method: str, kind: type[QuantizationConfig]) -> None:
        # A pipeline's configuration takes only classes of the table, so those of a name in use get another.
        name = f"lowbit-{method}" if method in theirs else method
        configs[name], quantizers[name] = kind, quantizer

    for method in SUPPORTED_QUANTIZATION_METHODS:
        try:
            add(method, config_class(method))
        except ConfigError as error:  # of another package; this library must stay importable
            logger.warning("%s", error)
    ON_REGISTRATION[auto.__name__] = add

    def from_dict(original: Callable[..., Any], config: Any, *args: Any, **kwargs: Any) -> Any:
        return _build(config) if claims(config, theirs) else original(config, *args, **kwargs)

    def from_config(original: Callable[..., Any], quantization_config: Any, **kwargs: Any) -> Any:
        if not claims(quantization_config, theirs):
            return original(quantization_config, **kwargs)
        return quantizer(_build(quantization_config), **kwargs)

    def merge(
        original: Callable[..., Any], quantization_config: Any, quantization_config_from_args: Any, **kwargs: Any
    ) -> Any:
        stored, requested = quantization_config, quantization_config_from_args
        if not claims(stored, theirs) and not isinstance(requested, QuantizationConfig):
            return original(stored, requested, **kwargs)
        return merge_configs(stored, requested)

    override(from_dict_owner, "from_dict", from_dict)
    override(factory, "from_config", from_config)
    override(factory, "merge_quantization_configs", merge)


def claims(config: object, theirs: Collection[str] = ()) -> bool:
    """Tell whether a configuration, or the dictionary of one, is lowbit's.

    A dictionary whose method the library has too is lowbit's only if the method's configuration claims it.

    Args:
        config: what a checkpoint or a user gives.
        theirs: methods that the library has a quantizer of its own for.
    """
    if isinstance(config, QuantizationConfig):
        return True
    if not isinstance(config, Mapping):
        return False
    method = canonical_name(method_of(config))
    if method is None:
        return False
    return method not in theirs or config_class(method).claims(config)


def method_of(config: object) -> str:
    """Return the name of the method of any configuration or dictionary; ``"unknown"`` when it names none."""
    if isinstance(config, Mapping):
        method = config.get("quant_method") or config.get("method")
    else:
        method = getattr(config, "quant_method", None)
    return str(getattr(method, "value", method) or "unknown")


def merge_configs(stored: object, requested: object | None) -> QuantizationConfig:
    """Return the configuration to load a checkpoint with that has one already.

    Args:
        stored: the checkpoint's, a dictionary or a configuration.
        requested: the user's, or ``None``.

    Returns:
        The checkpoint's, with the options of the user's that say how to run (``kernel``).

    Raises:
        ConfigError: the user asks for another method, or for options that the checkpoint was not written with.
    """
    names = [method_of(config) for config in (stored, requested) if config is not None]
    if len({canonical_name(name) or name for name in names}) > 1:
        raise ConfigError(
            f"The checkpoint is already quantized with {method_of(stored)!r} and can't be quantized again with"
            f" {method_of(requested)!r}: load it without a quantization configuration, or start from an unquantized"
            " checkpoint"
        )
    found = _build(stored)
    if not isinstance(requested, QuantizationConfig):
        return found
    _refuse_other_options(found, requested)
    return replace(found, **{name: getattr(requested, name) for name in found.runtime_options})


def _refuse_other_options(found: QuantizationConfig, requested: QuantizationConfig) -> None:
    defaults = type(requested)()
    for item in fields(requested):
        asked, stored = getattr(requested, item.name), getattr(found, item.name)
        if item.name in found.runtime_options or asked in (stored, getattr(defaults, item.name)):
            continue
        if item.name == "ignored_layers":
            logger.warning("The checkpoint is already quantized: ignored_layers %s can't change which layers", asked)
        elif not isinstance(asked, bool):
            raise ConfigError(
                f"The checkpoint is already quantized with {found.get_name()!r} and {item.name}={stored!r}; it can't"
                f" be loaded with {item.name}={asked!r}"
            )


def _build(config: Any) -> QuantizationConfig:
    built = build_quant_config(config)
    assert isinstance(built, QuantizationConfig)
    return built
