"""In auto-round's environment, without lowbit: what diffusers' own auto-round quantizer makes of a folder.

``benchmarks.auto_round_in_diffusers`` runs it: ``python benchmarks/auto_round_reader.py FOLDER DTYPE...`` prints JSON.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import torch

PACKAGES = ("auto-round", "diffusers", "torch", "transformers")


def effective_weight(layer: torch.nn.Module, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight [N, K] in float32 that a layer multiplies by, found by multiplying unit vectors."""
    bias = layer(torch.zeros(1, columns, dtype=dtype)).float()
    return (layer(torch.eye(columns, dtype=dtype)).float() - bias).t()


def converted(value: Any, dtype: torch.dtype) -> Any:
    """Return tensors, and lists of them, with the floating ones in ``dtype``."""
    if isinstance(value, list):
        return [converted(each, dtype) for each in value]
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@torch.no_grad()
def read(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Load ``folder/model`` and compare it with ``folder/expected.pt``.

    Returns:
        Layers that auto-round replaced and with what, the largest difference of a weight relative to the layer's
        largest, and the norm of the difference of outputs relative to that of the output.
    """
    kind = getattr(diffusers, json.loads((folder / "model" / "config.json").read_text())["_class_name"])
    model = kind.from_pretrained(folder / "model", torch_dtype=dtype)
    expected = torch.load(folder / "expected.pt", weights_only=True)
    replaced = {name: layer for name, layer in model.named_modules() if "auto_round" in type(layer).__module__}
    errors = []
    for name, weight in expected["weights"].items():
        found = effective_weight(model.get_submodule(name), weight.shape[1], dtype)
        errors.append(float((found - weight).abs().max() / weight.abs().max()))
    output = model(**{name: converted(value, dtype) for name, value in expected["inputs"].items()}, return_dict=False)[
        0
    ]
    output = torch.stack(output) if isinstance(output, list) else output
    difference = (output.float() - expected["output"]).norm() / expected["output"].norm()
    return {
        "layers": len(replaced),
        "classes": sorted({f"{type(layer).__module__}.{type(layer).__name__}" for layer in replaced.values()}),
        "same_layers": sorted(replaced) == sorted(expected["weights"]),
        "weight_error": max(errors),
        "output_difference": float(difference),
    }


def main() -> None:
    """Run the command line."""
    results = {}
    for dtype in sys.argv[2:]:
        try:
            results[dtype] = read(Path(sys.argv[1]), getattr(torch, dtype))
        except Exception as error:  # what the other tool can't read is a result
            results[dtype] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    assert "lowbit" not in sys.modules
    print(json.dumps({"results": results, "versions": {name: version(name) for name in PACKAGES}}))


if __name__ == "__main__":
    main()
