"""What smoothing and rotation gain and cost: error and time of an Int8 layer at Z-Image's width.

    python -m benchmarks.transforms --output benchmarks/results/transforms.json

Times are of whole linear layers in eager mode, in alternation; the error is the relative L2 against float64, with
ordinary activations and with a few channels 50 times as large.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.timing import alternate, summary, write
from lowbit.quantization.calibration.smoothing import smoothing_scale
from lowbit.quantization.methods.int8 import Int8Config
from lowbit.quantization.plan import quantize_layer

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"smoothing": 0.5},
    "rotation 16": {"rotation": 16},
    "rotation 64": {"rotation": 64},
    "rotation 256": {"rotation": 256},
    "smoothing, rotation 64": {"smoothing": 0.5, "rotation": 64},
}


def variant(linear: nn.Linear, x: torch.Tensor, options: dict[str, Any]) -> nn.Module:
    """Return ``linear`` in Int8 with these options, smoothed by ``x``."""
    scale = None
    changed = linear
    if "smoothing" in options:
        scale = smoothing_scale(x.abs().amax(dim=0), linear.weight.abs().amax(dim=0), options["smoothing"])
        changed = nn.Linear(linear.in_features, linear.out_features, bias=False, dtype=linear.weight.dtype)
        changed.weight.data = linear.weight.data / scale.to(linear.weight)
    return quantize_layer(changed, Int8Config(**options).linear_method(), mul_scale=scale)


def make_linear(width: int, features: int) -> nn.Linear:
    """Return a layer with normal weights, as trained ones nearly are (uniform ones would lose by being rotated)."""
    linear = nn.Linear(width, features, bias=False, dtype=torch.bfloat16)
    nn.init.normal_(linear.weight, std=width**-0.5)
    return linear.requires_grad_(False)


def errors(width: int, features: int, outliers: float) -> dict[str, float]:
    linear = make_linear(width, features)
    x = torch.randn(256, width, dtype=torch.bfloat16)
    x[:, :: width // 8] *= outliers
    exact = x.double() @ linear.weight.double().t()
    found = {}
    for name, options in VARIANTS.items():
        difference = variant(linear, x, options)(x).double() - exact
        found[name] = float(difference.norm() / exact.norm())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=3840)
    parser.add_argument("--features", type=int, default=3840)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 1088])
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args()
    torch.manual_seed(0)
    results: dict[str, Any] = {"width": options.width, "features": options.features, "times": {}, "relative_l2": {}}
    with torch.no_grad():
        for outliers in (1.0, 50.0):
            results["relative_l2"][f"channels x{outliers:g}"] = errors(options.width, options.features, outliers)
        linear = make_linear(options.width, options.features)
        for rows in options.rows:
            x = torch.randn(rows, options.width, dtype=torch.bfloat16)
            layers = {name: variant(linear, x, chosen) for name, chosen in VARIANTS.items()}
            cases = {name: (lambda layer=layer, x=x: layer(x)) for name, layer in layers.items()}
            times = {
                name: summary(values) for name, values in alternate(cases, repetitions=options.repetitions).items()
            }
            plain = times["plain"]["median_ms"]
            results["times"][f"m={rows}"] = {
                name: {**time, "over_plain": round(time["median_ms"] / plain, 3)} for name, time in times.items()
            }
    for name, found in results["relative_l2"].items():
        print(name, {variant: round(value, 5) for variant, value in found.items()})
    for name, found in results["times"].items():
        print(name, {variant: value["over_plain"] for variant, value in found.items()})
    if options.output is not None:
        write(options.output, results)


if __name__ == "__main__":
    main()
