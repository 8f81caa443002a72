"""Slices of quantized layers: put together they are the whole, or the refusal says why not."""

from __future__ import annotations

import functools
import re
from typing import Any, Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lowbit.errors import UnsupportedError
from lowbit.parallel.shard import shard_linear
from lowbit.quantization import QuantizedLinear, build_quant_config, quantize_model
from lowbit.quantization.base import LinearMethod
from lowbit.quantization.factory import SUPPORTED_QUANTIZATION_METHODS
from lowbit.quantization.methods import ascend, modelopt
from lowbit.quantization.methods.auto_round_linear import AutoRoundNvFp4Method
from tests.support.models import METHODS

# With a matrix product in the decoder, whose order of adding depends on the shape.
INEXACT = ("svdquant", "rotation", "NVFP4_SVD")
RANKS = (1, 2, 3, 4, 8)
EXTRA: dict[str, dict[str, Any]] = {
    "gguf-Q4_K": {"method": "gguf", "gguf_type": "Q4_K"},
    "auto-round-per-channel": {"method": "auto-round", "group_size": -1},
    "auto-round-128": {"method": "auto-round", "group_size": 128},
    **{
        f"compressed-tensors-{scheme}": {"method": "compressed-tensors", "scheme": scheme}
        for scheme in ("W3A16", "W4A16_ASYM", "W8A16", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4", "MXFP8")
    },
    "fp8-block-128": {"method": "fp8", "weight_block_size": [128, 128]},
}
ONLINE: dict[str, dict[str, Any]] = {
    **{name: options for name, options in METHODS.items() if name != "int8-onednn"},
    **EXTRA,
}


@functools.cache
def online(name: str, rows: int, columns: int) -> QuantizedLinear | str:
    """Return a quantized layer [rows, columns], or why the method keeps such a layer."""
    torch.manual_seed(rows * 1000 + columns)
    model = nn.Sequential(nn.Linear(columns, rows)).requires_grad_(False)
    options = {key: value for key, value in ONLINE[name].items() if key != "smoothing"}
    try:
        quantize_model(model, options)
    except ValueError as error:
        return str(error)
    layer = model[0]
    assert isinstance(layer, QuantizedLinear)
    for scale in ("input_scale",):
        if scale in layer.quantized_names:
            layer.replace_tensor(scale, torch.tensor(0.02))
    return layer


def reassembled(layer: QuantizedLinear, along: Any, ranks: int) -> torch.Tensor:
    shards = [shard_linear(layer, along, rank, ranks) for rank in range(ranks)]
    return torch.cat([shard.dequantized() for shard in shards], dim=0 if along == "n" else 1)


def same(name: str, found: torch.Tensor, expected: torch.Tensor) -> bool:
    if any(part in name for part in INEXACT):
        return torch.allclose(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    return torch.equal(found, expected)


def check(name: str, layer: QuantizedLinear, along: Any, ranks: int) -> bool:
    """Return whether the layer was cut; a refusal gives the numbers and ranks that divide them, which then must do."""
    refusal = refused(layer, along, ranks)
    if refusal is None:
        assert same(name, reassembled(layer, along, ranks), layer.dequantized())
        return True
    channels = layer.out_features if along == "n" else layer.in_features
    assert f"{channels} / {ranks} is not a" in refusal
    fitting = re.search(r"Ranks that divide it: ([\d, ]+)", refusal)
    assert fitting is not None
    assert ranks not in map(int, fitting[1].split(","))
    last = int(fitting[1].split(",")[-1])
    assert same(name, reassembled(layer, along, last), layer.dequantized())
    return False


def refused(layer: QuantizedLinear, along: Any, ranks: int) -> str | None:
    """Return why the layer can't be cut."""
    try:
        shard_linear(layer, along, 0, ranks)
    except UnsupportedError as error:
        return str(error)
    return None


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.sampled_from([32, 96, 128, 192, 512, 35]),
    columns=st.sampled_from([64, 96, 256, 384, 1024, 200, 2048]),
    along=st.sampled_from(["n", "k"]),
    ranks=st.sampled_from(RANKS),
)
@pytest.mark.parametrize("name", ONLINE)
def test_slices_are_the_whole_or_refused(name: str, rows: int, columns: int, along: str, ranks: int) -> None:
    layer = online(name, rows, columns)
    if isinstance(layer, str):
        assert "applies to no linear layer" in layer
        return
    check(name, layer, along, ranks)


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize("along", ["n", "k"])
def test_every_method_is_cut_where_it_can_be(name: str, along: str) -> None:
    layer = online(name, 1024, 4096)  # of 8 slices each has a whole group of 512
    assert isinstance(layer, QuantizedLinear)
    assert all(check(name, layer, along, ranks) for ranks in (1, 2, 4, 8))
    assert not check(name, layer, along, 3)


def filled(method: LinearMethod, rows: int = 512, columns: int = 1024) -> QuantizedLinear:
    """Return a layer of a format that is only read, with random tensors."""
    torch.manual_seed(0)
    layer = QuantizedLinear(columns, rows, True, method, dtype=torch.float32, prefix="layer")
    for spec in method.specs(rows, columns):
        shape = spec.shape(rows, columns)
        if spec.dtype in (torch.int8, torch.uint8, torch.int32):
            values = torch.randint(0, 100, shape).to(spec.dtype)
        else:
            values = (torch.rand(shape) + 0.5).to(spec.dtype)
        layer.replace_tensor(spec.name, values)
    layer.bias = nn.Parameter(torch.randn(rows), requires_grad=False)
    return layer


READ_ONLY = {
    **{f"ascend {name}": make("auto") for name, make in ascend.TYPES.items()},
    "modelopt NVFP4_SVD": modelopt.NvFp4SvdLinearMethod(8, "auto"),
    "auto-round nv_fp4": AutoRoundNvFp4Method("static", "auto"),
}


@pytest.mark.parametrize("name", READ_ONLY)
@pytest.mark.parametrize("along", ["n", "k"])
def test_formats_that_are_only_read(name: str, along: str) -> None:
    layer = filled(READ_ONLY[name])
    assert all(check(name, layer, along, ranks) for ranks in (1, 2))


def test_every_method_is_in_these_tests() -> None:
    tested = {options["method"] for options in ONLINE.values()} | {name.split()[0] for name in READ_ONLY}
    assert tested >= set(SUPPORTED_QUANTIZATION_METHODS)


@pytest.mark.parametrize("name", [name for name in ONLINE if name not in ("fp8-static", "modelopt-FP8")])
@pytest.mark.parametrize("along", ["n", "k"])
def test_the_slices_compute_what_the_whole_does(name: str, along: Literal["n", "k"]) -> None:
    layer = online(name, 512, 1024)
    assert isinstance(layer, QuantizedLinear)
    torch.manual_seed(1)
    x = torch.randn(5, 1024)
    shards = [shard_linear(layer, along, rank, 2) for rank in range(2)]
    with torch.no_grad():
        expected = layer(x)
        if along == "n":
            found = torch.cat([shard(x) for shard in shards], dim=1)
        else:
            found = sum(shard(part) for shard, part in zip(shards, x.chunk(2, dim=1), strict=True))
    # Rounding activations per token, a row-parallel slice has a scale of its own.
    bound = 0.2 if any(part in name for part in ("mxfp4", "nvfp4", "svdquant")) else 0.03
    error = float((found - expected).norm() / expected.norm())
    assert error < (1e-5 if along == "n" else bound)
    if name == "int8" and along == "n":
        assert torch.equal(found, expected)


def test_the_bias_is_added_once() -> None:
    layer = online("int8", 512, 1024)
    assert isinstance(layer, QuantizedLinear)
    rows = [shard_linear(layer, "k", rank, 4) for rank in range(4)]
    assert torch.equal(rows[0].bias, layer.bias)
    assert all(shard.bias is None for shard in rows[1:])
    columns = [shard_linear(layer, "n", rank, 4) for rank in range(4)]
    assert torch.equal(torch.cat([shard.bias for shard in columns]), layer.bias)


def test_what_a_sum_holds_already_is_held_by_one_rank() -> None:
    layer = filled(ascend.AscendStaticMethod("auto"))
    shards = [shard_linear(layer, "k", rank, 2) for rank in range(2)]
    assert torch.equal(shards[0].get_parameter("quant_bias"), layer.get_parameter("quant_bias"))
    assert not shards[1].get_parameter("quant_bias").any()


def test_slices_are_layers_of_their_own() -> None:
    layer = online("auto-round", 512, 1024)
    assert isinstance(layer, QuantizedLinear)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    shard = shard_linear(layer, "k", 1, 2)
    other = QuantizedLinear.like(shard, layer.method, "", torch.float32).to_empty(device="cpu")
    other.load_state_dict(shard.state_dict(), strict=False)
    x = torch.randn(3, 512)
    with torch.no_grad():
        assert torch.equal(other(x), shard(x))
    shard.get_parameter("weight").data.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_a_refusal_says_what_would_do() -> None:
    layer = online("gguf-Q4_K", 512, 1024)
    assert isinstance(layer, QuantizedLinear)
    message = r"1024 input channels on 8 ranks: 1024 / 8 is not a multiple of 256. Ranks that divide it: 1, 2, 4$"
    with pytest.raises(UnsupportedError, match=message):
        shard_linear(layer, "k", 0, 8)
    with pytest.raises(UnsupportedError, match="512 output channels on 3 ranks: 512 / 3 is not a whole number"):
        shard_linear(layer, "n", 0, 3)
    assert build_quant_config("int8") is not None
