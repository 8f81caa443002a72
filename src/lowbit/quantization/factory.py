"""From what a user writes to a configuration."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from lowbit.errors import ConfigError
from lowbit.quantization.base import QuantizationConfig
from lowbit.quantization.component import ComponentQuantizationConfig

# Method -> (module, configuration class), imported when asked for.
_METHODS: dict[str, tuple[str, str]] = {
    "int8": ("lowbit.quantization.int8", "Int8Config"),
    "fp8": ("lowbit.quantization.fp8", "Fp8Config"),
    "gguf": ("lowbit.quantization.gguf", "GgufConfig"),
    "mxfp8": ("lowbit.quantization.mxfp8", "Mxfp8Config"),
    "mxfp4": ("lowbit.quantization.mxfp4", "Mxfp4Config"),
    "mxfp4_dualscale": ("lowbit.quantization.mxfp4", "Mxfp4DualScaleConfig"),
    "nvfp4": ("lowbit.quantization.nvfp4", "NvFp4Config"),
    "modelopt": ("lowbit.quantization.modelopt", "ModelOptConfig"),
    "auto-round": ("lowbit.quantization.auto_round", "AutoRoundConfig"),
    "ascend": ("lowbit.quantization.ascend", "AscendConfig"),
}
# Other names of methods.
_ALIASES = {"inc": "auto-round"}

SUPPORTED_QUANTIZATION_METHODS: tuple[str, ...] = tuple(_METHODS)

AnyQuantizationConfig = QuantizationConfig | ComponentQuantizationConfig
QuantizationSpec = str | Mapping[str, Any] | AnyQuantizationConfig | None

_METHOD_KEYS = ("method", "quant_method")


def canonical_name(method: str) -> str | None:
    """Return the name of a method as it is listed; case and ``-`` or ``_`` do not matter. ``None`` for others."""
    wanted = _normalize(method)
    wanted = _ALIASES.get(wanted, wanted)
    return next((name for name in SUPPORTED_QUANTIZATION_METHODS if _normalize(name) == wanted), None)


def config_class(method: str) -> type[QuantizationConfig]:
    """Return the configuration class of a method; case and ``-`` or ``_`` do not matter.

    Raises:
        ConfigError: there is no such method; lists those there are.
    """
    known = canonical_name(method)
    if known is None:
        supported = ", ".join(SUPPORTED_QUANTIZATION_METHODS)
        raise ConfigError(f"Unknown quantization method: {method!r}. Supported methods: {supported}")
    module, name = _METHODS[known]
    found: type[QuantizationConfig] = getattr(importlib.import_module(module), name)
    return found


def build_quant_config(spec: QuantizationSpec, **kwargs: Any) -> AnyQuantizationConfig | None:
    """Turn what a user writes into a configuration.

    Args:
        spec: one of

            * ``None`` or ``"none"``: no quantization
            * a method's name: ``"int8"``
            * a dictionary with ``method`` (or ``quant_method``) and its options
            * a dictionary from components to any of these: ``{"transformer": "fp8", "vae": None, "default": "int8"}``
            * a configuration, returned as it is
        kwargs: further options of the method.

    Returns:
        The configuration, or ``None`` for no quantization. ``spec`` is never changed.

    Raises:
        ConfigError: an unknown method or option, options that contradict each other, or a dictionary that is neither.
    """
    if spec is None or (isinstance(spec, str) and _normalize(spec) == "none"):
        _refuse_options(kwargs, "no quantization")
        return None
    if isinstance(spec, QuantizationConfig | ComponentQuantizationConfig):
        _refuse_options(kwargs, "a configuration object")
        return spec
    if isinstance(spec, str):
        return config_class(spec).from_config(kwargs)
    if not isinstance(spec, Mapping):
        raise ConfigError(
            f"A quantization configuration is a method's name, a dictionary or a configuration, not {spec!r}"
        )
    if any(key in spec for key in _METHOD_KEYS):
        return _from_method_dict(spec, kwargs)
    _refuse_options(kwargs, "a dictionary of components")
    return _from_component_dict(spec)


def _from_method_dict(spec: Mapping[str, Any], kwargs: Mapping[str, Any]) -> QuantizationConfig | None:
    names = {spec[key] for key in _METHOD_KEYS if isinstance(spec.get(key), str)}
    if any(key in spec and spec[key] is not None and not isinstance(spec[key], str) for key in _METHOD_KEYS):
        raise ConfigError(f"The quantization method must be a name: {dict(spec)}")
    if len({canonical_name(name) or _normalize(name) for name in names}) > 1:
        raise ConfigError(f"'method' and 'quant_method' contradict each other: {dict(spec)}")
    method = next(iter(names), "none")
    if _normalize(method) == "none":
        _refuse_options({k: v for k, v in {**spec, **kwargs}.items() if k not in _METHOD_KEYS}, "no quantization")
        return None
    twice = [key for key in kwargs if key in spec and spec[key] != kwargs[key]]
    if twice:
        raise ConfigError(f"Options given twice with different values: {', '.join(twice)}")
    return config_class(method).from_config({**spec, **kwargs})


def _from_component_dict(spec: Mapping[str, Any]) -> ComponentQuantizationConfig:
    if not spec or not all(_is_component_value(value) for value in spec.values()):
        raise ConfigError(
            "A quantization dictionary must have a 'method' key, or map components to methods or configurations"
            f" (methods: {', '.join(SUPPORTED_QUANTIZATION_METHODS)}); got {dict(spec)}"
        )
    configs: dict[str, QuantizationConfig | None] = {}
    for name, value in spec.items():
        config = build_quant_config(value)
        if isinstance(config, ComponentQuantizationConfig):
            raise ConfigError(f"Component {name!r} can't itself be a dictionary of components: {value}")
        configs[name] = config
    default = configs.pop("default", None)
    return ComponentQuantizationConfig(component_configs=configs, default_config=default)


def _is_component_value(value: Any) -> bool:
    if isinstance(value, str):
        return _normalize(value) == "none" or canonical_name(value) is not None
    if isinstance(value, Mapping):
        return any(key in value for key in _METHOD_KEYS)
    return value is None or isinstance(value, QuantizationConfig)


def _refuse_options(options: Mapping[str, Any], what: str) -> None:
    if options:
        raise ConfigError(f"Options {', '.join(options)} can't be given with {what}")


def _normalize(name: str) -> str:
    return name.strip().lower().replace("_", "-")
