"""Linear layers by shape: counted as the model runs them, timed, added up."""

from __future__ import annotations

import pytest
import torch

from lowbit.bench import limits, shapes
from lowbit.bench.limits import gemm_limits
from lowbit.bench.shapes import (
    AttentionShape,
    Inventory,
    LinearShape,
    measure_shapes,
    predict,
    product_type,
    take_inventory,
    time_attention,
    time_linear,
)
from lowbit.bench.transformers import find_subject
from lowbit.errors import UnsupportedError

CPU = torch.device("cpu")


def test_the_inventory_of_z_image_is_what_its_layers_say() -> None:
    found = take_inventory(find_subject("z-image", size=512))
    by_shape = {(s.rows, s.in_features, s.out_features): (s, n) for s, n in found.linear.items()}
    tokens = 32 * 32 + 64
    shape, count = by_shape[tokens, 3840, 10240]
    assert (count, shape.kept) == (2 * 30, "")  # w1 and w3 of 30 blocks
    assert by_shape[tokens, 3840, 3840][1] == 4 * 30
    assert by_shape[1024, 10240, 3840][1] == 2  # the noise refiners see the picture alone
    assert by_shape[1, 256, 15360][0].kept == "modulation"
    assert found.attention == {
        AttentionShape(1, 30, tokens, tokens, 128): 30,
        AttentionShape(1, 30, 1024, 1024, 128): 2,
        AttentionShape(1, 30, 64, 64, 128): 2,
    }
    assert found.weights == pytest.approx(6.15e9, rel=0.002)
    assert found.quantized_weights / found.weights == pytest.approx(1 - 0.022, abs=0.001)


def test_cross_attention_and_frames_of_wan() -> None:
    found = take_inventory(find_subject("wan", size=256, layers=1, num_frames=5))
    tokens = 2 * 16 * 16
    assert AttentionShape(1, 40, tokens, 512, 128) in found.attention
    assert AttentionShape(1, 40, tokens, tokens, 128) in found.attention


def test_more_rows_than_are_timed_are_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def alternate(cases: dict[str, object], **_: object) -> dict[str, list[float]]:
        for case in cases.values():
            case()
        return {name: [0.5] for name in cases}

    monkeypatch.setattr(shapes, "alternate", alternate)
    monkeypatch.setattr(shapes, "MOST_ROWS", 8)
    monkeypatch.setattr(shapes, "MOST_QUERIES", 4)
    original = torch.nn.Linear.forward

    def forward(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape[0])
        return original(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    assert time_linear(LinearShape(24, 32, 16, "", "layer"), ["bf16"], CPU, 2, 0) == {"bf16": 1.5}
    assert seen == [8]
    assert time_attention(AttentionShape(1, 2, 6, 9, 16), [torch.float32], CPU, 2, 0) == {torch.float32: 0.75}


def test_a_prediction_adds_up_counts_and_leaves_kept_layers_as_they_are() -> None:
    plain, kept = LinearShape(8, 4, 4, "", "a"), LinearShape(1, 4, 4, "modulation", "b")
    one = AttentionShape(1, 1, 8, 8, 4)
    inventory = Inventory({plain: 3, kept: 2}, {one: 5}, 0, 0)
    linear = {plain: {"bf16": 4.0, "int8": 1.0}, kept: {"bf16": 0.5}}
    found = predict(inventory, linear, {one: {torch.bfloat16: 0.2}}, ["bf16", "int8"], "bf16")
    assert found["bf16"] == {"linear_seconds": 13.0, "attention_seconds": 1.0, "seconds": 14.0, "speedup": 1.0}
    assert found["int8"] == {"linear_seconds": 4.0, "attention_seconds": 1.0, "seconds": 5.0, "speedup": 2.8}


def test_measuring_the_embedded_models_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CPU_SIZES", ((64, 128, 128),))
    found = measure_shapes(
        find_subject("embedded", size=64), ["bf16", "int8"], CPU, repetitions=2, budget=0, progress=False
    )
    assert {"bf16", "int8"} == set(found["prediction"]) == set(found["limits"])
    for row in found["shapes"]:
        assert set(row["seconds"]) == ({"bf16"} if row["kept"] else {"bf16", "int8"})
        operations = 2 * row["rows"] * row["in_features"] * row["out_features"]
        assert row["operations_per_second"]["bf16"] * row["seconds"]["bf16"] == pytest.approx(operations, rel=0.05)
    total = sum(row["count"] * row["seconds"]["bf16"] for row in found["shapes"])
    assert found["prediction"]["bf16"]["linear_seconds"] == pytest.approx(total, rel=1e-3)


def test_limits_are_measured_by_whatever_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CPU_SIZES", ((64, 128, 128), (32, 64, 64)))
    found = gemm_limits(["fp32", "int8"], CPU)
    assert found["fp32"]["by"] == "torch"
    assert all(limit["operations_per_second"] > 0 for limit in found.values())
    with pytest.raises(UnsupportedError, match="Nothing multiplies fp8 on cpu"):
        gemm_limits(["fp8"], CPU)


def test_weight_only_methods_multiply_in_the_activations_precision() -> None:
    assert product_type("int8", CPU) == "int8"
    assert product_type("fp8", CPU) == "bf16"
    assert product_type("fp32", CPU) == "fp32"
