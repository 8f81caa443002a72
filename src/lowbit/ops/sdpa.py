"""Torch's scaled_dot_product_attention as an implementation of unquantized attention."""

from __future__ import annotations

import torch

from lowbit.ops.attention import UNQUANTIZED, AttentionProblem


def can_run(problem: AttentionProblem) -> str | None:
    """Return why it is not for ``problem``, or ``None``."""
    return None if problem.kind == UNQUANTIZED else "does not quantize"


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    kind: str,
) -> torch.Tensor:
    """Compute attention; arguments and result as in ``lowbit.ops.attention.attention``, the kind is ``UNQUANTIZED``.

    ``key_mask`` may be any mask that torch takes, boolean or added to the scores.
    """
    mask = key_mask[:, None, None, :] if key_mask is not None and key_mask.dim() == 2 else key_mask
    if key_mask is not None and key_mask.dim() == 2 and key_mask.shape != (query.shape[0], key.shape[1]):
        mask = key_mask  # [queries, keys]
    if is_causal and mask is not None:
        if mask.dtype != torch.bool:
            raise ValueError("A causal attention takes no mask that is added to its scores")
        mask = mask & torch.ones(query.shape[1], key.shape[1], dtype=torch.bool, device=query.device).tril()
        is_causal = False
    result = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return result.transpose(1, 2).contiguous()
