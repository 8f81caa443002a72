"""SVDQuant (Li et al., 2024): a low-rank product in 16 bits beside a 4-bit product of what it leaves.

``y = q(x / smooth_factor) W^T * wtscale * wcscales + x proj_down proj_up^T``, with the tensors as checkpoints have them
(vLLM-Omni's, row-major):

=================  ==============================================  ========================================
tensor             nvfp4                                           int4
=================  ==============================================  ========================================
``qweight``        int8 [N, K / 2]: e2m1, even column low          int8 [N, K / 2]: two's complement codes
``wscales``        e4m3 [K / 16, N]                                bfloat16 [K / 64, N]
``smooth_factor``  bfloat16 [K]                                    the same
``proj_down``      bfloat16 [K, rank]                              the same
``proj_up``        bfloat16 [N, rank]                              the same
``wcscales``       bfloat16 [N]                                    none
``wtscale``        bfloat16 [1]                                    none
=================  ==============================================  ========================================
"""

from __future__ import annotations

import torch

from lowbit.ops import nvfp4_weight_only, w4a16
from lowbit.ops.library import define_operator, register_kernel_lazily
from lowbit.ops.nvfp4 import dequantize_nvfp4
from lowbit.ops.w4a4 import dequantize_w4

# Columns beyond the rank, and passes over the matrix, of the randomized decomposition.
_OVERSAMPLING = 16
_PASSES = 4
_SEED = 0


def low_rank_factors(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors of a matrix's largest singular values: ``down`` [K, r] and ``up`` [N, r], float32.

    ``up @ down.T`` is near the closest matrix of that rank to ``matrix`` [N, K]; r is ``rank``, or N or K if that is
    smaller. Each factor takes the square root of the singular values. Randomized (Halko et al., 2011, algorithm 4.4:
    subspace iteration with orthonormalization) from a fixed seed, so that the same matrix gives the same factors.
    """
    matrix = matrix.float()
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= rank + _OVERSAMPLING:
        up, values, down = torch.linalg.svd(matrix, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(_SEED)
        start = torch.randn(matrix.shape[1], rank + _OVERSAMPLING, generator=generator).to(matrix.device)
        basis = torch.linalg.qr(matrix @ start)[0]
        for _ in range(_PASSES):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.t() @ basis)[0])[0]
        inner, values, down = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
        up = basis @ inner
    root = values[:rank].sqrt()
    return (down[:rank].t() * root).contiguous(), (up[:, :rank] * root).contiguous()


def svdquant_dequantize(
    qweight: torch.Tensor,
    wscales: torch.Tensor,
    smooth_factor: torch.Tensor,
    proj_down: torch.Tensor,
    proj_up: torch.Tensor,
    wcscales: torch.Tensor | None = None,
    wtscale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the float32 weight [N, K], for the input as it comes, of tensors as the table above has them.

    nvfp4 and int4 are told apart by the dtype of ``wscales``.
    """
    codes, scale = qweight.view(torch.uint8), wscales.t()
    if scale.dtype == torch.float8_e4m3fn:
        one = torch.ones((), device=qweight.device)
        weight = dequantize_nvfp4(codes, scale, one if wtscale is None else wtscale.float())
    else:
        weight = dequantize_w4(codes, scale)
    if wcscales is not None:
        weight = weight * wcscales.float().unsqueeze(1)
    return weight / smooth_factor.float() + proj_up.float() @ proj_down.float().t()


def nvfp4_svd_dequantize(
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    global_scale: torch.Tensor,
    pre_quant_scale: torch.Tensor,
    svdquant_lora_a: torch.Tensor,
    svdquant_lora_b: torch.Tensor,
) -> torch.Tensor:
    """Return the float32 weight [N, K], for the input as it comes, of ModelOpt's ``NVFP4_SVD``.

    ``y = z W^T + z svdquant_lora_a^T svdquant_lora_b^T`` with ``z = x * pre_quant_scale``, in ModelOpt's own names.

    Args:
        packed: e2m1 uint8 [N, K / 2].
        weight_scale: e4m3 [N, K / 16].
        global_scale: float32 [], ``weight_scale_2``.
        pre_quant_scale: [K], any floating dtype.
        svdquant_lora_a: [rank, K], any floating dtype.
        svdquant_lora_b: [N, rank], any floating dtype.
    """
    weight = dequantize_nvfp4(packed, weight_scale, global_scale)
    return (weight + svdquant_lora_b.float() @ svdquant_lora_a.float()) * pre_quant_scale.float()


def svdquant_weight_only_mm(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    global_scale: torch.Tensor | None,
    unsmoothed: torch.Tensor,
    proj_down: torch.Tensor,
    proj_up: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Add a low-rank product to that of unquantized activations and a 4-bit weight.

    Args:
        x: [M, K] floating, divided by ``smooth_factor``.
        packed: the weight as ``lowbit.ops.nvfp4.linear`` takes it, or as ``w4a4.pack_weight`` returns it.
        weight_scale: likewise: e4m3 [N, K / 16], or bfloat16 or float32 [N, K / 64].
        global_scale: float32 [], of NVFP4; ``None`` for int4.
        unsmoothed: [M, K] in ``x.dtype``, the activations as they come.
        proj_down: [K, rank] in ``x.dtype``.
        proj_up: [N, rank] in ``x.dtype``.
        bias: [N] or ``None``.

    Returns:
        [M, N] in ``x.dtype``.
    """
    if global_scale is None:
        result: torch.Tensor = w4a16.product_operator(x, packed.view(torch.uint8), weight_scale, bias)
    else:
        result = nvfp4_weight_only.product_operator(x, packed, weight_scale, bias, global_scale)
    return result.addmm_(unsmoothed @ proj_down, proj_up.t())


def _fake(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    global_scale: torch.Tensor | None,
    unsmoothed: torch.Tensor,
    proj_down: torch.Tensor,
    proj_up: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], packed.shape[0]))


product_operator = define_operator(
    "svdquant_weight_only_mm(Tensor x, Tensor packed, Tensor weight_scale, Tensor? global_scale, Tensor unsmoothed,"
    " Tensor proj_down, Tensor proj_up, Tensor? bias) -> Tensor",
    svdquant_weight_only_mm,
    _fake,
)
register_kernel_lazily("svdquant_weight_only_mm", "CPU", "lowbit.ops.cpu.svdquant")
