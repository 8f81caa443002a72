"""The GPU benchmark's parts that work on single kernels: correctness, products, tiles, modulation, passes between."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

import lowbit.ops.triton.elementwise  # noqa: F401  (registers its kernels)
from benchmarks.gpu_timing import Call, Context, copies_for, describe, time_cases
from benchmarks.published_models import MODELS, gemm_shapes, weight_only_weights
from lowbit.ops import elementwise, fp8, int8, int8_weight_only
from lowbit.ops.triton import fp8 as triton_fp8
from lowbit.ops.triton import int8 as triton_int8
from lowbit.ops.triton.int8_weight_only import MOST_ROWS
from lowbit.ops.triton.launch import target_of
from lowbit.ops.triton.tiles import FP8, FP8_BLOCKS, INT8, Tile, choose_tile

Row = dict[str, Any]
BLOCK = [128, 128]
# Rows beside the models' own: one, fewer than a tile, ragged.
CORRECTNESS_SHAPES = ((1, 3072, 3072), (17, 1000, 515), (64, 3840, 3840), (300, 4096, 1537), (4096, 3840, 3840))
# Beyond the rounding of the result, as a share of the sum of the products' magnitudes: float32 sums, and Hopper's FP8,
# which keeps about 14 bits of a partial sum. Of norms and gates as a share of the largest in a row.
SUM_BOUND, FP8_BOUND, ELEMENTWISE_BOUND = 1e-6, 2.0**-12, 2e-6


def random(rows: int, columns: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Return normal values [rows, columns] in bfloat16 with an outlier channel and a row of zeros."""
    generator = torch.Generator(device).manual_seed(seed)
    values = torch.randn(rows, columns, device=device, generator=generator)
    values[:, columns // 3] *= 30
    values[1:][-1:] = 0  # unless it is the only one
    return values.bfloat16()


def operands(kind: str, m: int, k: int, n: int, device: torch.device, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Return x, its scale, a weight and its scale in the precision of ``kind``."""
    x, weight = random(m, k, device, seed), random(n, k, device, seed + 1)
    if kind == INT8:
        return *int8.quantize_operator(x), *int8.quantize_operator(weight)
    if kind == FP8:
        return *fp8.quantize_per_token_operator(x), *fp8.quantize_per_token_operator(weight)
    return *fp8.quantize_per_group_operator(x, BLOCK[1]), *fp8.quantize_per_block_operator(weight, BLOCK)


def product(kind: str, arguments: tuple[torch.Tensor, ...], tile: Tile | None = None) -> torch.Tensor:
    """Multiply what ``operands`` made, to bfloat16, with the table's tile or the one given."""
    if tile is not None:
        if kind == INT8:
            return triton_int8.multiply(*arguments, None, torch.bfloat16, tile)
        return triton_fp8.multiply(*arguments, None, torch.bfloat16, BLOCK if kind == FP8_BLOCKS else None, tile)
    if kind == INT8:
        result: torch.Tensor = int8.scaled_mm_operator(*arguments, None, torch.bfloat16)
    else:
        block = BLOCK if kind == FP8_BLOCKS else None
        result = fp8.scaled_mm_operator(*arguments, None, torch.bfloat16, block)
    return result


def exact_product(kind: str, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the product in float64 and the sum of its terms' magnitudes."""
    x, x_scale, weight, weight_scale = arguments
    if kind == FP8_BLOCKS:
        left = fp8.dequantize_fp8(x, x_scale, (1, BLOCK[1]), torch.float64)
        right = fp8.dequantize_fp8(weight, weight_scale, (BLOCK[0], BLOCK[1]), torch.float64)
    else:
        left, right = x.double() * x_scale.double(), weight.double() * weight_scale.double()
    return left @ right.t(), left.abs() @ right.abs().t()


def beyond_rounding(result: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor) -> float:
    """Return the worst error beyond bfloat16's rounding of the result, as a share of the terms' magnitudes."""
    error = (result.double() - exact).abs() - 2.0**-8 * exact.abs()
    return float((error.clamp(min=0) / magnitude.clamp(min=1e-30)).max())


def check_quantization(x: torch.Tensor) -> Iterator[Row]:
    """Compare quantization with its reference bit for bit."""
    groups = {"group_size": BLOCK[1]}
    for name, operator, reference in (
        ("quantize int8", int8.quantize_operator, int8.quantize_int8_per_token),
        ("quantize fp8", fp8.quantize_per_token_operator, fp8.quantize_fp8_per_token),
        (
            "quantize fp8 groups",
            partial(fp8.quantize_per_group_operator, **groups),
            partial(fp8.quantize_fp8_per_group, **groups),
        ),
    ):
        pairs = zip(operator(x), reference(x.cpu()), strict=True)
        same = all(torch.equal(a.float().cpu(), b.float()) for a, b in pairs)
        yield {"kernel": name, "shape": list(x.shape), "passed": same}


def check_weight_only(x: torch.Tensor, n: int) -> Row:
    """Compare the weight-only product with float64."""
    weight, scale = int8.quantize_operator(random(n, x.shape[1], x.device, 1))
    right = weight.double() * scale.double()
    exact, magnitude = x.double() @ right.t(), x.double().abs() @ right.abs().t()
    worst = beyond_rounding(int8_weight_only.product_operator(x, weight, scale, None), exact, magnitude)
    bound = SUM_BOUND if x.shape[0] <= MOST_ROWS and x.is_cuda else 2.0**-8  # elsewhere more is rounded to bfloat16
    shape = [*x.shape, n]
    return {"kernel": "int8 weight-only", "shape": shape, "error": worst, "bound": bound, "passed": worst <= bound}


def check_elementwise(device: torch.device) -> Iterator[Row]:
    """Compare norms with rotary embeddings, and gates, with float64."""
    x, value = random(2 * 77 * 6, 128, device), random(2 * 77 * 6, 128, device, 1)
    heads, weight = x.view(2, 77, 6, 128), 1 + random(1, 128, device, 2)[0]
    turns = torch.rand(1, 77, 64, device=device, generator=torch.Generator(device).manual_seed(0)).mul_(7)
    frequencies = torch.stack([turns.cos(), turns.sin()], dim=-1)
    normal = heads.double() / (heads.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    real, imaginary = normal.unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = frequencies.double().unsqueeze(2).unbind(-1)
    turned = torch.stack([real * cosine - imaginary * sine, real * sine + imaginary * cosine], dim=-1).flatten(-2)
    results = {
        "norm and rotary embedding": (elementwise.normalize_operator(heads, 1e-5, weight, frequencies), turned),
        "gate": (elementwise.gate_operator(x, value), torch.nn.functional.silu(x.double()) * value.double()),
    }
    for name, (result, exact) in results.items():
        worst = beyond_rounding(result, exact, exact.abs().amax(-1, keepdim=True))
        row: Row = {"kernel": name, "shape": list(result.shape), "error": worst, "bound": ELEMENTWISE_BOUND}
        yield {**row, "passed": worst <= ELEMENTWISE_BOUND}


def correctness(context: Context) -> Iterator[Row]:
    """Compare every kernel with float64, and quantization with its reference bit for bit."""
    for m, k, n in CORRECTNESS_SHAPES:
        x = random(m, k, context.device)
        yield from check_quantization(x)
        for kind in (INT8, FP8, FP8_BLOCKS):
            arguments = operands(kind, m, k, n, context.device)
            exact, magnitude = exact_product(kind, arguments)
            worst = beyond_rounding(product(kind, arguments), exact, magnitude)
            bound = SUM_BOUND if kind == INT8 else FP8_BOUND
            yield {"kernel": kind, "shape": [m, k, n], "error": worst, "bound": bound, "passed": worst <= bound}
        yield check_weight_only(x, n)
    yield from check_elementwise(context.device)


def shapes_of(context: Context) -> Counter[tuple[int, int, int]]:
    """Return the products of all chosen models, by how many operations they make up."""
    shapes: Counter[tuple[int, int, int]] = Counter()
    for name in context.models:
        for (m, k, n), count in gemm_shapes(MODELS[name]).items():
            shapes[m, k, n] += count * m * k * n
    return shapes


def scaled_mm(arguments: tuple[torch.Tensor, ...], fast: bool) -> torch.Tensor:
    """Multiply with torch's own row-wise scaled FP8 product."""
    x, x_scale, weight, weight_scale = arguments
    result: torch.Tensor = torch._scaled_mm(
        x, weight.t(), x_scale, weight_scale.t().contiguous(), out_dtype=torch.bfloat16, use_fast_accum=fast
    )
    return result


def torchao_linears(weights: list[torch.Tensor]) -> dict[str, list[Callable[[torch.Tensor], torch.Tensor]]]:
    """Return torchao's dynamic W8A8 layers, compiled, or nothing when it is not installed."""
    if importlib.util.find_spec("torchao") is None:
        return {}
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    layers = []
    for weight in weights:
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        quantize_(layer, Int8DynamicActivationInt8WeightConfig())
        layers.append(torch.compile(layer))
    return {"torchao int8 compiled, with quantization": layers}


def gemm_cases(m: int, k: int, n: int, device: torch.device) -> dict[str, list[Call]]:
    """Return what to time for one shape: products alone, and whole layers that start from bfloat16."""
    copies = copies_for(k * n)
    x = [random(m, k, device, copy) for copy in range(copies)]
    weights = [random(n, k, device, 100 + copy) for copy in range(copies)]
    sets = {kind: [operands(kind, m, k, n, device, copy) for copy in range(copies)] for kind in (INT8, FP8, FP8_BLOCKS)}
    cases: dict[str, list[Call]] = {
        "torch bf16": [partial(torch.nn.functional.linear, a, b) for a, b in zip(x, weights, strict=True)],
        **{f"lowbit {kind}": [partial(product, kind, given) for given in sets[kind]] for kind in sets},
        "torch._int_mm": [partial(torch._int_mm, a, b.t()) for a, _, b, _ in sets[INT8]],
        "torch._scaled_mm": [partial(scaled_mm, given, False) for given in sets[FP8]],
        "torch._scaled_mm fast": [partial(scaled_mm, given, True) for given in sets[FP8]],
        "lowbit int8, with quantization": [
            partial(_quantize_and_multiply, INT8, a, b) for a, b in zip(x, sets[INT8], strict=True)
        ],
        "lowbit fp8, with quantization": [
            partial(_quantize_and_multiply, FP8, a, b) for a, b in zip(x, sets[FP8], strict=True)
        ],
    }
    try:
        peers = torchao_linears(weights)
    except Exception as error:
        print(f"torchao: {describe(error)}")
        peers = {}
    return {**cases, **{name: [partial(f, a) for f, a in zip(peer, x, strict=True)] for name, peer in peers.items()}}


def _quantize_and_multiply(kind: str, x: torch.Tensor, given: tuple[torch.Tensor, ...]) -> torch.Tensor:
    quantize = int8.quantize_operator if kind == INT8 else fp8.quantize_per_token_operator
    return product(kind, (*quantize(x), *given[2:]))


def microseconds(seconds: dict[str, Any]) -> dict[str, Any]:
    """Return times in microseconds, messages as they are."""
    return {name: round(1e6 * v, 2) if isinstance(v, float) else v for name, v in seconds.items()}


def gemm(context: Context) -> Iterator[Row]:
    """Time the products of the models' layers, the weightiest shapes first."""
    for (m, k, n), weight in shapes_of(context).most_common():
        if context.remaining < 0:
            context.notes.append(f"no time for {[m, k, n]} and smaller")
            return
        seconds = time_cases(gemm_cases(m, k, n, context.device), context)
        rates = {name: 2e-12 * m * k * n / value for name, value in seconds.items() if isinstance(value, float)}
        yield {
            "shape": [m, k, n],
            "operations": weight,
            "microseconds": microseconds(seconds),
            "tera_operations": {name: round(rate, 1) for name, rate in rates.items()},
        }


def candidates(kind: str) -> list[Tile]:
    """Return the tiles worth trying on a Hopper GPU for products of many rows."""
    wide = [Tile(128, 256, 128, 8, 3), Tile(256, 128, 128, 8, 3), Tile(128, 256, 128, 8, 4)]
    square = [Tile(128, 128, 128, 8, stages) for stages in (3, 4, 5)] + [Tile(64, 256, 128, 4, 4)]
    small = [Tile(64, 128, 128, 4, stages) for stages in (3, 4)]
    tiles = (wide if kind == INT8 else []) + square[: 3 if kind != INT8 else 4] + small
    if kind == FP8:  # what Hopper's own accumulator would give: 14 bits
        tiles += [replace(tile, promoted=False) for tile in (*wide, square[1])]
    return [replace(tile, persistent=persistent) for tile in tiles for persistent in (True, False)]


def tune(context: Context) -> Iterator[Row]:
    """Time candidates for the tile tables on the weightiest shapes, and say which is the best beside the table's."""
    for m, k, n in [shape for shape, _ in shapes_of(context).most_common(5)]:
        for kind in (INT8, FP8, FP8_BLOCKS):
            if context.remaining < 0:
                context.notes.append(f"no time for {kind} {[m, k, n]}")
                return
            copies = copies_for(k * n)
            sets = [operands(kind, m, k, n, context.device, copy) for copy in range(min(copies, 4))]
            tiles = {str(tile): tile for tile in candidates(kind)}
            cases = {name: [partial(product, kind, given, tile) for given in sets] for name, tile in tiles.items()}
            cases["table"] = [partial(product, kind, given) for given in sets]
            seconds = time_cases(cases, context)
            rates = {name: 2e-12 * m * k * n / v for name, v in seconds.items() if isinstance(v, float)}
            best = max(rates, key=lambda name: rates[name])
            print(f"  {kind} {m}x{k}x{n}: best {rates[best]:.0f} with {best}; table {rates.get('table', 0):.0f}")
            table = str(choose_tile(kind, target_of(context.device), m, n))
            failed = {name: value for name, value in seconds.items() if isinstance(value, str)}
            yield {
                "kind": kind, "shape": [m, k, n], "table": table, "best": best, "failed": failed,
                "tera_operations": {name: round(rate, 1) for name, rate in sorted(rates.items(), key=lambda r: -r[1])},
            }  # fmt: skip


def modulation(context: Context) -> Iterator[Row]:
    """Time weight-only layers of one row, as modulation is, against BF16 and a plain decoding of the weight."""
    for name in context.models:
        if not weight_only_weights(MODELS[name]):
            continue
        k = 3072
        n = 6 * k
        x = random(1, k, context.device) + 1
        copies = copies_for(k * n)
        weights = [random(n, k, context.device, copy) for copy in range(copies)]
        quantized = [int8.quantize_operator(weight) for weight in weights]
        cases: dict[str, list[Call]] = {
            "torch bf16": [partial(torch.nn.functional.linear, x, weight) for weight in weights],
            "lowbit int8 weight-only": [
                partial(int8_weight_only.product_operator, x, weight, scale, None) for weight, scale in quantized
            ],
            "decoded": [partial(int8_weight_only.int8_weight_only_mm, x, w, s, None) for w, s in quantized],
        }
        seconds = time_cases(cases, context)
        yield {"shape": [1, k, n], "microseconds": microseconds(seconds)}
        return


def quantization(context: Context) -> Iterator[Row]:
    """Time row quantization: bytes read and written over time."""
    for m, k in ((4096, 3072), (4096, 3840), (4224, 3840), (4096, 12288)):
        xs = [random(m, k, context.device, copy) for copy in range(copies_for(2 * m * k))]
        cases: dict[str, list[Call]] = {
            "int8": [partial(int8.quantize_operator, x) for x in xs],
            "fp8": [partial(fp8.quantize_per_token_operator, x) for x in xs],
            "fp8 groups": [partial(fp8.quantize_per_group_operator, x, 128) for x in xs],
            "copy of as many bytes": [partial(_copy, x) for x in xs],
        }
        seconds = time_cases(cases, context)
        rates = {name: 3e-9 * m * k / v if isinstance(v, float) else v for name, v in seconds.items()}
        yield {"shape": [m, k], "gigabytes_per_second": rates}


def elementwise_kernels(context: Context) -> Iterator[Row]:
    """Time what lies between products in a Z-Image block, beside eager torch: bytes read and written over time."""
    tokens, heads, width, hidden = 4160, 30, 128, 10240
    device = context.device
    copies = copies_for(4 * tokens * hidden)
    queries = [random(tokens, heads * width, device, copy).view(1, tokens, heads, width) for copy in range(copies)]
    gates = [random(tokens, hidden, device, copy) for copy in range(copies)]
    weight = torch.ones(width, device=device, dtype=torch.bfloat16)
    turns = torch.rand(1, tokens, width // 2, device=device).mul_(7)
    frequencies = torch.stack([turns.cos(), turns.sin()], dim=-1)
    complex_frequencies = torch.view_as_complex(frequencies)

    def eager(x: torch.Tensor) -> torch.Tensor:
        normal = torch.nn.functional.rms_norm(x, (width,), weight, 1e-5)
        pairs = torch.view_as_complex(normal.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * complex_frequencies.unsqueeze(2)).flatten(-2).to(x.dtype)

    parts: dict[str, tuple[int, dict[str, list[Call]]]] = {
        "norm and rotary embedding": (
            4 * queries[0].numel(),
            {
                "lowbit": [partial(elementwise.normalize_operator, x, 1e-5, weight, frequencies) for x in queries],
                "torch eager": [partial(eager, x) for x in queries],
            },
        ),
        "gate": (
            6 * gates[0].numel(),
            {
                "lowbit": [partial(elementwise.gate_operator, x, x) for x in gates],
                "torch eager": [partial(lambda x: torch.nn.functional.silu(x) * x, x) for x in gates],
            },
        ),
    }
    for name, (moved, cases) in parts.items():
        seconds = time_cases(cases, context)
        rates = {way: 1e-9 * moved / v if isinstance(v, float) else v for way, v in seconds.items()}
        yield {"what": name, "tokens": tokens, "gigabytes_per_second": rates}


def _copy(x: torch.Tensor) -> torch.Tensor:
    # Three quarters of a clone's four bytes an element are the three of a quantization.
    rows = x.shape[0] * 3 // 4
    return x[:rows].clone()
