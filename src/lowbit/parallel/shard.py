"""Cutting quantized linear layers for tensor parallelism (Shoeybi et al., arXiv 1909.08053).

Column-parallel: each rank holds some output channels, and results are put side by side. Row-parallel: each rank holds
some input channels, and results are summed; the bias is added once. Where a tensor can be cut is data of the method
(``lowbit.quantization.tensors``).
"""

from __future__ import annotations

import torch

from lowbit.quantization.linear import QuantizedLinear
from lowbit.quantization.tensors import Along, check_cut


def shard_linear(layer: QuantizedLinear, along: Along, rank: int, ranks: int) -> QuantizedLinear:
    """Return the slice of ``layer`` that one of several ranks holds, on the same device; ``layer`` is unchanged.

    Args:
        layer: with its tensors, in whatever layout its kernel reads.
        along: ``"n"`` for column-parallel layers, ``"k"`` for row-parallel ones.
        rank: of the slice, from 0.
        ranks: number of slices.

    Returns:
        [N / ranks, K] or [N, K / ranks]. Of row-parallel slices the first has the bias.

    Raises:
        UnsupportedError: a slice would cut a group, a block or a byte; names the layer, the numbers and what would do.
    """
    rows, columns = layer.out_features, layer.in_features
    step = layer.method.cut_step(rows, columns, along)
    count = check_cut(layer.prefix or "layer", along, rows if along == "n" else columns, ranks, step)
    first = rank * count
    size = (count, columns) if along == "n" else (rows, count)
    has_bias = layer.bias is not None and (along == "n" or rank == 0)
    shard = QuantizedLinear(
        size[1], size[0], has_bias, layer.method, device="meta", dtype=layer.compute_dtype, prefix=layer.prefix
    )
    whole = layer.canonical()
    for spec in layer.method.specs(rows, columns):
        if spec.name in whole.quantized_names:
            part = spec.slice(whole.get_parameter(spec.name).data, along, first, count)
            shard.hold_tensor(spec.name, part.clone(memory_format=torch.contiguous_format))
        else:
            shard.drop_tensor(spec.name)
    if has_bias:
        bias = layer.bias.data
        shard.bias = torch.nn.Parameter(
            (bias[first : first + count] if along == "n" else bias).clone(), requires_grad=layer.bias.requires_grad
        )
    shard.owns_weight = True
    return shard.train(layer.training)
