"""The names that transformers gives a checkpoint's tensors while it loads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Names:
    """From a checkpoint's names of tensors to a model's, as transformers renames them while it loads.

    Attributes:
        prefix: of the model's base model.
        expected: the model's state dict.
        renamings, converters: transformers' rules.
    """

    prefix: str
    expected: Mapping[str, torch.Tensor]
    renamings: Sequence[Any]
    converters: Sequence[Any]

    @classmethod
    def of(cls, model: Any, conversions: Sequence[Any] | None = None) -> Names:
        """Return the rules for ``model``: ``conversions``, or those that transformers has for its class."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        rules = get_model_conversion_mapping(model) if conversions is None else conversions
        renamings = [each for each in rules if isinstance(each, WeightRenaming)]
        converters = [each for each in rules if isinstance(each, WeightConverter)]
        return cls(model.base_model_prefix, model.state_dict(), renamings, converters)

    def __call__(self, stored: str) -> tuple[str, bool]:
        """Return the model's name, and whether transformers splits or merges the tensor on the way.

        Of a tensor that only a quantized layer has (``qweight``) the layer is found by its ``weight``.
        """
        name, is_converted = self._renamed(stored)
        if name in self.expected or is_converted:
            return name, is_converted
        layer, _, last = stored.rpartition(".")
        weight, _ = self._renamed(f"{layer}.weight")
        return (f"{weight.removesuffix('weight')}{last}", False) if weight in self.expected else (name, False)

    def _renamed(self, stored: str) -> tuple[str, bool]:
        from transformers.core_model_loading import rename_source_key

        name, converter = rename_source_key(stored, self.renamings, self.converters, self.prefix, self.expected)
        return name, converter is not None
