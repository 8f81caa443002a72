from __future__ import annotations

import pytest
import torch
from torch import nn

from lowbit.errors import ConfigError
from lowbit.quantization import Fp8Config, quantize_model
from lowbit.quantization.calibration.static import calibration, static_layers, uncalibrated_layers


def static_model() -> nn.Sequential:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8))
    quantize_model(model, Fp8Config(activation_scheme="static", kernel="reference"))
    return model


def test_input_scales_are_the_largest_input_over_448() -> None:
    model = static_model()
    assert uncalibrated_layers(model) == ["0", "2"]
    inputs = [torch.randn(4, 32), torch.randn(4, 32) * 3]
    with calibration(model):
        for x in inputs:
            model(x)
    assert uncalibrated_layers(model) == []
    expected = max(x.abs().max().item() for x in inputs) / 448
    assert static_layers(model)["0"].get_parameter("input_scale").item() == pytest.approx(expected)


def test_calibrated_model_is_close_and_saves_its_scales() -> None:
    model = static_model()
    x = torch.randn(16, 32)
    with calibration(model):
        dynamic = model(x)
    static = model(x)
    assert ((static - dynamic).norm() / dynamic.norm()).item() < 0.05
    assert not torch.equal(static, dynamic)
    again = static_model()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), static)


def test_layers_that_saw_nothing_are_named_and_nothing_changes() -> None:
    model = static_model()
    with pytest.raises(ConfigError, match="no usable input for 1 layers: 2"), calibration(model):
        model[0](torch.randn(4, 32))
    assert uncalibrated_layers(model) == ["0", "2"]


def test_inputs_that_are_not_finite_are_refused() -> None:
    model = static_model()
    with pytest.raises(ConfigError, match="no usable input"), calibration(model):
        model(torch.full((1, 32), float("nan")))
