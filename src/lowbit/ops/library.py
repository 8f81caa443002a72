"""The ``torch.library`` namespace ``lowbit::`` and the one way to define an operator in it."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from lowbit.compat.parts.tensors import below_autograd

NAMESPACE = "lowbit"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def define_operator(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    differentiable: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define ``lowbit::<name>`` with its reference for every device and its shape function.

    Where autograd would record a call, an operator without ``differentiable`` raises ``RuntimeError``: its result would
    have no gradient. ``lowbit.quantization.autograd`` differentiates whole layers.

    Args:
        schema: e.g. ``"int8_scaled_mm(Tensor x, ...) -> Tensor"``.
        reference: plain-torch implementation, the definition of the operator's numbers.
        fake: computes the results' shapes and dtypes without data (meta tensors, ``torch.compile``).
        differentiable: takes the place of the operator where autograd records: plain torch with the same arguments.

    Returns:
        The operator's default overload, callable.
    """
    name = schema.split("(", 1)[0].strip()
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    operator: Callable[..., Any] = getattr(getattr(torch.ops, NAMESPACE), name).default
    _library.impl(name, _recorded(name, operator, differentiable), "Autograd", with_keyset=True)
    return operator


def _recorded(name: str, operator: Callable[..., Any], differentiable: Callable[..., Any] | None) -> Callable[..., Any]:
    """Return what dispatch calls first for tensors that may require gradients."""
    redispatch, below = operator.redispatch, below_autograd()  # type: ignore[attr-defined]

    def recorded(keys: Any, *args: Any) -> Any:
        if not torch.is_grad_enabled() or not any(map(_requires_grad, args)):
            return redispatch(keys & below, *args)
        if differentiable is None:
            raise RuntimeError(
                f"{NAMESPACE}::{name} has no gradient: detach its inputs or call it under torch.no_grad(). Quantized"
                " layers have gradients"
            )
        return differentiable(*args)

    return recorded


def _requires_grad(argument: Any) -> bool:
    if isinstance(argument, list | tuple):
        return any(map(_requires_grad, argument))
    return isinstance(argument, torch.Tensor) and argument.requires_grad


def register_kernel(name: str, dispatch_key: str, kernel: Callable[..., Any]) -> None:
    """Give ``lowbit::<name>`` a faster implementation for a device (``dispatch_key``: ``"CPU"``, ``"CUDA"``...)."""
    _library.impl(name, kernel, dispatch_key)


def register_kernel_lazily(name: str, dispatch_key: str, module: str) -> None:
    """Like ``register_kernel`` with the function ``name`` of ``module``, which is imported at the first call."""

    @functools.cache
    def found() -> Callable[..., Any]:
        kernel: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return kernel

    def kernel(*args: Any, **kwargs: Any) -> Any:
        return found()(*args, **kwargs)

    register_kernel(name, dispatch_key, kernel)
