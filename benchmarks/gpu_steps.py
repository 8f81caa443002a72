"""The GPU benchmark's part that times whole transformer steps at true size, with random weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo
from torch import nn

from benchmarks.gpu_timing import Context, captured, describe, seconds_of, synchronize
from benchmarks.published_models import MODELS, PublishedModel
from lowbit.hosts.fused import fuse_elementwise
from lowbit.quantization import QuantizedLinear, quantize_model
from lowbit.quantization.manifest import Manifest

STEP_MODELS = ("z-image", "qwen-image")
SIDE = 128  # of the latents of a 1024x1024 picture
Step = Callable[[], torch.Tensor]
Row = dict[str, Any]
# No step of a kind is begun with fewer seconds left: compiling one model must leave time for the other's eager steps.
LEAST_SECONDS = {"eager": 15.0, "graph": 15.0, "compiled": 150.0}


def materialize(model: PublishedModel, device: torch.device, few_layers: bool = False) -> nn.Module:
    """Build the transformer on the meta device and give it random weights on ``device``."""
    transformer = model.components["transformer"].build(**(model.few_layers if few_layers else {}))
    transformer.to_empty(device=device)
    if hasattr(transformer, "pos_embed"):  # holds plain tensors, which the meta device made empty
        rope: Any = transformer.pos_embed
        transformer.pos_embed = type(rope)(theta=rope.theta, axes_dim=rope.axes_dim, scale_rope=rope.scale_rope)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02, generator=generator)
            else:
                parameter.fill_(1.0)
        for name, parameter in transformer.named_parameters():
            if name.endswith("bias") or "pad_token" in name:
                parameter.zero_()
    return transformer


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    """Return the modules that are compiled, one by one: those of the model's lists of blocks."""
    return [block for child in transformer.children() if isinstance(child, nn.ModuleList) for block in child]


def make_step(model: PublishedModel, transformer: Any, device: torch.device) -> Step:
    """Return a step on fixed random inputs for a 1024x1024 picture; it returns the prediction."""
    generator = torch.Generator(device).manual_seed(1)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=generator).bfloat16()

    time_step = torch.full((1,), 0.5, device=device, dtype=torch.bfloat16)
    if model.name == "z-image":
        latents, text = values(16, 1, SIDE, SIDE), values(model.text_tokens, 2560)
        return lambda: transformer([latents], time_step, [text], return_dict=False)[0][0]
    picture, text = values(1, (SIDE // 2) ** 2, 64), values(1, model.text_tokens, 3584)
    shapes = [[(1, SIDE // 2, SIDE // 2)]]
    return lambda: transformer(picture, text, None, time_step, shapes, return_dict=False)[0]


def time_step(step: Step, context: Context, kind: str, transformer: nn.Module) -> Row:
    """Return the milliseconds of a step run eagerly, replayed as a CUDA graph, or with compiled blocks."""
    with torch.no_grad():
        start = time.perf_counter()
        if kind == "compiled":
            for block in blocks_of(transformer):
                block.compile()
        call = captured([step], context.device) if kind == "graph" else step
        for _ in range(2):
            call()
        synchronize(context.device)
        prepared = time.perf_counter() - start
        samples = [seconds_of(call, context.device) for _ in range(context.rounds)]
    return {
        "milliseconds": round(1e3 * statistics.median(samples), 3),
        "spread": round((max(samples) - min(samples)) / statistics.median(samples), 3),
        "prepare_seconds": round(prepared, 1),
    }


def memory(device: torch.device) -> dict[str, float]:
    """Return gigabytes allocated now and at the peak since the last reset."""
    if device.type != "cuda":
        return {}
    return {
        "allocated_gb": round(torch.cuda.memory_allocated(device) / 1e9, 3),
        "peak_gb": round(torch.cuda.max_memory_allocated(device) / 1e9, 3),
    }


def reset_peak(device: torch.device) -> None:
    """Give freed memory back and begin a new peak."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def quantize(transformer: nn.Module, method: str, device: torch.device) -> Row:
    """Quantize in place; return what it took and how fast it read the unquantized weights."""
    reset_peak(device)
    synchronize(device)
    start = time.perf_counter()
    manifest: Manifest = quantize_model(transformer, method)
    synchronize(device)
    seconds = time.perf_counter() - start
    layers = [layer for layer in transformer.modules() if isinstance(layer, QuantizedLinear)]
    read = sum(2 * layer.in_features * layer.out_features for layer in layers)
    return {
        "seconds": round(seconds, 3),
        "gigabytes_per_second": round(read / seconds / 1e9, 2),
        "bytes_before": manifest.bytes_before,
        "bytes_after": manifest.bytes_after,
        "layers": {f"{name} ({kernel})": count for (name, kernel), count in manifest.by_kernel().items()},
        **memory(device),
    }


def measure(model: PublishedModel, transformer: nn.Module, precision: str, context: Context) -> Iterator[Row]:
    """Yield a row per way to run a step."""
    step = make_step(model, transformer, context.device)
    for kind in ("eager", "graph", *(("compiled",) if context.compile else ())):
        row: Row = {"model": model.name, "precision": precision, "kind": kind}
        if context.remaining < LEAST_SECONDS[kind]:
            yield {**row, "left_out": "no time"}
            continue
        reset_peak(context.device)
        try:
            row |= time_step(step, context, kind, transformer)
        except Exception as error:  # such as an operation that can't be captured
            row["error"] = describe(error)
            synchronize(context.device)
        yield {**row, **memory(context.device)}


def with_torchao(model: PublishedModel, context: Context) -> Iterator[Row]:
    """Time torchao's dynamic W8A8 on the layers lowbit quantizes, if it is installed."""
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError:
        context.notes.append("torchao is not installed")
        return
    from lowbit.quantization.methods.int8 import Int8Config
    from lowbit.quantization.plan import plan_layers

    transformer = materialize(model, context.device, context.few_layers)
    plan = plan_layers(transformer, Int8Config())
    chosen = {name for name, d in plan.items() if d.method is not None and not d.method.weight_only}
    quantize_(transformer, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda _, name: name in chosen)
    yield from measure(model, transformer, "torchao int8", context)


def steps(context: Context) -> Iterator[Row]:
    """Time steps in BF16, Int8 and FP8; BF16 before each of the two, so that a drift of the chip's clock is seen."""
    torch._dynamo.config.recompile_limit = 64  # every model's blocks share one code object
    for name in STEP_MODELS:
        model = MODELS[name]
        if name not in context.models:
            continue
        reference: torch.Tensor | None = None
        for method in ("int8", "fp8"):
            if context.remaining < 2 * LEAST_SECONDS["eager"]:
                context.notes.append(f"no time for {name} in {method}")
                return
            reset_peak(context.device)
            transformer = materialize(model, context.device, context.few_layers)
            yield {"model": name, "precision": "bf16", "kind": "weights", **memory(context.device)}
            if reference is None:
                yield from measure(model, transformer, "bf16", context)
            else:
                once = Context(context.device, context.models, context.deadline, compile=False, rounds=context.rounds)
                yield from measure(model, transformer, "bf16 again", once)
            transformer = _uncompiled(transformer)
            with torch.no_grad():
                reference = make_step(model, transformer, context.device)().float()
            taken = quantize(transformer, method, context.device)
            taken["fused"] = fuse_elementwise(transformer, device=context.device, dtype=torch.bfloat16)
            yield {"model": name, "precision": method, "kind": "quantizing", **taken}
            with torch.no_grad():
                result = make_step(model, transformer, context.device)().float()
            error = float((result - reference).norm() / reference.norm())
            yield {"model": name, "precision": method, "kind": "relative difference from bf16", "value": error}
            yield from measure(model, transformer, method, context)
            del transformer
        if name == STEP_MODELS[0]:
            yield from with_torchao(model, context)
        reset_peak(context.device)


def _uncompiled(transformer: nn.Module) -> nn.Module:
    for block in blocks_of(transformer):
        block._compiled_call_impl = None
    return transformer
