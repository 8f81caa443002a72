"""Tensors of codes: float8 and integers that stand for values only together with a scale.

A loader that takes codes for values computes garbage without an error. Integers never are values. Float8 codes are,
where a whole checkpoint was cast: no tensor has a scale. Beside tensors with a scale, codes without one are values only
if their magnitudes say so: scaled codes reach the largest number of their type (448 in e4m3), cast weights of trained
models stay far below.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lowbit.checkpoints.checks import FLOATS, TensorHeader
from lowbit.errors import CheckpointError

CAST: Mapping[str, torch.dtype] = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
"""Types that values may be cast to, as safetensors spells them."""
LARGEST_CAST_WEIGHT = 28.0
"""Of values cast to float8 beside scaled ones: a sixteenth of e4m3's largest number. The three weights of one attention
may share a scale, so that two of them stay below 448, but not by so much."""
LARGEST_CAST_VECTOR = 224.0
"""Of norms and biases, which no tool scales, and which are larger."""
SAMPLED = 8
"""Weights that are looked at in a checkpoint without any scale: if all reach half of 448, their scales were lost."""

Read = Callable[[str], torch.Tensor]


def is_codes(header: TensorHeader) -> bool:
    """Tell whether a tensor's type is none of the floating types that values have."""
    return header.dtype not in FLOATS


def scale_of(name: str, names: Collection[str]) -> str | None:
    """Return the name among ``names`` of the scale that belongs to the tensor ``name``, ``None`` if it has none."""
    owner, dot, last = name.rpartition(".")
    spellings = [f"{name}_scale", f"{name}_scale_inv", f"{name}_scales", f"{owner}{dot}scale_{last}", f"{name}.scale"]
    if last == "weight":
        spellings += [f"{owner}{dot}scale", f"{owner}{dot}scales", f"{owner}{dot}wscales", f"{owner}{dot}scale_inv"]
    return next((spelling for spelling in spellings if spelling in names), None)


def problems(codes: Mapping[str, TensorHeader], names: Collection[str], read: Read | None = None) -> dict[str, str]:
    """Return tensor -> why its codes are no values.

    Args:
        codes: name -> header of tensors that are to be taken for values, and are codes.
        names: of all the checkpoint's tensors.
        read: returns one of ``codes``; from its file, if it is not given.
    """
    get = read if read is not None else lambda name: read_codes(name, codes[name])
    found = {name: f"{header}" for name, header in codes.items() if header.dtype not in CAST}
    cast = [name for name in codes if name not in found]
    scales = {name: scale for name in cast if (scale := scale_of(name, names)) is not None}
    found.update({name: f"{codes[name]} with {scale}, which nothing applies" for name, scale in scales.items()})
    alone = {name: codes[name] for name in cast if name not in scales}
    return {**found, **cast_problems(alone, any(scale_of(name, names) is not None for name in names), get)}


def cast_problems(codes: Mapping[str, TensorHeader], others_have_scales: bool, read: Read) -> dict[str, str]:
    """Return tensor -> why its float8 codes, which have no scale, are no values.

    Args:
        codes: name -> header.
        others_have_scales: the checkpoint was not cast whole.
        read: returns one of ``codes``.
    """
    return _unlike_cast(codes, read) if others_have_scales else _lost_scales(codes, read)


def _unlike_cast(codes: Mapping[str, TensorHeader], read: Read) -> dict[str, str]:
    found = {}
    for name, header in codes.items():
        limit = LARGEST_CAST_WEIGHT if len(header.shape) > 1 else LARGEST_CAST_VECTOR
        largest = _largest(read(name))
        if not largest <= limit:
            found[name] = (
                f"{header} without a scale, which other tensors have, and its largest magnitude {largest:g} is a scaled"
                f" one's: cast weights stay below {limit:g}"
            )
    return found


def _lost_scales(codes: Mapping[str, TensorHeader], read: Read) -> dict[str, str]:
    matrices = [name for name, header in codes.items() if len(header.shape) > 1][:SAMPLED]
    magnitudes = [_largest(read(name)) for name in matrices]
    if len(magnitudes) < 2 or any(largest < LARGEST_CAST_VECTOR for largest in magnitudes):
        return {}
    return {
        name: f"{codes[name]}: no tensor has a scale, and weights reach {max(magnitudes):g} as scaled ones do"
        for name in codes
    }


def stand_ins(
    headers: Mapping[str, TensorHeader], names: Mapping[str, str], expected: Collection[str]
) -> dict[str, str]:
    """Return tensor -> why, for codes (``qweight``) in the place of a ``weight`` that a loader would make up.

    Args:
        headers: of the checkpoint.
        names: of ``headers`` to the model's.
        expected: names of the model's tensors.
    """
    present, found = set(names.values()), {}
    for stored, header in headers.items():
        name = names[stored]
        weight = f"{name.rpartition('.')[0]}.weight"
        if is_codes(header) and name not in expected and weight in expected and weight not in present:
            found[stored] = f"{header}, and {weight} is missing"
    return found


def _largest(codes: torch.Tensor) -> float:
    """Return the largest magnitude of float8 codes, infinite where some are NaN."""
    if codes.numel() == 0:
        return 0.0
    # Codes of magnitudes are in their order, NaN is above all.
    code = (codes.contiguous().view(torch.uint8) & 0x7F).amax().reshape(1)
    largest = float(code.view(codes.dtype).float())
    return float("inf") if math.isnan(largest) else largest


def read_codes(name: str, header: TensorHeader) -> torch.Tensor:
    """Return a tensor of a safetensors file.

    Raises:
        CheckpointError: it can't be read.
    """
    try:
        with safe_open(str(header.file), framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{header.file}: {name} can't be read: {error}") from error
    return tensor


def refuse(where: str, found: Mapping[str, str], cure: str) -> None:
    """Raise ``CheckpointError`` naming the tensors of ``found``, if there are any.

    Args:
        where: the model or file.
        found: tensor -> why it is refused.
        cure: what to do.
    """
    if found:
        listed = "; ".join(_grouped(found))
        raise CheckpointError(f"{where}: {len(found)} tensors are codes and not values: {listed}. {cure}")


def _grouped(found: Mapping[str, str]) -> Iterable[str]:
    """Yield tensors with their reasons, those of like names in one."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, reason in found.items():
        # Shapes tell kinds of layers apart, numbers within names do not.
        groups.setdefault((_without_numbers(name), _without_numbers(reason)), []).append(name)
    for names in groups.values():
        more = f" and {len(names) - 1} like it" if len(names) > 1 else ""
        yield f"{names[0]}{more} ({found[names[0]]})"


def _without_numbers(text: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".#", text)


def of_values(headers: Mapping[str, TensorHeader], floating: Callable[[str], Any]) -> dict[str, TensorHeader]:
    """Return those of ``headers`` that are codes and for which ``floating`` says that values are wanted."""
    return {name: header for name, header in headers.items() if is_codes(header) and floating(name)}
