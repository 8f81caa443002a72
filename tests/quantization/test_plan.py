from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lowbit.errors import ConfigError, UnsupportedError
from lowbit.quantization import Fp8Config, Int8Config, QuantizedLinear, plan_layers, quantize_model
from lowbit.quantization.calibration.smoothing import watched_inputs
from lowbit.quantization.methods.mxfp8 import Mxfp8Config
from tests.quantization.models import run_transformer, small_transformer


def test_the_family_keeps_what_its_table_says() -> None:
    plan = plan_layers(small_transformer(), Int8Config())
    kept = {name: decision.reason for name, decision in plan.items() if decision.method is None}
    assert kept["layers.0.adaLN_modulation.0"] == "modulation"
    assert kept["t_embedder.mlp.0"] == "embedding"
    assert kept["all_final_layer.2-1.linear"] == "last projection"
    assert not [name for name in kept if "attention" in name or "feed_forward" in name]


def test_a_serialized_checkpoint_says_itself_what_it_kept() -> None:
    plan = plan_layers(small_transformer(), Int8Config(is_checkpoint_int8_serialized=True))
    assert {"layers.0.adaLN_modulation.0", "layers.0.attention.to_q"} <= plan.keys()
    assert all(decision.method is not None for decision in plan.values())


def test_patterns_that_match_nothing_are_an_error_that_helps() -> None:
    model = small_transformer()
    with pytest.raises(ConfigError, match=r"\['img_mlp'\] match no layer.*feed_forward"):
        quantize_model(model, "int8", ignored_layers=["feed_forward", "img_mlp"])
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())


def test_a_method_that_applies_to_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match="int8 applies to no linear layer of Conv2d: it has none"):
        quantize_model(nn.Conv2d(1, 1, 1), "int8")
    with pytest.raises(ConfigError, match="applies to no linear layer.*ignored_layers"):
        quantize_model(small_transformer(), "int8", ignored_layers=["attention", "feed_forward"])


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({"method": "int8", "kernel": "reference"}, 0.02),
        ({"method": "int8"}, 0.02),
        ({"method": "fp8", "kernel": "reference"}, 0.06),
        ({"method": "fp8", "kernel": "reference", "weight_block_size": [128, 128]}, 0.06),
        ({"method": "fp8", "kernel": "weight_only"}, 0.05),
    ],
)
def test_quantizing_in_place_stays_close(options: dict[str, object], bound: float) -> None:
    model = small_transformer()
    before = run_transformer(model)
    manifest = quantize_model(model, options)
    after = run_transformer(model)
    error = ((after - before).norm() / before.norm()).item()
    assert 0 < error < bound
    assert model.lowbit_manifest is manifest
    assert len(manifest.quantized) == 28
    assert {layer.method for layer in manifest.quantized} == {options["method"]}
    assert {layer.reason for layer in manifest.kept} == {"modulation", "embedding", "last projection"}
    assert manifest.bytes_before == sum(p.numel() * 2 for p in small_transformer().parameters()) + sum(
        b.numel() * b.element_size() for b in small_transformer().buffers()
    )
    assert manifest.bytes_after < 0.75 * manifest.bytes_before
    assert sum(manifest.by_kernel().values()) == 28
    assert all(
        f"{count} layers {options['method']} ({kernel})" in manifest.summary()
        for (_, kernel), count in manifest.by_kernel().items()
    )


def test_ignored_layers_are_kept_and_the_manifest_says_so() -> None:
    model = small_transformer()
    manifest = quantize_model(model, "int8", ignored_layers=["to_qkv", "re:layers\\.1\\."])
    assert type(model.layers[0].attention.to_q) is nn.Linear
    assert type(model.layers[1].feed_forward.w1) is nn.Linear
    assert isinstance(model.layers[0].feed_forward.w1, QuantizedLinear)
    reasons = {layer.name: layer.reason for layer in manifest.kept}
    assert reasons["layers.0.attention.to_q"] == "ignored_layers"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_source_dtype(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)).to(dtype)
    expected = model(torch.ones(3, 64, dtype=dtype))
    quantize_model(model, Fp8Config(kernel="reference"))
    result = model(torch.ones(3, 64, dtype=dtype))
    assert result.dtype == dtype
    assert ((result - expected).norm() / expected.norm()).item() < 0.1


def test_bad_requests() -> None:
    with pytest.raises(ConfigError, match="one of lowbit's own methods"):
        quantize_model(nn.Linear(2, 2), {"transformer": "int8"})
    with pytest.raises(ConfigError, match="unquantized weights"):
        quantize_model(nn.Linear(2, 2), "int8", is_checkpoint_int8_serialized=True)


def test_progress_counts_layers() -> None:
    calls: list[tuple[int, int]] = []
    quantize_model(copy.deepcopy(small_transformer()), "int8", progress=lambda done, total: calls.append((done, total)))
    assert calls == [(index, 28) for index in range(1, 29)]


def test_a_method_without_a_weight_only_kind_says_so() -> None:
    with pytest.raises(ConfigError, match="mxfp8 has no weight-only kind"):
        plan_layers(small_transformer(), Mxfp8Config(weight_only_layers=["adaLN_modulation"]))


@pytest.mark.parametrize("smoothing", [None, 0.5])
def test_a_model_with_a_layer_that_no_kernel_takes_stays_whole(smoothing: float | None) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64, device="meta"))
    before = copy.deepcopy(model.state_dict())
    seen = None
    if smoothing is not None:
        with watched_inputs(model) as seen:
            model[1](model[0](torch.randn(4, 64)))
    with pytest.raises(UnsupportedError, match=r"(?s)named 'float32'.*runs on cpu, not on meta"):
        quantize_model(model, "int8", kernel="float32", smoothing=smoothing, seen_inputs=seen)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    assert not hasattr(model, "lowbit_manifest")
    assert all(tensor.is_meta or torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
