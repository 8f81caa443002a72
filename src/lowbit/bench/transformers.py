"""Transformers to measure: published shapes with random weights, or real ones; and copies that share their weights."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.bench.inputs import Workload
from lowbit.checkpoints.skeleton import empty_component
from lowbit.engine.loading import read_components, resolve_model
from lowbit.errors import CheckpointError, ConfigError
from lowbit.models import is_diffusion_transformer
from lowbit.models.embedded import EMBEDDED_NAME, embedded_model
from lowbit.models.published import PUBLISHED, published_transformer

DEFAULT_SIZE = 512
DEFAULT_TEXT_TOKENS = 64
_WEIGHT_SCALE = 0.02
_NOISE_VALUES = (1 << 24) - 3  # repeated to fill large weights; odd, so that rows differ


@dataclass(frozen=True)
class Subject:
    """The transformer to measure.

    Attributes:
        name: as the user gave it.
        class_name: in diffusers.
        config: what its constructor takes, cut to the layers asked for.
        source: folder or Hub id that holds its weights; ``None``: random ones.
        component: its name in ``source``; empty where ``source`` is the transformer's own folder.
        published_layers: blocks of its main list as published, ``None`` where that isn't known.
        workload: what a step is to make of it.
    """

    name: str
    class_name: str
    config: dict[str, Any]
    source: str | None
    component: str
    published_layers: int | None
    workload: Workload

    def empty(self) -> nn.Module:
        """Return it on the meta device."""
        if self.source is not None and self.component:
            return empty_component(self.source, self.component, "diffusers", self.class_name)
        with torch.device("meta"):
            model: nn.Module = _class(self.class_name).from_config(self.config)
        return model

    def load(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """Return it with weights, for inference."""
        if self.source is None:
            return random_transformer(self.class_name, self.config, dtype, device)
        options = {"subfolder": self.component} if self.component else {}
        model: nn.Module = _class(self.class_name).from_pretrained(self.source, torch_dtype=dtype, **options)
        return model.to(device).eval().requires_grad_(False)


def find_subject(
    model: str | None,
    *,
    size: int | None = None,
    layers: int | None = None,
    batch: int = 1,
    num_frames: int | None = None,
) -> Subject:
    """Find the transformer that the user named.

    Args:
        model: a name of ``lowbit.models.published``, ``"embedded"`` or ``None``, a folder of a pipeline or of a
            transformer, or a Hub id.
        size: height and width in pixels; ``None``: 512, of the embedded model what it was trained for.
        layers: blocks of the main list; only of a published shape. ``None``: all.
        batch: pictures at once.
        num_frames: ``None``: as published.

    Raises:
        ConfigError: there is no such model; ``layers`` of a real model; a size or number the model can't have.
        CheckpointError: a folder that is not a model's.
    """
    published = published_transformer(model or EMBEDDED_NAME)
    frames = num_frames or (published.num_frames if published else 1)
    tokens = published.text_tokens if published else DEFAULT_TEXT_TOKENS
    side = size or (embedded_model().height if model in (None, EMBEDDED_NAME) else DEFAULT_SIZE)
    workload = Workload(height=side, width=side, text_tokens=tokens, batch=batch, num_frames=frames)
    if published:
        most = published.config[published.depth[0]]
        if layers is not None and not 1 <= layers <= most:
            raise ConfigError(f"{published.name} has 1 to {most} layers, not {layers}")
        config = published.with_layers(layers)
        return Subject(published.name, published.class_name, config, None, "", most, workload)
    if layers is not None:
        names = ", ".join(entry.name for entry in PUBLISHED)
        raise ConfigError(
            f"layers applies to the published shapes ({names}); {model or EMBEDDED_NAME} is measured whole"
        )
    return _real(model, workload)


def _real(model: str | None, workload: Workload) -> Subject:
    """Return the transformer of a folder or of the Hub."""
    name = model or EMBEDDED_NAME
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        config = json.loads((folder / "config.json").read_text())
        if "_class_name" not in config:
            raise CheckpointError(f"{folder / 'config.json'} names no _class_name: it is not a model of diffusers")
        return Subject(name, config["_class_name"], config, str(folder), "", None, workload)
    if not folder.exists() and "/" not in name and name != EMBEDDED_NAME:
        known = ", ".join([*(entry.name for entry in PUBLISHED), EMBEDDED_NAME])
        raise ConfigError(f"Unknown model: {name!r}. Give {known}, a folder, or a Hub id of the form owner/name")
    source = resolve_model(model)
    for component, entry in read_components(source).items():
        if is_diffusion_transformer(*entry):
            return Subject(name, entry[1], {}, source, component, None, workload)
    raise ConfigError(f"{name} has no diffusion transformer")


def _class(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name)


def random_transformer(class_name: str, config: dict[str, Any], dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Return a model of diffusers with random weights: normal with deviation 0.02, norms 1, biases 0.

    Nothing is made in a wider dtype first.
    """
    model = hollow_transformer(class_name, config)
    noise = random_noise(dtype)
    for module in model.modules():
        fill(module, noise, device)
    return model.to(device).eval().requires_grad_(False)


def random_noise(dtype: torch.dtype) -> torch.Tensor:
    """Return the values [N] that ``fill`` repeats: normal with deviation 0.02."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_NOISE_VALUES, generator=generator).mul_(_WEIGHT_SCALE).to(dtype)


def hollow_transformer(class_name: str, config: dict[str, Any]) -> nn.Module:
    """Return a model of diffusers whose parameters are on the meta device, everything else being real."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model: nn.Module = _class(class_name).from_config(config)
    return model


def fill(module: nn.Module, noise: torch.Tensor, device: torch.device) -> None:
    """Put values in place of the parameters of ``module`` itself that are on the meta device.

    Args:
        module: whose own parameters to fill: matrices with ``noise``, norms' weights with 1, biases with 0.
        noise: [N], in the dtype that the parameters are to have.
        device: where they are to be.
    """
    for name, parameter in module._parameters.items():
        if parameter is None or not parameter.is_meta:
            continue
        values = torch.empty(parameter.shape, dtype=noise.dtype, device=device)
        if parameter.ndim == 1:
            values.fill_(1.0 if name == "weight" else 0.0)
        else:
            _repeat(noise, values.view(-1))
        module._parameters[name] = nn.Parameter(values, requires_grad=False)


def _repeat(noise: torch.Tensor, target: torch.Tensor) -> None:
    for start in range(0, target.numel(), noise.numel()):
        part = target[start : start + noise.numel()]
        part.copy_(noise[: part.numel()])


def share(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a copy of the modules with the same tensors, so that layers of one can be replaced or compiled alone.

    Args:
        module: what to copy; unchanged, whatever is done to the copy's modules.
        dtype: what to convert floating parameters to; ``None``: they stay, and share their memory.
    """
    copied = module.__class__.__new__(module.__class__)
    copied.__dict__ = {name: copy.copy(v) if _is_own(name, v) else v for name, v in module.__dict__.items()}
    copied._parameters = {name: _same(parameter, dtype) for name, parameter in module._parameters.items()}
    copied._modules = {name: share(child, dtype) if child is not None else None for name, child in _children(module)}
    return copied


def _is_own(name: str, value: object) -> bool:
    """Whether each copy needs its own: tables, and diffusers' attention processors, which hold a chosen kernel."""
    return isinstance(value, dict) or name == "processor"


def _children(module: nn.Module) -> list[tuple[str, nn.Module | None]]:
    return list(module._modules.items())


def _same(parameter: nn.Parameter | None, dtype: torch.dtype | None) -> nn.Parameter | None:
    if type(parameter) is not nn.Parameter:
        return parameter  # a quantized tensor of some library, which stays what it is
    data = parameter.data
    wanted = dtype if dtype is not None and data.is_floating_point() else data.dtype
    return nn.Parameter(data.to(wanted), requires_grad=False)
