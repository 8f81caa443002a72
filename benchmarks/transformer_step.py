"""Time one step of a Z-Image transformer of real width on the CPU: 8 bits against 16 and 32, and against peers.

    python -m benchmarks.transformer_step --quick
    python -m benchmarks.transformer_step --output benchmarks/results/transformer_step.json
    python -m benchmarks.transformer_step --variants bf16 int8 int8-compiled --repetitions 9 --keep-freed-memory

The model has the published width (3840, 30 heads) and few layers, random weights, and sees a 512x512 picture and 64
text tokens. All variants share one bfloat16 model's weights, quantize the same layers and are timed in alternation. A
variant of a library that isn't installed is left out and named.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from diffusers import ZImageTransformer2DModel
from torch import nn

from benchmarks.timing import alternate, summary, write
from lowbit.ops.cpu.memory import keep_freed_memory
from lowbit.quantization import QuantizedLinear, quantize_model

BASELINES = ("bf16", "bf16-compiled", "fp32")
COMPILED = "-compiled"
REQUIREMENTS = {"torchao": "torchao", "quanto": "optimum.quanto"}
VARIANTS = (
    *BASELINES,
    "int8",
    "int8-compiled",
    "fp8",
    "fp8-compiled",
    "torchao",
    "torchao-compiled",
    "quanto",
)
QUICK_VARIANTS = ("bf16", "fp32", "int8", "fp8")
TEXT_TOKENS, TEXT_WIDTH = 64, 2560


def make_model(layers: int, refiners: int) -> ZImageTransformer2DModel:
    """Return a bfloat16 model with random weights."""
    model = ZImageTransformer2DModel(n_layers=layers, n_refiner_layers=refiners, cap_feat_dim=TEXT_WIDTH)
    return model.to(torch.bfloat16).eval().requires_grad_(False)


def shallow_copy(model: ZImageTransformer2DModel) -> ZImageTransformer2DModel:
    """Return a model with the same tensors as parameters."""
    with torch.device("meta"):
        copied = ZImageTransformer2DModel.from_config(model.config)
    copied.load_state_dict(model.state_dict(), assign=True)
    return copied.eval().requires_grad_(False)


def quantized_layer_names(model: nn.Module) -> list[str]:
    """Return the names of the layers that lowbit quantizes, for the peers to quantize the same."""
    return [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]


def quantize_with_torchao(model: nn.Module, names: Sequence[str]) -> None:
    """Quantize with torchao's dynamic W8A8."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    chosen = set(names)
    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda _, name: name in chosen)


def quantize_with_quanto(model: nn.Module, names: Sequence[str]) -> None:
    """Quantize with optimum-quanto's int8 weights, which is what diffusers' quanto integration does."""
    from optimum.quanto import freeze, qint8, quantize

    quantize(model, weights=qint8, include=list(names))
    freeze(model)


def build(precision: str, base: ZImageTransformer2DModel, names: Sequence[str]) -> ZImageTransformer2DModel:
    """Return ``base`` in a precision; ``names``: the layers that peers quantize."""
    if precision == "bf16":
        return base
    model = shallow_copy(base)
    if precision == "fp32":
        return model.to(torch.float32)
    if precision in ("int8", "fp8"):
        quantize_model(model, precision)
    else:
        {"torchao": quantize_with_torchao, "quanto": quantize_with_quanto}[precision](model, names)
    return model


def inputs(model: ZImageTransformer2DModel, side: int) -> tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor]]:
    """Return latents of a picture of ``side`` pixels, the time and text features, in the model's dtype."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(16, 1, side // 8, side // 8, generator=generator).to(model.dtype)
    text = torch.randn(TEXT_TOKENS, TEXT_WIDTH, generator=generator).to(model.dtype)
    return [latents], torch.tensor([0.5], dtype=model.dtype), [text]


def make_step(model: ZImageTransformer2DModel, side: int, compiled: bool) -> Callable[[], torch.Tensor]:
    """Return a function that makes one step and returns the picture's prediction in float32."""
    given = inputs(model, side)
    stance = "default" if compiled else "force_eager"

    def step() -> torch.Tensor:
        with torch.no_grad(), torch.compiler.set_stance(stance):
            result: torch.Tensor = model(*given, return_dict=False)[0][0].float()
            return result

    return step


def make_steps(variants: Sequence[str], options: argparse.Namespace) -> dict[str, Callable[[], torch.Tensor]]:
    """Return the step of every variant; a model is built once for its eager and its compiled variant."""
    torch._dynamo.config.recompile_limit = 64  # every model's blocks share one code object
    base = make_model(options.layers, options.refiners)
    names: list[str] = []
    steps: dict[str, Callable[[], torch.Tensor]] = {}
    for precision in dict.fromkeys(variant.removesuffix(COMPILED) for variant in variants):
        if precision in REQUIREMENTS and not names:
            names = quantized_layer_names(build("int8", base, []))
        print(f"preparing {precision}", flush=True)
        model = build(precision, base, names)
        names = names or quantized_layer_names(model)
        if precision + COMPILED in variants:
            for block in [*model.noise_refiner, *model.context_refiner, *model.layers]:
                block.compile()
        for variant in (precision, precision + COMPILED):
            if variant in variants:
                steps[variant] = make_step(model, options.side, variant.endswith(COMPILED))
    return steps


def installed(variants: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide variants into those that can run and those whose library is missing."""
    present, missing = [], []
    for variant in variants:
        module = REQUIREMENTS.get(variant.removesuffix(COMPILED))
        found = module is None or (
            importlib.util.find_spec(module.split(".")[0]) is not None and importlib.util.find_spec(module) is not None
        )
        (present if found else missing).append(variant)
    return present, missing


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of what was expected: it sees a wrong scale."""
    return round(float((result - expected).norm() / expected.norm()), 5)


def report(steps: dict[str, Callable[[], torch.Tensor]], seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Print and return medians, ratios to the baselines and errors."""
    times = {variant: summary(values) for variant, values in seconds.items()}
    expected = steps["fp32" if "fp32" in steps else next(iter(steps))]()
    rows = []
    for variant, timed in times.items():
        speedup = {
            f"over_{baseline}": round(times[baseline]["median_ms"] / timed["median_ms"], 3)
            for baseline in BASELINES
            if baseline in times
        }
        error = relative_error(steps[variant](), expected)
        rows.append({"variant": variant, **timed, "speedup": speedup, "relative_error": error})
        shown = "  ".join(f"{name} {value:6.2f}" for name, value in speedup.items())
        print(f"{variant:18s}{timed['median_ms']:10.1f} ms  {shown}  spread {timed['spread']:.2f}  error {error}")
    return rows


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=None, help="default: all")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--refiners", type=int, default=1)
    parser.add_argument("--side", type=int, default=512, help="of the picture, in pixels (default 512)")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK_VARIANTS)}; three repetitions")
    parser.add_argument("--keep-freed-memory", action="store_true", help="see lowbit.ops.cpu.memory; for all alike")
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    return parser.parse_args(arguments)


def main() -> None:
    """Run the command line."""
    options = parse()
    if options.keep_freed_memory:
        keep_freed_memory()
    torch.manual_seed(0)
    variants, missing = installed(options.variants or (QUICK_VARIANTS if options.quick else VARIANTS))
    if missing:
        print(f"left out, not installed: {', '.join(missing)}")
    steps = make_steps(variants, options)
    seconds = alternate(steps, repetitions=3 if options.quick else options.repetitions)
    rows = report(steps, seconds)
    if options.output is not None:
        setting = {name: getattr(options, name) for name in ("layers", "refiners", "side", "keep_freed_memory")}
        write(options.output, {**setting, "tokens": (options.side // 16) ** 2 + TEXT_TOKENS, "results": rows})


if __name__ == "__main__":
    main()
