"""A comparison as one HTML file that needs no network: pictures, charts, verdicts, settings."""

from __future__ import annotations

import base64
import io
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

import lowbit
from lowbit.containers.atomic import write_text
from lowbit.evaluation.charts import LineChart, Series, line_chart
from lowbit.evaluation.layers import worst_layers
from lowbit.evaluation.metrics import OUTPUT_METRICS, to_json
from lowbit.evaluation.perceptual import PERCEPTUAL_METRICS
from lowbit.evaluation.sensitivity import LayerDamage, rank

if TYPE_CHECKING:
    from lowbit.evaluation.comparison import Comparison

MAX_PAIRS = 48
"""Pairs shown at most: a report of all frames of many videos would not open."""
_SMALL = 256
"""Pictures narrower than this are enlarged with hard edges, so that one sees their pixels."""


def write_report(comparison: Comparison, path: Path) -> None:
    """Write the report of a comparison, under a temporary name first."""
    write_text(path, render_report(comparison))


def render_report(comparison: Comparison) -> str:
    """Return the report as HTML. Every text of the user's is escaped; the page may load nothing."""
    return render("report.html.j2", **_context(comparison))


def render_sensitivity(layers: Sequence[LayerDamage], settings: Mapping[str, Any]) -> str:
    """Return a page with a bar for each layer, the most damaging first."""
    ranked = [(layer.name, layer.damage) for layer in rank(layers)]
    prompts, seeds, probes = len(settings["prompts"]), len(settings["seeds"]), settings["probes"]
    return render(
        "sensitivity.html.j2",
        title=f"{Path(settings['model']).name}: sensitivity to {settings['quantization']['quant_method']}",
        calls=f"{prompts} prompts, {seeds} seeds and up to {probes} steps of each",
        layers=_bars(ranked),
        settings=json.dumps(to_json(settings), indent=2, ensure_ascii=False),
    )


def render(template: str, **values: Any) -> str:
    """Return a page from a template of this package, with the common style and script in it."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("lowbit", "assets/report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    assets = files("lowbit") / "assets" / "report"
    style, script = (Markup((assets / name).read_text(encoding="utf-8")) for name in ("report.css", "report.js"))
    return environment.get_template(template).render(**values, style=style, script=script, version=lowbit.__version__)


def _context(comparison: Comparison) -> dict[str, Any]:
    result = comparison.result
    reference, candidate = (describe_side(result, side) for side in ("reference", "candidate"))
    pairs = list(_pairs(comparison))
    total = sum(_shown_of(comparison, index)[1] for index in range(len(result["cases"])))
    steps = _step_series(result)
    return {
        "title": f"{candidate} against {reference}",
        "lead": _lead(result),
        "passed": result["gate"]["passed"],
        "verdicts": [
            {"condition": str(verdict.condition), "found": show(verdict.found), "ok": verdict.ok}
            for verdict in comparison.verdicts
        ],
        "pairs": pairs,
        "shown": len(pairs),
        "total": total,
        "kind": "frame" if "num_frames" in result["output_metrics"] else "picture",
        "metrics": _metric_rows(result),
        "has_floor": "noise_floor" in result,
        "notes": _notes(result),
        "forced": any("teacher_forced_trajectory" in case for case in result["cases"]),
        "steps_chart": line_chart(steps, [str(index + 1) for index in range(len(steps[0].values))]),
        "step_table": _step_table(steps),
        "costs": _costs(result),
        "settings": _settings(result),
        **_layers(result.get("layers", [])),
    }


def describe_side(result: Mapping[str, Any], side: str) -> str:
    """Return a side's model and method in a few words, such as ``"embedded int8"``."""
    config = result["settings"][side]["quantization_config"]
    return f"{Path(result[side]['model']).name} {_method(config, result[side])}"


def _method(config: Any, side: Mapping[str, Any]) -> str:
    if isinstance(config, str):
        return config
    if isinstance(config, Mapping):
        return str(config.get("method") or ", ".join(f"{name} {_method(item, side)}" for name, item in config.items()))
    quantized = any(layer.get("method") for manifest in side["manifests"].values() for layer in manifest["layers"])
    return "as checkpointed" if quantized else str(side["dtype"])


def _lead(result: Mapping[str, Any]) -> str:
    median, worst = (result["summary"][name]["psnr_db"] for name in ("median", "worst"))
    first, second = (result[f"{side}_generation"] for side in ("reference", "candidate"))
    time = second["avg_generation_time_s"] / first["avg_generation_time_s"]
    memory = second["max_peak_memory_mb"] / first["max_peak_memory_mb"]
    count = len(result["cases"])
    return (
        f"Median PSNR {show(median)} dB, worst {show(worst)} dB over {count} case{'s' * (count != 1)};"
        f" {time:.2f} times the reference's time, {memory:.2f} times its peak memory."
    )


def show(value: float | None) -> str:
    """Return a figure for people."""
    if value is None or math.isnan(value):
        return "undefined"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:.5g}"


def _shown_of(comparison: Comparison, index: int) -> tuple[list[int], int]:
    """Return which pictures of a case to show, and how many there are: of a video the first, middle and last frame."""
    count = len(comparison.reference.case(index)["pictures"])
    if "num_frames" in comparison.result["output_metrics"]:
        return sorted({0, count // 2, count - 1}), count
    return list(range(count)), count


def _pairs(comparison: Comparison) -> Iterator[dict[str, Any]]:
    shown = 0
    for index, case in enumerate(comparison.result["cases"]):
        numbers, count = _shown_of(comparison, index)
        sides = [
            recording.case(index)["pictures"].numpy() for recording in (comparison.reference, comparison.candidate)
        ]
        for number in numbers:
            if shown == MAX_PAIRS:
                return
            shown += 1
            yield {
                "prompt": case["prompt"],
                "seed": case["seed"],
                "label": f"{number + 1} of {count}" if count > 1 else "",
                "psnr": f"{show(case['metrics']['psnr_db'])} dB" if count == 1 else "",
                "reference": data_uri(sides[0][number]),
                "candidate": data_uri(sides[1][number]),
                "small": sides[0].shape[2] < _SMALL,
            }


def data_uri(picture: np.ndarray) -> str:
    """Return a uint8 [height, width, 3] picture as a ``data:`` address, without loss."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _metric_rows(result: Mapping[str, Any]) -> list[dict[str, str]]:
    summary, floor = result["summary"], result.get("noise_floor", {}).get("summary", {}).get("median", {})
    return [
        {
            "name": name,
            "median": show(summary["median"][name]),
            "worst": show(summary["worst"][name]),
            "floor": show(floor[name]) if name in floor else "",
            "direction": "higher" if info.higher_is_better else "lower",
            "meaning": info.meaning,
        }
        for name, info in {**OUTPUT_METRICS, **PERCEPTUAL_METRICS}.items()
        if name in summary["median"]
    ]


def _notes(result: Mapping[str, Any]) -> list[str]:
    absent = result["metric_guidance"]["metrics"].get("lpips", {}).get("absent")
    return [f"No LPIPS: {absent}"] if absent else []


def _step_series(result: Mapping[str, Any]) -> list[Series]:
    kinds = {"trajectory": "free-running", "teacher_forced_trajectory": "teacher-forced"}
    return [
        Series(
            name,
            [
                statistics.median(step["relative_l2"] for step in steps)
                for steps in zip(*(case[key] for case in result["cases"]), strict=True)
            ],
        )
        for key, name in kinds.items()
        if key in result["cases"][0]
    ]


def _step_table(series: Sequence[Series]) -> dict[str, Any]:
    rows = [
        [str(index + 1), *(show(value) for value in values)]
        for index, values in enumerate(zip(*(line.values for line in series), strict=True))
    ]
    return {"names": [line.name for line in series], "rows": rows}


def _layers(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    ranked = worst_layers(steps)
    inexact = [(name, error) for name, error in ranked if error > 0]
    if not steps:
        return {"layers": [], "kept_layers": 0, "blocks_chart": None, "block_names": []}
    names = list(steps[0]["blocks"])
    return {
        "layers": _bars(inexact) or _bars(ranked),
        "kept_layers": len(ranked) - len(inexact) if inexact else 0,
        "blocks_chart": _blocks_chart(steps, names),
        "block_names": names,
    }


def _blocks_chart(steps: Sequence[Mapping[str, Any]], names: Sequence[str]) -> LineChart:
    series = [
        Series(f"step {row['step'] + 1}", [row["blocks"][name]["output_relative_l2"] for name in names])
        for row in steps
    ]
    return line_chart(series, [str(index + 1) for index in range(len(names))])


def _bars(rows: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    largest = max((value for _, value in rows if math.isfinite(value)), default=0.0)
    return [
        {"name": name, "text": show(value), "share": min(value / largest, 1.0) if largest else 0.0}
        for name, value in rows
    ]


def _costs(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    columns = (
        ("Time per generation", "s", "avg_generation_time_s"),
        ("Peak memory", "MB", "max_peak_memory_mb"),
        ("Time to load", "s", "load_time_s"),
    )
    costs = []
    for name, unit, key in columns:
        values = [(side.capitalize(), result[f"{side}_generation"][key]) for side in ("reference", "candidate")]
        ratio = f"{values[1][1] / values[0][1]:.3g} times" if values[0][1] else ""
        costs.append({"name": name, "unit": unit, "rows": _bars(values), "ratio": ratio})
    return costs


def _settings(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    parts = {
        "What was asked": result["settings"],
        "Reference": result["reference"],
        "Candidate": result["candidate"],
    }
    return [
        (name, json.dumps(to_json(part), indent=2, ensure_ascii=False, default=str)) for name, part in parts.items()
    ]
