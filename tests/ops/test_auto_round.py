"""AutoRound's words against their definition, bit by bit; the package's own files are in tests/quantization."""

from __future__ import annotations

import pytest
import torch

from lowbit.errors import UnsupportedError
from lowbit.ops import auto_round
from lowbit.ops.auto_round import PACKINGS, auto_round_dequantize, packing_of


@pytest.mark.parametrize("bits", auto_round.BITS)
def test_words_are_a_stream_of_bits(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 64), dtype=torch.uint8)
    codes[0] = 2**bits - 1
    words = auto_round.pack_words(codes, bits)
    assert words.shape == (3, 2 * bits)
    for row in range(3):
        stream = 0
        for i, code in enumerate(codes[row].tolist()):
            stream |= code << (i // 32 * 32 * bits + i % 32 * bits)
        found = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words[row].tolist()))
        assert found == stream
    assert torch.equal(auto_round.unpack_words(words, bits), codes)


@pytest.mark.parametrize("name", PACKINGS)
@pytest.mark.parametrize("bits", auto_round.BITS)
def test_packing_is_undone_and_decodes_to_the_formula(name: str, bits: int) -> None:
    packing = PACKINGS[name]
    codes = torch.randint(0, 2**bits, (64, 96), dtype=torch.uint8)
    zero = torch.randint(packing.zero_offset, 2**bits + packing.zero_offset, (64, 3), dtype=torch.int16)
    scale = torch.randn(64, 3).half()
    qweight = auto_round.pack_weight(codes, bits, packing)
    qzeros = auto_round.pack_zero_points(zero, bits, packing)
    assert (tuple(qweight.shape), tuple(qzeros.shape)) == auto_round.word_shapes(64, 96, 3, bits, packing)
    assert torch.equal(auto_round.unpack_weight(qweight, bits, packing), codes)
    assert torch.equal(auto_round.unpack_zero_points(qzeros, bits, packing), zero)
    spread = [part.double().repeat_interleave(32, 1) for part in (zero, scale)]
    expected = ((codes.double() - spread[0]) * spread[1]).float()
    packing_format = {"gptq": "auto_round:auto_gptq", "native": "auto_round", "awq": "auto_awq"}[name]
    found = auto_round_dequantize(qweight, qzeros, scale.t().contiguous(), bits, 32, packing_format)
    assert torch.equal(found, expected)


def test_a_short_last_group() -> None:
    codes, zero = torch.randint(0, 16, (32, 96)), torch.full((32, 2), 8)
    packing = PACKINGS["gptq"]
    scale = torch.rand(2, 32)
    tensors = auto_round.pack_weight(codes, 4, packing), auto_round.pack_zero_points(zero, 4, packing), scale
    expected = (codes - 8).float() * scale.t().repeat_interleave(64, 1)[:, :96]
    assert torch.equal(auto_round_dequantize(*tensors, 4, 64), expected)


@pytest.mark.parametrize(
    ("name", "packing"),
    [
        ("auto_round:auto_gptq", "gptq"),
        ("auto_gptq", "gptq"),
        ("auto_round:auto_gptq:exllamav2", "gptq"),
        ("auto_round", "native"),
        ("auto-round:gptqmodel", "native"),
        ("auto_round:auto_awq", "awq"),
        ("AUTO_AWQ", "awq"),
    ],
)
def test_names_of_packings(name: str, packing: str) -> None:
    assert packing_of(name) is PACKINGS[packing]


@pytest.mark.parametrize("name", ["", "auto_round:mlx", "fp8", "exllamav2", "auto_round:llm_compressor", "gguf"])
def test_other_packings_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match=r"(?s)is not supported.*auto_round:auto_awq"):
        packing_of(name)


def test_shapes_that_do_not_fit_are_refused() -> None:
    packing = PACKINGS["gptq"]
    words = auto_round.pack_weight(torch.zeros(32, 64), 4, packing)
    zeros = auto_round.pack_zero_points(torch.ones(32, 2), 4, packing)
    with pytest.raises(ValueError, match="have the shapes"):
        auto_round_dequantize(words, zeros, torch.ones(2, 32), 4, 64)
    with pytest.raises(ValueError, match="bits must be from 2 to 8"):
        auto_round_dequantize(words, zeros, torch.ones(2, 32), 9, 32)
