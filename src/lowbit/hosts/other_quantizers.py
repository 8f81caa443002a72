"""Other libraries' quantization behind lowbit's options.

Here are their configurations for diffusers and transformers, and after loading a record of what they did. The libraries
do the work, each by its own rules of which layers it takes; lowbit names them the layers it would keep.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowbit.checkpoints.skeleton import empty_component
from lowbit.errors import ConfigError, UnsupportedError, expected_one_of
from lowbit.models import kept_layers
from lowbit.models.patterns import matches_any
from lowbit.quantization.backends import BackendConfig
from lowbit.quantization.manifest import LayerRecord, Manifest
from lowbit.quantization.plan import check_patterns

logger = logging.getLogger(__name__)

IGNORED = "ignored_layers"


@dataclass(frozen=True)
class Backend:
    """Another library.

    Attributes:
        module: to import.
        build: (name of the library whose model it is, options, names to keep, names of all linear layers) -> the
            library's configuration.
    """

    module: str
    build: Callable[[str, Mapping[str, Any], Sequence[str], Sequence[str]], object]


@dataclass(frozen=True)
class Request:
    """What a library is asked to do to a component.

    Attributes:
        config: the user's.
        config_object: the library's, for ``PipelineQuantizationConfig``.
        kept: linear layer -> reason to keep it, empty for those to quantize.
    """

    config: BackendConfig
    config_object: Any
    kept: Mapping[str, str]


def route_of(library: str) -> str:
    """Return what the manifest shows in the place of a kernel, for a model of ``library``."""
    return f"through {library}"


def is_installed(backend: str) -> bool:
    """Tell whether the library of a backend can be imported."""
    module = _BACKENDS[backend].module
    top = module.split(".", maxsplit=1)[0]
    return importlib.util.find_spec(top) is not None and importlib.util.find_spec(module) is not None


def prepare(
    source: str, components: Mapping[str, tuple[str, str]], configs: Mapping[str, BackendConfig]
) -> dict[str, Request]:
    """Return what to ask of the libraries, by component.

    Args:
        source: the pipeline's folder or Hub id.
        components: component -> (library, class).
        configs: component -> configuration.

    Raises:
        UnsupportedError: the library is not installed (says what to install), or can't run here.
        ConfigError: an option that the library does not have, or patterns that match nothing.
    """
    requests = {}
    for name, config in configs.items():
        if not is_installed(config.backend):
            raise UnsupportedError(
                f"{config.backend} is not installed: pip install 'lowbit[{config.backend}]'", [f"asked for by {name}"]
            )
        library, class_name = components[name]
        kept = kept_by_name(empty_component(source, name, library, class_name), config)
        names = [layer for layer, reason in kept.items() if reason]
        made = _BACKENDS[config.backend].build(library, config.options, names, list(kept))
        requests[name] = Request(config, made, kept)
    return requests


def kept_by_name(model: nn.Module, config: BackendConfig) -> dict[str, str]:
    """Return linear layer -> why it is to be kept, empty for those to quantize.

    Raises:
        ConfigError: patterns of ``ignored_layers`` that match nothing.
    """
    check_patterns(config.ignored_layers, (name for name, _ in model.named_modules() if name))
    reasons = {IGNORED: config.ignored_layers, **kept_layers(type(model).__name__)}

    def reason(name: str) -> str:
        return next((reason for reason, patterns in reasons.items() if matches_any(patterns, name)), "")

    return {name: reason(name) for name, layer in model.named_modules() if type(layer) is nn.Linear}


def record(pipeline: Any, requests: Mapping[str, Request]) -> None:
    """Leave a manifest on every component that another library quantized, now or before it was saved, and log it.

    Raises:
        ConfigError: a library that was asked quantized nothing, or quantized what ``ignored_layers`` names.
    """
    for name, model in pipeline.components.items():
        quantizer = getattr(model, "hf_quantizer", None)
        if not isinstance(model, nn.Module) or quantizer is None or hasattr(model, "lowbit_manifest"):
            continue
        request = requests.get(name)
        method = request.config.backend if request is not None else _method_of(quantizer)
        manifest = _manifest(model, name, method, request.kept if request is not None else {})
        if request is not None:
            _check(request, manifest)
        model.lowbit_manifest = manifest  # type: ignore[assignment]
        logger.info("%s", manifest.summary())


def _method_of(quantizer: Any) -> str:
    from lowbit.hosts.routing import method_of

    return method_of(quantizer.quantization_config)


def _check(request: Request, manifest: Manifest) -> None:
    backend = request.config.backend
    if not manifest.quantized:
        raise ConfigError(f"{backend} quantized no linear layer of {manifest.component}")
    unwanted = [layer.name for layer in manifest.quantized if request.kept.get(layer.name)]
    ignored = [name for name in unwanted if request.kept[name] == IGNORED]
    if ignored:
        raise ConfigError(f"{backend} can't keep {', '.join(ignored)} apart from others: ignore all layers called so")
    if unwanted:
        logger.warning("%s quantized layers that lowbit would keep: %s", backend, ", ".join(unwanted))


def _manifest(model: nn.Module, component: str, method: str, kept: Mapping[str, str]) -> Manifest:
    records, through = [], route_of(type(model).__module__.split(".", maxsplit=1)[0])
    for name, layer in model.named_modules():
        shape = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
        if None in shape or getattr(layer, "weight", None) is None:
            continue
        after = _weight_bytes(layer)
        before = int(shape[0] * shape[1]) * _dtype_of(model).itemsize  # type: ignore[operator]
        if is_plain(layer):
            records.append(LayerRecord(name, None, None, kept.get(name) or f"kept by {method}", after, after))
        else:
            records.append(LayerRecord(name, method, through, "", before, after))
    linear = {f"{record.name}." for record in records}
    others = [
        tensor
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if not any(name.startswith(prefix) for prefix in linear) or name.endswith(".bias")
    ]
    return Manifest(component, records, _bytes(others))


def _dtype_of(model: nn.Module) -> torch.dtype:
    plain = (each.dtype for each in model.parameters() if type(each) is nn.Parameter and each.is_floating_point())
    return next((dtype for dtype in plain if dtype.itemsize > 1), torch.bfloat16)


def is_plain(layer: nn.Module) -> bool:
    """Tell whether a layer still is a linear layer with an ordinary floating-point weight."""
    weight = layer.weight
    return (
        type(layer) is nn.Linear
        and type(weight) is nn.Parameter
        and type(weight.data) is torch.Tensor
        and weight.data.is_floating_point()
    )


def _weight_bytes(layer: nn.Module) -> int:
    tensors = [each for name, each in layer.state_dict().items() if name != "bias" and isinstance(each, torch.Tensor)]
    return _bytes(tensors)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    total = 0
    for tensor in tensors:
        if hasattr(tensor, "__tensor_flatten__"):
            names, _ = tensor.__tensor_flatten__()
            total += _bytes(getattr(tensor, name) for name in names)
        else:
            total += tensor.numel() * tensor.element_size()
    return total


# The libraries' configurations.


def _class(library: str, name: str) -> Any:
    return getattr(importlib.import_module(library), name)


def _known_options(backend: str, kind: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``options`` if ``kind`` takes them all by name; raises ``ConfigError`` otherwise."""
    parameters = inspect.signature(kind).parameters.values()
    known = [each.name for each in parameters if each.kind is not each.VAR_KEYWORD and each.name != "self"]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ConfigError(f"Unknown options for {backend}: {', '.join(unknown)}. {expected_one_of(known)}")
    return dict(options)


def _made(backend: str, kind: Callable[..., Any], **options: Any) -> object:
    try:
        return kind(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{backend}: {error}") from error


def _bitsandbytes(library: str, options: Mapping[str, Any], kept: Sequence[str], names: Sequence[str]) -> object:
    if library == "diffusers" and not torch.accelerator.is_available():
        raise UnsupportedError("bitsandbytes: diffusers runs it on GPUs only, and this machine has none")
    kind = _class(library, "BitsAndBytesConfig")
    known = _known_options("bitsandbytes", kind.__init__, options)
    if not (known.get("load_in_8bit") or known.get("load_in_4bit")):
        raise ConfigError("bitsandbytes needs load_in_8bit or load_in_4bit")
    return _made("bitsandbytes", kind, llm_int8_skip_modules=list(kept), **known)


def _torchao(library: str, options: Mapping[str, Any], kept: Sequence[str], names: Sequence[str]) -> object:
    arguments = dict(options)
    kind = _torchao_class(arguments.pop("quant_type", "Int8WeightOnlyConfig"))
    made = _made("torchao", kind, **_known_options(f"torchao's {kind.__name__}", kind, arguments))
    return _made("torchao", _class(library, "TorchAoConfig"), quant_type=made, modules_to_not_convert=list(kept))


def _torchao_class(name: object) -> Any:
    """Return a configuration of ``torchao.quantization`` by its name: ``Int8WeightOnly``, ``int8_weight_only``..."""
    import torchao.quantization
    from torchao.core.config import AOBaseConfig

    kinds = {
        key: kind
        for key, kind in vars(torchao.quantization).items()
        if isinstance(kind, type) and issubclass(kind, AOBaseConfig) and dataclasses.is_dataclass(kind)
    }

    def plain(text: str) -> str:
        return text.lower().replace("_", "").replace("-", "").removesuffix("config")

    found = [kind for key, kind in kinds.items() if isinstance(name, str) and plain(key) == plain(name)]
    if not found:
        raise ConfigError(f"torchao has no quant_type {name!r}. {expected_one_of(sorted(kinds))}")
    return found[0]


def _quanto(library: str, options: Mapping[str, Any], kept: Sequence[str], names: Sequence[str]) -> object:
    kind = _class(library, "QuantoConfig")
    if library == "transformers":
        renamed = {"weights" if name == "weights_dtype" else name: value for name, value in options.items()}
        known = _known_options("quanto", kind.__init__, renamed)
        return _made("quanto", kind, modules_to_not_convert=list(kept), **known)
    known = _known_options("quanto", kind.__init__, options)
    # diffusers compares the last part of a layer's name alone: it can keep all layers called so, or none.
    quantized = {name.rpartition(".")[2] for name in names if name not in set(kept)}
    last = sorted({name.rpartition(".")[2] for name in kept} - quantized)
    return _made("quanto", kind, modules_to_not_convert=last, **known)


def _sdnq(library: str, options: Mapping[str, Any], kept: Sequence[str], names: Sequence[str]) -> object:
    kind = _class("sdnq", "SDNQConfig")
    known = _known_options("sdnq", kind.__init__, options)
    # A leading dot makes it the beginning of a parameter's full name.
    return _made("sdnq", kind, modules_to_not_convert=[f".{name}." for name in kept], **known)


_BACKENDS: Mapping[str, Backend] = {
    "bitsandbytes": Backend("bitsandbytes", _bitsandbytes),
    "torchao": Backend("torchao", _torchao),
    "quanto": Backend("optimum.quanto", _quanto),
    "sdnq": Backend("sdnq", _sdnq),
}
