"""TeaCache: a step whose input has hardly changed reuses what the blocks added in the last one that ran.

Source: Liu et al., "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model", 2024 (arXiv 2411.19108).
Before each step the relative L1 change of the transformer's modulated input, put through a fitted polynomial, is added
up; while the sum is below the threshold the blocks are skipped and their last residual is added instead. The first and
the last step always run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lowbit.cache.base import Calls, GenerationCache, RequestCache, Skips
from lowbit.compat.parts.modules import qwen_modulated
from lowbit.errors import ConfigError, expected_one_of
from lowbit.models.tea_cache import find_coefficients

POWERS = 5

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Signal = Callable[[nn.Module, Tensor, Arguments], Tensor]


def _argument(arguments: Arguments, name: str, position: int) -> Any:
    args, kwargs = arguments
    return kwargs[name] if name in kwargs else args[position]


def _flux_signal(block: Any, hidden: Tensor, arguments: Arguments) -> Tensor:
    modulated: Tensor = block.norm1(hidden, emb=_argument(arguments, "temb", 2))[0]
    return modulated


def _qwen_signal(block: Any, hidden: Tensor, arguments: Arguments) -> Tensor:
    modulation = block.img_mod(_argument(arguments, "temb", 3)).chunk(2, dim=-1)[0]
    index = arguments[1].get("modulate_index")
    return qwen_modulated(block, block.img_norm1(hidden), modulation, index)


def _wan_signal(block: Any, hidden: Tensor, arguments: Arguments) -> Tensor:
    embedding: Tensor = _argument(arguments, "temb", 2)
    return embedding


def _z_image_signal(block: Any, hidden: Tensor, arguments: Arguments) -> Tensor:
    embedding = _argument(arguments, "adaln_input", 3)
    if embedding is None:
        raise ConfigError("tea_cache does not work with Z-Image's several pictures per request")
    scale = block.adaLN_modulation(embedding).unsqueeze(1).chunk(4, dim=2)[0]
    modulated: Tensor = block.attention_norm1(hidden) * (1.0 + scale)
    return modulated


@dataclass(frozen=True)
class Family:
    """How TeaCache meets a transformer of diffusers.

    Attributes:
        blocks: the lists of blocks to skip, in the order they run.
        two_streams: the blocks return (text's, picture's) hidden states, not the picture's alone.
        signal: (first block, hidden states, its arguments) -> what to compare between steps.
    """

    blocks: tuple[str, ...]
    two_streams: bool
    signal: Signal


FAMILIES: Mapping[str, Family] = {
    "FluxTransformer2DModel": Family(("transformer_blocks", "single_transformer_blocks"), True, _flux_signal),
    "QwenImageTransformer2DModel": Family(("transformer_blocks",), True, _qwen_signal),
    "WanTransformer3DModel": Family(("blocks",), False, _wan_signal),
    "ZImageTransformer2DModel": Family(("layers",), False, _z_image_signal),
}


class TeaCache(GenerationCache):
    """TeaCache.

    Attributes:
        rel_l1_thresh: how much accumulated change, relative to the blocks' contribution, to let pass. Larger is faster
            and farther from the exact picture.
        coefficients: five, from the fourth power to the constant; ``None``: those known for the model.
    """

    runs_compiled = True

    def __init__(self, rel_l1_thresh: float = 0.2, coefficients: Sequence[float] | None = None) -> None:
        number = isinstance(rel_l1_thresh, (int, float)) and not isinstance(rel_l1_thresh, bool)
        if not number or not math.isfinite(rel_l1_thresh) or rel_l1_thresh <= 0:
            raise ConfigError(f"rel_l1_thresh must be a positive number, not {rel_l1_thresh!r}")
        if coefficients is not None:
            values = list(coefficients)
            if len(values) != POWERS or not all(isinstance(value, (int, float)) for value in values):
                raise ConfigError(f"coefficients must be {POWERS} numbers, highest power first, not {coefficients!r}")
            coefficients = tuple(float(value) for value in values)
        self.rel_l1_thresh = float(rel_l1_thresh)
        self.coefficients = coefficients

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Return the names of ``cache_config``."""
        return ("rel_l1_thresh", "coefficients")

    def check(self, transformers: Mapping[str, nn.Module]) -> None:
        """Raise ``ConfigError`` for a transformer of no known family, or without coefficients."""
        for transformer in transformers.values():
            self._coefficients(transformer)

    def _coefficients(self, transformer: nn.Module) -> Sequence[float]:
        find_family(transformer)
        if self.coefficients is not None:
            return self.coefficients
        name = type(transformer).__name__
        found = find_coefficients(name, getattr(transformer, "config", {}))
        if found is None:
            raise ConfigError(
                f"No TeaCache coefficients are known for this {name}: fit them with `lowbit calibrate-cache` and give"
                " them in cache_config"
            )
        return found.values

    def install(self, transformers: Mapping[str, nn.Module]) -> None:
        """Let the transformers' blocks ask the running request whether to run."""
        for transformer in transformers.values():
            install(transformer)

    def begin(self, pipeline: Any, transformers: Mapping[str, nn.Module], steps: int) -> RequestCache:
        """Return the cache of a request."""
        policies = {
            name: Threshold(self._coefficients(transformer), self.rel_l1_thresh)
            for name, transformer in transformers.items()
        }
        return _Request(pipeline, transformers, steps, policies)


class Recording(GenerationCache):
    """Skips nothing and keeps the changes of every step, to fit coefficients to.

    Attributes:
        pairs: component -> (change of the signal, change of the residual) of every step.
    """

    def __init__(self) -> None:
        self.pairs: dict[str, list[tuple[float, float]]] = {}

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Return no names: it has no options."""
        return ()

    def check(self, transformers: Mapping[str, nn.Module]) -> None:
        """Raise ``ConfigError`` for a transformer of no known family."""
        for transformer in transformers.values():
            find_family(transformer)

    def begin(self, pipeline: Any, transformers: Mapping[str, nn.Module], steps: int) -> RequestCache:
        """Return what records a request."""
        recorders = {name: Recorder(self.pairs.setdefault(name, [])) for name in transformers}
        return _Request(pipeline, transformers, steps, recorders)


def find_family(transformer: nn.Module) -> Family:
    """Return how TeaCache meets a transformer; raises ``ConfigError`` for one of no known family."""
    name = type(transformer).__name__
    if name not in FAMILIES:
        raise ConfigError(f"tea_cache does not know {name}. {expected_one_of(FAMILIES)}")
    return FAMILIES[name]


class Policy(Protocol):
    """Decides which steps to skip, and is told of those that ran."""

    wants_residual_change: bool

    def skips(self, branch: Branch, change: float) -> bool:
        """Decide whether to skip after a relative L1 change of the signal."""
        ...

    def ran(self, branch: Branch, change: float | None, residual_change: float | None) -> None:
        """Take note that the blocks ran; the changes are ``None`` where there was nothing to compare with."""
        ...


class Threshold:
    """The decision of TeaCache."""

    wants_residual_change = False

    def __init__(self, coefficients: Sequence[float], threshold: float) -> None:
        self.coefficients, self.threshold = coefficients, threshold

    def skips(self, branch: Branch, change: float) -> bool:
        """Add the change up and compare."""
        branch.accumulated += max(0.0, polynomial(self.coefficients, change))
        return branch.accumulated < self.threshold

    def ran(self, branch: Branch, change: float | None, residual_change: float | None) -> None:
        """Forget what was accumulated: the blocks ran."""
        branch.accumulated = 0.0


def polynomial(coefficients: Sequence[float], value: float) -> float:
    """Evaluate a polynomial, highest power first."""
    result = 0.0
    for coefficient in coefficients:
        result = result * value + coefficient
    return result


@dataclass
class Recorder:
    """A policy that never skips and keeps (change of the signal, change of the residual) of every step."""

    pairs: list[tuple[float, float]] = field(default_factory=list)
    wants_residual_change = True

    def skips(self, branch: Branch, change: float) -> bool:
        """Return ``False``."""
        return False

    def ran(self, branch: Branch, change: float | None, residual_change: float | None) -> None:
        """Keep the pair, if there was a step before."""
        if change is not None and residual_change is not None:
            self.pairs.append((change, residual_change))


@dataclass
class Branch:
    """What is remembered of one branch of guidance."""

    signal: Tensor | None = None
    residual: Tensor | None = None
    accumulated: float = 0.0


class _Blocks:
    """The blocks of a transformer as one thing to run or to skip."""

    def __init__(self, family: Family, calls: Calls, steps: int, skips: Skips, policy: Policy, count: int) -> None:
        self.family, self.calls, self.steps, self.skips_made, self.policy = family, calls, steps, skips, policy
        self.count = count
        self.branches: dict[int, Branch] = {}
        self.branch = Branch()
        self.change: float | None = None
        self.skipping = False
        self.entered: Tensor | None = None

    def run(self, block: _Block, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a block by ``call``, or pass on what would have left it."""
        index = block.index
        hidden: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if index == 0:
            self._begin(block.module, hidden, (args, kwargs))
        last = index == self.count - 1
        if not self.skipping:
            output = call(*args, **kwargs)
            if last:
                self._end(output[1] if self.family.two_streams else output)
            return output
        if last:
            assert self.branch.residual is not None
            hidden = hidden + self.branch.residual
        if self.family.two_streams:
            return _argument((args, kwargs), "encoder_hidden_states", 1), hidden
        return hidden

    def _begin(self, block: nn.Module, hidden: Tensor, arguments: Arguments) -> None:
        step, number = self.calls.begin()
        self.branch = branch = self.branches.setdefault(number, Branch())
        signal = self.family.signal(block, hidden, arguments)
        self.change = _change(signal, branch.signal)
        fits = branch.residual is not None and branch.residual.shape == hidden.shape
        free = 0 < step < self.steps - 1 and self.change is not None and fits
        self.skipping = free and self.change is not None and self.policy.skips(branch, self.change)
        self.skips_made.note(step, self.skipping)
        branch.signal = signal
        self.entered = None if self.skipping else hidden

    def _end(self, hidden: Tensor) -> None:
        assert self.entered is not None
        residual = hidden - self.entered
        change = _change(residual, self.branch.residual) if self.policy.wants_residual_change else None
        self.policy.ran(self.branch, self.change, change)
        self.branch.residual, self.entered = residual, None


def _change(value: Tensor, former: Tensor | None) -> float | None:
    return relative_l1(value, former) if former is not None and former.shape == value.shape else None


def relative_l1(value: Tensor, former: Tensor) -> float:
    """Return ``mean |value - former| / mean |former|``; infinite where ``former`` is zero and ``value`` is not."""
    difference = (value.float() - former.float()).abs().mean()
    size = former.float().abs().mean()
    ratio = float(difference / size)
    return 0.0 if math.isnan(ratio) else ratio


@dataclass(frozen=True)
class _Block:
    """A block of the running request.

    Attributes:
        index: among the transformer's blocks, in the order they run.
        module: the block.
        blocks: the request's cache of that transformer.
    """

    index: int
    module: nn.Module
    blocks: _Blocks


# id of a block -> its place in the request that this thread runs.
_RUNNING: ContextVar[Mapping[int, _Block] | None] = ContextVar("lowbit_tea_cache", default=None)


class _Request(RequestCache):
    """What TeaCache remembers of one request."""

    def __init__(
        self, pipeline: Any, transformers: Mapping[str, nn.Module], steps: int, policies: Mapping[str, Policy]
    ) -> None:
        super().__init__()
        self.places: dict[int, _Block] = {}
        for name, transformer in transformers.items():
            install(transformer)
            found = find_blocks(transformer)
            calls, policy = Calls(pipeline), policies[name]
            shared = _Blocks(find_family(transformer), calls, steps, self.skips, policy, len(found))
            self.places.update({id(block): _Block(index, block, shared) for index, block in enumerate(found)})

    @contextmanager
    def working(self) -> Iterator[None]:
        """Be the request of this thread's calls."""
        token = _RUNNING.set(self.places)
        try:
            yield
        finally:
            _RUNNING.reset(token)


def find_blocks(transformer: nn.Module) -> list[nn.Module]:
    """Return the blocks that are skipped, in the order they run."""
    lists = [transformer.get_submodule(path) for path in find_family(transformer).blocks]
    return [block for part in lists if isinstance(part, nn.ModuleList) for block in part]


def install(transformer: nn.Module) -> None:
    """Give the blocks a subclass of their class whose calls ask the running request; once is enough.

    Only the call from outside is another: state dict, compiled forward and hooks of a block stay its own, and without
    a running request it does nothing else.
    """
    for block in find_blocks(transformer):
        if not hasattr(type(block), "lowbit_cached"):
            own: Any = type(block)
            block.__class__ = _cached_class(own)


@functools.cache
def _cached_class(base: Any) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        places = _RUNNING.get()
        place = None if places is None else places.get(id(self))
        if place is None:
            return base.__call__(self, *args, **kwargs)
        return place.blocks.run(place, functools.partial(base.__call__, self), args, kwargs)

    # Libraries know blocks by their class's name.
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), {"__call__": call, "lowbit_cached": True, **names})


@torch.no_grad()
def fit(pairs: Sequence[tuple[float, float]]) -> list[float]:
    """Fit the polynomial from the changes of the signal to those of the residual, by least squares in float64.

    Args:
        pairs: (change of the signal, change of the residual); at least five.

    Returns:
        Five coefficients, highest power first.

    Raises:
        ConfigError: too few pairs.
    """
    import numpy as np

    if len(pairs) < POWERS:
        raise ConfigError(f"{len(pairs)} steps are too few to fit {POWERS} coefficients: use more steps or prompts")
    signal, residual = np.array(pairs, dtype=np.float64).T
    return [float(value) for value in np.polyfit(signal, residual, POWERS - 1)]
