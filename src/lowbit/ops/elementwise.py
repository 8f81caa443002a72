"""What transformers compute between products, each in one pass: root-mean-square norms with rotary embeddings, gates.

In eager mode plain torch passes over memory several times for each, in part in float32, and ``torch.compile`` leaves
the product of complex numbers to eager mode.
"""

from __future__ import annotations

import torch

from lowbit.ops.library import define_operator, register_kernel_lazily


def normalize(
    x: torch.Tensor, epsilon: float | None, weight: torch.Tensor | None, frequencies: torch.Tensor | None
) -> torch.Tensor:
    """Divide rows by the root of their mean square (Zhang and Sennrich, arXiv 1910.07467), then rotate their pairs.

    In float32, rounded once. ``y = x / sqrt(mean(x ** 2) + epsilon) * weight``; as complex numbers its pairs of
    neighbours are multiplied with ``frequencies`` (Su et al., arXiv 2104.09864).

    Args:
        x: [..., width] floating; with ``frequencies`` [batch, tokens, heads, width], the width even.
        epsilon: ``None`` leaves ``x`` undivided.
        weight: [width], or ``None``.
        frequencies: float32 [batch or 1, tokens, width / 2, 2], cosine and sine; ``None`` leaves pairs as they are.

    Returns:
        Like ``x``, dense.
    """
    check_normalized(x, weight, frequencies)
    result = x.float()
    if epsilon is not None:
        result = result * torch.rsqrt(result.square().mean(-1, keepdim=True) + epsilon)
    if weight is not None:
        result = result * weight.float()
    if frequencies is not None:
        cosine, sine = frequencies.unsqueeze(2).unbind(-1)
        real, imaginary = result.unflatten(-1, (-1, 2)).unbind(-1)
        rotated = (real * cosine - imaginary * sine, real * sine + imaginary * cosine)
        result = torch.stack(rotated, dim=-1).flatten(-2)
    return x.clone(memory_format=torch.contiguous_format) if result is x else result.to(x.dtype).contiguous()


def gate(x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return ``silu(x) * value``, in float32 and rounded once: both of one shape and floating dtype; dense."""
    if x.shape != value.shape or x.dtype != value.dtype:
        raise ValueError(f"gate and value differ: {x.dtype} {tuple(x.shape)}, {value.dtype} {tuple(value.shape)}")
    return (torch.nn.functional.silu(x.float()) * value.float()).to(x.dtype).contiguous()


def check_normalized(x: torch.Tensor, weight: torch.Tensor | None, frequencies: torch.Tensor | None) -> None:
    """Raise ``ValueError`` where the shapes of what ``normalize`` takes do not fit each other."""
    width = x.shape[-1]
    if weight is not None and weight.shape != (width,):
        raise ValueError(f"weight has to be [{width}], not {list(weight.shape)}")
    if frequencies is None:
        return
    batch = frequencies.shape[0]
    fits = x.dim() == 4 and batch in (1, x.shape[0]) and frequencies.shape == (batch, x.shape[1], width // 2, 2)
    if not fits or width % 2 or frequencies.dtype != torch.float32:
        raise ValueError(
            f"frequencies {frequencies.dtype} {list(frequencies.shape)} do not fit x {list(x.shape)}: they have to be"
            " float32 [batch or 1, tokens, width / 2, 2], x [batch, tokens, heads, width]"
        )


def _fake_normalize(
    x: torch.Tensor, epsilon: float | None, weight: torch.Tensor | None, frequencies: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty(x.shape)


def _fake_gate(x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


normalize_operator = define_operator(
    "normalize(Tensor x, float? epsilon, Tensor? weight, Tensor? frequencies) -> Tensor",
    normalize,
    _fake_normalize,
    differentiable=normalize,
)
gate_operator = define_operator("gate(Tensor x, Tensor value) -> Tensor", gate, _fake_gate, differentiable=gate)

for _name in ("normalize", "gate"):
    register_kernel_lazily(_name, "CPU", "lowbit.ops.cpu.elementwise")
