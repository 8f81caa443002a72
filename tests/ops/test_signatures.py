"""Backends have their family's functions, argument by argument: drift would break callers on one device only."""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType

import pytest

from lowbit.ops import fp8, int8, mx, nvfp4
from lowbit.ops.dispatch import Implementation

FUNCTIONS = ("supports", "pack_weight", "unpack_weight", "linear")
BACKENDS = [
    pytest.param(family, implementation, id=f"{family.__name__.rsplit('.', 1)[-1]}-{implementation.module}")
    for family in (int8, fp8, mx, nvfp4)
    for implementation in family.IMPLEMENTATIONS
]


def arguments(module: ModuleType, function: str) -> list[tuple[str, object, object]]:
    parameters = inspect.signature(getattr(module, function)).parameters.values()
    return [(parameter.name, parameter.kind, parameter.default) for parameter in parameters]


@pytest.mark.parametrize(("family", "implementation"), BACKENDS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_same_arguments(family: ModuleType, implementation: Implementation, function: str) -> None:
    try:
        module = importlib.import_module(implementation.module)
    except ImportError as error:
        pytest.skip(f"{implementation.module} can't be imported here: {error}")
    assert arguments(module, function) == arguments(family, function)
