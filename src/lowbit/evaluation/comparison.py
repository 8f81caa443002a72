"""A candidate against its reference: same prompts, same noise; how far pictures, latents and costs differ."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lowbit.containers.atomic import write_text
from lowbit.errors import ConfigError
from lowbit.evaluation.gates import RATIOS, Condition, Verdict, judge
from lowbit.evaluation.metrics import (
    OUTPUT_METRICS,
    MetricInfo,
    difference_metrics,
    median_and_worst,
    picture_metrics,
    to_json,
)
from lowbit.evaluation.perceptual import PERCEPTUAL_METRICS, absence, check_perceptual, perceptual_metrics
from lowbit.evaluation.recording import Recording, Side, Task, check_comparable, record

_GENERATION_KEYS = (
    "avg_generation_time_s",
    "per_run_generation_time_s",
    "max_peak_memory_mb",
    "per_run_peak_memory_mb",
    "load_time_s",
    "load_peak_memory_mb",
    "num_inference_steps",
    "per_case_skipped_steps",
)
_TRAJECTORY_KEYS = ("relative_l2", "cosine_similarity")
WORST = "worst_"
"""A figure's name with this prefix is its worst value over prompts and seeds; without it, the median."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to compare and how.

    Attributes:
        reference: the side that is right.
        candidate: the side to judge.
        task: what both make.
        perceptual: add SSIM, FLIP and, where its weights are, LPIPS.
        teacher_forced: let the candidate generate once more from the reference's latents at each step.
        noise_floor: compare the reference with itself in FP32 too.
        layers: compare linear layers and blocks at the first, the middle and the last step of the first case.
        gate: conditions to judge by.
        kind: ``"image"`` or ``"frame"``: what the JSON calls a picture.
    """

    reference: Side
    candidate: Side
    task: Task
    perceptual: bool = False
    teacher_forced: bool = False
    noise_floor: bool = False
    layers: bool = False
    gate: Sequence[Condition] = ()
    kind: str = "image"


@dataclass(frozen=True)
class Comparison:
    """A finished comparison.

    Attributes:
        result: the JSON's contents, infinite and undefined figures still floats.
        verdicts: of the gate's conditions.
        reference: what the reference made.
        candidate: what the candidate made.
    """

    result: dict[str, Any]
    verdicts: Sequence[Verdict]
    reference: Recording
    candidate: Recording

    @property
    def ok(self) -> bool:
        """Whether every condition of the gate holds."""
        return all(verdict.ok for verdict in self.verdicts)

    def write_json(self, path: Path) -> None:
        """Write the result as strict JSON, under a temporary name first."""
        text = json.dumps(to_json(self.result), indent=2, allow_nan=False)
        write_text(path, text)

    def write_pictures(self, folder: Path) -> list[Path]:
        """Write every picture of both sides as PNG and return their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for index in range(len(self.result["cases"])):
            for recording, name in ((self.reference, "reference"), (self.candidate, "candidate")):
                for number, picture in enumerate(recording.case(index)["pictures"].numpy()):
                    paths.append(folder / f"{index:03}_{number:03}_{name}.png")
                    Image.fromarray(picture).save(paths[-1])
        return paths


def known_figures(perceptual: bool) -> tuple[str, ...]:
    """Return the names that a gate may use."""
    names = [*OUTPUT_METRICS, *(_present_perceptual() if perceptual else ())]
    return (*names, *(WORST + name for name in names), *RATIOS)


def _present_perceptual() -> dict[str, MetricInfo]:
    return {name: info for name, info in PERCEPTUAL_METRICS.items() if absence(name) is None}


def compare(plan: Plan, work: Path) -> Comparison:
    """Run both sides, one after the other, and compare them.

    Args:
        plan: what to do.
        work: an existing folder for what they make.

    Raises:
        ConfigError, CheckpointError, UnsupportedError: a side can't be loaded or run, they are not comparable, or what
            ``perceptual`` needs is not installed.
    """
    if plan.perceptual:
        check_perceptual()
    check_comparable(plan.reference.check(), plan.candidate.check())
    reference = record(plan.reference, plan.task, _subfolder(work, "reference"), layers=plan.layers)
    candidate = record(
        plan.candidate,
        plan.task,
        _subfolder(work, "candidate"),
        reference.folder,
        forced=plan.teacher_forced,
        layers=plan.layers,
    )
    result = {
        **compare_recordings(plan, reference, candidate),
        "settings": _settings(plan),
        "metric_guidance": guidance(plan.perceptual),
    }
    if plan.layers:
        result["layers"] = candidate.info["layers"]
    if plan.noise_floor:
        result["noise_floor"] = _noise_floor(plan, reference, work)
    verdicts = judge(plan.gate, figures(result)) if plan.gate else []
    result["gate"] = {
        "passed": all(verdict.ok for verdict in verdicts),
        "conditions": [
            {"condition": str(verdict.condition), "found": verdict.found, "passed": verdict.ok} for verdict in verdicts
        ],
    }
    return Comparison(result, verdicts, reference, candidate)


def _subfolder(work: Path, name: str) -> Path:
    folder = work / name
    folder.mkdir()
    return folder


def _noise_floor(plan: Plan, reference: Recording, work: Path) -> dict[str, Any]:
    """Return what rounding to the reference's dtype alone does: its pictures against those of FP32."""
    side = replace(plan.reference, name="float32", dtype="float32")
    exact = record(side, replace(plan.task, warmup_runs=0, measure_runs=1), _subfolder(work, "float32"))
    found = compare_recordings(replace(plan, teacher_forced=False), exact, reference)
    return {"reference": "the reference side in float32", **{key: found[key] for key in ("output_metrics", "summary")}}


def compare_recordings(plan: Plan, reference: Recording, candidate: Recording) -> dict[str, Any]:
    """Return the figures of two recordings of ``plan.task``."""
    cases, rows, output = [], [], {}
    for index, (_, prompt, seed) in enumerate(plan.task.cases):
        first, second = reference.case(index), candidate.case(index)
        pictures = [tensors["pictures"].numpy() for tensors in (first, second)]
        metrics = stack_metrics(pictures[0], pictures[1], plan.kind)
        overall = dict(metrics[f"all_{plan.kind}s_metrics"])
        if plan.perceptual:
            overall |= _mean_perceptual(pictures[0], pictures[1])
        case: dict[str, Any] = {"prompt": prompt, "seed": seed, "metrics": overall}
        case["trajectory"] = trajectory(first["latents"].numpy(), second["latents"].numpy())
        if plan.teacher_forced:
            forced = candidate.case(index, "forced")["latents"].numpy()
            case["teacher_forced_trajectory"] = trajectory(first["latents"].numpy(), forced)
        cases.append(case)
        rows.append(overall)
        if index == 0:
            output = metrics
    directions = {name: info.higher_is_better for name, info in {**OUTPUT_METRICS, **PERCEPTUAL_METRICS}.items()}
    return {
        "output_metrics": output,
        "summary": median_and_worst(rows, directions),
        "cases": cases,
        "reference_generation": {key: reference.info[key] for key in _GENERATION_KEYS},
        "candidate_generation": {key: candidate.info[key] for key in _GENERATION_KEYS},
        "reference": _identity(reference),
        "candidate": _identity(candidate),
    }


def _identity(recording: Recording) -> dict[str, Any]:
    return {key: value for key, value in recording.info.items() if key not in (*_GENERATION_KEYS, "layers")}


def stack_metrics(reference: np.ndarray, candidate: np.ndarray, kind: str = "image") -> dict[str, Any]:
    """Compare stacks of pictures: the first, the middle one, and all of them as one.

    Args:
        reference: uint8 [N, H, W, 3].
        candidate: of the same shape.
        kind: ``"image"`` or ``"frame"``: which of vLLM-Omni's names to give the results.
    """
    middle = len(reference) // 2
    return {
        f"num_{kind}s": len(reference),
        f"{kind}0_metrics": picture_metrics(reference[0], candidate[0]),
        f"mid_{kind}_index": middle,
        f"mid_{kind}_metrics": picture_metrics(reference[middle], candidate[middle]),
        f"all_{kind}s_metrics": picture_metrics(reference, candidate),
    }


def _mean_perceptual(reference: np.ndarray, candidate: np.ndarray) -> dict[str, float]:
    rows = [perceptual_metrics(first, second) for first, second in zip(reference, candidate, strict=True)]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def trajectory(reference: np.ndarray, candidate: np.ndarray) -> list[dict[str, float]]:
    """Return relative L2 and cosine of latents [steps, ...] after each step."""
    steps = []
    for step, (expected, found) in enumerate(zip(reference, candidate, strict=True)):
        metrics = difference_metrics(expected, found)
        steps.append({"step": step, **{key: metrics[key] for key in _TRAJECTORY_KEYS}})
    return steps


def figures(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures that a gate may name: medians, ``worst_`` ones, and the ratios of the costs."""
    summary = result["summary"]
    reference, candidate = result["reference_generation"], result["candidate_generation"]
    return {
        **summary["median"],
        **{WORST + name: value for name, value in summary["worst"].items()},
        "avg_generation_time_ratio": candidate["avg_generation_time_s"] / reference["avg_generation_time_s"],
        "max_peak_memory_ratio": candidate["max_peak_memory_mb"] / reference["max_peak_memory_mb"],
    }


def _settings(plan: Plan) -> dict[str, Any]:
    return {
        "reference": asdict(plan.reference),
        "candidate": asdict(plan.candidate),
        "prompts": list(plan.task.prompts),
        "seeds": list(plan.task.seeds),
        "warmup_runs": plan.task.warmup_runs,
        "measure_runs": plan.task.measure_runs,
        "sampling": {key: value for key, value in asdict(plan.task.params).items() if key != "seed"},
        "noise": "drawn on the CPU from the seed, the same for both sides",
    }


def guidance(perceptual: bool) -> dict[str, Any]:
    """Return what each figure means, which direction is better, and the recommended thresholds."""
    described = {**OUTPUT_METRICS, **(PERCEPTUAL_METRICS if perceptual else {})}
    entries: dict[str, Any] = {}
    for name, info in described.items():
        entries[name] = {"meaning": info.meaning, "direction": "higher" if info.higher_is_better else "lower"}
        thresholds = {preset: getattr(info, preset) for preset in ("smoke", "strict")}
        if thresholds["smoke"] is not None:
            entries[name]["thresholds"] = thresholds
    if perceptual and (reason := absence("lpips")):
        entries["lpips"]["absent"] = reason
    return {
        "scope": "heuristics for the same model, prompt, seed, size, scheduler and steps; look at the pictures too",
        "metrics": entries,
        "ratios": dict(RATIOS),
    }


def check_output_file(path: str | os.PathLike[str], option: str) -> Path:
    """Return ``path`` if a file can be written there, its folder created where that is missing.

    Raises:
        ConfigError: it is a folder, or can't be written.
    """
    target = Path(path)
    if target.is_dir():
        raise ConfigError(f"{option}: {target} is a folder; name a file")
    check_output_folder(target.parent, option)
    return target


def check_output_folder(path: str | os.PathLike[str], option: str) -> Path:
    """Return ``path`` if files can be written there, creating it where it is missing.

    Raises:
        ConfigError: it can't be created or written, or is no folder.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{option}: can't create the folder {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{option}: no permission to write in {folder}")
    return folder
