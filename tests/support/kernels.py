"""Kernels that this machine may lack: a test that names one is skipped with the kernel's own refusal."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowbit.errors import UnsupportedError
from lowbit.quantization import QuantizationConfig, build_quant_config
from lowbit.quantization.factory import QuantizationSpec
from lowbit.quantization.plan import quantize_layer


def refusal(spec: QuantizationSpec, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Return why no layer can run here with the method ``spec`` and the kernel it names; ``None`` if one can."""
    config = build_quant_config(spec)
    assert isinstance(config, QuantizationConfig)
    try:
        quantize_layer(nn.Linear(128, 64, dtype=dtype), config.linear_method(), "layer")
    except UnsupportedError as error:
        return str(error)
    return None


def skip_if_refused(spec: QuantizationSpec, dtype: torch.dtype = torch.bfloat16) -> None:
    """Skip the test that calls if ``refusal`` has a reason."""
    reason = refusal(spec, dtype)
    if reason is not None:
        pytest.skip(reason)
