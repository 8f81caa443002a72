"""The fastest matrix product of a type that this machine was seen to make."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from lowbit.bench.steps import DTYPES
from lowbit.bench.timing import alternate, wait_for
from lowbit.compat.parts.tensors import fp8_product, int8_product
from lowbit.errors import UnsupportedError
from lowbit.ops.dispatch import Problem, verdicts
from lowbit.ops.weight_format import Prepared

# (M, K, N): large enough that starting and ending cost nothing.
CPU_SIZES = ((1024, 4096, 4096), (2048, 4096, 4096), (1024, 3072, 12288))
ACCELERATOR_SIZES = ((4096, 4096, 4096), (8192, 8192, 8192), (8192, 4096, 16384), (16384, 8192, 8192))
_BUDGET = 1.5  # seconds per size

Size = tuple[int, int, int]
Product = Callable[[], Any]


def gemm_limits(
    types: Sequence[str], device: torch.device, announce: Callable[[str], None] = lambda _: None
) -> dict[str, dict[str, Any]]:
    """Measure the fastest product of each type: the best of several sizes and of every way to compute it.

    Args:
        types: ``"int8"``, ``"fp8"``, or names of ``DTYPES``.
        device: where.
        announce: told which type is being measured.

    Returns:
        type -> ``operations_per_second`` (a multiplication and an addition are two), ``by`` (what made it) and ``size``
        [M, K, N].

    Raises:
        UnsupportedError: nothing here multiplies this type.
    """
    found = {}
    for kind in types:
        announce(f"limit of {kind}")
        rates: list[tuple[float, str, Size]] = []
        for size in CPU_SIZES if device.type == "cpu" else ACCELERATOR_SIZES:
            cases = dict(_products(kind, size, device))
            seconds = alternate(cases, repetitions=20, warmup=0, budget=_BUDGET, least=1)
            operations = 2 * size[0] * size[1] * size[2]
            rates += [(operations / min(times), name, size) for name, times in seconds.items()]
        if not rates:
            raise UnsupportedError(f"Nothing multiplies {kind} on {device}")
        rate, name, size = max(rates)
        found[kind] = {"operations_per_second": round(rate), "by": name, "size": list(size)}
    return found


def _products(kind: str, size: Size, device: torch.device) -> Iterator[tuple[str, Product]]:
    """Yield every way to make a product of this type and size that runs here, after trying it once."""
    rows, columns, features = size
    if kind in DTYPES:
        x = torch.randn(rows, columns, device=device).to(DTYPES[kind])
        weight = torch.randn(features, columns, device=device).to(DTYPES[kind])
        once = _waited(lambda: nn.functional.linear(x, weight), device)
        once()
        yield "torch", once
        return
    for name, product in [*_torch_products(kind, size, device), *_kernels(kind, size, device)]:
        try:
            product()
        except (RuntimeError, NotImplementedError, AttributeError):
            continue  # this way doesn't exist here; what runs is what is compared
        yield name, _waited(product, device)


def _torch_products(kind: str, size: Size, device: torch.device) -> Iterator[tuple[str, Product]]:
    rows, columns, features = size
    x = torch.randint(-127, 128, (rows, columns), device=device)
    weight = torch.randint(-127, 128, (features, columns), device=device)
    if kind == "int8":
        x8, weight8 = x.to(torch.int8), weight.to(torch.int8).t()
        yield "torch._int_mm", lambda: int8_product(x8, weight8)
    elif device.type != "cpu":  # a CPU's is not meant to be fast
        half, other = x.float().to(torch.float8_e4m3fn), weight.float().to(torch.float8_e4m3fn).t()
        one = torch.ones((), device=device)
        yield "torch._scaled_mm", lambda: fp8_product(half, other, one)


def _kernels(kind: str, size: Size, device: torch.device) -> Iterator[tuple[str, Product]]:
    """Yield lowbit's own kernels of a family, quantizing the input included; those known to be slow are left out."""
    rows, columns, features = size
    family: Any = importlib.import_module(f"lowbit.ops.{kind}")
    quantize = family.quantize_operator if kind == "int8" else family.quantize_per_token_operator
    half = torch.randn(features, columns, device=device, dtype=torch.bfloat16)
    x = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
    weight, scale = quantize(half)
    problem = Problem(device, torch.bfloat16, features, columns)
    for implementation, refusal in verdicts(family.IMPLEMENTATIONS, problem):
        if refusal is None and implementation.automatic and not implementation.slow:
            kernel: Any = implementation.load()
            prepared = kernel.prepare(Prepared(weight, scale))
            yield f"lowbit {implementation.name}", _call(kernel, x, prepared)


def _call(kernel: Any, x: torch.Tensor, prepared: Prepared) -> Product:
    return lambda: kernel.linear(x, prepared, None)


def _waited(product: Product, device: torch.device) -> Product:
    def call() -> None:
        with torch.no_grad():
            product()
        wait_for(device)

    return call
