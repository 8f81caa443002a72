"""Norms and rotary embeddings in float64, and inputs for them."""

from __future__ import annotations

import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def exact(
    x: torch.Tensor, epsilon: float | None, weight: torch.Tensor | None, frequencies: torch.Tensor | None
) -> torch.Tensor:
    """Return ``normalize`` in float64, by complex numbers."""
    result = x.double()
    if epsilon is not None:
        result = result / (result.square().mean(-1, keepdim=True) + epsilon).sqrt()
    if weight is not None:
        result = result * weight.double()
    if frequencies is not None:
        turned = torch.view_as_complex(result.unflatten(-1, (-1, 2)).contiguous())
        turned = turned * torch.view_as_complex(frequencies.double()).unsqueeze(2)
        result = torch.view_as_real(turned).flatten(-2)
    return result


def angles(batch: int, tokens: int, width: int) -> torch.Tensor:
    """Return cosine and sine of random angles, [batch, tokens, width / 2, 2]."""
    return torch.view_as_real(
        torch.polar(torch.ones(batch, tokens, width // 2), 7 * torch.randn(batch, tokens, width // 2))
    )


def is_near(result: torch.Tensor, expected: torch.Tensor, units: float = 0.5) -> bool:
    """Whether ``result`` is rounded once, by ``units``, after some errors of float32 as to the largest of its row."""
    once = torch.finfo(result.dtype).eps * units * expected.abs()
    error = (result.double() - expected).abs()
    smallest = torch.finfo(result.dtype).smallest_normal
    return bool((error <= 1.01 * once + 2e-6 * expected.abs().amax(-1, keepdim=True) + smallest).all())
