"""Damage of layers, each quantized alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lowbit import Omni
from lowbit.errors import ConfigError
from lowbit.evaluation import sensitivity
from lowbit.evaluation.recording import Task
from lowbit.evaluation.report import render_sensitivity
from lowbit.evaluation.sensitivity import (
    damage,
    measure,
    one_method,
    quantizable_layers,
    rank,
    record_calls,
    settings,
    spread,
    swapped,
)
from lowbit.inputs.data import OmniDiffusionSamplingParams

TASK = Task(prompts=("a red circle",), params=OmniDiffusionSamplingParams(num_inference_steps=3))
METHOD = {"method": "int8", "ignored_layers": ["re:(?!layers\\.[12]\\.attention)"]}
PLANTED = "transformer.layers.2.attention.to_v"


@pytest.fixture(scope="module")
def omni() -> Omni:
    return Omni(device="cpu")


@pytest.fixture
def outlier(omni: Omni) -> Iterator[None]:
    """A weight of one layer made large, which spoils its row's and hence its own rounding."""
    weight = omni.transformers()["transformer"].get_submodule(PLANTED.partition(".")[2]).weight
    kept = weight.data.clone()
    weight.data[:, 0] = 3.0
    yield
    weight.data.copy_(kept)


def test_the_layer_with_outliers_is_found(omni: Omni, outlier: None, tmp_path: Path) -> None:
    file = tmp_path / "damage.json"
    layers = measure(omni, METHOD, TASK, file, probes=2)
    assert len(layers) == 8
    assert rank(layers)[0].name == PLANTED
    assert all(0 < layer.damage < 0.5 and layer.saved_bytes > 0 for layer in layers)
    kept = json.loads(file.read_text())
    assert [row["name"] for row in kept["layers"]] == [layer.name for layer in rank(layers)]
    page = render_sensitivity(layers, settings(omni, one_method(METHOD), TASK, 2))
    assert all(layer.name in page for layer in layers)


def test_an_interrupted_measurement_goes_on(omni: Omni, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "damage.json"
    calls = record_calls(omni, TASK, 1)
    true, done = sensitivity.damage, []

    def die_at_the_fourth(*arguments: object) -> float:
        done.append(1)
        if len(done) == 4:
            raise KeyboardInterrupt
        return true(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(sensitivity, "damage", die_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        measure(omni, METHOD, TASK, file, 1, calls)
    assert len(json.loads(file.read_text())["layers"]) == 3
    layers = measure(omni, METHOD, TASK, file, 1, calls)
    assert len(done) == 4 + 5
    assert len(layers) == 8
    with pytest.raises(ConfigError, match=r"other settings \(probes\)"):
        measure(omni, METHOD, TASK, file, 2, calls)
    file.write_text("{}")
    with pytest.raises(ConfigError, match="no result of lowbit sensitivity"):
        measure(omni, METHOD, TASK, file, 1, calls)


def test_nothing_swapped_does_no_damage_and_swapping_is_undone(omni: Omni) -> None:
    calls = record_calls(omni, TASK, 3)
    assert [call.component for call in calls] == ["transformer"] * 3
    assert damage(omni, calls) == 0
    layers = quantizable_layers(omni, one_method(METHOD))
    zero = {
        name: torch.nn.Linear(layer.in_features, layer.out_features).bfloat16() for name, (layer, _) in layers.items()
    }
    with swapped(omni, zero):
        assert damage(omni, calls) > 0
    assert damage(omni, calls) == 0


def test_damage_is_the_root_mean_square_of_relative_errors(omni: Omni) -> None:
    calls = record_calls(omni, TASK, 2)
    scaled = [
        sensitivity.Call(call.component, call.arguments, call.output / factor)
        for call, factor in zip(calls, (1.1, 1.3), strict=True)
    ]
    assert damage(omni, scaled) == pytest.approx(math.sqrt((0.1**2 + 0.3**2) / 2), rel=1e-3)


def test_probes_are_spread() -> None:
    assert spread(20, 4) == [0, 6, 13, 19]
    assert spread(3, 4) == [0, 1, 2]
    assert spread(9, 1) == [4]


@pytest.mark.parametrize(
    "spec",
    [
        None,
        {"transformer": "int8"},
        {"method": "int8", "is_checkpoint_int8_serialized": True},
        {"method": "int8", "smoothing": 0.5},
    ],
)
def test_what_is_no_single_method(spec: object) -> None:
    with pytest.raises(ConfigError):
        one_method(spec)
