"""Products in bfloat16 by AVX512-BF16 and AMX, and weights decoded for them, against the references and float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lowbit.ops import fp8, int8, nvfp4, svdquant, w4a4, w4a16, w8a16
from lowbit.ops.cpu import fp8 as cpu_fp8
from lowbit.ops.cpu import gguf_native, int8_weight_only, native, weight_only
from lowbit.ops.cpu import w4a16 as cpu_w4a16
from lowbit.ops.cpu import w8a16 as cpu_w8a16
from lowbit.ops.gguf import gguf_dequantize
from lowbit.ops.gguf_types import block_type
from tests.support.few_rows import MOST_INTEGER_ROWS, UNIT
from tests.support.four_bits import FORMATS, Layer
from tests.support.gguf import NATIVE_TYPES, random_weight

# See bfloat16_units.h, bfloat16_few_rows.h and bfloat16_product.h for what differs by rows; and amx_few_rows.h and
# amx_product.h.
ROWS_OF = {"AVX512-BF16": (1, 4, 8, 16, 20, 40, 70), "AMX": (9, 20, 40, 70)}
ROWS = pytest.mark.parametrize(
    ("isa", "rows"), [(isa, rows) for isa, counts in ROWS_OF.items() for rows in counts], indirect=["isa"]
)
EACH_ISA = pytest.mark.parametrize("isa", ROWS_OF, indirect=True)
BF16 = block_type("BF16").number  # weights as they are

pytestmark = pytest.mark.usefixtures("isa")


def one_input_a_row(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x [rows, columns] of which each row picks one input, so that there is nothing to sum, and the inputs."""
    inputs = torch.randint(columns, (rows,), generator=torch.Generator().manual_seed(0))
    inputs[0] = columns - 1
    x = torch.zeros(rows, columns, dtype=torch.bfloat16)
    x[torch.arange(rows), inputs] = 1.0
    assert weight_only.takes_bfloat16(x)
    return x, inputs


@ROWS
@pytest.mark.parametrize("columns", [32, 1046, 1312, 2048, 4704])
@pytest.mark.parametrize("kind", FORMATS)
def test_four_and_eight_bits_are_decoded_as_by_the_reference(kind: str, columns: int, rows: int) -> None:
    layer = Layer(kind, 37, columns)
    x, inputs = one_input_a_row(rows, columns)
    assert torch.equal(layer.linear(x), layer.weight().bfloat16()[:, inputs].t())


@ROWS
@pytest.mark.parametrize("kind", FORMATS)
def test_every_scale_code_of_blocks(kind: str, rows: int) -> None:
    layer = Layer(kind, 256, 512)
    packed, scale, *rest = layer.tensors
    codes = torch.arange(256, dtype=torch.uint8)[:, None].expand(scale.shape).contiguous()
    layer.tensors = (packed, codes.view(scale.dtype), *rest)
    x, inputs = one_input_a_row(rows, 512)
    weight, result = layer.weight().bfloat16(), layer.linear(x)
    result = torch.where(result.abs() < 2.0**-126, 0, result)  # that of a sum which was scaled
    usable = weight.isfinite().all(dim=1)  # infinity times 0 is NaN
    assert usable.sum() > 240
    expected = weight[usable][:, inputs].t()
    expected = torch.where(expected.abs() < 2.0**-126, 0, expected)  # the instruction takes those for 0
    assert torch.equal(result[:, usable], expected)
    assert not result[:, weight.isnan().all(dim=1)].isfinite().any()


@ROWS
@pytest.mark.parametrize("columns", [64, 333, 2048, 5000])
def test_eight_bits_with_scales_of_any_shape(columns: int, rows: int) -> None:
    weight = torch.randn(70, columns)
    x, inputs = one_input_a_row(rows, columns)
    codes, scale = int8.quantize_int8_per_token(weight)
    result = int8_weight_only.int8_weight_only_mm(x, codes, scale, None)
    assert torch.equal(result, (codes * scale).bfloat16()[:, inputs].t())
    for block in (None, (16, 100), (128, 128), (1, 32)):
        values, scales = (
            fp8.quantize_fp8_per_token(weight) if block is None else fp8.quantize_fp8_per_block(weight, block)
        )
        decoded = fp8.dequantize_fp8(values, scales, block).bfloat16()
        assert torch.equal(cpu_fp8.fp8_weight_only_mm(x, values, scales, None, block), decoded[:, inputs].t())


@ROWS
def test_every_code_of_int8(rows: int) -> None:
    codes = (torch.arange(256)[:, None] + torch.arange(1280)).to(torch.int8)  # all of them of each input
    scale = torch.rand(256, 1) + 0.1
    x, inputs = one_input_a_row(rows, codes.shape[1])
    result = int8_weight_only.int8_weight_only_mm(x, codes, scale, None)
    assert torch.equal(result, (codes * scale).bfloat16()[:, inputs].t())


@ROWS
@pytest.mark.parametrize("group_size", [32, 96, 1024, 4704])
def test_eight_bits_with_zero_points(group_size: int, rows: int) -> None:
    columns = 9408 // group_size * group_size  # more than what is decoded at once
    codes = torch.randint(-128, 128, (70, columns), dtype=torch.int8)
    scale = torch.rand(70, columns // group_size) + 0.1
    zero = torch.randint(-128, 129, scale.shape, dtype=torch.int16)
    x, inputs = one_input_a_row(rows, columns)
    decoded = w8a16.dequantize_int8_groups(codes, scale, zero).bfloat16()
    assert torch.equal(cpu_w8a16.w8a16_mm(x, codes, scale, None, zero), decoded[:, inputs].t())


@ROWS
def test_every_code_of_e4m3(rows: int) -> None:
    codes = (torch.arange(256)[:, None] + torch.arange(1280)).to(torch.uint8)  # all of them of each input
    values = torch.where(codes % 128 == 127, 8, codes).view(torch.float8_e4m3fn)
    scale = torch.rand(256, 1) + 0.1
    x, inputs = one_input_a_row(rows, codes.shape[1])
    result = cpu_fp8.fp8_weight_only_mm(x, values, scale, None, None)
    assert torch.equal(result, fp8.dequantize_fp8(values, scale, None).bfloat16()[:, inputs].t())


@ROWS
def test_every_code_of_e4m3_in_blocks(rows: int) -> None:
    columns = 1200  # not whole blocks
    codes = torch.arange(256, dtype=torch.uint8).repeat(columns * 144 // 256).view(144, columns)
    codes = torch.where(codes % 128 == 127, 8, codes)
    scale = torch.tensor([1.0, 0.3, 2e-20]).repeat(2, 4)[:, :10].contiguous()
    x, inputs = one_input_a_row(rows, columns)
    expected = fp8.dequantize_fp8(codes.view(torch.float8_e4m3fn), scale, (128, 128)).bfloat16()[:, inputs].t()
    codes[5, 1199] = 127
    values = codes.view(torch.float8_e4m3fn)
    result = cpu_fp8.fp8_weight_only_mm(x, values, scale, None, (128, 128))
    assert result[:, 5].isnan().all()
    others = torch.arange(144) != 5
    assert torch.equal(result[:, others], expected[:, others])


@ROWS
def test_every_code_of_e4m3_under_any_scale(rows: int) -> None:
    every = torch.arange(256, dtype=torch.uint8).repeat(5, 4)
    every[1:4] = torch.where(every[1:4] % 128 == 127, 8, every[1:4])  # channels without a NaN, too
    every[2] = torch.where(every[2] % 128 > 0x68, 8, every[2])  # at most 64, so that no product overflows
    codes = every.view(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0], [0.3], [2e36], [1e-30], [torch.inf]])
    x, inputs = one_input_a_row(rows, 1024)
    expected = fp8.dequantize_fp8(codes, scale, None).bfloat16()[:, inputs].t()
    result = cpu_fp8.fp8_weight_only_mm(x, codes, scale, None, None)
    assert torch.equal(result[:, 1:4], expected[:, 1:4])
    assert result[:, [0, 4]].isnan().all()  # NaN or infinity times zero


@ROWS
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 96, 128, 512, 1536, 4608])
def test_four_bits_in_groups(group_size: int, symmetric: bool, scale_dtype: torch.dtype, rows: int) -> None:
    columns = 4608
    x, inputs = one_input_a_row(rows, columns)
    weight = torch.randn(21, columns)
    packed, scale, zero = w4a16.quantize_int4_per_group(weight, group_size, symmetric, scale_dtype)
    decoded = w4a16.dequantize_int4(packed, scale, zero).bfloat16()
    assert torch.equal(cpu_w4a16.w4a16_mm(x, packed, scale, None, zero), decoded[:, inputs].t())


@ROWS
@pytest.mark.parametrize("kind", NATIVE_TYPES)
def test_gguf_is_decoded_as_by_the_reference(kind: str, rows: int) -> None:
    columns = 2304  # more than is packed at once
    x, inputs = one_input_a_row(rows, columns)
    raw = random_weight(kind, 35, columns)
    weight = gguf_dequantize(raw, kind).bfloat16()
    usable = weight.isfinite().all(dim=1)
    expected = weight[usable][:, inputs].t()
    expected = torch.where(expected.abs() < 2.0**-126, 0, expected)  # the instruction takes those for 0
    assert torch.equal(gguf_native.multiply_native(x, raw, kind)[:, usable], expected)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("rows", "features", "columns"),
    [
        (1, 1, 1),
        (2, 70, 770),
        (3, 40, 544),
        (4, 50, 1024),
        (5, 33, 64),
        (8, 35, 330),
        (15, 17, 96),
        (16, 33, 4100),
        (33, 208, 260),
        (48, 70, 4700),
        (64, 40, 2048),
        (70, 401, 4700),
        (260, 70, 2050),
        (300, 530, 128),
        (4130, 16, 32),
    ],
)
@EACH_ISA
def test_products_agree_with_float64(rows: int, features: int, columns: int, threads: int) -> None:
    x = torch.randn(rows, columns).bfloat16()
    weight, bias = torch.randn(features, columns).bfloat16(), torch.randn(features)
    for given in (None, bias):
        output = torch.empty(rows, features, dtype=torch.bfloat16)
        native.gguf_product(x, weight.view(torch.uint8), BF16, given, output)
        exact = x.double() @ weight.double().t() + (0 if given is None else given.double())
        size = x.double().abs() @ weight.double().abs().t()
        assert ((output.double() - exact).abs() <= 2.0**-8 * exact.abs() + 2e-6 * size).all()


@EACH_ISA
def test_rows_that_are_apart() -> None:
    x = torch.randn(40, 200).bfloat16()[:, :96]
    codes, scale = int8.quantize_int8_per_token(torch.randn(50, 96))
    expected = int8_weight_only.int8_weight_only_mm(x.contiguous(), codes, scale, None)
    assert torch.equal(int8_weight_only.int8_weight_only_mm(x, codes, scale, None), expected)


@EACH_ISA
def test_what_is_not_finite_stays_in_its_row_and_channel() -> None:
    x, weight = torch.randn(40, 96).bfloat16(), torch.randn(50, 96).bfloat16()
    x[3, 5], weight[7, 90] = float("nan"), float("inf")
    output = torch.empty(40, 50, dtype=torch.bfloat16)
    native.gguf_product(x, weight.view(torch.uint8), BF16, None, output)
    bad = ~output.isfinite()
    assert bad[3].all()
    assert bad[:, 7].all()
    bad[3], bad[:, 7] = False, False
    assert not bad.any()


@pytest.mark.parametrize("precision", ["nvfp4", "int4"])
@pytest.mark.parametrize("rank", [1, 8, 32, 40])
@pytest.mark.parametrize(
    ("rows", "features", "columns"),
    [
        (1, 33, 64),
        (1, 33, 640),
        (2, 50, 512),
        (7, 48, 1600),
        (16, 40, 576),
        (21, 35, 1088),
        (40, 17, 512),
        (64, 96, 320),
        (70, 40, 192),
    ],
)
@EACH_ISA
def test_a_low_rank_product_is_added(
    rows: int, features: int, columns: int, rank: int, precision: str, isa: str
) -> None:
    weight, bias = torch.randn(features, columns) * columns**-0.5, torch.randn(features)
    x, unsmoothed = torch.randn(rows, columns).bfloat16(), torch.randn(rows, columns + 8).bfloat16()[:, :columns]
    down, up = (torch.randn(size, rank).mul_(size**-0.5).bfloat16() for size in (columns, features))
    if precision == "nvfp4":
        outer = nvfp4.global_scale_of(weight.abs().amax())
        packed, scale = nvfp4.quantize_nvfp4(weight, outer)
        decoded = nvfp4.dequantize_nvfp4(packed, scale, outer)
        result = svdquant.product_operator(x, packed, scale, outer, unsmoothed, down, up, bias)
    else:
        codes, scale = w4a4.quantize_weight(weight)
        decoded = w4a4.dequantize_w4(codes, scale)
        result = svdquant.product_operator(x, w4a4.pack_weight(codes), scale, None, unsmoothed, down, up, bias)
    is_rounded = rows > MOST_INTEGER_ROWS[isa] or columns % UNIT > 0
    decoded = decoded.bfloat16().double() if is_rounded else decoded.double()
    hidden = unsmoothed.double() @ down.double()
    product, added = x.double() @ decoded.t() + bias.double(), hidden @ up.double().t()
    error = 2.0**-8 * (hidden.abs() @ up.double().abs().t())  # of rounding what is between
    error += 2.0**-8 * (product.abs() + (product + added).abs())  # rows that are many are rounded twice
    assert ((result.double() - product - added).abs() <= error + 1e-5).all()


@EACH_ISA
def test_a_low_rank_product_is_the_same_with_any_threads() -> None:
    x, weight = torch.randn(20, 2048).bfloat16(), torch.randn(64, 2048)
    down, up = torch.randn(2048, 32).bfloat16(), torch.randn(64, 32).bfloat16()
    codes, scale = w4a4.quantize_weight(weight)
    arguments = x, w4a4.pack_weight(codes), scale, None, x, down, up, None
    expected = svdquant.product_operator(*arguments)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(svdquant.product_operator(*arguments), expected)
    finally:
        torch.set_num_threads(threads)
