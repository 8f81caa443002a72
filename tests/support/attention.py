"""Attention in float64, and inputs for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    """Sizes of an attention."""

    batch: int
    queries: int
    keys: int
    heads: int
    key_heads: int
    width: int


def make(
    case: Case, dtype: torch.dtype, masked: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return query, key, value and mask; keys and values have large means, as a model's have."""
    generator = torch.Generator().manual_seed(case.queries * 1000 + case.keys)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    query = normal(case.batch, case.queries, case.heads, case.width)
    key = normal(case.batch, case.keys, case.key_heads, case.width) + 4 * normal(case.key_heads, case.width)
    value = normal(case.batch, case.keys, case.key_heads, case.width) + normal(case.key_heads, case.width)
    mask = torch.rand(case.batch, case.keys, generator=generator) < 0.7 if masked else None
    if mask is not None:
        mask[:, 0] = True
    return query.to(dtype), key.to(dtype), value.to(dtype), mask


def exact(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    is_causal: bool = False,
) -> torch.Tensor:
    """Return unquantized attention in float64."""
    shared = query.shape[2] // key.shape[2]
    q, k, v = (tensor.double().transpose(1, 2) for tensor in (query, key, value))
    k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    scores = q @ k.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of what is expected."""
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=1e-30))
