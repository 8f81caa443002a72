from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.quantization import (
    Fp8Config,
    Int8Config,
    Mxfp4Config,
    Mxfp4DualScaleConfig,
    Mxfp8Config,
    NvFp4Config,
    QuantizedLinear,
)
from lowbit.quantization.base import QuantizationConfig
from lowbit.quantization.plan import quantize_layer
from tests.support.kernels import skip_if_refused

CONFIGS = [
    Int8Config(),
    Int8Config(kernel="reference"),
    Int8Config(kernel="onednn"),
    Fp8Config(kernel="reference"),
    Fp8Config(),
    Fp8Config(weight_block_size=[128, 128], kernel="reference"),
    Mxfp8Config(),
    Mxfp8Config(kernel="reference"),
    Mxfp4Config(),
    Mxfp4Config(kernel="reference"),
    Mxfp4DualScaleConfig(num_bf16_fallback_layers=0),
    Mxfp4DualScaleConfig(num_bf16_fallback_layers=0, kernel="reference"),
    NvFp4Config(),
    NvFp4Config(kernel="reference"),
    NvFp4Config(weight_only=True),
]


@pytest.fixture(params=CONFIGS, ids=str)
def config(request: pytest.FixtureRequest) -> QuantizationConfig:
    skip_if_refused(request.param)
    chosen: QuantizationConfig = request.param
    return chosen


def quantized(config: QuantizationConfig, dtype: torch.dtype = torch.bfloat16) -> QuantizedLinear:
    torch.manual_seed(3)
    return quantize_layer(nn.Linear(200, 72).to(dtype), config.linear_method(), "block.to_q")


def same_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


class TestEveryMethod:
    def test_is_a_linear_layer(self, config: QuantizationConfig) -> None:
        layer = quantized(config)
        assert isinstance(layer, nn.Linear)
        assert (layer.in_features, layer.out_features) == (200, 72)
        assert not layer.weight.requires_grad
        assert "method=" + config.get_name() in repr(layer)

    def test_state_dict_is_canonical_and_loads_again(self, config: QuantizationConfig) -> None:
        layer = quantized(config)
        x = torch.randn(5, 200).to(torch.bfloat16)
        expected = layer(x)
        state = layer.state_dict()
        canonical = config.linear_method().quantize_weight(_source().weight.detach())
        for name, tensor in canonical.items():
            assert state[name].dtype == tensor.dtype
            assert torch.equal(same_bytes(state[name]), same_bytes(tensor)), name
        other = QuantizedLinear.like(_source(), config.linear_method(), "block.to_q", torch.bfloat16).to_empty(
            device="cpu"
        )
        other.load_state_dict(state)
        assert torch.equal(other(x), expected)

    def test_copies_and_pickles_compute_the_same(self, config: QuantizationConfig) -> None:
        layer = quantized(config)
        x = torch.randn(5, 200).to(torch.bfloat16)
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))
        assert torch.equal(torch.load(file, weights_only=False)(x), layer(x))

    def test_casting_leaves_quantized_tensors_alone(self, config: QuantizationConfig) -> None:
        layer = quantized(config)
        before = layer.state_dict()
        after = layer.to(torch.float32).state_dict()
        for name in layer.quantized_names:
            assert after[name].dtype == before[name].dtype
            assert torch.equal(same_bytes(after[name]), same_bytes(before[name]))
        assert layer.bias.dtype == torch.float32
        assert layer(torch.randn(2, 200)).dtype == torch.float32

    def test_moves_to_the_meta_device(self, config: QuantizationConfig) -> None:
        layer = quantized(config).to("meta")
        assert all(parameter.is_meta for parameter in layer.parameters())
        assert layer.get_parameter("weight").shape == layer.expected["weight"][0]

    def test_hooks_run(self, config: QuantizationConfig) -> None:
        layer = quantized(config)
        seen = []
        layer.register_forward_hook(lambda *_: seen.append(1))
        layer(torch.randn(2, 200).to(torch.bfloat16))
        assert seen == [1]

    def test_is_traced_whole(self, config: QuantizationConfig) -> None:
        torch.compiler.reset()
        layer, x = quantized(config), torch.randn(2, 200).to(torch.bfloat16)
        torch.compiler.reset()
        traced = torch.compile(layer, backend="eager", fullgraph=True)
        torch.testing.assert_close(traced(x), layer(x))


def _source() -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(200, 72).to(torch.bfloat16)


def test_a_tensor_of_the_wrong_shape_is_named() -> None:
    layer = QuantizedLinear.like(_source(), Int8Config().linear_method(), "block.to_q", torch.bfloat16)
    with pytest.raises(
        CheckpointError, match=r"block.to_q.weight: found int8 \[72, 199\], int8 needs int8 \[72, 200\]"
    ):
        layer.load_tensor("weight", torch.zeros(72, 199, dtype=torch.int8))
    with pytest.raises(CheckpointError, match="found float32"):
        layer.load_tensor("weight", torch.zeros(72, 200))


@pytest.mark.parametrize("shape", [(72, 1), (72,), (1,), ()])
def test_scales_of_other_shapes_are_understood(shape: tuple[int, ...]) -> None:
    layer = QuantizedLinear.like(_source(), Int8Config().linear_method(), "", torch.bfloat16)
    layer.load_tensor("weight_scale", torch.full(shape, 0.5))
    assert torch.equal(layer.get_parameter("weight_scale"), torch.full((72, 1), 0.5))


def test_a_kernel_that_cannot_run_here_says_why() -> None:
    with pytest.raises(UnsupportedError, match="triton: runs on cuda"):
        quantized(Int8Config(kernel="triton"))
