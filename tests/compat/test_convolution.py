"""Convolutions in float32 where the CPU has none in the model's dtype."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lowbit import Omni
from lowbit.compat.parts.tensors import convolves
from lowbit.compat.patches.convolution import convolve_in_float32


def layers(dtype: torch.dtype) -> dict[str, tuple[nn.Module, torch.Tensor]]:
    torch.manual_seed(0)
    return {
        "1d": (nn.Conv1d(8, 12, 3, padding=1).to(dtype), torch.randn(2, 8, 17).to(dtype)),
        "2d": (nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False).to(dtype), torch.randn(2, 8, 9, 11).to(dtype)),
        "2d-reflect": (
            nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect").to(dtype),
            torch.randn(1, 8, 6, 6).to(dtype),
        ),
        "2d-grouped": (nn.Conv2d(8, 16, 3, groups=4, dilation=2).to(dtype), torch.randn(1, 8, 12, 12).to(dtype)),
        "3d": (nn.Conv3d(4, 8, 3, padding=1).to(dtype), 1e3 * torch.randn(1, 4, 3, 5, 5).to(dtype)),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["1d", "2d", "2d-reflect", "2d-grouped", "3d"])
def test_is_the_float64_result_rounded(name: str, dtype: torch.dtype) -> None:
    layer, x = layers(dtype)[name]
    with torch.no_grad():
        expected = copy.deepcopy(layer).double()(x.double())
        assert convolve_in_float32(nn.Sequential(layer)) == 1
        found = layer(x)
    assert found.dtype == dtype
    bound = torch.finfo(dtype).eps / 2 * expected.abs() + 1e-5 * expected.abs().max()
    assert ((found.double() - expected).abs() <= bound).all()


def test_copies_and_pickles_compute_with_their_own_weights() -> None:
    layer, x = layers(torch.bfloat16)["2d"]
    convolve_in_float32(layer)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        with torch.no_grad():
            other.get_parameter("weight").zero_()
        assert not other(x).any()
        assert layer(x).any()
    assert [*layer.state_dict()] == ["weight"]
    assert layer.weight.dtype == torch.bfloat16


def test_gradients_flow() -> None:
    layer, x = layers(torch.bfloat16)["2d"]
    convolve_in_float32(layer)
    layer(x.requires_grad_()).sum().backward()
    assert x.grad is not None
    assert x.grad.any()


def test_the_question_that_is_asked_of_torch_exists() -> None:
    assert convolves(torch.float32)
    assert isinstance(convolves(torch.bfloat16), bool)
    assert isinstance(convolves(torch.float16), bool)


@pytest.mark.skipif(convolves(torch.bfloat16), reason="this CPU convolves BF16 by itself")
def test_the_vae_of_a_loaded_pipeline_takes_it() -> None:
    vae = Omni(device="cpu").pipeline.vae
    assert vae.dtype == torch.bfloat16
    assert all("_conv_forward" in layer.__dict__ for layer in vae.modules() if isinstance(layer, nn.Conv2d))
