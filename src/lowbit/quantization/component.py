"""One configuration per component of a pipeline, or per stage of an omni model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lowbit.errors import ConfigError, expected_one_of
from lowbit.quantization.backends import BackendConfig
from lowbit.quantization.base import LinearMethod, QuantizationConfig


@dataclass(frozen=True)
class ComponentQuantizationConfig:
    """Routes each component to its configuration by the longest prefix of whole dotted names.

    Attributes:
        component_configs: component name -> configuration, ``None`` to leave it as it is.
        default_config: for components that are not named.
    """

    component_configs: Mapping[str, QuantizationConfig | BackendConfig | None] = field(default_factory=dict)
    default_config: QuantizationConfig | BackendConfig | None = None

    @classmethod
    def get_name(cls) -> str:
        """Return ``"component"``."""
        return "component"

    def resolve(self, prefix: str) -> QuantizationConfig | BackendConfig | None:
        """Return the configuration for a component or for a layer inside it.

        ``"transformer"`` takes ``transformer.blocks.0`` and not ``transformer_2``; the longest match wins.
        """
        parts = prefix.split(".")
        for length in range(len(parts), 0, -1):
            name = ".".join(parts[:length])
            if name in self.component_configs:
                return self.component_configs[name]
        return self.default_config

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> LinearMethod | None:
        """Return what to do with ``layer``, whose full name with its component is ``prefix``."""
        config = self.resolve(prefix)
        return None if config is None else config.get_quant_method(layer, prefix)

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary that ``build_quant_config`` turns into this configuration again."""
        named = {name: config and config.to_dict() for name, config in self.component_configs.items()}
        return {**named, "default": self.default_config and self.default_config.to_dict()}

    def check_components(self, components: Mapping[str, Any]) -> None:
        """Raise ``ConfigError`` when a component is named that the pipeline does not have."""
        unknown = [name for name in self.component_configs if name.split(".")[0] not in components]
        if unknown:
            raise ConfigError(
                f"The quantization configuration names components the pipeline lacks: {', '.join(unknown)}."
                f" {expected_one_of(components)}"
            )
