"""From the names of single-file checkpoints, which are the reference implementations', to those of diffusers.

diffusers has a conversion function per model class. What such a function does (rename, split fused layers by rows, swap
halves) is found by giving it the numbers of rows in place of the weights; the same is then done to rows of whatever
type the file holds, one tensor at a time. So quantized weights need no conversion of their own.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowbit.errors import CheckpointError, UnsupportedError

logger = logging.getLogger(__name__)

# Of checkpoints that hold other models beside; some writers put one of them twice.
PREFIXES = ("model.diffusion_model.", "diffusion_model.")
# Of checkpoints whose tensors all have it.
SHARED_PREFIXES = ("net.", "transformer.")
# Tensors whose presence alone says something -> what of the model's configuration. Qwen-Image-Edit-2511 modulates
# reference pictures at timestep 0 (stable-diffusion.cpp's pull request 1146); ComfyUI's first FP8 files have the other.
MARKERS: Mapping[str, Mapping[str, Any]] = {"__index_timestep_zero__": {"zero_cond_t": True}, "scaled_fp8": {}}
# Row numbers are int64: half a gigabyte.
MOST_ROWS = 1 << 26
# Some of diffusers' functions split at rows of the published models' width. For another width every tensor gets as many
# row numbers as the widest tensor of such a model has: 7 * 3072, which 2 and 3 divide.
SCALED_ROWS = 21504


@dataclass(frozen=True)
class Rows:
    """Rows of a tensor of the file.

    Attributes:
        source: its name in the file, without its prefix.
        first, last: along dimension 0; ``last`` is not included.
    """

    source: str
    first: int
    last: int


Recipe = Mapping[str, tuple[Rows, ...]]
"""The model's name of a tensor -> the rows it is put together from."""


def strip_prefix(names: Collection[str]) -> dict[str, str]:
    """Return name without its prefixes -> name; where some names have one, the others belong to other models."""
    found = {name: name for name in names}
    prefix = _prefix(found)
    while prefix is not None:
        found = {name.removeprefix(prefix): stored for name, stored in found.items() if name.startswith(prefix)}
        prefix = _prefix(found)
    return found


def _prefix(names: Collection[str]) -> str | None:
    """Return a prefix to strip: one of ``PREFIXES`` that any name has, or of ``SHARED_PREFIXES`` that all have."""
    for prefix in PREFIXES:
        if any(name.startswith(prefix) for name in names):
            return prefix
    return next((prefix for prefix in SHARED_PREFIXES if names and all(n.startswith(prefix) for n in names)), None)


def take_markers(
    where: str, shapes: Mapping[str, Sequence[int]], expected: Collection[str]
) -> tuple[list[str], dict[str, Any]]:
    """Find the tensors that hold nothing: empty, or a single number that is neither the model's nor a scale.

    Args:
        where: the file, for a warning that names those lowbit does not know.
        shapes: name in the file, without its prefix -> extents.
        expected: the model's names.

    Returns:
        Their names, and what those of ``MARKERS`` say of the model's configuration.
    """
    found = [
        name
        for name, shape in shapes.items()
        if name in MARKERS or (_is_empty(shape) and name not in expected and "scale" not in name.rpartition(".")[2])
    ]
    unknown = sorted(set(found) - MARKERS.keys())
    if unknown:
        logger.warning("%s: ignored tensors that hold nothing, such as markers: %s", where, ", ".join(unknown))
    settings = {key: value for name in found for key, value in MARKERS.get(name, {}).items()}
    return found, settings


def _is_empty(shape: Sequence[int]) -> bool:
    return len(shape) == 0 or 0 in shape


def find_recipe(model: nn.Module, heights: Mapping[str, int]) -> tuple[Recipe, list[str]]:
    """Find out where the tensors of ``model`` are in a single-file checkpoint.

    Args:
        model: of diffusers, possibly on the meta device.
        heights: name in the file -> extent of dimension 0.

    Returns:
        The recipe, and the names that the conversion looked for in vain.

    Raises:
        UnsupportedError: the names are not the model's, and diffusers has no conversion for its class.
        CheckpointError: the conversion fails on these names.
    """
    expected = model.state_dict().keys()
    own: Recipe = {name: (Rows(name, 0, height),) for name, height in heights.items()}
    if heights.keys() <= expected or expected <= heights.keys():
        return own, []
    convert = _conversion(type(model))
    if convert is not None:
        converted, missing = _converted(convert, model, heights)
        if len(converted.keys() & expected) > len(own.keys() & expected):
            return converted, missing
    if 2 * len(own.keys() & expected) >= len(own):
        return own, []
    without = (
        "" if convert is not None else f", and diffusers has no conversion of single files to {type(model).__name__}"
    )
    shown = ", ".join(sorted(heights)[:3])
    raise UnsupportedError(f"the tensors are not those of {type(model).__name__} ({shown}, ...){without}")


def _converted(convert: Callable[..., Any], model: nn.Module, heights: Mapping[str, int]) -> tuple[Recipe, list[str]]:
    if sum(heights.values()) > MOST_ROWS:
        raise CheckpointError(f"{sum(heights.values())} rows are more than a model of this kind has")
    try:
        return _follow(convert, model, heights, heights)
    except (RuntimeError, IndexError):
        pass
    try:
        return _scaled(*_follow(convert, model, dict.fromkeys(heights, SCALED_ROWS), heights), heights)
    except (RuntimeError, IndexError) as error:
        raise CheckpointError(f"the tensors can't be converted to {type(model).__name__}'s ({error})") from error


def _conversion(kind: type) -> Callable[..., Any] | None:
    import diffusers
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES as CLASSES

    names = [base.__name__ for base in kind.__mro__ if getattr(diffusers, base.__name__, None) is base]
    found = next((CLASSES[name] for name in names if name in CLASSES), None)
    return None if found is None else found["checkpoint_mapping_fn"]


class _Numbers(dict[str, torch.Tensor]):
    """Row numbers by name; stands in for what is missing and takes note of it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.missing: list[str] = []

    def pop(self, name: str, *default: Any) -> Any:
        if name not in self and not default:
            return self[name]
        return super().pop(name, *default)

    def __missing__(self, name: str) -> torch.Tensor:
        self.missing.append(name)
        return torch.full((SCALED_ROWS,), -1)


def _follow(
    convert: Callable[..., Any], model: nn.Module, rows: Mapping[str, int], names: Collection[str]
) -> tuple[Recipe, list[str]]:
    """Convert row numbers and read the recipe off them."""
    ends = torch.tensor([rows[name] for name in names]).cumsum(0)
    numbers = _Numbers(
        (name, torch.arange(int(end) - rows[name], int(end))) for name, end in zip(names, ends, strict=True)
    )
    arguments: dict[str, Any] = {"checkpoint": numbers}
    if "config" in inspect.signature(convert).parameters:
        settings: Any = model.config
        arguments["config"] = dict(settings)
    try:
        converted = convert(**arguments)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the names can't be converted to {type(model).__name__}'s ({error!r})") from error
    missing = list(numbers.missing)
    order = list(names)
    recipe = {}
    for name, value in converted.items():
        if value.ndim == 1 and not bool((value < 0).any()):
            recipe[name] = _runs(value, ends, rows, order)
    return recipe, missing


def _runs(value: torch.Tensor, ends: torch.Tensor, rows: Mapping[str, int], order: list[str]) -> tuple[Rows, ...]:
    """Cut row numbers into runs of consecutive rows of one tensor."""
    tensor = torch.searchsorted(ends, value, right=True)
    breaks = ((value.diff() != 1) | (tensor.diff() != 0)).nonzero().flatten().tolist()
    found = []
    for first, last in zip([0, *(index + 1 for index in breaks)], [*breaks, len(value) - 1], strict=True):
        source = order[int(tensor[first])]
        start = int(ends[tensor[first]]) - rows[source]
        found.append(Rows(source, int(value[first]) - start, int(value[last]) - start + 1))
    return tuple(found)


def _scaled(recipe: Recipe, missing: list[str], heights: Mapping[str, int]) -> tuple[Recipe, list[str]]:
    """Bring rows among ``SCALED_ROWS`` to rows of the tensors."""

    def exact(number: int, source: str) -> int:
        row, rest = divmod(number * heights[source], SCALED_ROWS)
        if rest:
            raise CheckpointError(f"{source}: can't be cut as diffusers' conversion cuts it")
        return row

    scaled = {
        name: tuple(Rows(p.source, exact(p.first, p.source), exact(p.last, p.source)) for p in parts)
        for name, parts in recipe.items()
    }
    return scaled, missing
