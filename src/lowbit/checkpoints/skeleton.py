"""A component's modules without its weights, to plan on."""

from __future__ import annotations

import importlib

import torch

from lowbit.errors import UnsupportedError


def empty_component(source: str, component: str, library: str, class_name: str) -> torch.nn.Module:
    """Build a component of a pipeline on the meta device from its configuration alone.

    Args:
        source: the pipeline's folder or Hub id.
        component: name in the pipeline.
        library: ``"diffusers"`` or ``"transformers"``.
        class_name: of the component.

    Raises:
        UnsupportedError: the class is of another library, or of none that is installed.
    """
    module = importlib.import_module(library) if library in _BUILDERS else None
    model_class = getattr(module, class_name, None)
    if model_class is None:
        raise UnsupportedError(f"{component}: no installed library has a model class {library}.{class_name}")
    with torch.device("meta"):
        return _BUILDERS[library](model_class, source, component)


def _diffusers_model(model_class: type, source: str, component: str) -> torch.nn.Module:
    config = model_class.load_config(source, subfolder=component)  # type: ignore[attr-defined]
    model: torch.nn.Module = model_class.from_config(config)  # type: ignore[attr-defined]
    return model


def _transformers_model(model_class: type, source: str, component: str) -> torch.nn.Module:
    config = model_class.config_class.from_pretrained(source, subfolder=component)  # type: ignore[attr-defined]
    model: torch.nn.Module = model_class(config)
    return model


_BUILDERS = {"diffusers": _diffusers_model, "transformers": _transformers_model}
