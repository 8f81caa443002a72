"""ComfyUI's layouts, against float64 and, where it is installed, comfy-kitchen's own quantizers."""

from __future__ import annotations

import pytest
import torch

from lowbit.ops.comfyui import blocked_shape, comfyui_dequantize, from_blocked, swap_nibbles, to_blocked
from lowbit.ops.e2m1 import E2M1_VALUES


@pytest.mark.parametrize(("rows", "groups"), [(128, 4), (1, 1), (130, 9), (256, 3)])
def test_blocked_scales_come_back_and_are_where_cublas_has_them(rows: int, groups: int) -> None:
    scales = torch.randint(0, 256, (rows, groups), dtype=torch.uint8)
    blocked = to_blocked(scales)
    assert blocked.shape == blocked_shape(rows, groups)
    assert torch.equal(from_blocked(blocked, rows, groups), scales)
    assert torch.equal(from_blocked(blocked.flatten(), rows, groups), scales)
    # cuBLAS: offset of (row, group) within a tile, tiles of a row of tiles one after the other
    flat = blocked.flatten()
    tiles = -(-groups // 4)
    for row in range(0, rows, 37):
        for group in range(groups):
            tile = (row // 128) * tiles + group // 4
            offset = 512 * tile + (row % 32) * 16 + (row % 128) // 32 * 4 + group % 4
            assert flat[offset] == scales[row, group]
    with pytest.raises(ValueError, match="blocked scales"):
        from_blocked(blocked.flatten()[1:], rows, groups)


def test_nvfp4_against_float64() -> None:
    torch.manual_seed(0)
    packed = torch.randint(0, 256, (48, 32), dtype=torch.uint8)
    scale, scale_2 = torch.rand(48, 4).to(torch.float8_e4m3fn), torch.tensor([0.3])
    table = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], dtype=torch.float64)
    values = table[torch.stack([packed >> 4, packed & 15], dim=-1).flatten(1).long()]  # the even column is high
    expected = values * scale.double().repeat_interleave(16, dim=1) * scale_2.double()
    found = comfyui_dequantize("nvfp4", packed, to_blocked(scale), scale_2)
    assert torch.allclose(found.double(), expected, rtol=1e-6, atol=0)
    assert torch.equal(swap_nibbles(swap_nibbles(packed)), packed)


def test_comfy_kitchens_own_tensors() -> None:
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    torch.manual_seed(0)
    weight = torch.randn(80, 96)
    for pad in (False, True):
        weight = torch.randn(80, 96) if not pad else torch.randn(75, 90)
        scale_2 = weight.abs().amax() / (6 * 448)
        packed, scales = kitchen.quantize_nvfp4(weight, scale_2, pad_16x=pad)
        expected = kitchen.dequantize_nvfp4(packed, scale_2, scales, torch.float32)
        assert torch.equal(comfyui_dequantize("nvfp4", packed, scales, scale_2), expected)
        elements, scales = kitchen.quantize_mxfp8(weight, pad_32x=pad)
        expected = kitchen.dequantize_mxfp8(elements, scales, torch.float32)
        assert torch.equal(comfyui_dequantize("mxfp8", elements, scales), expected)
    weight = torch.randn(24, 128)
    codes, scale = kitchen.quantize_int8_convrot_weight(weight, 64)
    expected = kitchen.dequantize_int8_convrot_weight(codes, scale, 64)
    found = comfyui_dequantize("int8_tensorwise", codes, scale, rotation=64)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    for codes, scale in (kitchen.quantize_int8_rowwise(weight), kitchen.quantize_int8_tensorwise(weight)):
        expected = kitchen.dequantize_int8_simple(codes, scale)
        assert torch.equal(comfyui_dequantize("int8_tensorwise", codes, scale), expected)
    scale = weight.abs().amax() / 448
    elements = kitchen.quantize_per_tensor_fp8(weight, scale)
    expected = kitchen.dequantize_per_tensor_fp8(elements, scale, torch.float32)
    assert torch.equal(comfyui_dequantize("float8_e4m3fn", elements, scale), expected)


def test_other_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="no weight format 'int4'"):
        comfyui_dequantize("int4", torch.zeros(2, 2), torch.zeros(()))
