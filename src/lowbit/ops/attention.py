"""Attention whose products are made in 8 bits, quantized while running.

After SageAttention (Zhang et al., arXiv 2410.02367) and SageAttention2 (arXiv 2411.10958, "Efficient Attention with
Thorough Outlier Smoothing"; code: github.com/thu-ml/SageAttention): the mean over tokens is taken from the keys, which
softmax does not see and without which their outliers would take all the codes; queries and keys are quantized per
token; the softmax is quantized relative to its highest value. Here the values lose their mean too, which comes back
exactly, because the quantized weights of a row are divided by their own sum.

The reference here defines the numbers. Of a query's scores in powers of two (``scale * log2(e)`` in the query's
quantization scale), in blocks ``b`` of 64 keys ``j``::

    s[j]   = (q . k[j]) * q_scale * k_scale[j]                  q, k: codes of query and key - mean(key), per token
    top[b] = max of s[j] in b
    p[j]   = round(255 * 2 ** (s[j] - top[b]))                  "int8"; "fp8": e4m3(448 * 2 ** (s[j] - top[b]))
    w[b]   = 2 ** (top[b] - max of top)
    out    = sum_b w[b] v_scale[b] sum_j p[j] v[j] / sum_b w[b] sum_j p[j] + mean(value)

``v`` are the codes of value - mean(value), with a scale per block and channel. Codes are int8 in [-127, 127] or e4m3;
sums of int8 codes are exact in int32, all else is float32. Keys that a mask leaves out count nowhere: not in the means,
not in the scales. A query without keys gives zeros. NaN or infinity in a query gives NaN in its row, in a key NaN
everywhere in its head, in a value NaN in its channel of the head.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn.functional import pad

from lowbit.errors import ConfigError, expected_one_of
from lowbit.ops import fp8, int8
from lowbit.ops.dispatch import ANY_DEVICE, AUTO, Implementation, named, select
from lowbit.ops.library import define_operator

logger = logging.getLogger(__name__)

KINDS = ("int8", "fp8")
"""What attention can be quantized to."""
UNQUANTIZED = "none"
"""The kind that only chooses who computes."""

TORCH = "sdpa"
"""The implementation that is torch's own attention."""

BLOCK_KEYS = 64
LOG2_E = math.log2(math.e)
LARGEST_POWER = {"int8": 255.0, "fp8": 448.0}

# Scores that the reference holds at once.
SCORES_AT_ONCE = 1 << 22

IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("triton", "lowbit.ops.triton.attention", frozenset({"cuda", "xpu"})),
    Implementation("native", "lowbit.ops.cpu.attention", frozenset({"cpu"})),
    Implementation(TORCH, "lowbit.ops.sdpa", ANY_DEVICE),
    Implementation(
        "reference",
        "lowbit.ops.attention",
        ANY_DEVICE,
        slow="the reference holds scores in memory and is slow everywhere",
    ),
)


@dataclass(frozen=True)
class AttentionProblem:
    """What a model's attention asks of an implementation.

    Attributes:
        device: where queries, keys and values live.
        dtype: theirs, and the result's.
        kind: ``"int8"``, ``"fp8"`` or ``UNQUANTIZED``.
        head_dim: width of a head; ``None`` when it is not known yet.
    """

    device: torch.device
    dtype: torch.dtype
    kind: str
    head_dim: int | None = None


def select_kernel(problem: AttentionProblem, option: str = AUTO) -> str:
    """Return the name of the implementation for ``problem``; see ``dispatch.select`` for the option and the errors."""
    return select("attention", IMPLEMENTATIONS, problem, option).name


def check_kind(kind: str | None, option: str = "attention_quantization") -> str:
    """Return ``kind`` in its canonical spelling, ``UNQUANTIZED`` for ``None``.

    Raises:
        ConfigError: it is none of ``KINDS``.
    """
    known = (*KINDS, UNQUANTIZED)
    if kind is None:
        return UNQUANTIZED
    if not isinstance(kind, str) or kind.lower() not in known:
        raise ConfigError(f"Unknown {option}: {kind!r}. {expected_one_of(known)}")
    return kind.lower()


def check_shapes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Raise ``ValueError`` where the shapes of an attention's tensors don't fit each other; names both."""
    if query.dim() != 4 or key.dim() != 4:
        raise ValueError("query and key have to be [batch, tokens, heads, head_dim]")
    batch, _, heads, width = query.shape
    keys, key_heads = key.shape[1:3]
    if key.shape != (batch, keys, key_heads, width) or heads % max(key_heads, 1):
        raise ValueError(
            f"key {tuple(key.shape)} does not fit query {tuple(query.shape)}: batch and head_dim have to be equal, its"
            " heads a divisor of the query's"
        )
    if value.shape != key.shape:
        raise ValueError(f"value has to have the shape of key, {tuple(key.shape)}, not {tuple(value.shape)}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key and value have to have one dtype, not {query.dtype}, {key.dtype}, {value.dtype}")


def as_key_mask(mask: torch.Tensor, batch: int, keys: int) -> torch.Tensor | None:
    """Return bool [batch, keys], or ``None`` for a mask that is not boolean or not the same for all queries and heads.

    Args:
        mask: as diffusers' dispatcher takes it: bool [batch or 1, keys], or what broadcasts against
            [batch, heads, queries, keys].
        batch: size of the batch.
        keys: number of keys.
    """
    if mask.dim() == 4 and mask.shape[1:3] == (1, 1):
        mask = mask[:, 0, 0]
    if mask.dtype != torch.bool or mask.dim() != 2 or mask.shape[0] not in (1, batch) or mask.shape[1] != keys:
        return None
    return mask.expand(batch, keys)


def _run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    kind: str,
    kernel: str,
) -> torch.Tensor:
    """Compute attention with the implementation named ``kernel``.

    Args:
        query: [batch, queries, heads, head_dim].
        key: [batch, keys, key heads, head_dim].
        value: as ``key``.
        mask: see ``as_key_mask``; with another one than of keys attention is torch's, unquantized, which the log says.
        scale: of the scores.
        is_causal: query i sees the keys 0 ... i.
        kind: ``"int8"``, ``"fp8"`` or ``UNQUANTIZED``.
        kernel: a name in ``IMPLEMENTATIONS``.

    Returns:
        Like ``query``, dense.
    """
    check_shapes(query, key, value)
    if query.numel() == 0 or key.shape[1] == 0:
        return query.new_zeros(query.shape)
    key_mask = None if mask is None else as_key_mask(mask, query.shape[0], key.shape[1])
    if mask is not None and key_mask is None:
        if kind != UNQUANTIZED:
            _tell_once(
                f"{mask.dtype} {list(mask.shape)}" if mask.dim() < 3 else f"{mask.dtype}, {mask.dim()} dimensions"
            )
        kind, kernel, key_mask = UNQUANTIZED, TORCH, mask
    module = named(IMPLEMENTATIONS, kernel).load()
    result: torch.Tensor = module.attention(query, key, value, key_mask, scale, is_causal, kind)
    return result


@cache
def _tell_once(mask: str) -> None:
    logger.warning(
        "A mask (%s) is not a boolean one of keys: this attention is not quantized, torch computes it as it is", mask
    )


def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    kind: str,
    kernel: str,
) -> torch.Tensor:
    check_shapes(query, key, value)
    return query.new_empty(query.shape)


class StraightThroughAttention(torch.autograd.Function):
    """Attention by any kernel forward, the gradient of torch's unquantized attention backward."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        """Compute ``_run``."""
        query, key, value, mask, scale, is_causal, *_ = arguments
        ctx.save_for_backward(query, key, value, mask)
        ctx.setting = (scale, is_causal)
        return _run(*arguments)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of query, key and value: torch's attention is computed once more."""
        *inputs, mask = ctx.saved_tensors
        scale, is_causal = ctx.setting
        with torch.enable_grad():
            query, key, value = leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            result = _run(query, key, value, mask, scale, is_causal, UNQUANTIZED, TORCH)
            return *torch.autograd.grad(result, leaves, grad), *[None] * 5


attention_operator = define_operator(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, bool is_causal, str kind,"
    " str kernel) -> Tensor",
    _run,
    _fake,
    differentiable=StraightThroughAttention.apply,
)


# The reference as an implementation of the family.


def can_run(problem: AttentionProblem) -> str | None:
    """Return why the reference is not for ``problem``, or ``None``."""
    return None if problem.kind in KINDS else "quantizes: unquantized attention is torch's"


@torch.no_grad()
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    kind: str,
) -> torch.Tensor:
    """Compute attention in 8 bits.

    Args:
        query: [batch, queries, heads, head_dim] floating.
        key: [batch, keys, key heads, head_dim]; each of its heads serves heads / (key heads) of the query's, in order.
        value: as ``key``.
        key_mask: bool [batch, keys], ``False`` for keys to leave out; ``None`` keeps all.
        scale: of the scores, usually ``head_dim ** -0.5``.
        is_causal: query i sees the keys 0 ... i.
        kind: ``"int8"`` or ``"fp8"``.

    Returns:
        Like ``query``, dense.
    """
    shared = query.shape[2] // key.shape[2]
    keys, values = (_head_first(tensor).repeat_interleave(shared, dim=1) for tensor in (key, value))
    keep = None if key_mask is None else key_mask[:, None, :, None]
    keys, _ = _center(keys, keep)
    values, value_mean = _center(values, keep)
    key_codes, key_scale = _encode(keys, kind, -1)
    value_codes, value_scale = _encode(_in_blocks(values, -2, 0.0), kind, -2)
    query_codes, query_scale = _encode(_head_first(query), kind, -1)
    scores_of_a_query = query.shape[0] * query.shape[2] * (keys.shape[2] + value_scale.shape[2] * keys.shape[3])
    step = max(SCORES_AT_ONCE // scores_of_a_query, 1)
    parts = []
    for first in range(0, query.shape[1], step):
        part = slice(first, first + step)
        scores = query_codes[:, :, part] @ key_codes.transpose(-1, -2)
        scores = scores * (query_scale[:, :, part] * (scale * LOG2_E)) * key_scale.transpose(-1, -2)
        if keep is not None:
            scores = scores.masked_fill(~keep.transpose(-1, -2), -torch.inf)
        if is_causal:
            scores = scores.masked_fill(_future(first, scores), -torch.inf)
        parts.append(_soften(_in_blocks(scores, -1, -torch.inf), value_codes, value_scale, kind))
    result = torch.cat(parts, dim=2)
    result = torch.where(result.isneginf(), 0.0, result + value_mean)
    return result.transpose(1, 2).contiguous().to(query.dtype)


def _soften(scores: torch.Tensor, value_codes: torch.Tensor, value_scale: torch.Tensor, kind: str) -> torch.Tensor:
    """Return the weighted mean of values.

    Args:
        scores: [batch, heads, queries, blocks, 64], -inf where a key is left out.
        value_codes: [batch, heads, blocks, 64, head_dim].
        value_scale: [batch, heads, blocks, 1, head_dim].
        kind: of the codes.

    Returns:
        [batch, heads, queries, head_dim]; -inf for a query without keys.
    """
    top = scores.amax(dim=-1, keepdim=True)
    present = ~top.isneginf()
    powers = torch.exp2(scores - torch.where(present, top, 0.0)) * LARGEST_POWER[kind]
    codes = powers.round() if kind == "int8" else fp8.to_e4m3(powers).float()
    weight = torch.exp2(top - top.amax(dim=-2, keepdim=True)).where(present, 0.0)
    products = torch.einsum("bhqnk,bhnkd->bhqnd", codes, value_codes) * value_scale.transpose(2, 3)
    total = (weight * codes.sum(dim=-1, keepdim=True)).sum(dim=-2)
    return torch.where(total == 0, -torch.inf, (weight * products).sum(dim=-2) / total)


def _encode(values: torch.Tensor, kind: str, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes, as float32, and scales along ``dim``, as ``quantize_..._per_token`` finds them."""
    quantize = int8.quantize_int8_per_token if kind == "int8" else fp8.quantize_fp8_per_token
    codes, scale = quantize(values.transpose(dim, -1))
    return codes.float().transpose(dim, -1), scale.transpose(dim, -1)


def _center(values: torch.Tensor, keep: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``values`` [batch, heads, tokens, head_dim] less their mean over kept tokens, zero elsewhere, and it."""
    if keep is None:
        mean = values.mean(dim=2, keepdim=True)
        return values - mean, mean
    mean = values.where(keep, 0.0).sum(dim=2, keepdim=True) / keep.sum(dim=2, keepdim=True).clamp(min=1)
    return (values - mean).where(keep, 0.0), mean


def _head_first(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float().transpose(1, 2)


def _in_blocks(values: torch.Tensor, dim: int, filling: float) -> torch.Tensor:
    """Split dimension ``dim`` (-1 or -2) in blocks of 64, the last one filled up."""
    missing = -values.shape[dim] % BLOCK_KEYS
    padding = (0, missing) if dim == -1 else (0, 0, 0, missing)
    blocks: torch.Tensor = pad(values, padding, value=filling).unflatten(dim, (-1, BLOCK_KEYS))
    return blocks


def _future(first: int, scores: torch.Tensor) -> torch.Tensor:
    """Return bool [queries, keys]: which keys come after the queries, the first being number ``first``."""
    queries, keys = scores.shape[-2:]
    query = torch.arange(first, first + queries, device=scores.device)
    return torch.arange(keys, device=scores.device) > query[:, None]
