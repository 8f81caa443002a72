"""The linear layers of a transformer by shape: how often each runs, how fast, and how near to the machine's limit.

The transformer is run once on the meta device, where nothing is computed, to see every layer's rows and every
attention's sizes. Then each distinct shape is timed once per method, and the step's time is added up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from lowbit.bench.inputs import step_inputs
from lowbit.bench.limits import gemm_limits
from lowbit.bench.steps import DTYPES
from lowbit.bench.timing import alternate, summary, wait_for
from lowbit.bench.transformers import Subject
from lowbit.quantization.base import LinearMethod
from lowbit.quantization.factory import build_quant_config
from lowbit.quantization.plan import plan_layers, quantize_layer

MOST_ROWS = 4096  # more rows are timed as this many and scaled
MOST_QUERIES = 2048  # likewise of attention


@dataclass(frozen=True)
class LinearShape:
    """Linear layers of one shape.

    Attributes:
        rows: M, of the input.
        in_features: K.
        out_features: N.
        kept: why quantization leaves them as they are; empty where it doesn't.
        name: of one of them, with ``*`` for numbers.
    """

    rows: int
    in_features: int
    out_features: int
    kept: str
    name: str

    @property
    def operations(self) -> int:
        """Multiplications and additions of one layer."""
        return 2 * self.rows * self.in_features * self.out_features


@dataclass(frozen=True)
class AttentionShape:
    """Attentions of one shape: batch, heads, queries, keys and the size of a head."""

    batch: int
    heads: int
    queries: int
    keys: int
    head_size: int

    @property
    def operations(self) -> int:
        """Multiplications and additions of one attention's two products."""
        return 4 * self.batch * self.heads * self.queries * self.keys * self.head_size


@dataclass(frozen=True)
class Inventory:
    """What one step of a transformer computes: how often each shape occurs, and the weights of all linear layers."""

    linear: Mapping[LinearShape, int]
    attention: Mapping[AttentionShape, int]
    weights: int
    quantized_weights: int


class _AttentionWatch(TorchFunctionMode):
    """Counts calls of ``scaled_dot_product_attention`` by shape."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[AttentionShape] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(zip(("query", "key"), args, strict=False), **(kwargs or {}))
        if function is scaled_dot_product_attention:
            batch, heads, queries, size = given["query"].shape
            self.seen[AttentionShape(batch, heads, queries, given["key"].shape[-2], size)] += 1
        return function(*args, **(kwargs or {}))


def take_inventory(subject: Subject) -> Inventory:
    """Run a transformer on the meta device and count its linear layers and attentions by shape."""
    model = subject.empty().to(torch.bfloat16)
    kept = {
        name: "" if decision.method else decision.reason
        for name, decision in plan_layers(model, build_quant_config("int8")).items()  # type: ignore[arg-type]
    }
    calls: Counter[tuple[int, int, int, str]] = Counter()
    names: dict[tuple[int, int, int, str], str] = {}

    def watch(name: str, layer: nn.Linear) -> None:
        def hook(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            rows = given[0].numel() // layer.in_features
            key = (rows, layer.in_features, layer.out_features, kept[name])
            names.setdefault(key, ".".join("*" if part.isdigit() else part for part in name.split(".")))
            calls[key] += 1

        layer.register_forward_pre_hook(hook)

    for name in kept:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        watch(name, layer)
    with torch.no_grad(), torch.device("meta"), _AttentionWatch() as attention:
        model(**step_inputs(model, subject.workload, torch.bfloat16))
    weights = {name: model.get_parameter(f"{name}.weight").numel() for name in kept}
    return Inventory(
        {LinearShape(*key, names[key]): count for key, count in calls.items()},
        dict(attention.seen),
        sum(weights.values()),
        sum(count for name, count in weights.items() if not kept[name]),
    )


def _method(name: str) -> LinearMethod:
    config: Any = build_quant_config(name)
    method: LinearMethod = config.linear_method()
    return method


def product_type(method: str, device: torch.device) -> str:
    """Return the type that a method multiplies in on a device: ``"int8"``, ``"fp8"``, or a name of ``DTYPES``.

    A weight-only method multiplies in the activations' precision, ``"bf16"``.
    """
    if method in DTYPES:
        return method
    layer = quantize_layer(nn.Linear(64, 64, dtype=torch.bfloat16, device=device), _method(method))
    is_weight_only = layer.method.format.activation is None or layer.bound.implementation.is_weight_only
    return "bf16" if is_weight_only else layer.method.family


def time_linear(
    shape: LinearShape, methods: Sequence[str], device: torch.device, repetitions: int, budget: float
) -> dict[str, float]:
    """Return the seconds of a shape by method; of kept layers those of the unquantized methods alone."""
    rows = min(shape.rows, MOST_ROWS)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape.out_features, shape.in_features, generator=generator) * shape.in_features**-0.5
    x = torch.randn(rows, shape.in_features, generator=generator)
    cases = {}
    for method in methods:
        if method not in DTYPES and shape.kept:
            continue
        dtype = DTYPES.get(method, torch.bfloat16)
        layer: nn.Module = _plain_layer(weight.to(device, dtype))
        if method not in DTYPES:
            assert isinstance(layer, nn.Linear)
            layer = quantize_layer(layer, _method(method))
        cases[method] = _waiting(layer, x.to(device, dtype), device)
    seconds = alternate(cases, repetitions=repetitions, budget=budget, least=1)
    scale = shape.rows / rows
    return {method: summary(values)["median_ms"] / 1e3 * scale for method, values in seconds.items()}


def _plain_layer(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _waiting(function: Any, given: torch.Tensor, device: torch.device) -> Any:
    def call() -> None:
        with torch.no_grad():
            function(given)
        wait_for(device)

    return call


def time_attention(
    shape: AttentionShape, dtypes: Sequence[torch.dtype], device: torch.device, repetitions: int, budget: float
) -> dict[torch.dtype, float]:
    """Return the seconds of an attention by dtype."""
    queries = min(shape.queries, MOST_QUERIES)
    cases = {}
    for dtype in dtypes:
        query = torch.randn(shape.batch, shape.heads, queries, shape.head_size, dtype=dtype, device=device)
        key = torch.randn(shape.batch, shape.heads, shape.keys, shape.head_size, dtype=dtype, device=device)
        cases[str(dtype)] = _waiting(lambda q, k=key: scaled_dot_product_attention(q, k, k), query, device)
    seconds = alternate(cases, repetitions=repetitions, budget=budget, least=1)
    scale = shape.queries / queries
    return {dtype: summary(seconds[str(dtype)])["median_ms"] / 1e3 * scale for dtype in dtypes}


def measure_shapes(
    subject: Subject,
    methods: Sequence[str],
    device: torch.device,
    *,
    repetitions: int = 5,
    budget: float = 2.0,
    progress: bool = True,
) -> dict[str, Any]:
    """Time every distinct linear layer and attention of a transformer, and predict its step.

    Args:
        subject: the transformer; its weights are not needed.
        methods: names of ``DTYPES`` and quantization methods; the first of ``DTYPES`` among them, or else bf16, is what
            kept layers compute in and what speedups are over.
        device: where.
        repetitions: of each measurement.
        budget: seconds per measurement, beyond a warm-up and one repetition.
        progress: show a bar.

    Returns:
        ``limits``: type -> its fastest measured product, in operations per second; ``shapes``: a dictionary per shape;
        ``attention`` likewise; ``prediction``: method -> seconds of linear layers, attention and both, and speedup.
    """
    baseline = next((name for name in methods if name in DTYPES), "bf16")
    methods = list(dict.fromkeys([baseline, *methods]))
    inventory = take_inventory(subject)
    types = {method: product_type(method, device) for method in methods}
    total = len(inventory.linear) + len(inventory.attention) + len(set(types.values()))
    bar = tqdm(total=total, unit="shape", disable=not progress)
    limits = gemm_limits(sorted(set(types.values())), device, lambda text: _advance(bar, text))
    linear, attention = {}, {}
    for shape in sorted(inventory.linear, key=lambda one: -one.operations * inventory.linear[one]):
        _advance(bar, f"{shape.rows}x{shape.in_features}x{shape.out_features}")
        linear[shape] = time_linear(shape, methods, device, repetitions, budget)
    dtypes = list(dict.fromkeys(DTYPES.get(method, torch.bfloat16) for method in methods))
    for one in inventory.attention:
        _advance(bar, f"attention of {one.queries}")
        attention[one] = time_attention(one, dtypes, device, repetitions, budget)
    bar.close()
    return {
        "limits": limits,
        "shapes": [_shape_row(shape, inventory.linear[shape], linear[shape], types, limits) for shape in linear],
        "attention": [_attention_row(one, inventory.attention[one], attention[one]) for one in attention],
        "weights": inventory.weights,
        "quantized_weights": inventory.quantized_weights,
        "prediction": predict(inventory, linear, attention, methods, baseline),
    }


def _attention_row(shape: AttentionShape, count: int, seconds: Mapping[torch.dtype, float]) -> dict[str, Any]:
    times = {str(dtype).removeprefix("torch."): time for dtype, time in seconds.items()}
    return {**vars(shape), "count": count, "seconds": times}


def _advance(bar: Any, text: str) -> None:
    bar.set_postfix_str(text)
    bar.update()


def _shape_row(
    shape: LinearShape,
    count: int,
    seconds: Mapping[str, float],
    types: Mapping[str, str],
    limits: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    rates = {method: shape.operations / time for method, time in seconds.items()}
    return {
        **vars(shape),
        "count": count,
        "seconds": {method: round(time, 7) for method, time in seconds.items()},
        "operations_per_second": {method: round(rate) for method, rate in rates.items()},
        "of_limit": {
            method: round(rate / limits[types[method]]["operations_per_second"], 3) for method, rate in rates.items()
        },
    }


def predict(
    inventory: Inventory,
    linear: Mapping[LinearShape, Mapping[str, float]],
    attention: Mapping[AttentionShape, Mapping[torch.dtype, float]],
    methods: Sequence[str],
    baseline: str,
) -> dict[str, dict[str, float]]:
    """Add up a step's linear layers and attentions by method.

    Norms, modulation and everything else elementwise are left out, so that the step itself takes longer and its
    speedup is somewhat less.
    """
    found = {}
    for method in methods:
        layers = sum(
            count * linear[shape].get(method, linear[shape][baseline]) for shape, count in inventory.linear.items()
        )
        dtype = DTYPES.get(method, torch.bfloat16)
        mixing = sum(count * attention[one][dtype] for one, count in inventory.attention.items())
        found[method] = {"linear_seconds": layers, "attention_seconds": mixing, "seconds": layers + mixing}
    for figures in found.values():
        figures["speedup"] = round(found[baseline]["seconds"] / figures["seconds"], 3)
    return found
