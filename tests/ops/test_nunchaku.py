"""nunchaku's order undone, against a packer of our own from its definition."""

from __future__ import annotations

import pytest
import torch

from lowbit.ops import nunchaku
from tests.support import nunchaku_packer as packer


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (256, 384)])
def test_weights_come_back(rows: int, columns: int) -> None:
    codes = torch.randint(0, 16, (rows, columns))
    expected = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8).view(torch.int8)
    packed = packer.pack_weight(codes)
    assert packed.shape == expected.shape
    assert not torch.equal(packed, expected)
    assert torch.equal(nunchaku.unpack_weight(packed), expected)


def test_the_order_of_scales_is_the_one_in_nunchakus_comments() -> None:
    # "0 1 8 9", "2 3 10 11", ..., "16 17 24 25", ..., "118 119 126 127"
    order = list(packer.scale_order())
    assert order[:8] == [0, 1, 8, 9, 2, 3, 10, 11]
    assert order[16:20] == [16, 17, 24, 25]
    assert order[-4:] == [118, 119, 126, 127]
    rows = torch.arange(128, dtype=torch.bfloat16)
    packed = packer.pack_scale(rows)
    assert packed[:4].tolist() == [0, 1, 8, 9]
    # pack_micro_scale: "0 32 64 96", "8 40 72 104", ..., "1 33 65 97" by lane 4
    micro = packer.pack_micro_scale(
        torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None].repeat(1, 4)
    )
    assert micro.view(torch.uint8).flatten()[::4][:20].tolist() == [
        *(0, 32, 64, 96, 8, 40, 72, 104, 16, 48, 80, 112, 24, 56, 88, 120),
        *(1, 33, 65, 97),
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_come_back(dtype: torch.dtype) -> None:
    scale = torch.randn(256, 6).to(dtype)
    assert torch.equal(nunchaku.unpack_scales(packer.pack_scale(scale)), scale.t())
    vector = torch.randn(256).to(dtype)
    assert torch.equal(nunchaku.unpack_scales(packer.pack_scale(vector)), vector)
    micro = torch.rand(256, 16).to(torch.float8_e4m3fn)
    found = nunchaku.unpack_micro_scales(packer.pack_micro_scale(micro))
    assert torch.equal(found.float(), micro.t().float())


def test_factors_come_back() -> None:
    down, up = torch.randn(32, 256).bfloat16(), torch.randn(384, 32).bfloat16()
    assert torch.equal(nunchaku.unpack_low_rank(packer.pack_low_rank(down, down=True), down=True), down.t())
    assert torch.equal(nunchaku.unpack_low_rank(packer.pack_low_rank(up, down=False), down=False), up)


def test_weights_for_16_bit_activations_come_back() -> None:
    codes = torch.randint(0, 16, (48, 128))
    scale, zero = torch.rand(4, 48).bfloat16(), torch.randn(4, 48).bfloat16()  # two groups of padding
    expected = codes.double() * scale[:2].t().double().repeat_interleave(64, 1) + zero[
        :2
    ].t().double().repeat_interleave(64, 1)
    found = nunchaku.awq_dequantize(packer.pack_awq(codes), scale, zero)
    assert torch.allclose(found.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("parts", [3, 6])
def test_modulation_comes_back(parts: int) -> None:
    weight, bias = torch.randn(48, 8), torch.randn(48)
    shifted = bias.reshape(parts, -1).clone()
    shifted[1] += 1
    if parts == 6:
        shifted[4] += 1
    found = nunchaku.split_modulation(
        packer.interleave(weight, parts), packer.interleave(shifted.flatten(), parts), parts
    )
    assert torch.equal(found[0], weight)
    assert found[1] is not None
    assert torch.allclose(found[1], bias, atol=1e-6)
    assert nunchaku.split_modulation(weight, None, parts)[1] is None


@pytest.mark.parametrize(
    "unpack",
    [
        lambda: nunchaku.unpack_weight(torch.zeros(100, 64, dtype=torch.int8)),
        lambda: nunchaku.unpack_scales(torch.zeros(4, 100)),
        lambda: nunchaku.unpack_micro_scales(torch.zeros(3, 128, dtype=torch.uint8)),
        lambda: nunchaku.unpack_low_rank(torch.zeros(128, 8), down=True),
        lambda: nunchaku.awq_dequantize(torch.zeros(4, 16, dtype=torch.int32), torch.zeros(1, 16), torch.zeros(1, 16)),
        lambda: nunchaku.awq_dequantize(torch.zeros(4, 32, dtype=torch.int32), torch.zeros(1, 8), torch.zeros(1, 16)),
        lambda: nunchaku.split_modulation(torch.zeros(4, 2), None, 3),
    ],
)
def test_wrong_shapes_are_refused(unpack: object) -> None:
    with pytest.raises(ValueError, match="not|fit"):
        unpack()
