"""Compute the bytes of published models' weights: BF16, Int8 and 4 bits, with and without quantized text encoders.

    python -m benchmarks.memory_plan --output benchmarks/results/memory_plan.json

Every component is built on the meta device from its published configuration and goes through the same plan that
loading does. Nothing is measured and nothing is downloaded; activations come on top.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.published_models import MODELS, Component, PublishedModel
from lowbit.checkpoints import component as loading
from lowbit.engine.placement import find_embedding, find_layer
from lowbit.models.unused import UNUSED_LAYERS
from lowbit.quantization.base import QuantizationConfig
from lowbit.quantization.manifest import Manifest
from lowbit.quantization.methods.gguf import GgufConfig
from lowbit.quantization.methods.int8 import Int8Config
from lowbit.quantization.plan import make_manifest

INT8, Q4_K = Int8Config(), GgufConfig(gguf_type="Q4_K")
# Plan -> configuration of the transformers and of the text encoders.
PLANS: dict[str, tuple[QuantizationConfig | None, QuantizationConfig | None]] = {
    "bf16": (None, None),
    "int8": (INT8, None),
    "int8 + text encoder": (INT8, INT8),
    "Q4_K + int8 text encoder": (Q4_K, INT8),
}


def quantized(component: Component, config: QuantizationConfig) -> tuple[nn.Module, Manifest]:
    """Return the model and the manifest that loading ``component`` with ``config`` would give."""
    model = component.build()
    kept = {}
    if component.library == "transformers":
        from lowbit.hosts.transformers import kept_by_model

        kept = kept_by_model(model)
    preparation = loading.prepare(model, config, torch.bfloat16, kept=kept)
    for layer in preparation.layers.values():
        layer.method.create_weights(layer)  # as loaded: until then the unquantized weight's place is held
    return model, make_manifest(model, preparation.plan)


def device_bytes(model: nn.Module, unused: Sequence[str]) -> int:
    """Return the bytes of a model's tensors that ``Omni`` leaves on the device."""
    embedding = find_embedding(model)
    elsewhere = [find_layer(model, name) for name in unused] + ([embedding[1]] if embedding else [])
    return held_bytes(model) - sum(held_bytes(layer) for layer in elsewhere if layer is not None)


def held_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers, shared ones once."""
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def config_of(plan: str, component: str) -> QuantizationConfig | None:
    """Return the configuration that ``plan`` gives to a component."""
    transformers, text_encoders = PLANS[plan]
    if component.startswith("transformer"):
        return transformers
    return text_encoders if component.startswith("text_encoder") else None


def plan_model(model: PublishedModel) -> dict[str, Any]:
    """Return bytes per component and plan: of lowbit's, those on the device."""
    unused = UNUSED_LAYERS.get(model.pipeline, {})
    plans, summaries = {}, {}
    for plan in PLANS:
        parts = {}
        for name, component in model.components.items():
            config = config_of(plan, name)
            built = component.build()
            if config is not None:
                built, manifest = quantized(component, config)
                summaries[f"{plan}: {name}"] = manifest.summary()
            parts[name] = held_bytes(built) if plan == "bf16" else device_bytes(built, unused.get(name, ()))
        plans[plan] = {"total": sum(parts.values()), **parts}
    return {"title": model.title, "bytes": plans, "manifests": summaries}


def table(results: dict[str, Any]) -> str:
    """Return the totals in GB (1e9 bytes) and GiB, as Markdown."""
    lines = [f"| model | {' | '.join(PLANS)} |", "|---" * (1 + len(PLANS)) + "|"]
    for row in results.values():
        totals = [row["bytes"][plan]["total"] for plan in PLANS]
        cells = [f"{total / 1e9:.1f} GB ({total / 2**30:.1f} GiB)" for total in totals]
        lines.append(f"| {row['title']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse(arguments)
    results = {name: plan_model(MODELS[name]) for name in options.models}
    print(table(results))
    if options.output is not None:
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
