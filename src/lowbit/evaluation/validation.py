"""The fixed comparison behind a row of docs/supported-models.md, and the table of such rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowbit.errors import ConfigError
from lowbit.evaluation.comparison import Plan
from lowbit.evaluation.prompts import validation_prompts
from lowbit.evaluation.recording import Side, Task
from lowbit.inputs.data import OmniDiffusionSamplingParams

SEEDS = (0, 1)
"""Every prompt is drawn with each."""

HEADER = (
    "| model | method | kernels | kept beyond the family's defaults | size | speed | peak memory |"
    " PSNR, median (worst) | SSIM | FLIP | device | figures |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def validation_plan(
    model: str | None,
    spec: Any,
    params: OmniDiffusionSamplingParams,
    *,
    dtype: str,
    device: str | None,
    calibration_prompts: tuple[str, ...] = (),
    attention_quantization: str | Mapping[str, str | None] | None = None,
) -> Plan:
    """Return the comparison of ``spec`` with the unquantized model: twelve prompts, two seeds, one warm-up."""
    reference = Side(name="reference", model=model, dtype=dtype, device=device)
    candidate = replace(
        reference,
        name="candidate",
        quantization_config=spec,
        calibration_prompts=calibration_prompts,
        attention_quantization=attention_quantization,
    )
    task = Task(prompts=validation_prompts(model), seeds=SEEDS, params=params, warmup_runs=1)
    return Plan(reference=reference, candidate=candidate, task=task, perceptual=True)


@dataclass(frozen=True)
class Row:
    """What the table says of one validation.

    Attributes:
        model: its name.
        method: and its options.
        kernels: that computed it.
        ignored_layers: kept beyond the defaults of the model's family.
        bytes_before: of the quantized components as they are.
        bytes_after: quantized.
        speed: the reference's time over the candidate's.
        memory: the candidate's peak over the reference's.
        psnr_db: median and worst.
        ssim: median.
        flip: median.
        device: that it ran on.
    """

    model: str
    method: str
    kernels: str
    ignored_layers: str
    bytes_before: int
    bytes_after: int
    speed: float
    memory: float
    psnr_db: tuple[float, float]
    ssim: float
    flip: float
    device: str

    def markdown(self, link: str = "") -> str:
        """Return the row in Markdown; ``link`` leads to the JSON."""
        size = f"{self.bytes_before / 1e6:,.1f} → {self.bytes_after / 1e6:,.1f} MB"
        cells = [
            self.model,
            self.method,
            self.kernels,
            self.ignored_layers or "none",
            f"{size} ({self.bytes_after / self.bytes_before:.0%})",
            f"{self.speed:.2f} times",
            f"{self.memory:.2f} times",
            f"{self.psnr_db[0]:.1f} ({self.psnr_db[1]:.1f}) dB",
            f"{self.ssim:.4f}",
            f"{self.flip:.4f}",
            self.device,
            f"[json]({link})" if link else "",
        ]
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def row(result: Mapping[str, Any]) -> Row:
    """Return the row of a comparison's JSON.

    Raises:
        ConfigError: it is no validation: other prompts or seeds, or figures that are missing.
    """
    try:
        settings, summary = result["settings"], result["summary"]
        candidate, reference = result["candidate_generation"], result["reference_generation"]
        model = settings["candidate"]["model"]
        fixed = list(validation_prompts(model)) == settings["prompts"] and list(SEEDS) == settings["seeds"]
        if not fixed:
            raise ConfigError("Not a validation: made with other prompts or seeds than those of lowbit validate")
        manifests = list(result["candidate"]["manifests"].values())
        return Row(
            model=Path(result["candidate"]["model"]).name,
            method=_method(settings["candidate"]["quantization_config"])
            + _attention(result["candidate"].get("attention", {})),
            kernels=_kernels(manifests),
            ignored_layers=_ignored(settings["candidate"]["quantization_config"]),
            bytes_before=sum(manifest["bytes_before"] for manifest in manifests),
            bytes_after=sum(manifest["bytes_after"] for manifest in manifests),
            speed=reference["avg_generation_time_s"] / candidate["avg_generation_time_s"],
            memory=candidate["max_peak_memory_mb"] / reference["max_peak_memory_mb"],
            psnr_db=(float(summary["median"]["psnr_db"]), float(summary["worst"]["psnr_db"])),
            ssim=float(summary["median"]["ssim"]),
            flip=float(summary["median"]["flip"]),
            device=result["candidate"]["device_name"],
        )
    except (KeyError, TypeError) as error:
        raise ConfigError(f"Not a validation's JSON: {error} is missing or wrong") from error


def _method(config: Any) -> str:
    if isinstance(config, str):
        return config
    options = {key: value for key, value in config.items() if key not in ("method", "ignored_layers", "kernel")}
    shown = ", ".join(f"{key}={value}" for key, value in options.items())
    return f"{config['method']} ({shown})" if shown else str(config["method"])


def _attention(records: Mapping[str, Mapping[str, Any]]) -> str:
    found = sorted({f"{record['kind']} ({record['kernel']})" for record in records.values()})
    return f", attention {', '.join(found)}" if found else ""


def _ignored(config: Any) -> str:
    return ", ".join(f"`{name}`" for name in config.get("ignored_layers", [])) if isinstance(config, Mapping) else ""


def _kernels(manifests: Sequence[Mapping[str, Any]]) -> str:
    found = {layer["kernel"] for manifest in manifests for layer in manifest["layers"] if layer["kernel"]}
    return ", ".join(sorted(found))


def table(files: Iterable[Path], root: Path) -> str:
    """Return the Markdown table of validations' files, sorted by name; links are relative to ``root``.

    Raises:
        ConfigError: a file is not a validation's; names it.
    """
    rows = []
    for file in sorted(files):
        try:
            found = row(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, ConfigError) as error:
            raise ConfigError(f"{file}: {error}") from error
        rows.append(found.markdown(file.relative_to(root).as_posix()))
    return "\n".join([HEADER, *rows])
