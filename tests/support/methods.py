"""Methods that a test registers, taken out again."""

from __future__ import annotations

from diffusers.quantizers import auto as diffusers_auto
from transformers.quantizers import auto as transformers_auto

from lowbit.quantization import SUPPORTED_QUANTIZATION_METHODS, factory


def forget_method(name: str) -> None:
    """Undo ``register_quantization_method``: other tests look at every method there is."""
    del factory._METHODS[name]
    SUPPORTED_QUANTIZATION_METHODS.remove(name)
    for auto in (diffusers_auto, transformers_auto):
        del auto.AUTO_QUANTIZATION_CONFIG_MAPPING[name], auto.AUTO_QUANTIZER_MAPPING[name]
