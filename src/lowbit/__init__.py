"""lowbit runs diffusion transformers in 8 bits and below."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lowbit.hosts import registration

__version__ = "0.1.0"

if TYPE_CHECKING:  # the table below says the same, to what imports them when they are used
    from lowbit.engine import Omni as Omni
    from lowbit.engine import OmniDiffusionConfig as OmniDiffusionConfig
    from lowbit.inputs.data import OmniDiffusionSamplingParams as OmniDiffusionSamplingParams
    from lowbit.outputs import OmniRequestOutput as OmniRequestOutput
    from lowbit.quantization import build_quant_config as build_quant_config
    from lowbit.quantization import quantize_model as quantize_model
    from lowbit.quantization import register_quantization_method as register_quantization_method

_PUBLIC = {
    "Omni": "lowbit.engine",
    "OmniDiffusionConfig": "lowbit.engine",
    "OmniDiffusionSamplingParams": "lowbit.inputs.data",
    "OmniRequestOutput": "lowbit.outputs",
    "build_quant_config": "lowbit.quantization",
    "quantize_model": "lowbit.quantization",
    "register_quantization_method": "lowbit.quantization",
}

__all__ = [  # noqa: PLE0604, the table above holds strings
    "__version__",
    *_PUBLIC,
]

registration.install()


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
