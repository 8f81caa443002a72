"""Timing one step of a transformer in several precisions and libraries, in alternation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lowbit.bench.compilation import compilation_allowed, compile_blocks, nothing_new_compiled, warm_up
from lowbit.bench.inputs import Workload, step_inputs
from lowbit.bench.peers import PEERS, check_peers, quantize_with_peer
from lowbit.bench.timing import alternate, summary, wait_for
from lowbit.bench.transformers import share
from lowbit.errors import ConfigError, expected_one_of
from lowbit.hosts.attention import speed_up_attention
from lowbit.hosts.fused import fuse_elementwise
from lowbit.ops.cpu.memory import keep_freed_memory
from lowbit.quantization.factory import SUPPORTED_QUANTIZATION_METHODS
from lowbit.quantization.plan import quantize_model

COMPILED = "-compiled"
DTYPES: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEFAULT_ALLOCATOR, KEPT_ALLOCATOR = "system default", "freed memory kept"

Step = Callable[[], torch.Tensor]


@dataclass
class Variant:
    """The transformer in one precision, eager or compiled.

    Attributes:
        name: the precision, ``-compiled`` after it where it is.
        step: makes a step, waits for it, returns its result in float32 on the CPU.
        result: what a step returned.
        weight_bytes: of all parameters and buffers.
        about: kernels, versions, graphs: for the record.
    """

    name: str
    step: Step
    result: torch.Tensor
    weight_bytes: int
    about: dict[str, Any] = field(default_factory=dict)


def check_precisions(names: Sequence[str]) -> None:
    """Check names of precisions, ``-compiled`` after them or not.

    Raises:
        ConfigError: an unknown name, or a peer that isn't installed.
    """
    plain = [name.removesuffix(COMPILED) for name in names]
    known = [*DTYPES, *SUPPORTED_QUANTIZATION_METHODS, *PEERS]
    unknown = [name for name in plain if name not in known]
    if unknown:
        raise ConfigError(f"Unknown methods: {', '.join(unknown)}. {expected_one_of(known)}")
    check_peers([name for name in plain if name in PEERS])


def make_variants(
    base: nn.Module,
    names: Sequence[str],
    workload: Workload,
    dtype: torch.dtype,
    announce: Callable[[str], None] = lambda _: None,
) -> list[Variant]:
    """Build every variant from one model; the variants share its weights as far as they can.

    Args:
        base: the unquantized transformer.
        names: precisions (``DTYPES``, methods, peers), ``-compiled`` after them or not.
        workload: what a step is to make.
        dtype: of the activations of quantized variants.
        announce: told what is being prepared.
    """
    floating: dict[torch.dtype, nn.Module] = {}
    quantized_names: list[str] = []

    def unquantized(wanted: torch.dtype) -> nn.Module:
        if wanted not in floating:
            floating[wanted] = share(base, wanted)
        return floating[wanted]

    variants = []
    for precision in dict.fromkeys(name.removesuffix(COMPILED) for name in names):
        announce(f"preparing {precision}")
        if precision in DTYPES:
            model, about = unquantized(DTYPES[precision]), dict[str, Any]()
        elif precision in PEERS:
            quantized_names = quantized_names or _layers_to_quantize(unquantized(dtype))
            model, about = _with_peer(precision, unquantized(dtype), quantized_names, dtype)
        else:
            model, about = _with_lowbit(precision, unquantized(dtype), dtype)
        given = step_inputs(model, workload, DTYPES.get(precision, dtype))
        for name in (precision, precision + COMPILED):
            if name in names:
                announce(f"warming {name}")
                variants.append(_make_variant(name, model, given, about))
    return sorted(variants, key=lambda variant: names.index(variant.name))


def _layers_to_quantize(model: nn.Module) -> list[str]:
    """Return the names of the layers that lowbit's plainest method quantizes."""
    from lowbit.quantization.factory import build_quant_config
    from lowbit.quantization.plan import plan_layers

    config = build_quant_config("int8")
    return [name for name, decision in plan_layers(model, config).items() if decision.method]  # type: ignore[arg-type]


def _with_lowbit(method: str, model: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    copied = share(model)
    manifest = quantize_model(copied, method)
    setting: dict[str, Any] = {"device": next(model.parameters()).device, "dtype": dtype}
    attention, fused = speed_up_attention(copied, **setting), fuse_elementwise(copied, **setting)
    kernels = {kernel: count for (_, kernel), count in manifest.by_kernel().items()}
    return copied, {"kernels": kernels, "attention": "torch" if attention is None else attention.kernel, "fused": fused}


def _with_peer(
    peer: str, model: nn.Module, names: Sequence[str], dtype: torch.dtype
) -> tuple[nn.Module, dict[str, Any]]:
    copied = share(model)
    quantize_with_peer(peer, copied, names, dtype)
    entry = PEERS[peer]
    return copied, {"version": entry.version, "method": entry.what, "detail": entry.detail(), "layers": len(names)}


def _make_variant(name: str, model: nn.Module, given: Mapping[str, Any], about: Mapping[str, Any]) -> Variant:
    compiled = name.endswith(COMPILED)
    used = share(model) if compiled else model
    blocks = compile_blocks(used) if compiled else 0
    device = next(model.parameters()).device

    def step() -> torch.Tensor:
        with torch.no_grad():
            result = used(**given, return_dict=False)[0]
        first = result[0] if isinstance(result, list) else result
        wait_for(device)
        values: torch.Tensor = first.float().cpu()
        return values

    with compilation_allowed():
        result, compilation = warm_up(step, blocks)
    return Variant(name, step, result, _bytes(model), {**about, "compilation": compilation})


def _bytes(model: nn.Module) -> int:
    return sum(_tensor_bytes(tensor) for tensor in [*model.parameters(), *model.buffers()])


def _tensor_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor, or of those that a library's quantized tensor is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_tensor_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def time_variants(
    variants: Sequence[Variant],
    *,
    repetitions: int,
    budget: float = float("inf"),
    allocators: Sequence[str] = (DEFAULT_ALLOCATOR,),
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Time the variants in alternation; while timing, compiling anything is an error.

    Args:
        variants: all warm.
        repetitions: rounds.
        budget: seconds for each allocator; two rounds are made in any case.
        allocators: settings of the C library for all variants alike; the system's default can only come first.
        progress: show a bar.

    Returns:
        A dictionary per variant and allocator: times, ``speedup`` over every unquantized variant (``over_bf16``...),
        ``relative_error`` against float32 or the first variant, and what ``Variant.about`` holds.
    """
    if DEFAULT_ALLOCATOR in allocators[1:]:
        raise ConfigError("The system's allocator settings must come first: glibc can't be brought back to all of them")
    errors = relative_errors(variants)
    rows = []
    for allocator in allocators:
        if allocator == KEPT_ALLOCATOR and not keep_freed_memory():
            raise ConfigError("This C library has no mallopt: freed memory can't be kept")
        with nothing_new_compiled():
            cases = {variant.name: variant.step for variant in variants}
            title = allocator if progress else None
            warmup = int(allocator == KEPT_ALLOCATOR)  # all are warm, but kept memory fills at the first use
            seconds = alternate(cases, repetitions=repetitions, warmup=warmup, budget=budget, progress=title)
        times = {name: summary(values) for name, values in seconds.items()}
        rows += [_row(variant, times, allocator, errors[variant.name]) for variant in variants]
    return rows


def _row(variant: Variant, times: Mapping[str, dict[str, Any]], allocator: str, error: float) -> dict[str, Any]:
    own = times[variant.name]
    speedup = {
        f"over_{name}": round(time["median_ms"] / own["median_ms"], 3)
        for name, time in times.items()
        if name.removesuffix(COMPILED) in DTYPES
    }
    return {
        "variant": variant.name,
        "allocator": allocator,
        **own,
        "speedup": speedup,
        "weight_bytes": variant.weight_bytes,
        "relative_error": error,
        **variant.about,
    }


def relative_errors(variants: Sequence[Variant]) -> dict[str, float]:
    """Return the norm of each result's difference from float32's (or the first's) over its norm: sees a wrong scale."""
    reference = next((variant for variant in variants if variant.name == "fp32"), variants[0])
    expected = reference.step()
    return {variant.name: round(float((variant.step() - expected).norm() / expected.norm()), 6) for variant in variants}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as text: a line each, ratios over the first unquantized variant (or the first)."""
    speedups = list(rows[0]["speedup"])
    width = max(len(row["variant"]) for row in rows)
    head = f"{'variant':{width}} {'ms':>10} {'spread':>7} {'weights MB':>11} {'error':>9}"
    lines = [head + "".join(f" {name.replace('_', ' '):>19}" for name in speedups)]
    allocator = None
    for row in rows:
        if row["allocator"] != allocator:
            allocator = row["allocator"]
            lines.append(f"allocator: {allocator}")
        ratios = "".join(f" {row['speedup'][name]:>18.2f}x" for name in speedups)
        lines.append(
            f"{row['variant']:{width}} {row['median_ms']:10.1f} {row['spread']:7.2f} {row['weight_bytes'] / 1e6:11,.1f}"
            f" {row['relative_error']:9.2g}{ratios}"
        )
    return "\n".join(lines)
