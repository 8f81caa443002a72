"""Backends have their family's functions, argument by argument: drift would break callers on one device only."""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType

import pytest

from lowbit.ops import attention, fp8, gguf, int8, int8_static, mx, nvfp4, w4a4, w4a16, w8a16
from lowbit.ops.dispatch import Implementation

LINEAR = ("can_run", "prepare", "restore", "linear")
FUNCTIONS = {
    **dict.fromkeys((int8, int8_static, fp8, gguf, mx, nvfp4, w4a4, w4a16, w8a16), LINEAR),
    attention: ("can_run", "attention"),
}
FAMILIES = tuple(family for family in FUNCTIONS if family is not attention)
CAPABILITIES = {"joint": "linears", "gated": "gated_linear"}
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


@pytest.mark.parametrize("function", LINEAR)
def test_one_signature_for_every_format(function: str) -> None:
    assert len({str(arguments(family, function)) for family in FAMILIES}) == 1


@pytest.mark.parametrize("implementation", [entry for family in FAMILIES for entry in family.IMPLEMENTATIONS])
def test_capabilities_are_declared_and_there(implementation: Implementation) -> None:
    module = pytest.importorskip(implementation.module, exc_type=ImportError)
    for capability, function in CAPABILITIES.items():
        assert (capability in implementation.capabilities) == (function in vars(module))
    assert implementation.capabilities <= {*CAPABILITIES, "low_rank"}
