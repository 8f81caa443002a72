"""Quantizing, decoding and scaling on CPUs against the references, bit for bit."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowbit.ops import fp8, int8
from lowbit.ops.cpu import helper, memory, native, quantize
from tests.support.cpu import awkward, same

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 64), (9, 333), (40, 512), (3, 1)]
NEEDS_NATIVE = pytest.mark.skipif(helper.refusal() is not None, reason=f"native helper {helper.refusal()}")


def poisoned(dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(12, 150).to(dtype)
    x[2, 5], x[4, 149], x[6, 0] = float("nan"), float("inf"), -float("inf")
    return x


def inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    return [*(awkward(*shape, dtype) for shape in SHAPES), poisoned(dtype)]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_quantizers_equal_the_references(dtype: torch.dtype, path: str) -> None:
    for x in inputs(dtype):
        check_quantizers(x)


@NEEDS_NATIVE
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantizers_equal_the_references_on_every_isa(dtype: torch.dtype, isa: str) -> None:
    for x in inputs(dtype):
        check_quantizers(x)


def near_ties(dtype: torch.dtype) -> torch.Tensor:
    """Return rows of which half the quotients by their scale are halves, or next to them."""
    scale = torch.rand(60, 1) + 0.01
    halves = torch.randint(-126, 126, (60, 1027)) + 0.5
    x = torch.where(torch.rand(60, 1027) < 0.5, halves, 50 * torch.randn(60, 1027).clamp(-2, 2)) * scale
    x[:, 0] = 127 * scale[:, 0]
    x[20:40] = torch.nextafter(x[20:40], torch.tensor(torch.inf))
    x[40:] = torch.nextafter(x[40:], torch.tensor(-torch.inf))
    return x.to(dtype)


@NEEDS_NATIVE
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_beside_a_tie_are_the_references(dtype: torch.dtype, isa: str) -> None:
    for _ in range(5):
        check_quantizers(near_ties(dtype))


def check_quantizers(x: torch.Tensor) -> None:
    pairs = [
        (quantize.quantize_int8_per_token(x), int8.quantize_int8_per_token(x)),
        (quantize.quantize_fp8_per_token(x), fp8.quantize_fp8_per_token(x)),
        (quantize.quantize_fp8_per_group(x, 64), fp8.quantize_fp8_per_group(x, 64)),
        (quantize.quantize_fp8_per_block(x, (8, 100)), fp8.quantize_fp8_per_block(x, (8, 100))),
    ]
    for (codes, scale), (expected, expected_scale) in pairs:
        assert same(scale, expected_scale)
        assert codes.dtype == expected.dtype
        assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_unsigned_codes_are_the_signed_ones_and_128(dtype: torch.dtype, path: str) -> None:
    for x in inputs(dtype):
        codes, scale = torch.empty(x.shape, dtype=torch.uint8), torch.empty(x.shape[0], 1)
        quantize.quantize_uint8_rows(x, codes, scale)
        expected, expected_scale = int8.quantize_int8_per_token(x)
        assert torch.equal(codes.int() - 128, expected.int())
        assert same(scale, expected_scale)


def test_leading_dimensions_and_strides(path: str) -> None:
    for x in (torch.randn(2, 3, 64), torch.randn(64, 6).t(), torch.randn(6, 128)[:, ::2], torch.randn(6, 200)[:, 7:71]):
        codes, scale = quantize.quantize_int8_per_token(x)
        expected, expected_scale = int8.quantize_int8_per_token(x)
        assert same(codes, expected)
        assert same(scale, expected_scale)


def test_nothing_to_quantize(path: str) -> None:
    codes, scale = quantize.quantize_int8_per_token(torch.empty(0, 64))
    assert (codes.shape, scale.shape) == ((0, 64), (0, 1))


def test_rounding_to_e4m3_of_every_bfloat16(path: str) -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = every[every.float().abs() <= 448.0].reshape(1, -1).contiguous()
    codes, scale = quantize.quantize_fp8_per_token(x)  # the scale is 1
    assert scale.item() == 1.0
    assert torch.equal(codes.view(torch.uint8), x.to(fp8.E4M3).view(torch.uint8))


@NEEDS_NATIVE
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_codes_decode(dtype: torch.dtype, isa: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(3, 1)[:, :255].contiguous()  # 255: no multiple of a register
    scale = torch.tensor([[1.0], [0.37], [1e-4]])
    for typed in (codes.view(torch.int8), codes.view(fp8.E4M3)):
        output = torch.empty(codes.shape, dtype=dtype)
        native.dequantize(typed, scale, output)
        assert same(output, (typed.float() * scale).to(dtype))


@NEEDS_NATIVE
def test_part_of_a_matrix_decodes_with_its_blocks() -> None:
    codes, scale = fp8.quantize_fp8_per_block(torch.randn(50, 70), (16, 32))
    output = torch.empty(20, 70)
    native.dequantize(codes[10:30], scale, output, 16, 32, first_row=10)
    assert same(output, fp8.dequantize_fp8(codes, scale, (16, 32))[10:30])


@NEEDS_NATIVE
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_are_scaled_and_rounded_once(dtype: torch.dtype, has_bias: bool, isa: str) -> None:
    product = torch.randn(5, 77) * 1000
    rows, columns, bias = torch.rand(5, 1), torch.rand(77, 1), torch.randn(77) if has_bias else None
    rows[1], rows[2], rows[3], product[4, 3] = float("nan"), 1e36, 1e-8, float("inf")
    wide = torch.zeros(5, 100, dtype=dtype)
    expected = product * rows * columns.t()
    expected = expected if bias is None else expected + bias
    native.scale_product(product, rows, columns, bias, wide[:, 10:87])
    assert same(wide[:, 10:87], expected.to(dtype))
    assert not wide[:, :10].any()
    assert not wide[:, 87:].any()
    native.scale_product(product, None, None, bias, wide[:, :77])
    assert same(wide[:, :77], (product if bias is None else product + bias).to(dtype))


@NEEDS_NATIVE
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_large_matrices_are_shared_among_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = torch.randn(301, 1000)
        assert same(quantize.quantize_int8_per_token(x)[0], int8.quantize_int8_per_token(x)[0])
    finally:
        torch.set_num_threads(before)


def test_operators_use_these_kernels(path: str) -> None:
    x = torch.randn(5, 130).bfloat16()
    assert same(int8.quantize_operator(x)[0], int8.quantize_int8_per_token(x)[0])
    assert same(fp8.quantize_per_token_operator(x)[0], fp8.quantize_fp8_per_token(x)[0])
    assert same(fp8.quantize_per_group_operator(x, 128)[1], fp8.quantize_fp8_per_group(x, 128)[1])
    assert same(fp8.quantize_per_block_operator(x, [4, 64])[1], fp8.quantize_fp8_per_block(x, (4, 64))[1])


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        (int8.quantize_operator, ()),
        (fp8.quantize_per_token_operator, ()),
        (fp8.quantize_per_group_operator, (64,)),
        (fp8.quantize_per_block_operator, ([2, 64],)),
    ],
)
def test_operators_are_well_formed(operator: object, arguments: tuple[object, ...]) -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")  # the last can't compare e4m3
    torch.library.opcheck(operator, (torch.randn(5, 130), *arguments), test_utils=checks)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are those of glibc")
def test_freed_memory_can_be_kept_and_given_back() -> None:
    """In a process of its own: a heap that other tests have left may have room without growing."""
    code = "from tests.ops.cpu.test_native import check_freed_memory; check_freed_memory()"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=True)


def check_freed_memory() -> None:
    def is_on_the_heap(tensor: torch.Tensor) -> bool:
        ranges = memory.mapped_ranges(frozenset({"[heap]"}))
        return any(begin <= tensor.data_ptr() < end for begin, end in ranges)

    size = 64 << 20  # above the largest threshold from which glibc maps a block apart, and unmaps it when it is freed
    with memory.freed_memory_kept() as kept:
        assert kept
        assert is_on_the_heap(torch.empty(size, dtype=torch.uint8))
    assert not is_on_the_heap(torch.empty(size, dtype=torch.uint8))
