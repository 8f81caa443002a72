"""The published models' configurations, on the real classes on the meta device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import gpu_kernel_model, gpu_model, memory_plan
from benchmarks.published_models import MODELS, gemm_shapes, quantized_inputs

# Parameters of the components in billions, as their makers state them.
PARAMETERS = {
    ("qwen-image", "transformer"): 20.43,
    ("qwen-image", "text_encoder"): 8.29,
    ("z-image", "transformer"): 6.15,
    ("z-image", "text_encoder"): 4.02,
    ("flux", "transformer"): 11.90,
    ("flux", "text_encoder_2"): 4.76,
    ("wan", "transformer"): 14.29,
    ("wan", "text_encoder"): 5.68,
}


@pytest.mark.parametrize(("model", "component"), list(PARAMETERS))
def test_components_are_as_large_as_published(model: str, component: str) -> None:
    built = MODELS[model].components[component].build()
    assert sum(p.numel() for p in built.parameters()) / 1e9 == pytest.approx(PARAMETERS[model, component], abs=0.006)


def test_shapes_of_qwen_image() -> None:
    shapes = gemm_shapes(MODELS["qwen-image"])
    # A block: q, k, v, out and two layers of a feed-forward, for the picture and for the text.
    assert shapes[4096, 3072, 3072] == shapes[256, 3072, 3072] == 4 * 60
    assert shapes[4096, 3072, 12288] == shapes[256, 12288, 3072] == 60
    assert shapes.total() == 12 * 60


def test_inputs_that_layers_share_are_quantized_once() -> None:
    # A block of Qwen-Image: q, k and v together, out, two layers of a feed-forward, for the picture and for the text.
    inputs = quantized_inputs(MODELS["qwen-image"])
    assert inputs[4096, 3072] == inputs[256, 3072] == 3 * 60
    assert inputs[4096, 12288] == inputs[256, 12288] == 60
    # Wan's second attention takes keys and values from the text.
    inputs = quantized_inputs(MODELS["wan"])
    assert (inputs[4096, 5120], inputs[MODELS["wan"].text_tokens, 5120]) == (5 * 40, 40)


@pytest.mark.parametrize("name", list(MODELS))
def test_every_layer_has_its_rows(name: str) -> None:
    model = MODELS[name]
    rows = {m for m, _, _ in gemm_shapes(model)}
    assert rows <= {4096, model.text_tokens, 4096 + model.text_tokens}
    assert max(rows) == (4096 + model.text_tokens if model.joint_layers else 4096)


def test_the_memory_plan_adds_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory_plan.main(["--models", "z-image", "--output", str(tmp_path / "plan.json")])
    plans = json.loads((tmp_path / "plan.json").read_text())["z-image"]["bytes"]
    for plan in plans.values():
        assert plan["total"] == sum(size for part, size in plan.items() if part != "total")
    assert plans["bf16"]["total"] / 1e9 == pytest.approx(20.5, abs=0.1)
    block = 2 * (2560 * (4096 + 2 * 1024 + 9728 * 3) + 4096 * 2560 + 2 * 2560 + 2 * 128)  # the last one, set aside
    norm, table = 2 * 2560, 2 * 151936 * 2560
    assert plans["bf16"]["text_encoder"] - plans["int8"]["text_encoder"] == block + norm + table
    assert plans["int8 + text encoder"]["total"] < 11e9 < plans["int8"]["total"] < 14e9
    assert "Z-Image" in capsys.readouterr().out


def test_a_prediction_is_never_below_a_limit() -> None:
    chip = gpu_model.CHIPS["H100 SXM"]
    for kind in ("bf16", "int8", "fp8"):
        seconds = gpu_model.gemm_seconds(chip, kind, 4096, 3072, 12288)
        assert seconds >= 2 * 4096 * 3072 * 12288 / (chip.rates[kind] * 1e12)
        few = gpu_model.gemm_seconds(chip, kind, 16, 3072, 12288)
        assert few >= 3072 * 12288 / (chip.memory * 1e12)
    rows = gpu_model.predict(["z-image"], ["H100 SXM", "A100 SXM 80 GB"])
    assert [(row["chip"], row["kind"]) for row in rows][-2:] == [("A100 SXM 80 GB", "bf16"), ("A100 SXM 80 GB", "int8")]
    assert all(row["total_ms"] == pytest.approx(sum(row["milliseconds"].values()), abs=0.1) for row in rows)


def test_no_kernel_is_predicted_beyond_the_data_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_kernel_model.main(["--output", str(tmp_path / "kernels.json")])
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert {row["kernel"] for row in rows} == set(gpu_kernel_model.KERNELS)
    assert all(0.05 < row["of_the_limit"] <= 1 and row["microseconds"] > 0 for row in rows)
    # An A100 does not multiply e4m3.
    assert not any(row["chip"].startswith("A100") and row["kernel"].startswith("fp8 product") for row in rows)
    few = {row["chip"]: row for row in rows if row["kernel"].startswith("4 bits")}
    weight = gpu_kernel_model.WIDTH * gpu_kernel_model.HIDDEN / 2
    assert few["H100 SXM"]["bound_by"] == "memory"
    assert few["H100 SXM"]["microseconds"] > 1e6 * weight / (gpu_model.CHIPS["H100 SXM"].memory * 1e12)
    assert "attention in int8" in capsys.readouterr().out
