"""Backends have their family's functions, argument by argument: drift would break callers on one device only."""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType

import pytest

from lowbit.ops import attention, fp8, gguf, int8, int8_static, mx, nvfp4, w4a4, w4a16, w8a16
from lowbit.ops.dispatch import Implementation

LINEAR = ("supports", "pack_weight", "unpack_weight", "linear")
FUNCTIONS = {
    **dict.fromkeys((int8, int8_static, fp8, gguf, mx, nvfp4, w4a4, w4a16, w8a16), LINEAR),
    attention: ("supports", "attention"),
}
BACKENDS = [
    pytest.param(
        family, implementation, function, id=f"{family.__name__.rsplit('.', 1)[-1]}-{implementation.name}-{function}"
    )
    for family, functions in FUNCTIONS.items()
    for implementation in family.IMPLEMENTATIONS
    for function in functions
]


def arguments(module: ModuleType, function: str) -> list[tuple[str, object, object]]:
    parameters = inspect.signature(getattr(module, function)).parameters.values()
    return [(parameter.name, parameter.kind, parameter.default) for parameter in parameters]


@pytest.mark.parametrize(("family", "implementation", "function"), BACKENDS)
def test_same_arguments(family: ModuleType, implementation: Implementation, function: str) -> None:
    try:
        module = importlib.import_module(implementation.module)
    except ImportError as error:
        pytest.skip(f"{implementation.module} can't be imported here: {error}")
    assert arguments(module, function) == arguments(family, function)
