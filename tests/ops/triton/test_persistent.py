"""The persistent kernel, on tiles that the interpreter can pay for."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from lowbit.ops import fp8 as fp8_reference
from lowbit.ops import int8 as int8_reference
from lowbit.ops.triton import fp8, int8, persistent
from lowbit.ops.triton.launch import Target
from lowbit.ops.triton.tiles import FP8, FP8_BLOCKS, INT8, Tile, choose_tile, tiles_for

TILE = Tile(32, 32, 64, num_warps=4, num_stages=2, group_m=2, persistent=True)
TARGET = Target("interpreter", 0, processors=3)  # fewer than there are tiles


@pytest.fixture
def persistent_only(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Let the pointer kernels fail, and give the interpreter's programs several tiles each."""
    monkeypatch.delattr(int8, "_launch")
    monkeypatch.delattr(fp8, "_launch")
    if device.type == "cpu":
        for module in (int8, fp8):
            monkeypatch.setattr(module, "target_of", lambda device: TARGET)


@pytest.mark.usefixtures("persistent_only")
@pytest.mark.parametrize(("m", "k", "n"), [(1, 64, 32), (70, 208, 51), (100, 32, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_int8_is_the_reference_bit_for_bit(device: torch.device, m: int, k: int, n: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(m)
    x = torch.randint(-128, 128, (m, k), generator=generator, dtype=torch.int8)
    weight = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
    scales = torch.rand(m, 1, generator=generator), torch.rand(n, 1, generator=generator)
    bias = torch.randn(n, generator=generator)
    for given in (bias, None):
        arguments = (x, scales[0], weight, scales[1], given)
        expected = int8_reference.int8_scaled_mm(*arguments, dtype)
        moved = [None if a is None else a.to(device) for a in arguments]
        assert torch.equal(int8.multiply(*moved, dtype, TILE).cpu(), expected)


@pytest.mark.usefixtures("persistent_only")
@pytest.mark.parametrize("block", [None, [64, 64], [32, 32], [48, 64]], ids=str)
@pytest.mark.parametrize(("m", "k", "n"), [(1, 64, 32), (70, 208, 51)])
def test_fp8_against_float64(device: torch.device, m: int, k: int, n: int, block: list[int] | None) -> None:
    generator = torch.Generator().manual_seed(m)
    left, right = torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator)
    bias = torch.randn(n, generator=generator)
    if block is None:
        x, weight = fp8_reference.quantize_fp8_per_token(left), fp8_reference.quantize_fp8_per_token(right)
        groups = None
    else:
        x = fp8_reference.quantize_fp8_per_group(left, block[1])
        weight, groups = fp8_reference.quantize_fp8_per_block(right, block), (1, block[1])
    moved = [a.to(device) for a in (*x, *weight, bias)]
    actual = fp8.multiply(*moved, torch.float32, block, TILE).cpu().double()
    a = fp8_reference.dequantize_fp8(*x, groups, torch.float64)
    b = fp8_reference.dequantize_fp8(*weight, None if block is None else (block[0], block[1]), torch.float64)
    bound = (1e-6 if device.type == "cpu" else 2**-12) * (a.abs() @ b.abs().t() + bias.abs())
    assert ((actual - (a @ b.t() + bias)).abs() <= bound).all()


def test_what_has_no_descriptor_takes_pointers(device: torch.device) -> None:
    x = torch.randint(-128, 128, (5, 100), dtype=torch.int8)  # rows 100 bytes apart
    ones = torch.ones(5, 1)
    assert not persistent.can_describe(x)
    assert persistent.can_describe(torch.empty(5, 112, dtype=torch.int8))
    assert not persistent.can_describe(torch.empty(5, 112, dtype=torch.int8)[:, 1:])
    arguments = (x, ones, x, ones, None)
    expected = int8_reference.int8_scaled_mm(*arguments, torch.float32)
    actual = int8.multiply(*(None if a is None else a.to(device) for a in arguments), torch.float32, TILE)
    assert torch.equal(actual.cpu(), expected)


HOPPER = Target("cuda", 90, 132)
TARGETS = [Target("cuda", 80, 108), HOPPER, Target("cuda", 100, 148), Target("hip", "gfx942", 304)]


@pytest.mark.parametrize("kind", [INT8, FP8, FP8_BLOCKS])
@pytest.mark.parametrize("target", TARGETS)
def test_tiles_follow_the_rows(kind: str, target: Target) -> None:
    tiles = tiles_for(kind, target)
    assert choose_tile(kind, target, 4096, 3072) == tiles[0]
    assert choose_tile(kind, target, 1, 3072) == choose_tile(kind, target, 16, 18432) == tiles[-1]
    heights = [choose_tile(kind, target, m, 3072).block_m for m in (1, 17, 64, 256, 4096)]
    assert heights == sorted(heights)
    # A tile is not mostly empty.
    assert all(choose_tile(kind, target, m, 65536).block_m < 2 * m for m in range(65, 4096, 17))


def test_few_rows_are_spread_over_the_processors() -> None:
    assert choose_tile(INT8, HOPPER, 512, 3072).block_m == 64
    assert choose_tile(INT8, HOPPER, 512, 12288) == tiles_for(INT8, HOPPER)[0]
