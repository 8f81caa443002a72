"""Rotation and smoothing of linear layers' inputs."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImageTransformer2DModel

from lowbit import Omni
from lowbit.errors import ConfigError
from lowbit.inputs.data import OmniDiffusionSamplingParams
from lowbit.ops.rotation import hadamard, rotate
from lowbit.quantization import Fp8Config, Int8Config, quantize_model
from lowbit.quantization.calibration.smoothing import SeenInput, smooth, smoothing_scale, squared_error, watched_inputs
from lowbit.quantization.plan import quantize_layer
from lowbit.quantization.transforms import ROTATIONS, rotation_group
from tests.support.models import FAMILIES, relative_error

REFERENCE: dict[str, Any] = {"kernel": "reference"}


@pytest.mark.parametrize("size", ROTATIONS)
def test_the_matrix_is_a_regular_hadamard_of_exact_entries(size: int) -> None:
    matrix = hadamard(size).double()
    scaled = matrix * size**0.5
    assert set(scaled.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    assert torch.equal(matrix, matrix.T)
    assert (scaled.sum(dim=0) == size**0.5).all()  # regular: every column sums to the same
    assert torch.equal(hadamard(size, torch.bfloat16).double(), matrix)


def test_rotating_twice_is_nothing_and_groups_stay_apart() -> None:
    x = torch.randn(3, 5, 48, dtype=torch.float64)
    matrix = hadamard(16)
    torch.testing.assert_close(rotate(rotate(x, matrix), matrix), x)
    one = torch.zeros(1, 48)
    one[0, 20] = 1.0
    assert rotate(one, matrix)[0].nonzero().flatten().tolist() == list(range(16, 32))
    assert [rotation_group(288, 256), rotation_group(768, 256), rotation_group(6, 64)] == [16, 256, 1]


@pytest.mark.parametrize("config_class", [Int8Config, Fp8Config])
@pytest.mark.parametrize(("smoothing", "rotation"), [(0.5, None), (None, 64), (0.5, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outlier_channels_cost_less_than_half(
    config_class: type, smoothing: float | None, rotation: int | None, dtype: torch.dtype
) -> None:
    linear = torch.nn.Linear(256, 96, dtype=dtype)
    x = torch.randn(64, 256, dtype=dtype)
    x[:, [3, 77, 200]] *= 60  # as attention sinks and gates do in diffusion transformers
    linear.weight.data[:, [3, 77, 200]] /= 60
    exact = torch.nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double())
    plain = quantize_layer(linear, config_class(**REFERENCE).linear_method())
    scale = None
    changed = linear
    if smoothing is not None:
        scale = smoothing_scale(x.abs().amax(dim=0), linear.weight.abs().amax(dim=0), smoothing)
        changed = torch.nn.Linear(256, 96, dtype=dtype)
        changed.weight.data, changed.bias = linear.weight.data / scale.to(dtype), linear.bias
    config = config_class(smoothing=smoothing, rotation=rotation, **REFERENCE)
    better = quantize_layer(changed, config.linear_method(), mul_scale=scale)
    with torch.no_grad():
        before, after = (relative_error(layer(x), exact) for layer in (plain, better))
    if config_class is Int8Config:
        assert after < 0.5 * before
    elif rotation is None:  # e4m3 has an exponent, so outliers cost it nothing; spreading them does
        assert after < 1.05 * before
    weight = better.method.dequantize_weight(better)
    assert relative_error(weight, linear.weight.double()) < 0.1


def plant_outliers(model: torch.nn.Module, names: list[str]) -> dict[str, SeenInput]:
    """Return inputs of which a few channels are large, seen by layers whose weights are small there."""
    seen = {}
    for name in names:
        weight = model.get_submodule(name).get_parameter("weight")
        rows = torch.randn(64, weight.shape[1])
        rows[:, ::16] *= 64
        weight.data[:, ::16] /= 64
        seen[name] = SeenInput(rows.abs().amax(dim=0), rows)
    return seen


def test_smoothing_by_itself_changes_nothing() -> None:
    family = FAMILIES["z-image"]
    method = Int8Config(**REFERENCE).linear_method()
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = family.make().to(dtype)
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        with watched_inputs(model) as seen:
            family.run(model)
        names = [name for name in seen if name.startswith("layers.") and "adaLN" not in name]
        seen = plant_outliers(model, names)
        expected, before = family.run(model), copy.deepcopy(model.state_dict())
        online = smooth(model, names, seen, 0.5, method)
        assert not online  # every layer's scale went into what comes before it
        assert all(not torch.equal(before[f"{name}.weight"], model.state_dict()[f"{name}.weight"]) for name in names)
        torch.testing.assert_close(family.run(model), expected, rtol=0, atol=0)


def test_what_has_no_fold_is_multiplied_while_running() -> None:
    family = FAMILIES["flux"]
    torch.manual_seed(0)
    model = family.make().float()
    seen = plant_outliers(model, [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)])
    expected = family.run(model)
    manifest = quantize_model(model, Int8Config(smoothing=0.5, **REFERENCE), seen_inputs=seen)
    assert manifest.quantized
    layer = model.get_submodule(family.quantized)
    assert layer.bound.facts.is_smoothed
    assert relative_error(family.run(model), expected) < 0.02


def test_layers_that_would_lose_are_left_alone() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 64, bias=False))
    rows = torch.randn(64, 256)
    rows[0, 7] = 100.0  # one value of one token: the channel's weights would be made large for the others
    before = model[0].weight.detach().clone()
    method = Int8Config(**REFERENCE).linear_method()
    assert not smooth(model, ["0"], {"0": SeenInput(rows.abs().amax(dim=0), rows)}, 1.0, method)
    assert torch.equal(next(model.parameters()), before)


def test_the_squared_error_is_that_of_the_layer() -> None:
    torch.manual_seed(0)
    x, linear = torch.randn(32, 64), torch.nn.Linear(64, 24, bias=False)
    method = Int8Config(**REFERENCE).linear_method()
    with torch.no_grad():
        exact = x.double() @ linear.weight.double().t()
        result = quantize_layer(linear, method)(x).double()
    expected = ((result - exact).square().sum() / exact.square().sum()).item()
    assert squared_error(x, linear.weight.detach(), method) == pytest.approx(expected, rel=1e-3)


def test_some_rows_of_every_call_are_kept() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    calls = [torch.full((2, 50, 4), float(call)) for call in range(100)]
    with watched_inputs(model) as seen:
        for x in calls:
            model(x)
    assert 32 <= len(seen["0"].rows) <= 128
    assert seen["0"].absmax.tolist() == [99.0] * 4
    values, counts = seen["0"].rows[:, 0].unique(return_counts=True)
    assert values.diff().max() <= 8
    assert counts.max() <= 2


def test_scales_are_powers_of_two_that_even_channels_out() -> None:
    x, weight = torch.tensor([64.0, 1.0, 0.0, 4.0]), torch.tensor([1.0, 64.0, 1.0, 0.0])
    assert smoothing_scale(x, weight, 0.5).tolist() == [1 / 8, 8.0, 1.0, 1.0]
    scale = smoothing_scale(torch.rand(100) * 1e9, torch.rand(100) * 1e-9, 1.0)
    assert torch.equal(scale, torch.exp2(torch.log2(scale).round()))
    assert scale.min() >= 2.0**-20


def plant(model: ZImageTransformer2DModel) -> None:
    """Make some channels of every layer's input large by an exact rescaling: what comes before, times 2^k, and back."""
    for block in [*model.layers, *model.noise_refiner]:
        for norm, consumers in (
            (block.attention_norm1, (block.attention.to_q, block.attention.to_k, block.attention.to_v)),
            (block.ffn_norm1, (block.feed_forward.w1, block.feed_forward.w3)),
        ):
            norm.weight.data[5::40] *= 32
            for layer in consumers:
                layer.weight.data[:, 5::40] /= 32


PARAMS = OmniDiffusionSamplingParams(num_inference_steps=3, seed=1)


@pytest.mark.parametrize("options", [{"smoothing": 0.5}, {"rotation": 256}, {"smoothing": 0.5, "rotation": 256}])
def test_a_model_with_planted_outliers_errs_less_than_half(options: dict[str, Any]) -> None:
    prompt = "a large red circle left of a small blue square"

    def planted() -> Omni:
        omni = Omni(device="cpu")
        plant(omni.transformers()["transformer"])
        return omni

    with watched_inputs((original := planted()).transformers()["transformer"]) as seen:
        exact = latents(original, prompt)

    def error(**config: Any) -> float:
        omni = planted()
        quantize_model(omni.transformers()["transformer"], "int8", seen_inputs=seen, **config)
        return relative_error(latents(omni, prompt), exact)

    assert error(**options) < 0.5 * error()


def latents(omni: Omni, prompt: str) -> torch.Tensor:
    found: list[torch.Tensor] = []
    params = replace(PARAMS, height=128, width=128, guidance_scale=0.0)
    omni.generate(prompt, params, progress=False, on_step=lambda _, value: found.append(value.float().clone()))
    return found[-1]


def test_a_smoothed_and_rotated_checkpoint_reloads_bit_for_bit(tmp_path: Path) -> None:
    spec = {"method": "int8", "smoothing": 0.5, "rotation": 16}
    omni = Omni(quantization_config=spec, device="cpu", calibration_prompts=("a blue star",))
    omni.save_pretrained(str(tmp_path / "saved"))
    again = Omni(str(tmp_path / "saved"), device="cpu")
    prompt = "a red circle"
    assert torch.equal(latents(omni, prompt), latents(again, prompt))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smoothing": 0}, "smoothing must be"),
        ({"smoothing": 1.5}, "smoothing must be"),
        ({"smoothing": True}, "smoothing must be"),
        ({"rotation": 128}, "rotation must be one of 4, 16, 64, 256"),
        ({"rotation": "64"}, "rotation must be one of"),
    ],
)
def test_what_is_no_transform(options: dict[str, Any], message: str) -> None:
    for config in (Int8Config, Fp8Config):
        with pytest.raises(ConfigError, match=message):
            config(**options)


def test_smoothing_needs_prompts() -> None:
    with pytest.raises(ConfigError, match="calibration_prompts"):
        Omni(quantization_config={"method": "int8", "smoothing": 0.5}, device="cpu")
    with pytest.raises(ConfigError, match="seen_inputs"):
        quantize_model(torch.nn.Sequential(torch.nn.Linear(16, 16)), "int8", smoothing=0.5)
    with pytest.raises(ConfigError, match="dynamic"):
        Fp8Config(activation_scheme="static", rotation=16)
