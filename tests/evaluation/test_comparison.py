"""Comparisons of the embedded model with itself, quantized and not."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lowbit.errors import ConfigError
from lowbit.evaluation.comparison import (
    Comparison,
    Plan,
    check_output_file,
    check_output_folder,
    compare,
    figures,
    known_figures,
    stack_metrics,
    trajectory,
)
from lowbit.evaluation.gates import parse_gate
from lowbit.evaluation.recording import Side, Task, check_same_shape, in_process
from lowbit.inputs.data import OmniDiffusionSamplingParams
from lowbit.models.embedded import embedded_model

PARAMS = OmniDiffusionSamplingParams(num_inference_steps=3)
TASK = Task(prompts=("a red circle above a blue star",), seeds=(1, 2), params=PARAMS)


def plan(candidate: Any = None, **changes: Any) -> Plan:
    sides = [Side(name=name, device="cpu") for name in ("reference", "candidate")]
    return replace(
        Plan(reference=sides[0], candidate=replace(sides[1], quantization_config=candidate), task=TASK), **changes
    )


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    gate = parse_gate("psnr_db>=25,max_peak_memory_ratio<=100,mae<=1e-9", known_figures(perceptual=True))
    return compare(
        plan("int8", perceptual=True, teacher_forced=True, noise_floor=True, gate=gate), tmp_path_factory.mktemp("int8")
    )


def test_a_model_equals_itself(tmp_path: Path) -> None:
    found = compare(plan(gate=parse_gate("strict"), teacher_forced=True), tmp_path)
    assert found.ok
    assert found.result["summary"]["worst"]["psnr_db"] == math.inf
    for case in found.result["cases"]:
        for key in ("trajectory", "teacher_forced_trajectory"):
            assert len(case[key]) == 3
            assert all(step["relative_l2"] == 0 and step["cosine_similarity"] == 1 for step in case[key])


def test_int8_is_close_and_not_equal(int8: Comparison) -> None:
    median = int8.result["summary"]["median"]
    assert 30 < median["psnr_db"] < math.inf
    assert 0.95 < median["ssim"] < 1
    assert 0 < median["flip"] < 0.1
    assert [verdict.ok for verdict in int8.verdicts] == [True, True, False]
    assert not int8.ok
    assert int8.result["gate"]["passed"] is False
    assert int8.result["noise_floor"]["summary"]["median"]["psnr_db"] > 30


def test_forced_steps_err_alone_and_free_ones_accumulate(int8: Comparison) -> None:
    for case in int8.result["cases"]:
        free, forced = case["trajectory"], case["teacher_forced_trajectory"]
        assert free[0] == forced[0]  # nothing is replaced before the first step
        assert free[-1]["relative_l2"] != forced[-1]["relative_l2"]


def test_the_figures_are_those_of_the_pictures(int8: Comparison, tmp_path: Path) -> None:
    paths = int8.write_pictures(tmp_path)
    assert len(paths) == 4
    first, second = (np.asarray(Image.open(path), dtype=np.float64) for path in paths[:2])
    expected = 10 * math.log10(255**2 / np.mean((first - second) ** 2))
    assert int8.result["cases"][0]["metrics"]["psnr_db"] == pytest.approx(expected)
    assert int8.result["output_metrics"]["image0_metrics"]["psnr_db"] == pytest.approx(expected)


def test_the_json_is_strict_and_tells_what_made_it(int8: Comparison, tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    int8.write_json(target)
    result = json.loads(target.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert result["reference"]["pipeline"] == "ZImagePipeline"
    assert result["candidate"]["manifests"]["transformer"]["layers"]
    assert result["settings"]["candidate"]["quantization_config"] == "int8"
    assert len(result["reference_generation"]["per_run_generation_time_s"]) == 2
    assert result["candidate_generation"]["max_peak_memory_mb"] > 0
    assert result["metric_guidance"]["metrics"]["psnr_db"]["thresholds"] == {"smoke": 20.0, "strict": 25.0}
    assert set(known_figures(perceptual=True)) == set(figures(int8.result))


def test_other_schedulers_are_refused_before_anything_is_generated(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(embedded_model().folder, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "shift": 7.5}))
    other = Side(name="candidate", model=str(folder), device="cpu")
    work = tmp_path / "work"
    work.mkdir()
    with pytest.raises(ConfigError, match=r"schedulers .* differ .*shift"):
        compare(replace(plan(), candidate=other), work)
    assert not list(work.iterdir())


def test_other_counts_sizes_and_steps_are_refused() -> None:
    made = {"pictures": torch.zeros(2, 8, 8, 3), "latents": torch.zeros(4, 1)}
    check_same_shape(made, made)
    for pictures in (torch.zeros(1, 8, 8, 3), torch.zeros(2, 8, 16, 3)):
        with pytest.raises(ConfigError, match=r"reference made .*\[2, 8, 8\]"):
            check_same_shape(made, {**made, "pictures": pictures})
    with pytest.raises(ConfigError, match="took 4 steps, the candidate 3"):
        check_same_shape(made, {**made, "latents": torch.zeros(3, 1)})


def test_unknown_layers_are_found_before_anything_is_generated(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no_such_layer"):
        compare(plan({"method": "int8", "ignored_layers": ["no_such_layer"]}), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ()}, "no prompt"),
        ({"prompts": ("a", " ")}, "one is empty"),
        ({"seeds": (1, 1)}, "different numbers"),
        ({"measure_runs": 0}, "measure_runs"),
    ],
)
def test_what_is_no_task(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(TASK, **changes)


def test_stacks_have_a_first_a_middle_and_all() -> None:
    first = np.zeros((5, 4, 4, 3), np.uint8)
    second = first.copy()
    second[2] = 10
    found = stack_metrics(first, second, "frame")
    assert found["num_frames"] == 5
    assert found["frame0_metrics"]["mae"] == 0
    assert found["mid_frame_index"] == 2
    assert found["mid_frame_metrics"]["mae"] == 10
    assert found["all_frames_metrics"]["mae"] == 2


def test_the_trajectory_is_per_step() -> None:
    reference = np.ones((2, 1, 4))
    found = trajectory(reference, reference * np.array([1.0, 1.5])[:, None, None])
    assert [step["relative_l2"] for step in found] == [0.0, pytest.approx(0.5)]
    assert found[1]["cosine_similarity"] == pytest.approx(1.0)


def test_outputs_that_can_not_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match="--output-json: can't create the folder"):
        check_output_file(file / "result.json", "--output-json")
    with pytest.raises(ConfigError, match="is a folder; name a file"):
        check_output_file(tmp_path, "--output-json")
    with pytest.raises(ConfigError, match="--save-output-dir"):
        check_output_folder(file, "--save-output-dir")


def _die() -> None:
    import os

    os._exit(7)


def test_a_process_that_dies_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="status 7"):
        in_process(_die)
