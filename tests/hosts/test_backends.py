"""Other libraries' methods behind lowbit's options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from examples.custom_method import ToyConfig
from lowbit import Omni, build_quant_config, quantize_model, register_quantization_method
from lowbit.checkpoints.skeleton import empty_component
from lowbit.cli.info import info
from lowbit.cli.quantize import refuse_other_backends
from lowbit.engine.loading import read_components, resolve_model
from lowbit.errors import ConfigError, UnsupportedError
from lowbit.hosts import other_quantizers as backends
from lowbit.hosts.routing import claims
from lowbit.inputs.data import OmniDiffusionSamplingParams
from lowbit.quantization import ComponentQuantizationConfig
from lowbit.quantization.backends import BACKENDS, BackendConfig

PARAMS = OmniDiffusionSamplingParams(num_inference_steps=2, seed=0)


def needs(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if not backends.is_installed(name)]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


def picture(omni: Omni) -> Any:
    output = omni.generate("a large red circle", PARAMS, progress=False)[0]
    return np.asarray(output.images[0]).astype(float)


def test_every_backend_has_an_entry() -> None:
    assert tuple(backends._BACKENDS) == BACKENDS


@pytest.mark.parametrize(
    ("spec", "options", "expected"),
    [
        ("torchao", {}, BackendConfig(backend="torchao")),
        (" Quanto", {"weights_dtype": "int4"}, BackendConfig(backend="quanto", options={"weights_dtype": "int4"})),
        (
            {"method": "sdnq", "modules_to_not_convert": ["a"], "group_size": 64},
            {},
            BackendConfig(backend="sdnq", ignored_layers=("a",), options={"group_size": 64}),
        ),
        ({"quant_method": "torchao", "ignored_layers": []}, {}, BackendConfig(backend="torchao")),
    ],
)
def test_configurations(spec: Any, options: dict[str, Any], expected: BackendConfig) -> None:
    config = build_quant_config(spec, **options)
    assert config == expected
    assert build_quant_config(expected.to_dict()) == expected


def test_configurations_per_component() -> None:
    config = build_quant_config({"transformer": "int8", "text_encoder": {"method": "quanto"}, "default": "torchao"})
    assert isinstance(config, ComponentQuantizationConfig)
    assert config.resolve("text_encoder") == BackendConfig(backend="quanto")
    assert config.resolve("vae") == BackendConfig(backend="torchao")
    assert build_quant_config(config.to_dict()) == config


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="leave out kernel"):
        build_quant_config("torchao", kernel="reference")
    with pytest.raises(ConfigError, match="must be a list"):
        build_quant_config("torchao", ignored_layers="to_q")
    with pytest.raises(ConfigError, match="one of lowbit's own methods"):
        quantize_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), "quanto")
    with pytest.raises(ConfigError, match="There is a quantization method 'torchao' already"):
        register_quantization_method("torchao", ToyConfig)
    with pytest.raises(ConfigError, match="not of quanto, torchao"):
        refuse_other_backends({"transformer": "torchao", "vae": None, "default": "quanto"})
    refuse_other_backends({"transformer": "int8"})


@pytest.mark.parametrize("backend", BACKENDS)
def test_their_checkpoints_are_theirs(backend: str) -> None:
    assert not claims({"quant_method": backend})


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_missing_package_is_named(backend: str) -> None:
    if backends.is_installed(backend):
        pytest.skip(f"{backend} is installed")
    with pytest.raises(UnsupportedError, match=rf"{backend} is not installed: pip install 'lowbit\[{backend}\]'"):
        Omni(quantization=backend, device="cpu")


@needs("torchao", "quanto", "sdnq")
@pytest.mark.parametrize(
    "spec",
    [
        {"method": "torchao"},
        {"method": "torchao", "quant_type": "int8_dynamic_activation_int8_weight", "ignored_layers": ["layers.0.*"]},
        {"method": "quanto", "weights_dtype": "int8"},
        {"method": "sdnq", "use_quantized_matmul": True},
    ],
)
def test_a_transformer(spec: dict[str, Any]) -> None:
    expected = picture(Omni(device="cpu"))
    omni = Omni(quantization_config=spec, device="cpu")
    manifest = omni.manifests["transformer"]
    assert manifest.by_kernel().keys() == {(spec["method"], "through diffusers")}
    assert manifest.bytes_after < 0.8 * manifest.bytes_before
    assert f"layers {spec['method']} (through diffusers)" in manifest.summary()
    kept = {record.name: record.reason for record in manifest.kept}
    assert any(reason == "last projection" for reason in kept.values())
    if "ignored_layers" in spec:
        assert kept["layers.0.attention.to_q"] == "ignored_layers"
    if spec["method"] != "quanto":  # diffusers can't name it one layer among others called alike
        assert kept["t_embedder.mlp.0"] == "embedding"
    error = ((picture(omni) - expected) ** 2).mean()
    assert 0 < error < 1


@needs("torchao", "quanto", "sdnq")
@pytest.mark.parametrize("backend", ["torchao", "quanto", "sdnq"])
def test_what_they_saved_is_loaded(backend: str, tmp_path: Path) -> None:
    omni = Omni(quantization=backend, device="cpu")
    expected, layers = picture(omni), omni.manifests["transformer"].by_kernel()
    omni.save_pretrained(str(tmp_path / "saved"))
    del omni
    loaded = Omni(str(tmp_path / "saved"), device="cpu")
    assert loaded.manifests["transformer"].by_kernel() == layers
    assert ((picture(loaded) - expected) ** 2).mean() < 0.5  # sdnq loads its scales in fewer digits


@needs("torchao", "quanto", "sdnq")
@pytest.mark.parametrize("backend", ["torchao", "quanto", "sdnq"])
def test_beside_a_method_of_lowbit(backend: str) -> None:
    omni = Omni(quantization_config={"transformer": "int8", "text_encoder": backend}, device="cpu")
    assert omni.manifests["text_encoder"].by_kernel().keys() == {(backend, "through transformers")}
    assert {method for method, _ in omni.manifests["transformer"].by_kernel()} == {"int8"}
    assert ((picture(omni) - picture(Omni(device="cpu"))) ** 2).mean() < 1


@needs("torchao", "quanto", "sdnq")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"method": "torchao", "quant_type": "Int3"}, "no quant_type 'Int3'.*Int8WeightOnlyConfig"),
        ({"method": "torchao", "weights_dtype": "int8"}, "Unknown options for torchao's Int8WeightOnlyConfig"),
        ({"method": "quanto", "bits": 3}, "Unknown options for quanto: bits. Expected one of: weights_dtype"),
        ({"method": "quanto", "weights_dtype": "int3"}, "quanto: .*int3"),
        ({"method": "sdnq", "activation_scheme": "static"}, "Unknown options for sdnq: activation_scheme"),
        ({"method": "torchao", "ignored_layers": ["nowhere"]}, "match no layer"),
        ({"method": "quanto", "ignored_layers": ["layers.0.attention.to_q"]}, "quanto can't keep layers.0.attention"),
        ({"method": "torchao", "ignored_layers": ["*"]}, "torchao quantized no linear layer"),
    ],
)
def test_bad_options_are_named(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Omni(quantization_config=spec, device="cpu")


@needs("bitsandbytes")
@pytest.mark.skipif(torch.accelerator.is_available(), reason="has an accelerator")
def test_bitsandbytes_without_a_gpu() -> None:
    with pytest.raises(UnsupportedError, match="on GPUs only"):
        Omni(quantization_config={"method": "bitsandbytes", "load_in_8bit": True}, device="cpu")
    spec = {"text_encoder": {"method": "bitsandbytes", "load_in_4bit": True}}
    omni = Omni(quantization_config=spec, device="cpu")
    assert omni.manifests["text_encoder"].by_kernel().keys() == {("bitsandbytes", "through transformers")}


@needs("torchao")
def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    info("embedded", "torchao", None, None, None, None)
    shown = capsys.readouterr().out
    assert "torchao (through diffusers)" in shown
    assert "kept: last projection" in shown


def test_layers_to_keep() -> None:
    source = resolve_model(None)
    config = BackendConfig(backend="torchao", ignored_layers=("to_q",))
    skeleton = empty_component(source, "transformer", *read_components(source)["transformer"])
    kept = backends.kept_by_name(skeleton, config)
    assert kept["layers.0.attention.to_q"] == "ignored_layers"
    assert kept["layers.0.attention.to_k"] == ""
