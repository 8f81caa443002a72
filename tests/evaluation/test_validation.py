"""Rows of the table of supported models."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from lowbit.errors import ConfigError
from lowbit.evaluation.prompts import validation_prompts
from lowbit.evaluation.validation import HEADER, SEEDS, row, table, validation_plan
from lowbit.inputs.data import OmniDiffusionSamplingParams

ROOT = Path(__file__).resolve().parents[2]


def result(**changes: Any) -> dict[str, Any]:
    generation = {"avg_generation_time_s": 3.0, "max_peak_memory_mb": 100.0}
    layers = [{"kernel": "native"}, {"kernel": None}]
    figures = {"psnr_db": 41.5, "ssim": 0.99, "flip": 0.01}
    found = {
        "settings": {
            "candidate": {"model": None, "quantization_config": {"method": "int8", "ignored_layers": ["to_q"]}},
            "prompts": list(validation_prompts(None)),
            "seeds": list(SEEDS),
        },
        "summary": {"median": figures, "worst": {**figures, "psnr_db": "inf"}},
        "reference_generation": generation,
        "candidate_generation": {"avg_generation_time_s": 2.0, "max_peak_memory_mb": 50.0},
        "candidate": {
            "model": "embedded",
            "device_name": "a CPU",
            "manifests": {"transformer": {"bytes_before": 2_000_000, "bytes_after": 1_000_000, "layers": layers}},
        },
    }
    return {**found, **changes}


def test_a_row_has_the_figures_of_its_file() -> None:
    found = row(result())
    text = found.markdown("validation/a.json")
    assert text.count("|") == HEADER.splitlines()[0].count("|")
    for cell in ("embedded", "int8", "native", "`to_q`", "2.0 → 1.0 MB (50%)", "1.50", "0.50", "41.5 (inf) dB"):
        assert cell in text
    assert "[json](validation/a.json)" in text


def test_only_validations_make_rows(tmp_path: Path) -> None:
    other = result()
    other["settings"]["prompts"] = ["a cat"]
    with pytest.raises(ConfigError, match="other prompts or seeds"):
        row(other)
    (tmp_path / "b.json").write_text(json.dumps({"gate": 1}))
    with pytest.raises(ConfigError, match=r"b\.json: Not a validation's JSON"):
        table(tmp_path.glob("*.json"), tmp_path)


def test_the_plan_is_the_documented_one() -> None:
    plan = validation_plan(None, "int8", OmniDiffusionSamplingParams(), dtype="bfloat16", device="cpu")
    assert len(plan.task.cases) == 24
    assert plan.reference.quantization_config is None
    assert plan.task.warmup_runs == 1


def test_the_documented_table_is_that_of_its_files() -> None:
    spec = importlib.util.spec_from_file_location("supported_models", ROOT / "scripts" / "supported_models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "supported-models.md").read_text(encoding="utf-8") == module.page()
    files = {file.stem for file in (ROOT / "docs" / "validation").glob("*.json")}
    assert {"embedded-int8", "embedded-fp8"} <= files
