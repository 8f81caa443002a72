"""Offloading by diffusers and accelerate, with the CPU as the device that computes: the hooks, not the transfers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from accelerate.utils import set_module_tensor_to_device
from diffusers.hooks import apply_group_offloading

from lowbit import Omni
from lowbit.inputs.data import OmniDiffusionSamplingParams
from lowbit.quantization import QuantizedLinear
from lowbit.quantization.plan import quantize_model, quantized_layers
from tests.support.foreign_models import FOREIGN, foreign_model
from tests.support.kernels import skip_if_refused
from tests.support.models import FAMILIES, METHODS, STATIC, Family, quantized_model, same_bytes

CPU = torch.device("cpu")


def sequential(model: Any, folder: Path) -> None:
    cpu_offload(model, CPU)
    assert all(tensor.is_meta for tensor in model.parameters())


def leaves_that_keep_their_own_copies(model: Any, folder: Path) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            add_hook_to_module(module, AlignDevicesHook(CPU, offload=True))
            assert module.weight.is_meta


def placed_once(model: Any, folder: Path) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            add_hook_to_module(module, AlignDevicesHook(CPU, io_same_device=True))


def whole_model(model: Any, folder: Path) -> None:
    cpu_offload_with_hook(model, CPU)


def group_of_leaves(model: Any, folder: Path) -> None:
    apply_group_offloading(model, CPU, CPU, "leaf_level")


def group_of_blocks(model: Any, folder: Path) -> None:
    model.enable_group_offload(CPU, CPU, "block_level", num_blocks_per_group=1)


def leaves_on_the_disk(model: Any, folder: Path) -> None:
    apply_group_offloading(model, CPU, CPU, "leaf_level", offload_to_disk_path=str(folder))


def blocks_on_the_disk(model: Any, folder: Path) -> None:
    apply_group_offloading(model, CPU, CPU, "block_level", num_blocks_per_group=2, offload_to_disk_path=str(folder))


OFFLOADINGS: list[Callable[[Any, Path], None]] = [
    sequential,
    leaves_that_keep_their_own_copies,
    placed_once,
    whole_model,
    group_of_leaves,
    group_of_blocks,
    leaves_on_the_disk,
    blocks_on_the_disk,
]


# Every method meets hooks that bring new parameters and hooks that write into old ones; some meet every kind of them.
EVERY_KIND = ["int8-onednn", "fp8-static", "mxfp4_dualscale", "gguf-Q4_0", "auto-round", "svdquant-int4"]
CASES = [
    (method, offload)
    for method in METHODS
    for offload in (OFFLOADINGS if method in EVERY_KIND else [sequential, leaves_on_the_disk])
]


@pytest.mark.parametrize(("method", "offload"), CASES)
def test_offloading_changes_nothing(
    method: str, offload: Callable[[Any, Path], None], z_family: Family, tmp_path: Path
) -> None:
    model = quantized_model(z_family, method)
    expected = z_family.run(model)
    offload(model, tmp_path)
    for _ in range(2):
        assert torch.equal(z_family.run(model), expected)


@pytest.mark.parametrize("offload", [sequential, leaves_on_the_disk, group_of_blocks])
@pytest.mark.parametrize("name", FOREIGN)
def test_offloading_checkpoints_of_other_tools(name: str, offload: Callable[[Any, Path], None], tmp_path: Path) -> None:
    model, family = foreign_model(name, tmp_path / "model"), FAMILIES["flux"]
    expected, before = family.run(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (tmp_path / "offloaded").mkdir()
    offload(model, tmp_path / "offloaded")
    assert torch.equal(family.run(model), expected)
    if offload is sequential:
        remove_hook_from_submodules(model)
        assert same_bytes(model.state_dict(), before)


@pytest.mark.parametrize("method", METHODS)
def test_what_was_offloaded_comes_back(method: str, z_family: Family) -> None:
    model = quantized_model(z_family, method)
    expected, before = z_family.run(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cpu_offload(model, CPU)
    z_family.run(model)
    remove_hook_from_submodules(model)
    assert same_bytes(model.state_dict(), before)
    assert torch.equal(z_family.run(model), expected)


# Static scales need calibration, and those layers move as dynamic ones do. Without hooks accelerate casts what it sets
# to the dtype it finds, which is that of the kernel's layout: svdquant's int4 weights don't survive that.
MOVABLE = [method for method in METHODS if method not in STATIC and method != "svdquant-int4"]


@pytest.mark.parametrize("method", MOVABLE)
def test_the_kernel_follows_tensors_that_others_move(method: str) -> None:
    skip_if_refused(METHODS[method])
    linear = torch.nn.Linear(64, 64, dtype=torch.bfloat16)
    parent = torch.nn.Sequential(torch.nn.Linear(64, 64, dtype=torch.bfloat16), linear)
    options = {name: value for name, value in METHODS[method].items() if name not in ("smoothing", "kernel")}
    quantize_model(parent, options, kernel="onednn" if method == "int8-onednn" else "auto")
    layer = parent[1]
    assert isinstance(layer, QuantizedLinear)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    expected = layer(x)
    before = layer.state_dict()
    layer.leave_kernel()
    canonical = {name: parameter.data for name, parameter in layer.named_parameters()}
    if method != "int8-onednn":  # which is asked for by name and runs on the CPU alone
        for name in canonical:
            set_module_tensor_to_device(layer, name, "meta")
        assert layer(x.to("meta")).shape == expected.shape
        assert layer.bound.device == torch.device("meta")
    for name, tensor in canonical.items():
        set_module_tensor_to_device(layer, name, "cpu", value=tensor)
    assert torch.equal(layer(x), expected)
    assert layer.bound.device == CPU
    assert same_bytes(layer.state_dict(), before)


def test_a_pipeline() -> None:
    def picture(omni: Omni) -> Any:
        output = omni.generate(
            "a red circle", OmniDiffusionSamplingParams(num_inference_steps=1, seed=0), progress=False
        )
        return output.images[0]

    omni = Omni(quantization_config={"transformer": "mxfp4", "text_encoder": "int8"}, device="cpu")
    expected = picture(omni)
    pipeline = omni.pipeline
    # enable_sequential_cpu_offload(device="cpu") fails in accelerate, quantized or not; above are its hooks.
    pipeline.enable_model_cpu_offload(device="cpu")
    assert picture(omni).tobytes() == expected.tobytes()
    pipeline.remove_all_hooks()
    assert quantized_layers(pipeline.text_encoder)
    pipeline.enable_group_offload(CPU, CPU, offload_type="leaf_level")
    assert picture(omni).tobytes() == expected.tobytes()
