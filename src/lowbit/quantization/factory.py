"""From what a user writes to a configuration."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

from lowbit.errors import ConfigError, expected_one_of
from lowbit.quantization.backends import BACKENDS, BackendConfig
from lowbit.quantization.base import QuantizationConfig
from lowbit.quantization.component import ComponentQuantizationConfig

logger = logging.getLogger(__name__)

# Method -> (module, configuration class), imported when asked for; or the class, of a method added while running.
_METHODS: dict[str, tuple[str, str] | type[QuantizationConfig]] = {
    "int8": ("lowbit.quantization.methods.int8", "Int8Config"),
    "fp8": ("lowbit.quantization.methods.fp8", "Fp8Config"),
    "gguf": ("lowbit.quantization.methods.gguf", "GgufConfig"),
    "mxfp8": ("lowbit.quantization.methods.mxfp8", "Mxfp8Config"),
    "mxfp4": ("lowbit.quantization.methods.mxfp4", "Mxfp4Config"),
    "mxfp4_dualscale": ("lowbit.quantization.methods.mxfp4", "Mxfp4DualScaleConfig"),
    "nvfp4": ("lowbit.quantization.methods.nvfp4", "NvFp4Config"),
    "svdquant": ("lowbit.quantization.methods.svdquant", "SvdQuantConfig"),
    "comfyui": ("lowbit.quantization.methods.comfyui", "ComfyUiConfig"),
    "modelopt": ("lowbit.quantization.methods.modelopt", "ModelOptConfig"),
    "auto-round": ("lowbit.quantization.methods.auto_round", "AutoRoundConfig"),
    "ascend": ("lowbit.quantization.methods.ascend", "AscendConfig"),
    "compressed-tensors": ("lowbit.quantization.methods.compressed_tensors", "CompressedTensorsConfig"),
}
# Other names of methods.
_ALIASES = {"inc": "auto-round"}

# Grows when a method is registered.
SUPPORTED_QUANTIZATION_METHODS: list[str] = list(_METHODS)

# Installed packages name their methods here: ``method = "module:ConfigurationClass"``.
ENTRY_POINTS = "lowbit.quantization_methods"

# Called with each method's name and class that is registered, by the name of whoever wants to know.
ON_REGISTRATION: dict[str, Callable[[str, type[QuantizationConfig]], None]] = {}

AnyQuantizationConfig = QuantizationConfig | BackendConfig | ComponentQuantizationConfig
QuantizationSpec = str | Mapping[str, Any] | AnyQuantizationConfig | None

_METHOD_KEYS = ("method", "quant_method")


def canonical_name(method: str) -> str | None:
    """Return the name of a method as it is listed; case and ``-`` or ``_`` do not matter. ``None`` for others."""
    return _listed(_ALIASES.get(_normalize(method), method), SUPPORTED_QUANTIZATION_METHODS)


def _listed(name: str, names: Sequence[str]) -> str | None:
    return next((listed for listed in names if _normalize(listed) == _normalize(name)), None)


def config_class(method: str) -> type[QuantizationConfig]:
    """Return the configuration class of a method; case and ``-`` or ``_`` do not matter.

    Raises:
        ConfigError: there is no such method; lists those there are.
    """
    known = canonical_name(method)
    if known is None:
        supported = expected_one_of([*SUPPORTED_QUANTIZATION_METHODS, *BACKENDS])
        raise ConfigError(f"Unknown quantization method: {method!r}. {supported}")
    entry = _METHODS[known]
    if isinstance(entry, type):
        return entry
    module, name = entry
    try:
        found: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"Quantization method {known!r}: can't import {module}:{name} ({error})") from error
    _check_config_class(known, found)
    _METHODS[known] = found
    return found  # type: ignore[no-any-return]


def register_quantization_method(name: str, config_class: type[QuantizationConfig]) -> None:
    """Add a method that another package brings, for everything that takes a method's name or reads checkpoints.

    The command line starts without that package; for it, and for checkpoints in a fresh process, the package names the
    class in its entry points ``lowbit.quantization_methods`` instead of calling this.

    Args:
        name: of the method, as ``config_class.get_name()`` returns it.
        config_class: its configuration, whose ``linear_method()`` says what becomes of a linear layer.

    Raises:
        ConfigError: the name is in use, or the class is no ``QuantizationConfig`` that can be made.
    """
    _check_name(name)
    _check_config_class(name, config_class)
    _add(name, config_class)
    for inform in ON_REGISTRATION.values():
        inform(name, config_class)


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not name.strip() or _normalize(name) in ("none", "component"):
        raise ConfigError(f"{name!r} can't be the name of a quantization method")
    known = canonical_name(name) or _listed(name, BACKENDS)
    if known is not None:
        raise ConfigError(f"There is a quantization method {known!r} already: choose another name than {name!r}")


def _check_config_class(name: str, config_class: object) -> None:
    if not (isinstance(config_class, type) and issubclass(config_class, QuantizationConfig)):
        raise ConfigError(f"Quantization method {name!r} needs a class derived from QuantizationConfig: {config_class}")
    if inspect.isabstract(config_class):
        missing = ", ".join(sorted(config_class.__abstractmethods__))
        raise ConfigError(f"Quantization method {name!r}: {config_class.__name__} does not define {missing}")
    if config_class.get_name() != name:
        raise ConfigError(
            f"Quantization method {name!r}: get_name() of {config_class.__name__} returns {config_class.get_name()!r};"
            " checkpoints would name a method that does not exist"
        )


def _add(name: str, entry: tuple[str, str] | type[QuantizationConfig]) -> None:
    _METHODS[name] = entry
    SUPPORTED_QUANTIZATION_METHODS.append(name)


def _add_installed() -> None:
    """Add the methods that installed packages name; their modules are imported when asked for."""
    for point in entry_points(group=ENTRY_POINTS):
        try:
            _check_name(point.name)
        except ConfigError as error:
            logger.warning("Not added: entry point %s of %s: %s", point.name, point.value, error)
        else:
            _add(point.name, (point.module, point.attr))


def build_quant_config(spec: QuantizationSpec, **kwargs: Any) -> AnyQuantizationConfig | None:
    """Turn what a user writes into a configuration.

    Args:
        spec: one of

            * ``None`` or ``"none"``: no quantization
            * a method's name: ``"int8"``, or that of another library's backend: ``"torchao"``
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
    if isinstance(spec, QuantizationConfig | BackendConfig | ComponentQuantizationConfig):
        _refuse_options(kwargs, "a configuration object")
        return spec
    if isinstance(spec, str):
        return _from_options(spec, kwargs)
    if not isinstance(spec, Mapping):
        raise ConfigError(
            f"A quantization configuration is a method's name, a dictionary or a configuration, not {spec!r}"
        )
    if any(key in spec for key in _METHOD_KEYS):
        return _from_method_dict(spec, kwargs)
    _refuse_options(kwargs, "a dictionary of components")
    return _from_component_dict(spec)


def _from_method_dict(spec: Mapping[str, Any], kwargs: Mapping[str, Any]) -> QuantizationConfig | BackendConfig | None:
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
    return _from_options(method, {**spec, **kwargs})


def _from_options(method: str, options: Mapping[str, Any]) -> QuantizationConfig | BackendConfig:
    backend = _listed(method, BACKENDS)
    return config_class(method).from_config(options) if backend is None else BackendConfig.from_config(backend, options)


def _from_component_dict(spec: Mapping[str, Any]) -> ComponentQuantizationConfig:
    if not spec or not all(_is_component_value(value) for value in spec.values()):
        raise ConfigError(
            "A quantization dictionary must have a 'method' key, or map components to methods or configurations"
            f" (methods: {', '.join([*SUPPORTED_QUANTIZATION_METHODS, *BACKENDS])}); got {dict(spec)}"
        )
    configs: dict[str, QuantizationConfig | BackendConfig | None] = {}
    for name, value in spec.items():
        config = build_quant_config(value)
        if isinstance(config, ComponentQuantizationConfig):
            raise ConfigError(f"Component {name!r} can't itself be a dictionary of components: {value}")
        configs[name] = config
    default = configs.pop("default", None)
    return ComponentQuantizationConfig(component_configs=configs, default_config=default)


def _is_component_value(value: Any) -> bool:
    if isinstance(value, str):
        return canonical_name(value) is not None or _listed(value, ["none", *BACKENDS]) is not None
    if isinstance(value, Mapping):
        return any(key in value for key in _METHOD_KEYS)
    return value is None or isinstance(value, QuantizationConfig | BackendConfig)


def _refuse_options(options: Mapping[str, Any], what: str) -> None:
    if options:
        raise ConfigError(f"Options {', '.join(options)} can't be given with {what}")


def _normalize(name: str) -> str:
    return name.strip().lower().replace("_", "-")


_add_installed()
