"""Exporting the embedded model, interrupted or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowbit.engine.export import export_pipeline
from lowbit.quantization.manifest import Manifest

INT8 = {"transformer": {"method": "int8"}, "text_encoder": {"method": "fp8"}}


class InterruptedExportError(Exception):
    pass


def card(manifests: Any) -> str:
    return "\n".join(manifest.summary() for manifest in manifests.values())


def export(target: Path, spec: Any = INT8, model: str | None = None, after: Any = None, **options: Any) -> list[str]:
    """Export the embedded model and return the components that were written, in this order."""
    written: list[str] = []

    def report(name: str, manifest: Manifest | None) -> None:
        written.append(name)
        if after is not None:
            after(name)

    settings = {"device": "cpu", "dtype": "bf16", **options}
    export_pipeline(model, target, quantization_config=spec, card=card, report=report, **settings)
    return written


def stop_after(component: str) -> Any:
    def stop(name: str) -> None:
        if name == component:
            raise InterruptedExportError

    return stop
