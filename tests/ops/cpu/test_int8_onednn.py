"""The oneDNN implementation of int8 against the reference, which is exact in integers."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lowbit.ops import int8
from lowbit.ops.cpu import int8_onednn as onednn
from lowbit.ops.dispatch import Problem
from tests.support import calls
from tests.support.cpu import awkward, same

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 64, 32), (7, 333, 100), (30, 1, 5), (300, 256, 96)]  # M, K, N
REFUSAL = onednn.can_run(Problem(torch.device("cpu"), torch.float32, 64, 64))
pytestmark = pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))


@pytest.mark.parametrize("shape", [(1, 1), (100, 333), (96, 64), (520, 1030)])
def test_packing_is_undone_exactly(shape: tuple[int, int]) -> None:
    weight = torch.randint(-128, 128, shape, dtype=torch.int8)
    assert torch.equal(calls.unpacked(onednn, calls.packed(onednn, weight)), weight)
    assert torch.equal(calls.unpacked(onednn, calls.packed(onednn, weight.t())), weight.t())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_equals_the_reference(dtype: torch.dtype, shape: tuple[int, int, int], has_bias: bool, path: str) -> None:
    rows, columns, features = shape
    x = awkward(rows, columns, dtype)
    weight, scale = int8.quantize_int8_per_token(torch.randn(features, columns) / 8)
    bias = torch.randn(features).to(dtype) if has_bias else None
    result = calls.linear(onednn, x, calls.packed(onednn, weight), scale, bias)
    assert same(result, calls.linear(int8, x, weight, scale, bias))


def test_sums_beyond_the_integers_of_float32_are_exact(path: str) -> None:
    x = torch.full((3, 20_000), 127.0)
    weight = torch.full((5, 20_000), 127, dtype=torch.int8)
    weight[:, 0] = 126
    one = torch.ones(5, 1)
    assert same(
        calls.linear(onednn, x, calls.packed(onednn, weight), one, None), calls.linear(int8, x, weight, one, None)
    )


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_poisoned_rows_and_only_they_give_nan(poison: float, path: str) -> None:
    x = torch.randn(4, 64)
    x[2, 5] = poison
    weight, scale = int8.quantize_int8_per_token(torch.randn(8, 64))
    result = calls.linear(onednn, x, calls.packed(onednn, weight), scale, None)
    assert result[2].isnan().all()
    assert result[[0, 1, 3]].isfinite().all()


def test_leading_dimensions_strides_and_no_rows(path: str) -> None:
    weight, scale = int8.quantize_int8_per_token(torch.randn(8, 64))
    packed = calls.packed(onednn, weight)
    for x in (torch.randn(64, 3, 2).permute(2, 1, 0), torch.randn(2, 3, 64), torch.randn(5, 99)[:, 3:67]):
        assert same(calls.linear(onednn, x, packed, scale, None), calls.linear(int8, x, weight, scale, None))
    assert calls.linear(onednn, torch.randn(0, 64), packed, scale, None).shape == (0, 8)


def test_results_do_not_share_memory(path: str) -> None:
    weight, scale = int8.quantize_int8_per_token(torch.randn(8, 64))
    packed, x = calls.packed(onednn, weight), torch.randn(2, 5, 64)
    first = calls.linear(onednn, x[0], packed, scale, None)
    kept = first.clone()
    calls.linear(onednn, x[1], packed, scale, None)
    assert torch.equal(first, kept)


class Block(torch.nn.Module):
    def __init__(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(calls.packed(onednn, weight), requires_grad=False)
        self.scale = torch.nn.Parameter(scale, requires_grad=False)
        self.bias = torch.nn.Parameter(torch.randn(scale.shape[0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return calls.linear(onednn, torch.nn.functional.silu(x), self.weight, self.scale, self.bias) + x


def test_compiled_blocks_agree(path: str) -> None:
    block = Block(*int8.quantize_int8_per_token(torch.randn(64, 64)))
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True)
    with torch.no_grad():
        for rows in (3, 17):
            x = torch.randn(2, rows, 64)
            torch.testing.assert_close(compiled(x), block(x), rtol=0.02, atol=0.02)  # silu may round to another code


def test_works_in_inference_mode_after_and_before(path: str) -> None:
    weight, scale = int8.quantize_int8_per_token(torch.randn(8, 64))
    packed, x = calls.packed(onednn, weight), torch.randn(3, 64)
    with torch.inference_mode():
        first = calls.linear(onednn, x, packed, scale, None)
    assert torch.equal(first, calls.linear(onednn, x, packed, scale, None))


@pytest.mark.parametrize("dtype", DTYPES)
def test_operator_knows_its_result_without_computing(dtype: torch.dtype) -> None:
    # opcheck would do this, but copies its arguments, which an opaque tensor does not allow
    weight, scale = int8.quantize_int8_per_token(torch.randn(8, 64))
    x = torch.randint(1, 256, (5, 64), dtype=torch.uint8)
    arguments = (x, torch.rand(5, 1), calls.packed(onednn, weight), scale)
    result = onednn.product_operator(*arguments, None, dtype)
    with FakeTensorMode() as mode:
        fake = onednn.product_operator(*(mode.from_tensor(argument) for argument in arguments), None, dtype)
    assert (fake.shape, fake.dtype, fake.stride()) == (result.shape, result.dtype, result.stride())


def test_refuses_what_it_cannot_do() -> None:
    cpu = torch.device("cpu")
    assert "float64" in (onednn.can_run(Problem(cpu, torch.float64, 8, 8)) or "")
    assert "overflow" in (onednn.can_run(Problem(cpu, torch.float32, 8, 100_000)) or "")
