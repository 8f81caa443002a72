from __future__ import annotations

import pytest
import torch

from lowbit.integrations import loading
from lowbit.quantization import Fp8Config, Int8Config, QuantizationConfig, QuantizedLinear


@pytest.mark.parametrize(
    "config",
    [
        Int8Config(),
        Fp8Config(activation_scheme="static"),
        Fp8Config(weight_block_size=[128, 128]),
        Fp8Config(weight_block_size=[1, 64]),
    ],
)
@pytest.mark.parametrize("at_once", [1, 1000, 70_000])
def test_it_is_what_the_method_does(config: QuantizationConfig, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "ELEMENTS_AT_ONCE", at_once)
    weight = torch.randn(300, 200, dtype=torch.bfloat16)
    layer = QuantizedLinear(200, 300, False, config.linear_method(), device="meta")
    expected = layer.method.quantize_weight(weight)
    found = loading.quantize_by_rows(layer, weight)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].float(), tensor.float()), name
