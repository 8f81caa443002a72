"""TeaCache's coefficients, as data.

A polynomial, highest power first, from the relative L1 change of a transformer's modulated input between two steps to
the relative L1 change that its blocks' contribution then has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Coefficients:
    """Coefficients for a transformer.

    Attributes:
        transformer: its class in diffusers.
        values: five, from the fourth power to the constant.
        source: who found them.
        where: values of the transformer's configuration that tell models of one class apart.
    """

    transformer: str
    values: tuple[float, ...]
    source: str
    where: Mapping[str, Any] = field(default_factory=dict)


_TEACACHE = "TeaCache, github.com/ali-vilab/TeaCache"
_VLLM_OMNI = "vLLM-Omni, vllm_omni/diffusion/cache/teacache/config.py"

# The first whose class and configuration match is taken.
COEFFICIENTS: tuple[Coefficients, ...] = (
    Coefficients(
        "FluxTransformer2DModel", (4.98651651e02, -2.83781631e02, 5.58554382e01, -3.82021401, 2.64230861e-01), _TEACACHE
    ),
    Coefficients(
        "ZImageTransformer2DModel",
        (1.8858829670e02, -1.3707103979e02, 2.9740938889e01, -1.4912653550, 5.0336784787e-02),
        "`lowbit calibrate-cache` on the embedded model",
        {"dim": 288, "n_layers": 5},
    ),
    Coefficients("QwenImageTransformer2DModel", (-4.5e02, 2.8e02, -4.5e01, 3.2, -2.0e-02), _VLLM_OMNI),
    Coefficients(
        "ZImageTransformer2DModel", (-4.5e02, 2.8e02, -4.5e01, 3.2, -2.0e-02), f"{_VLLM_OMNI}, those of Qwen-Image"
    ),
    # Wan 2.1, with the time embedding that enters the blocks as signal ("use_ret_steps" in TeaCache4Wan2.1).
    Coefficients(
        "WanTransformer3DModel",
        (2.57151496e05, -3.54229917e04, 1.40286849e03, -1.35890334e01, 1.32517977e-01),
        f"{_TEACACHE}, image to video at 480p",
        {"image_dim": 1280},
    ),
    Coefficients(
        "WanTransformer3DModel",
        (-5.21862437e04, 9.23041404e03, -5.28275948e02, 1.36987616e01, -4.99875664e-02),
        f"{_TEACACHE}, text to video 1.3B",
        {"num_layers": 30},
    ),
    Coefficients(
        "WanTransformer3DModel",
        (-3.03318725e05, 4.90537029e04, -2.65530556e03, 5.87365115e01, -3.15583525e-01),
        f"{_TEACACHE}, text to video 14B",
        {"num_layers": 40},
    ),
)


def find_coefficients(transformer: str, config: Mapping[str, Any]) -> Coefficients | None:
    """Return the coefficients for a transformer's class name and configuration, ``None`` if none are known."""
    for entry in COEFFICIENTS:
        if entry.transformer == transformer and all(config.get(key) == value for key, value in entry.where.items()):
            return entry
    return None
