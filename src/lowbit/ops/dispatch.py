"""The one place where an implementation of an operation family is chosen.

An *implementation* is a module with four functions, named and typed alike in every backend (``linear`` takes
further scale tensors in some families):

``supports(problem) -> str | None``
    ``None`` when it can run the problem, otherwise the reason it can't.
``pack_weight(weight, overwrite=False) -> Tensor``
    canonical (checkpoint) layout to the layout its kernel reads; with ``overwrite`` possibly in the same memory.
``unpack_weight(packed) -> Tensor``
    the exact inverse.
``linear(x, packed, weight_scale, ...) -> Tensor``
    the computation.

A module may also have ``linears``, which takes lists of weights, scales and biases and quantizes one input once for all
layers, and ``gated_linear``, which takes two and returns silu of the first's result times the second's
(``lowbit.quantization.joint`` looks for them).

Those whose kernels read the checkpoint's own layout take the packing from ``lowbit.ops.canonical``.

The attention family has ``supports`` and ``attention`` (``lowbit.ops.attention``) in place of the four.

The module is imported only once a device it serves is asked for, so a vendor's library is never imported without need.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Protocol

import torch

from lowbit import env
from lowbit.errors import ConfigError, UnsupportedError, expected_one_of

logger = logging.getLogger(__name__)

AUTO = "auto"
ANY_DEVICE = frozenset({"any"})


class AnyProblem(Protocol):
    """What choosing needs to know of a problem; the rest is between the family and its implementations."""

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""


@dataclass(frozen=True)
class Problem:
    """What a linear layer asks of an implementation.

    Attributes:
        device: where the layer's tensors live.
        dtype: of the activations and of the result.
        out_features: N.
        in_features: K.
        activation_scheme: ``"dynamic"``, ``"static"``, or ``"none"`` for activations that are not to be quantized.
        weight_block_size: ``(rows, columns)`` of a weight block, ``None`` for one scale per output channel.
        weight_format: of a weight whose family has several, such as ``"mxfp4"`` or GGUF's ``"Q4_K"``; empty otherwise.
    """

    device: torch.device
    dtype: torch.dtype
    out_features: int
    in_features: int
    activation_scheme: str = "dynamic"
    weight_block_size: tuple[int, int] | None = None
    weight_format: str = ""


@dataclass(frozen=True)
class Implementation:
    """An entry of a family's table.

    Attributes:
        name: what the user types to ask for it, and what the manifest shows.
        module: dotted name of the module that holds its functions.
        devices: ``torch.device.type`` values it serves, or ``ANY_DEVICE``.
        slow: why ``auto`` should tell the user when it ends up here; empty for a fast path.
        automatic: whether ``auto`` may choose it; otherwise it must be asked for by name.
    """

    name: str
    module: str
    devices: frozenset[str]
    slow: str = ""
    automatic: bool = True

    def load(self) -> ModuleType:
        """Import and return the module that implements it."""
        return importlib.import_module(self.module)

    def refusal(self, problem: AnyProblem) -> str | None:
        """Return why it can't run ``problem``, or ``None`` when it can."""
        if self.devices != ANY_DEVICE and problem.device.type not in self.devices:
            return f"runs on {', '.join(sorted(self.devices))}, not on {problem.device.type}"
        try:
            module = self.load()
        except ImportError as error:
            return f"can't be imported ({error})"
        reason: str | None = module.supports(problem)
        return reason


def requested_kernel(family: str, option: str = AUTO) -> str:
    """Resolve the kernel name: the option if it names one, else ``LOWBIT_<FAMILY>_KERNEL``, else ``auto``."""
    if option != AUTO:
        return option
    return env.read_kernel(family) or AUTO


def verdicts(table: Sequence[Implementation], problem: AnyProblem) -> Iterator[tuple[Implementation, str | None]]:
    """Yield every implementation in order of preference with its refusal (``None``: it can run)."""
    for implementation in table:
        yield implementation, implementation.refusal(problem)


def select(family: str, table: Sequence[Implementation], problem: AnyProblem, option: str = AUTO) -> Implementation:
    """Choose the implementation of ``family`` for ``problem``.

    Args:
        family: ``"int8"``, ``"fp8"``, ``"attention"``: the module in ``ops`` whose table this is.
        table: implementations, the preferred first.
        problem: what the layer or the model asks for.
        option: a name from the table, or ``"auto"``. A named one is used or refused, never replaced.

    Raises:
        ConfigError: ``option`` names nothing in the table.
        UnsupportedError: nothing (or not the one named) can run the problem; lists every reason.
    """
    name = requested_kernel(family, option)
    candidates = [entry for entry in table if (entry.automatic if name == AUTO else entry.name == name)]
    if not candidates:
        source = f" of {env.kernel_variable(family)}" if option == AUTO else ""
        known = expected_one_of([AUTO, *(entry.name for entry in table)])
        raise ConfigError(f"Unknown {family} kernel: {name!r}{source}. {known}")
    refusals: list[str] = []
    for implementation, reason in verdicts(candidates, problem):
        if reason is None:
            asked_for = isinstance(problem, Problem) and problem.activation_scheme == "none"
            if name == AUTO and implementation.slow and not asked_for:
                _tell_once(family, implementation.name, implementation.slow, tuple(refusals))
            return implementation
        refusals.append(f"{implementation.name}: {reason}")
    raise UnsupportedError(
        f"No {family} kernel{'' if name == AUTO else f' named {name!r}'} can run {problem}", refusals
    )


@cache
def _tell_once(family: str, name: str, slow: str, refusals: tuple[str, ...]) -> None:
    because = "; ".join(refusals)
    logger.warning("%s runs with the %r kernel: %s.%s", family, name, slow, f" ({because})" if because else "")
