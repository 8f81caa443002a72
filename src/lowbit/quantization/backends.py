"""Methods of other libraries, which diffusers and transformers apply with quantizers of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lowbit.errors import ConfigError

# Named as diffusers' backends are; ``hosts.other_quantizers`` knows what becomes of their options.
BACKENDS: tuple[str, ...] = ("bitsandbytes", "torchao", "quanto", "sdnq")


@dataclass(frozen=True, kw_only=True)
class BackendConfig:
    """How another library is to quantize one component.

    Attributes:
        backend: its name, one of ``BACKENDS``.
        ignored_layers: patterns of layers to keep beyond those of the model's family.
        options: of the library's own configuration, checked against it when loading.
    """

    backend: str
    ignored_layers: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    # What a configuration of lowbit's own methods is asked too.
    needs_calibration = False
    weights_from = None

    @classmethod
    def from_config(cls, backend: str, config: Mapping[str, Any]) -> BackendConfig:
        """Build from a dictionary.

        Raises:
            ConfigError: options of lowbit's methods, or ``ignored_layers`` that is no list of names.
        """
        options = {name: value for name, value in config.items() if name not in ("method", "quant_method")}
        ignored = options.pop("ignored_layers", None) or options.pop("modules_to_not_convert", None) or []
        if isinstance(ignored, str) or not all(isinstance(layer, str) for layer in ignored):
            raise ConfigError(f"ignored_layers must be a list of layer names or patterns, not {ignored!r}")
        if "kernel" in options:
            raise ConfigError(f"{backend} computes with kernels of its own: leave out kernel")
        return cls(backend=backend, ignored_layers=tuple(ignored), options=options)

    def get_name(self) -> str:
        """Return the backend's name."""
        return self.backend

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary that ``build_quant_config`` turns into this configuration again."""
        ignored = {"ignored_layers": list(self.ignored_layers)} if self.ignored_layers else {}
        return {"method": self.backend, **ignored, **self.options}

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> None:
        """Return ``None``: no layer is lowbit's to quantize."""
        return
