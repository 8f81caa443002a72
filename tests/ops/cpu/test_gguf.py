from __future__ import annotations

import pytest
import torch

from lowbit.ops import gguf
from lowbit.ops.cpu import gguf as blocked
from lowbit.ops.cpu import gguf_native, helper, native
from lowbit.ops.dispatch import Problem
from lowbit.ops.gguf import BLOCK_TYPES, gguf_dequantize, gguf_quantize
from lowbit.ops.gguf_decode_small import SMALL_DECODERS
from lowbit.ops.weight_format import WeightFormat
from tests.support import calls
from tests.support.cpu import at_the_end_of_memory
from tests.support.gguf import NATIVE_TYPES, random_blocks, random_weight, same_bits

needs_native = pytest.mark.skipif(not helper.available(), reason=f"native helper {helper.refusal()}")


@needs_native
@pytest.mark.parametrize("kind", NATIVE_TYPES)
@pytest.mark.parametrize("dtype", native.ELEMENT_TYPES)
def test_native_decoding_is_exact(kind: str, dtype: torch.dtype, isa: str) -> None:
    raw = random_blocks(kind, 400)
    assert same_bits(blocked.gguf_dequantize(raw, kind, dtype), gguf_dequantize(raw, kind, dtype))


def products(x: torch.Tensor, kind: str, bias: torch.Tensor | None, function: object) -> tuple[float, torch.Tensor]:
    """Return the largest error of a product, in units of the sum of the products' magnitudes."""
    torch.manual_seed(1)
    weight = torch.randn(37, x.shape[1]) * 0.02
    raw = gguf_quantize(weight, kind)
    decoded = gguf_dequantize(raw, kind).double()
    expected = x.double() @ decoded.t() + (0 if bias is None else bias.double())
    bound = x.double().abs() @ decoded.abs().t() + 1e-30
    result = function(x, raw, kind, bias)
    assert result.dtype == x.dtype
    assert result.shape == expected.shape
    return float(((result.double() - expected).abs() / bound).max()), result


@needs_native
@pytest.mark.parametrize("kind", sorted(BLOCK_TYPES.keys() & set(gguf.QUANTIZABLE_TYPES)))
@pytest.mark.parametrize("rows", [1, 5, 6, 13, 64, 65])
def test_native_products(kind: str, rows: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, 2304)  # more than one piece of the depth, the last one shorter
    for bias in (None, torch.randn(37)):
        assert products(x, kind, bias, calls.function(gguf_native))[0] < 1e-6
    assert products(x.bfloat16(), kind, None, calls.function(gguf_native))[0] < 5e-3


@needs_native
@pytest.mark.parametrize("kind", NATIVE_TYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
def test_products_of_few_rows(kind: str, rows: int) -> None:
    """Features that are no whole task, inputs of several pieces, and scales of any size, not finite ones too."""
    torch.manual_seed(rows)
    columns = 8192 + max(BLOCK_TYPES[kind].elements, 32)
    x, raw, bias = torch.randn(rows, columns), random_weight(kind, 71, columns), torch.randn(71)
    decoded = gguf_dequantize(raw, kind).double()
    expected = x.double() @ decoded.t() + bias.double()
    result = calls.linear(gguf_native, x, raw, kind, bias)
    finite = decoded.isfinite().all(dim=1)
    bound = x.double().abs() @ decoded.abs().t() + bias.double().abs()
    assert ((result.double() - expected).abs() <= 1e-6 * bound)[:, finite].all()
    assert finite.sum() < 71
    assert torch.equal(result[:, ~finite].isnan(), expected[:, ~finite].isnan())
    assert torch.equal(result[:, ~finite].isposinf(), expected[:, ~finite].isposinf())
    torch.set_num_threads(1)
    alone = calls.linear(gguf_native, x, raw, kind, bias)
    if helper.multiplies_gguf():
        assert same_bits(alone, result)
    else:  # torch's GEMM: its order of adding depends on the number of threads
        assert ((alone.double() - expected).abs() <= 1e-6 * bound)[:, finite].all()


@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_blocked_products(kind: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, 512)
    with_native = products(x, kind, torch.randn(37), calls.function(blocked))[0]
    monkeypatch.setattr(helper, "available", lambda: False)
    assert max(with_native, products(x, kind, torch.randn(37), calls.function(blocked))[0]) < 1e-6


@needs_native
def test_rows_that_are_apart_and_zero_rows() -> None:
    x = torch.randn(6, 1024)[::2, ::2]
    x[1] = 0
    error, result = products(x, "Q6_K", None, calls.function(gguf_native))
    assert error < 1e-6
    assert not result[1].any()


@needs_native
def test_nan_in_gives_nan_out() -> None:
    x = torch.randn(2, 256)
    x[0, 7] = torch.nan
    raw = gguf_quantize(torch.randn(5, 256), "Q5_K")
    result = calls.linear(gguf_native, x, raw, "Q5_K", None)
    assert result[0].isnan().all()
    assert result[1].isfinite().all()


@needs_native
def test_wrong_sizes_are_caught_before_memory_is_touched() -> None:
    with pytest.raises(RuntimeError, match="gguf_decode: the native helper .* has no kernel for these arguments"):
        native.gguf_decode(torch.zeros(2, 143, dtype=torch.uint8), 12, torch.empty(2, 256))
    with pytest.raises(RuntimeError, match="gguf_decode"):
        native.gguf_decode(torch.zeros(2, 144, dtype=torch.uint8), 99, torch.empty(2, 256))


def test_float64_is_refused() -> None:
    problem = Problem(torch.device("cpu"), torch.float64, 8, 256, format=WeightFormat("Q4_K"))
    for module in (gguf_native, blocked) if helper.available() else (blocked,):
        assert "float64" in str(module.can_run(problem))


@needs_native
@pytest.mark.parametrize("kind", NATIVE_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_read_beyond_a_weight(kind: str, dtype: torch.dtype, wide_isa: str) -> None:
    raw = random_weight(kind, 7, 768)
    last = at_the_end_of_memory(raw)
    assert same_bits(blocked.gguf_dequantize(last, kind), blocked.gguf_dequantize(raw, kind))
    for rows in (1, 3, 7, 9, 70):
        x = torch.randn(rows, 768).to(dtype)
        assert same_bits(calls.linear(gguf_native, x, last, kind, None), calls.linear(gguf_native, x, raw, kind, None))


@pytest.mark.parametrize("kind", SMALL_DECODERS)
@pytest.mark.parametrize("rows", [1, 5, 130])
def test_types_that_only_torch_decodes(kind: str, rows: int) -> None:
    """The native kernel says that it can't; the blocked one decodes with torch."""
    pytest.importorskip("gguf")
    problem = Problem(torch.device("cpu"), torch.float32, 71, 768, format=WeightFormat(kind))
    assert gguf_native.can_run(problem) is not None
    assert blocked.can_run(problem) is None
    torch.manual_seed(rows)
    x, raw, bias = torch.randn(rows, 768), random_weight(kind, 71, 768), torch.randn(71)
    decoded = gguf_dequantize(raw, kind).double()
    finite = decoded.isfinite().all(dim=1)
    expected = x.double() @ decoded.t() + bias.double()
    bound = x.double().abs() @ decoded.abs().t() + bias.double().abs()
    error = (calls.linear(blocked, x, raw, kind, bias).double() - expected).abs()
    assert finite.any()
    assert (error <= 1e-6 * bound)[:, finite].all()
