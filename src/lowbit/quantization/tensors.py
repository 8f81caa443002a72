"""What the tensors of a quantized layer are, as data: dtype, which dimension runs along N or K, and how.

A layer computes N output channels from K input channels. From a method's specs come a layer's empty parameters, the
checks of checkpoints, the bytes in manifests, and how a layer is cut into the slices that several ranks hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lowbit.errors import UnsupportedError

Along = Literal["n", "k"]
_CHANNELS = {"n": "output", "k": "input"}


@dataclass(frozen=True)
class Dim:
    """One dimension of a tensor.

    Attributes:
        along: ``"n"`` or ``"k"``: it runs along output or input channels; ``None``: its size is ``elements``.
        channels: the smallest number of channels that a cut can keep whole: a group, a block, the codes of a byte.
        elements: entries of the dimension for that many channels.
    """

    along: Along | None
    channels: int = 1
    elements: int = 1

    def size(self, features: int) -> int:
        """Return the extent for ``features`` channels; a last group that is not full counts."""
        return self.elements if self.along is None else -(-features // self.channels) * self.elements


N = Dim("n")
K = Dim("k")


def groups(dim: Dim, channels: int) -> Dim:
    """Return a dimension with one entry for each ``channels`` channels, such as a scale per group."""
    return Dim(dim.along, channels)


def blocks(dim: Dim, channels: int, elements: int) -> Dim:
    """Return a dimension with ``elements`` entries for each ``channels`` channels, such as the bytes of a block."""
    return Dim(dim.along, channels, elements)


def fixed(size: int) -> Dim:
    """Return a dimension that runs along no channels, such as a rank."""
    return Dim(None, elements=size)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a quantized layer.

    Attributes:
        name: of the parameter.
        dtype: of its elements.
        dims: its dimensions; none for one scale of the whole layer. A tensor without a dimension along the channels
            that are cut is the same on every rank.
        is_summed: it is added to the sum over input channels: of ranks that cut them one has it, the others zeros.
        counts_groups: it holds numbers of groups along K, from 0 on each rank.
    """

    name: str
    dtype: torch.dtype
    dims: tuple[Dim, ...] = ()
    is_summed: bool = False
    counts_groups: bool = False

    def shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Return its shape in a layer of ``out_features`` N and ``in_features`` K."""
        features = {"n": out_features, "k": in_features, None: 0}
        return tuple(dim.size(features[dim.along]) for dim in self.dims)

    def slice(self, tensor: torch.Tensor, along: Along, first: int, count: int) -> torch.Tensor:
        """Return the part of ``tensor`` for ``count`` channels from ``first`` on; both whole groups of every dimension.

        Views where they can be.
        """
        for index, dim in enumerate(self.dims):
            if dim.along == along:
                start, size = first // dim.channels * dim.elements, dim.size(count)
                tensor = tensor.narrow(index, start, size)
                if self.counts_groups and size:
                    tensor = tensor - tensor[0]
        return torch.zeros_like(tensor) if self.is_summed and along == "k" and first > 0 else tensor


def cut_step(specs: Sequence[TensorSpec], along: Along) -> int:
    """Return the number of channels whose multiples cut no group, block, byte or word of any tensor."""
    return math.lcm(*(dim.channels for spec in specs for dim in spec.dims if dim.along == along))


def check_cut(layer: str, along: Along, channels: int, ranks: int, step: int) -> int:
    """Return the channels of each of ``ranks`` equal slices.

    Args:
        layer: its name, for the message.
        along: the channels that are cut.
        channels: how many there are.
        ranks: number of slices.
        step: a slice is a multiple of this many, unless there is one alone.

    Raises:
        UnsupportedError: the channels can't be cut so; gives the numbers, and ranks that would do.
    """
    if ranks == 1 or channels % (ranks * step) == 0:
        return channels // ranks
    fitting = [str(count) for count in range(1, 17) if count == 1 or channels % (count * step) == 0]
    whole = f"a multiple of {step}" if step > 1 else "a whole number"
    raise UnsupportedError(
        f"{layer}: {channels} {_CHANNELS[along]} channels on {ranks} ranks: {channels} / {ranks} is not {whole}. Ranks"
        f" that divide it: {', '.join(fitting)}"
    )
