from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from lowbit.ops.fp8 import quantize_activation
from lowbit.ops.weight_format import Prepared, WeightFormat
from tests.support import calls

pytest.importorskip("triton")

from lowbit.errors import UnsupportedError
from lowbit.ops import fp8 as reference
from lowbit.ops.dispatch import Problem
from lowbit.ops.triton import fp8, launch, quantize_rows
from tests.support.fp8 import E4M3, adversarial, every_rounding, random

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_same_bytes(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == E4M3
    assert actual.is_contiguous()
    torch.testing.assert_close(actual.view(torch.uint8).cpu(), expected.view(torch.uint8), rtol=0, atol=0)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual.cpu(), expected.cpu(), rtol=0, atol=0, equal_nan=True)


def assert_product(
    actual: torch.Tensor,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    block: tuple[int, int] | None = None,
) -> None:
    """Compare with the product in float64.

    Errors are held against the sum of the products' magnitudes. Sums in float32 stay within 1e-6 of it at these K; a
    chip's tensor cores may keep fewer bits of a partial sum (Hopper: about 14).
    """
    left = reference.dequantize_fp8(x, x_scale, None if block is None else (1, block[1]), torch.float64)
    right = reference.dequantize_fp8(weight, weight_scale, block, torch.float64)
    extra = torch.zeros(()).double() if bias is None else bias.double()
    exact = left @ right.t() + extra
    magnitude = left.abs() @ right.abs().t() + extra.abs()
    bound = (1e-6 if actual.device.type == "cpu" else 2**-12) * magnitude
    if actual.dtype != torch.float32:
        # The interpreter cuts bfloat16 off where chips round it: one unit in the last place rather than half.
        bound = bound + torch.finfo(actual.dtype).eps * exact.abs()
    assert ((actual.cpu().double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [None, 128, 48], ids=["token", "groups of 128", "groups of 48"])
def test_quantization_is_the_references_bit_for_bit(
    device: torch.device, dtype: torch.dtype, group_size: int | None
) -> None:
    x = adversarial(9, 301, dtype)
    if group_size is None:
        quantized, scale = fp8.quantize_fp8_per_token(x.to(device))
        expected, expected_scale = reference.quantize_fp8_per_token(x)
    else:
        quantized, scale = fp8.quantize_fp8_per_group(x.to(device), group_size)
        expected, expected_scale = reference.quantize_fp8_per_group(x, group_size)
    assert_same_bytes(quantized, expected)
    assert_same(scale, expected_scale)


def test_rows_longer_than_a_block(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_rows, "LONGEST_BLOCK", 256)
    x = adversarial(8, 700, torch.float32)
    quantized, scale = fp8.quantize_fp8_per_token(x.to(device))
    expected, expected_scale = reference.quantize_fp8_per_token(x)
    assert_same_bytes(quantized, expected)
    assert_same(scale, expected_scale)


@pytest.mark.parametrize("value", [1.0, 0.0173, 1e-42, 0.0])
def test_every_rounding_with_a_known_scale(device: torch.device, value: float) -> None:
    x, scale = every_rounding(), torch.tensor(value)
    assert_same_bytes(fp8.quantize_fp8_per_tensor(x.to(device), scale.to(device)), reference.to_e4m3(x / scale))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.reshape(2, 6, 40)[:, 1:4],
        lambda x: x[:, ::3],
        lambda x: x.t(),
        lambda x: x[0],
        lambda x: x[:0],
    ],
    ids=["rows of a batch", "columns apart", "transposed", "one row", "no rows"],
)
def test_quantization_of_views(device: torch.device, view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x, moved, scale = view(random(12, 40, 1)), view(random(12, 40, 1).to(device)), torch.tensor(0.01)
    for name, arguments in (("per_token", ()), ("per_group", (16,))):
        quantized, actual_scale = getattr(fp8, f"quantize_fp8_{name}")(moved, *arguments)
        expected, expected_scale = getattr(reference, f"quantize_fp8_{name}")(x, *arguments)
        assert_same_bytes(quantized, expected)
        assert_same(actual_scale, expected_scale)
    actual = fp8.quantize_fp8_per_tensor(moved, scale.to(device))
    assert_same_bytes(actual, reference.quantize_fp8_per_tensor(x, scale))


def test_a_product_reads_every_code(device: torch.device) -> None:
    x = torch.zeros(256, 32, dtype=torch.uint8)
    x[:, 0] = torch.arange(256)
    one = torch.ones((), device=device)
    weight = torch.ones(1, 32, device=device).to(E4M3)
    result = fp8.fp8_scaled_mm(x.view(E4M3).to(device), one, weight, one, None, torch.float32)
    assert_same(result[:, 0], x.view(E4M3)[:, 0].float())


@pytest.mark.parametrize(("m", "k", "n"), [(1, 64, 32), (1, 200, 51), (37, 200, 51), (70, 32, 33), (33, 17, 1)])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
def test_product_with_scales_per_row(device: torch.device, m: int, k: int, n: int, has_bias: bool) -> None:
    x, x_scale = reference.quantize_fp8_per_token(random(m, k, 1))
    weight, weight_scale = reference.quantize_fp8_per_token(random(n, k, 2))
    bias = random(1, n, 3)[0] if has_bias else None
    arguments = (x, x_scale, weight, weight_scale, bias)
    actual = fp8.fp8_scaled_mm(*(None if a is None else a.to(device) for a in arguments), torch.float32)
    assert_product(actual, *arguments)


@pytest.mark.parametrize("x_per_tensor", [True, False], ids=["x per tensor", "x per token"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_product_with_scales_per_tensor(device: torch.device, x_per_tensor: bool, dtype: torch.dtype) -> None:
    scale = torch.tensor(0.013)
    x, x_scale = reference.quantize_fp8_per_token(random(5, 96, 1))
    if x_per_tensor:
        x, x_scale = reference.quantize_fp8_per_tensor(random(5, 96, 1), scale), scale
    weight = reference.quantize_fp8_per_tensor(random(40, 96, 2), scale)
    arguments = (x, x_scale, weight, scale, random(1, 40, 3)[0].to(dtype))
    actual = fp8.fp8_scaled_mm(*(a.to(device) for a in arguments), dtype)
    assert actual.dtype == dtype
    assert_product(actual, *arguments)


@pytest.mark.parametrize(
    ("m", "k", "n", "block"),
    [
        (5, 256, 40, (128, 128)),
        (5, 200, 51, (128, 128)),
        (40, 130, 70, (32, 64)),
        (3, 100, 70, (24, 32)),
        (2, 32, 8, (128, 128)),
    ],
)
def test_product_with_scales_per_block(device: torch.device, m: int, k: int, n: int, block: tuple[int, int]) -> None:
    x, weight = random(m, k, 1), random(n, k, 2)
    # Blocks that differ by orders of magnitude: a scale applied to the wrong block would show.
    x *= 10.0 ** torch.arange(k).div(block[1], rounding_mode="floor").sub(1)
    weight *= 10.0 ** torch.arange(n).div(block[0], rounding_mode="floor").sub(1)[:, None]
    x, x_scale = reference.quantize_fp8_per_group(x, block[1])
    weight, weight_scale = reference.quantize_fp8_per_block(weight, block)
    arguments = (x, x_scale, weight, weight_scale, random(1, n, 3)[0])
    actual = fp8.fp8_scaled_mm(*(a.to(device) for a in arguments), torch.float32, list(block))
    assert_product(actual, *arguments, block)


def test_static_activations_with_block_wise_weights(device: torch.device) -> None:
    x, scale = reference.quantize_fp8_per_tensor(random(5, 96, 1), torch.tensor(0.01)), torch.tensor(0.01)
    weight, weight_scale = reference.quantize_fp8_per_block(random(40, 96, 2), (32, 32))
    arguments = (x, scale, weight, weight_scale)
    actual = fp8.fp8_scaled_mm(*(a.to(device) for a in arguments), None, torch.float32, [32, 32])
    assert_product(actual, *arguments, None, (32, 32))


def test_large_scales_do_not_overflow_before_the_small_ones(device: torch.device) -> None:
    x, weight = torch.full((2, 64), 448.0).to(E4M3), torch.full((3, 64), 448.0).to(E4M3)
    arguments = (x, torch.full((2, 1), 1e35), weight, torch.full((3, 1), 1e-35))
    actual = fp8.fp8_scaled_mm(*(a.to(device) for a in arguments), None, torch.float32)
    assert_product(actual, *arguments)


@pytest.mark.parametrize(
    ("view_x", "view_weight"),
    [
        (lambda x: x[::2, 5:], lambda w: w[::3, 5:]),
        (lambda x: x.t().contiguous().t(), lambda w: w.t().contiguous().t()),
    ],
    ids=["rows apart", "columns first"],
)
def test_product_of_views(
    device: torch.device,
    view_x: Callable[[torch.Tensor], torch.Tensor],
    view_weight: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    whole_x, whole_weight = random(40, 70, 1).to(E4M3), random(60, 70, 2).to(E4M3)
    x, weight = view_x(whole_x), view_weight(whole_weight)
    # Scales apart in memory too, as a slice of a checkpoint's would be.
    x_scale, weight_scale = random(80, 2, 3).abs()[: 2 * x.shape[0] : 2, :1], random(60, 3, 4).abs()[: len(weight), 1:2]
    actual = fp8.fp8_scaled_mm(
        view_x(whole_x.to(device)),
        x_scale.to(device),
        view_weight(whole_weight.to(device)),
        weight_scale.to(device),
        None,
        torch.float32,
    )
    assert_product(actual, x, x_scale, weight, weight_scale)


@pytest.mark.parametrize(
    ("static", "block"),
    [(False, None), (True, None), (False, (32, 32))],
    ids=["per token", "static", "block-wise"],
)
def test_linear_is_the_references(
    device: torch.device, static: bool, block: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cpu":  # The operators' kernels for the CPU are other ones.
        monkeypatch.setattr(reference, "quantize_per_token_operator", fp8.quantize_fp8_per_token)
        monkeypatch.setattr(reference, "quantize_per_group_operator", fp8.quantize_fp8_per_group)
        monkeypatch.setattr(reference, "quantize_per_tensor_operator", fp8.quantize_fp8_per_tensor)
        monkeypatch.setattr(fp8, "scaled_mm_operator", fp8.fp8_scaled_mm)
    x = adversarial(12, 72, torch.bfloat16)
    x[6] *= 1e-3  # Its products would come close to float32's largest, in another order beyond it.
    x = x.reshape(2, 6, 72)
    weight, weight_scale = reference.quantize_fp8_per_token(random(9, 72, 1))
    if block is not None:
        weight, weight_scale = reference.quantize_fp8_per_block(random(9, 72, 1), block)
    bias, input_scale = random(1, 9, 2)[0], torch.tensor(0.02) if static else None
    moved = [
        None if t is None else t.to(device) for t in (x, calls.packed(fp8, weight), weight_scale, bias, input_scale)
    ]
    actual = calls.linear(fp8, *moved, block).cpu()
    expected = calls.linear(reference, x, weight, weight_scale, bias, input_scale, block)
    assert actual.dtype == torch.bfloat16
    bad = ~x.isfinite().all(dim=-1)
    assert torch.equal(actual.isnan().all(dim=-1), bad)
    torch.testing.assert_close(actual[~bad], expected[~bad], rtol=2**-7, atol=2**-7)
    assert torch.equal(calls.unpacked(fp8, moved[1]).cpu().view(torch.uint8), weight.view(torch.uint8))


def test_compiling_leaves_the_quantization_to_the_compiler() -> None:
    targets: list[str] = []

    def collect(graph: torch.fx.GraphModule, inputs: object) -> object:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    weight, weight_scale = reference.quantize_fp8_per_token(random(8, 64, 1))
    compiled = torch.compile(calls.function(fp8), backend=collect, fullgraph=True)
    compiled(random(3, 64, 2), weight, weight_scale, None)
    assert any("fp8_scaled_mm" in target for target in targets)
    assert not any("quantize_fp8" in target for target in targets)


@pytest.mark.parametrize("key", ["CUDA", "XPU"])
@pytest.mark.parametrize(
    "name", ["quantize_fp8_per_token", "quantize_fp8_per_group", "quantize_fp8_per_tensor", "fp8_scaled_mm"]
)
def test_operators_have_these_kernels(name: str, key: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lowbit::{name}", key)


def test_wrong_shapes_are_refused() -> None:
    x, weight, one = random(2, 64, 1).to(E4M3), random(3, 64, 2).to(E4M3), torch.ones(())
    with pytest.raises(ValueError, match=r"weight .*\(3, 64\), not \(3, 32\)"):
        fp8.fp8_scaled_mm(x, one, weight[:, :32], one, None, torch.float32)
    with pytest.raises(ValueError, match=r"x_scale .*\(2, 2\), not \(2, 1\)"):
        fp8.fp8_scaled_mm(x, torch.ones(2, 1), weight, torch.ones(1, 2), None, torch.float32, [32, 32])
    with pytest.raises(ValueError, match=r"weight_scale .*\(1, 2\), not \(2, 1\)"):
        fp8.fp8_scaled_mm(x, torch.ones(2, 2), weight, torch.ones(2, 1), None, torch.float32, [32, 32])
    with pytest.raises(UnsupportedError, match="not of 48"):
        fp8.fp8_scaled_mm(x, one, weight, one, None, torch.float32, [32, 48])


def problem(**changes: object) -> Problem:
    defaults = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "out_features": 64, "in_features": 64}
    return Problem(**{**defaults, **changes})


@pytest.mark.parametrize(
    ("target", "asked", "reason"),
    [
        (launch.Target("cuda", 80), problem(), r"no FP8 tensor cores \(SM 8\.0"),
        (launch.Target("cuda", 86), problem(), r"no FP8 tensor cores \(SM 8\.6"),
        (launch.Target("cuda", 90), problem(format=WeightFormat(block=(128, 48))), "not of 48"),
        (launch.Target("cuda", 90), problem(dtype=torch.float64), "float64"),
        (launch.Target("cuda", 89), problem(), None),
        (launch.Target("cuda", 120), problem(format=WeightFormat(block=(128, 128))), None),
        (launch.Target("hip", "gfx942"), problem(), None),
    ],
)
def test_supports(monkeypatch: pytest.MonkeyPatch, target: launch.Target, asked: Problem, reason: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fp8, "target_of", lambda device: target)
    verdict = fp8.can_run(asked)
    assert (verdict is None) == (reason is None)
    assert reason is None or re.search(reason, str(verdict))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("m", [1, 48, 300])
@pytest.mark.parametrize("block", [None, (128, 128)], ids=["per row", "per block"])
def test_every_tile_of_this_chip(m: int, block: tuple[int, int] | None) -> None:
    x, weight = random(m, 1000, 1), random(500, 1000, 2)
    quantized = reference.quantize_fp8_per_token(x), reference.quantize_fp8_per_token(weight)
    if block is not None:
        quantized = reference.quantize_fp8_per_group(x, block[1]), reference.quantize_fp8_per_block(weight, block)
    arguments = (*quantized[0], *quantized[1], torch.randn(500))
    moved = [a.cuda() for a in arguments]
    actual = fp8.fp8_scaled_mm(*moved, torch.float32, None if block is None else list(block))
    assert_product(actual, *arguments, block)


def test_layers_with_one_input_quantize_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [reference.quantize_fp8_per_token(torch.randn(features, 64)) for features in (16, 48)]
    bias = [None, torch.randn(48)]
    x = torch.randn(2, 5, 64).bfloat16()
    alone = [calls.linear(fp8, x, *layer, b) for layer, b in zip(layers, bias, strict=True)]
    quantized: list[torch.Tensor] = []
    quantize = quantize_activation
    monkeypatch.setattr(fp8, "quantize_activation", lambda x, *rest: quantize((quantized.append(x), x)[1], *rest))
    together = fp8.linears(x, [Prepared(*layer) for layer in layers], bias)
    assert len(quantized) == 1
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
