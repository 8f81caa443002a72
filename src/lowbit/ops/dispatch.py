"""The one place where a kernel of an operation family is chosen.

A kernel is a module with what ``Kernel`` names, alike for every format and backend. Its table entry declares what it
can do beyond ``linear`` (``Implementation.capabilities``):

``"joint"``
    ``linears(x, layers, bias) -> list[Tensor]`` quantizes one input once for several layers.
``"gated"``
    ``gated_linear(x, layers, bias) -> Tensor``: silu of the first of two results times the second.
``"low_rank"``
    ``lowbit.ops.svdquant.product_operator`` multiplies with its numbers, and adds a low-rank product within.

Kernels that read the checkpoint's own layout take ``can_run``, ``prepare`` and ``restore`` from
``lowbit.ops.canonical``. Attention kernels have ``can_run`` and ``attention``.

A module is imported only once a device it serves is asked for, so a vendor's library is never imported without need.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol

import torch

from lowbit import env
from lowbit.errors import ConfigError, UnsupportedError, expected_one_of
from lowbit.ops.weight_format import PLAIN, Prepared, WeightFormat

logger = logging.getLogger(__name__)

AUTO = "auto"
INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ANY_DEVICE = frozenset({"any"})
LOW_RANK = frozenset({"low_rank"})


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
        dtype: of the activations and of the result: bfloat16, float16 or float32.
        out_features: N.
        in_features: K.
        format: of the weight, and what happens to activations.
    """

    device: torch.device
    dtype: torch.dtype
    out_features: int
    in_features: int
    format: WeightFormat = PLAIN


class Kernel(Protocol):
    """What multiplies by a quantized weight, whatever its format."""

    def can_run(self, problem: Problem) -> str | None:
        """Return why it can't run ``problem``, ``None`` when it can."""

    def prepare(self, tensors: Prepared, overwrite: bool = False) -> Prepared:
        """Bring a checkpoint's tensors to the kernel's layout; with ``overwrite`` possibly in the same memory."""

    def restore(self, prepared: Prepared) -> Prepared:
        """Undo ``prepare``, bit for bit."""

    def linear(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Compute x [..., K] -> [..., N] in ``x.dtype``."""


@dataclass(frozen=True)
class Implementation:
    """An entry of a family's table.

    Attributes:
        name: what the user types to ask for it, and what the manifest shows.
        module: dotted name of the module that holds its functions.
        devices: ``torch.device.type`` values it serves, or ``ANY_DEVICE``.
        slow: why ``auto`` should tell the user when it ends up here; empty for a fast path.
        automatic: whether ``auto`` may choose it; otherwise it must be asked for by name.
        is_weight_only: it multiplies unquantized activations, whatever the format asks for.
        capabilities: what it can do beyond ``linear``, see the module.
    """

    name: str
    module: str
    devices: frozenset[str]
    slow: str = ""
    automatic: bool = True
    is_weight_only: bool = False
    capabilities: frozenset[str] = frozenset()

    def load(self) -> Any:
        """Import and return the module that implements it."""
        return importlib.import_module(self.module)

    def refusal(self, problem: AnyProblem) -> str | None:
        """Return why it can't run ``problem``, or ``None`` when it can."""
        if self.devices != ANY_DEVICE and problem.device.type not in self.devices:
            return f"runs on {', '.join(sorted(self.devices))}, not on {problem.device.type}"
        try:
            kernel = self.load()
        except ImportError as error:
            return f"can't be imported ({error})"
        reason: str | None = kernel.can_run(problem)
        return reason


def taken_dtypes(implementation: Implementation, problem: Problem) -> frozenset[torch.dtype]:
    """Return the dtypes of activations that ``implementation`` takes for a ``problem`` that it can run."""
    others = (dtype for dtype in INPUT_DTYPES if dtype != problem.dtype)
    taken = (dtype for dtype in others if implementation.refusal(replace(problem, dtype=dtype)) is None)
    return frozenset((problem.dtype, *taken))


def requested_kernel(family: str, option: str = AUTO) -> str:
    """Resolve the kernel name: the option if it names one, else ``LOWBIT_<FAMILY>_KERNEL``, else ``auto``."""
    if option != AUTO:
        return option
    return env.read_kernel(family) or AUTO


def verdicts(table: Sequence[Implementation], problem: AnyProblem) -> Iterator[tuple[Implementation, str | None]]:
    """Yield every implementation in order of preference with its refusal (``None``: it can run)."""
    for implementation in table:
        yield implementation, implementation.refusal(problem)


def named(table: Sequence[Implementation], name: str) -> Implementation:
    """Return the implementation that ``name`` chose before; raises ``KeyError`` where the table has none."""
    for implementation in table:
        if implementation.name == name:
            return implementation
    raise KeyError(name)


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
            asked_for = isinstance(problem, Problem) and problem.format.activation is None
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
