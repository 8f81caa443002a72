"""Decoders against the ``gguf`` package on all bit patterns, quantizers against it or against the error they claim."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from lowbit.errors import UnsupportedError
from lowbit.ops import gguf, gguf_decode_small
from lowbit.ops.gguf import BLOCK_TYPES, gguf_dequantize, gguf_quantize
from tests.support import calls
from tests.support.gguf import random_blocks, same_bits

package = pytest.importorskip("gguf")

EXACT = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
SEARCHED = {"Q4_K": (32, 15), "Q5_K": (32, 31), "Q6_K": (16, 63)}


def reference(raw: torch.Tensor, kind: str) -> torch.Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(package.quants.dequantize(raw.numpy().copy(), package.GGMLQuantizationType[kind]))


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    normal = torch.randn(8, 512) * 0.02
    return {
        "normal": normal,
        "outliers": normal * (1 + 50 * (torch.rand(8, 512) > 0.995)),
        "heavy tails": torch.distributions.StudentT(3.0).sample((8, 512)) * 0.02,
        "one sign": normal.abs() + 0.01,
        "constants": torch.tensor([0.3, -0.3, 1.0, -7.0, 1e-3, 100.0, 2.0, 5.0])[:, None].expand(8, 512).contiguous(),
    }


def test_table_is_ggmls() -> None:
    for kind in BLOCK_TYPES.values():
        number = package.GGMLQuantizationType[kind.name]
        assert (int(number), *package.GGML_QUANT_SIZES[number]) == (kind.number, kind.elements, kind.bytes)


@pytest.mark.parametrize("kind", [kind for kind in BLOCK_TYPES if kind != "Q1_0"])  # which the package does not decode
def test_decoders_are_exact_on_all_bit_patterns(kind: str) -> None:
    raw = random_blocks(kind)
    expected = reference(raw, kind)
    if kind != "NVFP4" and (BLOCK_TYPES[kind].elements > 1 or kind == "F32"):
        assert not expected.isfinite().all()  # scales of NaN and infinity are among them
    assert same_bits(gguf_dequantize(raw, kind), expected)
    for dtype in (torch.bfloat16, torch.float16):
        assert same_bits(gguf_dequantize(raw, kind, dtype), expected.to(dtype))


def test_one_bit_is_a_sign() -> None:
    raw = random_blocks("Q1_0")
    blocks = raw.reshape(-1, 18).numpy()
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    bits = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little")
    with np.errstate(invalid="ignore"):
        expected = torch.from_numpy(np.where(bits == 1, scale, -scale)).reshape(len(raw), -1)
    assert same_bits(gguf_dequantize(raw, "Q1_0"), expected)


def test_tables_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gguf_decode_small._grid.cache_clear()
    monkeypatch.setitem(sys.modules, "gguf.quants", None)
    with pytest.raises(UnsupportedError, match="IQ3_S: its tables are in the gguf package: pip install .lowbit.gguf"):
        gguf_dequantize(random_blocks("IQ3_S"), "IQ3_S")


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("name", weights())
def test_quantizers_are_the_packages(kind: str, name: str) -> None:
    weight = weights()[name]
    weight[0] = 0.0
    weight[1, ::2] = -weight[1, 1::2]  # ties for the largest magnitude
    raw = gguf_quantize(weight, kind)
    expected = package.quants.quantize(weight.numpy(), package.GGMLQuantizationType[kind])
    assert np.array_equal(raw.numpy(), expected)
    assert same_bits(gguf_dequantize(raw, kind), reference(raw, kind))


@pytest.mark.parametrize("kind", SEARCHED)
@pytest.mark.parametrize("name", weights())
def test_k_quants_beat_plain_rounding(kind: str, name: str) -> None:
    """No worse than rounding each group with exact float32 scales (and minimums), which take more bytes."""
    weight = weights()[name]
    size, largest = SEARCHED[kind]
    groups = weight.reshape(-1, size).double()
    if kind == "Q6_K":
        scale = groups.abs().amax(1, keepdim=True) / 31
        plain = (groups / scale).round().clamp(-32, 31) * scale
    else:
        low = groups.amin(1, keepdim=True).clamp(max=0)
        scale = (groups.amax(1, keepdim=True) - low) / largest
        scale[scale == 0] = 1.0
        plain = ((groups - low) / scale).round() * scale + low
    allowed = float((plain - groups).norm() / groups.norm())
    raw = gguf_quantize(weight, kind)
    found = float((gguf_dequantize(raw, kind).double() - weight).norm() / weight.double().norm())
    assert found <= max(1.01 * allowed, 1e-3)  # float16 scales alone cost 5e-4
    assert same_bits(gguf_dequantize(raw, kind), reference(raw, kind))


# llama.cpp's own quantizers (ggml-quants.c of llama-cpp-python 0.3.16, no importance matrix) on this very weight:
# relative errors. A vector, because the library is no dependency.
LLAMA_CPP = {"Q4_K": 0.07150, "Q5_K": 0.03608, "Q6_K": 0.01773}


@pytest.mark.parametrize("kind", LLAMA_CPP)
def test_k_quants_are_as_close_as_llama_cpps(kind: str) -> None:
    weight = torch.randn(128, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    decoded = gguf_dequantize(gguf_quantize(weight, kind), kind)
    assert float((decoded - weight).norm() / weight.norm()) < 1.005 * LLAMA_CPP[kind]


@pytest.mark.parametrize("kind", [kind for kind in gguf.QUANTIZABLE_TYPES if kind not in ("F32", "F16", "BF16")])
def test_blocks_that_are_not_finite_stay_so(kind: str) -> None:
    weight = torch.randn(2, 512)
    weight[0, 3], weight[1, 300] = torch.nan, torch.inf
    decoded = gguf_dequantize(gguf_quantize(weight, kind), kind)
    assert not decoded[0, :256].isfinite().all()
    assert not decoded[1, 256:].isfinite().all()
    assert decoded[0, 256:].isfinite().all()
    assert decoded[1, :256].isfinite().all()


@pytest.mark.parametrize("kind", gguf.QUANTIZABLE_TYPES)
def test_zeros_stay_zero(kind: str) -> None:
    assert not gguf_dequantize(gguf_quantize(torch.zeros(3, 256), kind), kind).any()


def test_bad_input_is_named() -> None:
    with pytest.raises(UnsupportedError, match="Unknown GGUF type 'Q9'.*Q4_K"):
        gguf_dequantize(torch.zeros(1, 34, dtype=torch.uint8), "Q9")
    with pytest.raises(UnsupportedError, match="blocks of 144 bytes; 145"):
        gguf_dequantize(torch.zeros(1, 145, dtype=torch.uint8), "Q4_K")
    with pytest.raises(UnsupportedError, match="uint8"):
        gguf_dequantize(torch.zeros(1, 144), "Q4_K")
    with pytest.raises(UnsupportedError, match="blocks of 256; 288"):
        gguf_quantize(torch.zeros(1, 288), "Q4_K")
    with pytest.raises(UnsupportedError, match="read and not written"):
        gguf_quantize(torch.zeros(1, 256), "Q2_K")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear(dtype: torch.dtype) -> None:
    weight, x, bias = torch.randn(5, 64), torch.randn(2, 3, 64).to(dtype), torch.randn(5).to(dtype)
    raw = gguf_quantize(weight, "Q8_0")
    expected = x.double() @ gguf_dequantize(raw, "Q8_0").double().t() + bias.double()
    result = calls.linear(gguf, x, raw, "Q8_0", bias)
    assert result.dtype == dtype
    assert torch.allclose(result.double(), expected, rtol=0.01 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_operators_pass_opcheck() -> None:
    raw = gguf_quantize(torch.randn(4, 256), "Q4_K")
    x, bias = torch.randn(3, 256), torch.randn(4)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(gguf.dequantize_operator, (raw, "Q4_K", torch.bfloat16), test_utils=checks)
    torch.library.opcheck(gguf.quantize_operator, (torch.randn(4, 256), "Q6_K"), test_utils=checks)
    torch.library.opcheck(gguf.mm_operator, (x, raw, "Q4_K", bias), test_utils=checks)
