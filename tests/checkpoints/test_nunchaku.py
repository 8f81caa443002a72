"""Files in nunchaku's layout, packed by our own packer from its definition, as the weights of small transformers."""

from __future__ import annotations

import copy
import json
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from lowbit.checkpoints.external import load_component
from lowbit.errors import CheckpointError, ConfigError, UnsupportedError
from lowbit.quantization import QuantizedLinear, SvdQuantConfig
from tests.support.models import FAMILIES, relative_error, save
from tests.support.nunchaku_files import MAKERS, Written


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
@pytest.mark.parametrize("name", MAKERS)
def test_every_layer_is_what_its_packed_tensors_stand_for(name: str, precision: str, tmp_path: Path) -> None:
    written = Written(name, precision, tmp_path)
    loaded = written.load()
    found = loaded.state_dict()
    quantized = {key: layer for key, layer in loaded.named_modules() if isinstance(layer, QuantizedLinear)}
    assert set(quantized) == set(written.codes)
    assert {record.method for record in loaded.lowbit_manifest.quantized} == {f"svdquant {precision}"}
    for layer, codes in written.codes.items():
        assert torch.equal(found[f"{layer}.qweight"].view(torch.uint8), codes), layer
    for key, expected in written.expected.items():
        found_layer: Any = quantized.get(key.rpartition(".")[0])
        if found_layer is not None and key.endswith(".weight"):
            found_layer.leave_kernel()
            tensor = found_layer.method.dequantize_weight(found_layer)
        else:
            tensor = found[key]
        assert (tensor.double() - expected).norm() <= 1e-6 * expected.norm(), key
    if name in FAMILIES and name != "z-image":
        reference = MAKERS[name]().double()
        reference.load_state_dict(written.expected)
        family = FAMILIES[name]
        expected_output = family.run(reference.float().eval())
        assert relative_error(family.run(loaded), expected_output) < 1e-4


def test_saving_writes_row_major_tensors_that_load_again(tmp_path: Path) -> None:
    written = Written("flux", "nvfp4", tmp_path)
    loaded = written.load(torch.bfloat16)
    loaded.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert config.keys() == {"quant_method", "rank", "precision", "modules_to_not_convert"}
    again = type(loaded).from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16)
    first, second = loaded.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    family = FAMILIES["flux"]
    assert torch.equal(family.run(loaded), family.run(again))


def test_ignored_layers_are_decoded(tmp_path: Path) -> None:
    written = Written("qwen-image", "int4", tmp_path)
    loaded = written.load(ignored_layers=["img_mlp"])
    layer = loaded.transformer_blocks[0].img_mlp.net[2]
    assert type(layer) is nn.Linear
    key = "transformer_blocks.0.img_mlp.net.2"
    assert relative_error(layer.weight, written.expected[f"{key}.weight"]) < 1e-6
    assert relative_error(layer.bias, written.expected[f"{key}.bias"]) < 1e-6


def test_names_of_earlier_versions_are_read(tmp_path: Path) -> None:
    written = Written("flux", "int4", tmp_path)
    aliases = {
        "proj_down": "lora_down",
        "proj_up": "lora_up",
        "smooth_factor": "smooth",
        "smooth_factor_orig": "smooth_orig",
    }
    renamed = {}
    for key, tensor in written.tensors.items():
        layer, _, last = key.rpartition(".")
        renamed[f"{layer}.{aliases.get(last, last)}"] = tensor
    before = written.load().state_dict()
    written.tensors, written.metadata = renamed, {}
    written.save()
    after = written.load().state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def changed(written: Written, key: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(written.path)
    assert key in tensors, key
    tensors.pop(key)
    if tensor is not None:
        tensors[key] = tensor
    save_file(tensors, written.path, written.metadata)


BLOCK = "transformer_blocks.0."


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("attn.to_qkv.qweight", torch.zeros(256, 128, dtype=torch.int8), "attn.to_qkv.qweight: found I8 .256, 128."),
        ("attn.to_qkv.proj_up", torch.zeros(256, 32).bfloat16(), "proj_up: found BF16"),
        ("attn.to_qkv.wscales", None, "attn.to_qkv.wscales: found nothing"),
        ("attn.to_qkv.smooth_factor", torch.zeros(128).bfloat16(), "smooth_factor: .* above zero"),
        ("img_mlp.net.2.bias", None, "img_mlp.net.2.bias: found nothing"),
        ("img_mod.1.wzeros", torch.zeros(1, 8).bfloat16(), "img_mod.1.wzeros: found BF16 .1, 8."),
        ("attn.norm_q.weight", None, "1 missing: transformer_blocks.0.attn.norm_q.weight"),
    ],
)
def test_wrong_tensors_are_named(key: str, tensor: torch.Tensor | None, message: str, tmp_path: Path) -> None:
    written = Written("qwen-image", "int4", tmp_path)
    changed(written, BLOCK + key, tensor)
    with pytest.raises(CheckpointError, match=message):
        written.load()


def test_wrong_metadata_models_and_files_are_refused(tmp_path: Path) -> None:
    written = Written("qwen-image", "int4", tmp_path)
    good = written.metadata
    for metadata, message in (
        ({"model_class": "NunchakuFluxTransformer2dModel"}, "model_class is NunchakuFlux"),
        ({"quantization_config": json.dumps({"weight": {"dtype": "fp4_e2m1_all"}})}, "the tensors are int4"),
        ({"quantization_config": "[1"}, "not JSON"),
    ):
        written.metadata = {**good, **metadata}
        written.save()
        with pytest.raises(CheckpointError, match=message):
            written.load()
    wan = FAMILIES["wan"].make()
    folder = save(wan, tmp_path / "wan" / "transformer").parent
    config = SvdQuantConfig(svdquant_model=str(written.path))
    with pytest.raises(UnsupportedError, match="layout of WanTransformer3DModel is not known"):
        load_component(str(folder), "transformer", "diffusers", type(wan).__name__, config, dtype=torch.float32)
    with pytest.raises(ConfigError, match="there is no file nothing.safetensors"):
        load_component(
            written.source,
            "transformer",
            "diffusers",
            written.class_name,
            SvdQuantConfig(svdquant_model="nothing.safetensors"),
            dtype=torch.float32,
        )
    save_file({"a.weight": torch.zeros(2, 2)}, written.path)
    with pytest.raises(CheckpointError, match="no 4-bit layer"):
        written.load()


def test_refiners_that_are_not_quantized_are_split(tmp_path: Path) -> None:
    """With skip_refiners they have nunchaku's names and their own weights."""
    written = Written("z-image", "int4", tmp_path)
    found = {}
    for key, tensor in written.tensors.items():
        if not key.startswith("noise_refiner.0.feed_forward"):
            found[key] = tensor
    own = {name: torch.randn(512, 192) for name in ("w1", "w3")} | {"w2": torch.randn(192, 512)}
    found["noise_refiner.0.feed_forward.net.0.proj.weight"] = torch.cat([own["w3"], own["w1"]])
    found["noise_refiner.0.feed_forward.net.2.weight"] = own["w2"]
    written.tensors = found
    written.save()
    loaded = written.load().noise_refiner[0].feed_forward
    for name, tensor in own.items():
        assert torch.equal(loaded.get_parameter(f"{name}.weight"), tensor), name


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written("qwen-image", "int4", tmp_path_factory.mktemp("fuzz"))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_mutated_headers_give_an_error_of_ours_or_load(small: Written, data: st.DataObject) -> None:
    content = small.path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = bytearray(content[8 : 8 + size])
    for _ in range(data.draw(st.integers(1, 4))):
        header[data.draw(st.integers(0, size - 1))] = data.draw(st.sampled_from([*b'0123456789"{}[],:FUI_x', 0, 255]))
    changed = copy.copy(small)
    changed.path = small.path.with_name("mutated.safetensors")
    changed.path.write_bytes(content[:8] + bytes(header) + content[8 + size :])
    with suppress(CheckpointError, UnsupportedError, ConfigError):
        changed.load()
