from __future__ import annotations

import io
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel, ZImageTransformer2DModel
from tqdm import tqdm

from lowbit.errors import CheckpointError, ConfigError
from lowbit.ops.cpu.memory import mapped_ranges
from lowbit.quantization import Fp8Config, Int8Config, QuantizationConfig, QuantizedLinear, quantize_model
from lowbit.quantization.calibration.static import calibration
from tests.support.models import FAMILIES, Family, relative_error, save, stored_config, tensors

BF16 = torch.bfloat16


@pytest.fixture
def source(family: Family, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    torch.manual_seed(0)
    model = family.make()
    folder = save(model, tmp_path / "bf16")
    return folder, family.run(type(model).from_pretrained(folder, torch_dtype=BF16))


def test_online_then_saved_then_reloaded(
    family: Family, config: QuantizationConfig, source: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    folder, expected = source
    kind = type(family.make())
    online = kind.from_pretrained(folder, torch_dtype=BF16, quantization_config=config)
    output = family.run(online)
    assert 0 < relative_error(output, expected) < 0.15
    assert isinstance(online.get_submodule(family.quantized), QuantizedLinear)
    assert type(online.get_submodule(family.kept)) is torch.nn.Linear
    manifest = online.lowbit_manifest
    assert manifest.bytes_after < manifest.bytes_before
    methods = Counter(record.method for record in manifest.quantized)
    assert methods.pop(f"{config.get_name()}_weight_only", 0) == family.weight_only
    assert methods.keys() == {config.get_name()}

    online.save_pretrained(tmp_path / "saved")
    reloaded = kind.from_pretrained(tmp_path / "saved", torch_dtype=BF16)
    assert {r.name for r in reloaded.lowbit_manifest.quantized} == {r.name for r in manifest.quantized}
    same_kernel = kind.from_pretrained(
        tmp_path / "saved", torch_dtype=BF16, quantization_config=type(config)(kernel=config.kernel)
    )
    assert torch.equal(family.run(same_kernel), output)
    assert same_kernel.lowbit_manifest.by_kernel() == manifest.by_kernel()


def test_online_equals_quantize_model(family: Family, source: tuple[Path, torch.Tensor]) -> None:
    folder, _ = source
    kind = type(family.make())
    online = kind.from_pretrained(folder, torch_dtype=BF16, quantization_config=Int8Config())
    in_memory = kind.from_pretrained(folder, torch_dtype=BF16)
    quantize_model(in_memory, "int8")
    found, expected = online.state_dict(), in_memory.state_dict()
    assert found.keys() == expected.keys()
    different = [name for name in found if not torch.equal(found[name], expected[name])]
    # Only where the model wants float32, which only loading knows.
    assert all(expected[name].dtype == BF16 and found[name].dtype == torch.float32 for name in different)


def test_serialized_int8_layout(family: Family, source: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, _ = source
    model = type(family.make()).from_pretrained(folder, torch_dtype=BF16, quantization_config=Int8Config())
    model.save_pretrained(tmp_path / "saved")
    stored = stored_config(tmp_path / "saved")
    kept = [record.name for record in model.lowbit_manifest.kept]
    weight_only = stored.pop("weight_only_layers", [])
    assert len(weight_only) == family.weight_only
    assert stored == {
        "quant_method": "int8",
        "activation_scheme": "dynamic",
        "is_checkpoint_int8_serialized": True,
        "ignored_layers": kept,
    }
    before, after = tensors(folder), tensors(tmp_path / "saved")
    quantized = [record.name for record in model.lowbit_manifest.quantized]
    assert after.keys() == before.keys() | {f"{name}.weight_scale" for name in quantized}
    for name in quantized:
        weight, scale = after[f"{name}.weight"], after[f"{name}.weight_scale"]
        assert weight.dtype == torch.int8
        assert weight.shape == before[f"{name}.weight"].shape
        assert scale.dtype == torch.float32
        assert scale.shape == (weight.shape[0], 1)
        assert relative_error(weight * scale, before[f"{name}.weight"].float()) < 0.01
    for name in kept:
        assert torch.equal(after[f"{name}.weight"].float(), before[f"{name}.weight"].float())


@pytest.mark.parametrize(
    ("config", "scale_name", "scale_shape"),
    [
        (Fp8Config(), "weight_scale", (64, 1)),
        (Fp8Config(weight_block_size=[32, 48]), "weight_scale_inv", (2, 2)),
    ],
)
def test_serialized_fp8_layout(
    checkpoint: Path, tmp_path: Path, config: Fp8Config, scale_name: str, scale_shape: tuple[int, int]
) -> None:
    model = ZImageTransformer2DModel.from_pretrained(checkpoint, torch_dtype=BF16, quantization_config=config)
    model.save_pretrained(tmp_path / "saved")
    found = tensors(tmp_path / "saved")
    assert found["layers.0.attention.to_q.weight"].dtype == torch.float8_e4m3fn
    assert found[f"layers.0.attention.to_q.{scale_name}"].dtype == torch.float32
    assert found[f"layers.0.attention.to_q.{scale_name}"].shape == scale_shape
    assert stored_config(tmp_path / "saved").get("weight_block_size") == config.weight_block_size


def test_static_fp8_is_calibrated_before_it_is_saved(checkpoint: Path, tmp_path: Path, z_family: Family) -> None:
    config = Fp8Config(activation_scheme="static")
    model = ZImageTransformer2DModel.from_pretrained(checkpoint, torch_dtype=BF16, quantization_config=config)
    with pytest.raises(ConfigError, match="have no input_scale yet"):
        model.save_pretrained(tmp_path / "early")
    with calibration(model):
        z_family.run(model)
    model.save_pretrained(tmp_path / "saved")
    assert tensors(tmp_path / "saved")["layers.0.attention.to_q.input_scale"].shape == ()
    reloaded = ZImageTransformer2DModel.from_pretrained(tmp_path / "saved", torch_dtype=BF16)
    assert torch.equal(z_family.run(reloaded), z_family.run(model))


@pytest.mark.parametrize("source_dtype", [torch.float16, torch.float32])
def test_dtypes_of_the_source_and_of_the_model(tmp_path: Path, z_family: Family, source_dtype: torch.dtype) -> None:
    folder = save(z_family.make(), tmp_path / "source", source_dtype)
    model = ZImageTransformer2DModel.from_pretrained(folder, torch_dtype=BF16, quantization_config=Int8Config())
    assert model.get_submodule(z_family.kept).weight.dtype == BF16
    assert model.get_submodule(z_family.quantized).weight_scale.dtype == torch.float32
    assert model.get_submodule(z_family.quantized).compute_dtype == BF16
    unspecified = ZImageTransformer2DModel.from_pretrained(folder, quantization_config=Int8Config())
    assert unspecified.dtype == torch.float32, "what diffusers does without torch_dtype"
    plain = ZImageTransformer2DModel.from_pretrained(folder)
    assert 0 < relative_error(z_family.run(unspecified), z_family.run(plain)) < 0.05


def test_sharded_checkpoints(tmp_path: Path, z_family: Family) -> None:
    torch.manual_seed(0)
    model = z_family.make()
    whole = save(model, tmp_path / "whole")
    sharded = save(model, tmp_path / "sharded", max_shard_size="200KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    load = ZImageTransformer2DModel.from_pretrained
    first = load(whole, torch_dtype=BF16, quantization_config=Int8Config())
    second = load(sharded, torch_dtype=BF16, quantization_config=Int8Config())
    assert torch.equal(z_family.run(first), z_family.run(second))
    second.save_pretrained(tmp_path / "quantized", max_shard_size="100KB")
    assert len(list((tmp_path / "quantized").glob("*.safetensors"))) > 3
    assert torch.equal(z_family.run(load(tmp_path / "quantized", torch_dtype=BF16)), z_family.run(first))


@pytest.mark.parametrize("online", [True, False])
def test_parallel_loading(tmp_path: Path, z_family: Family, monkeypatch: pytest.MonkeyPatch, online: bool) -> None:
    torch.manual_seed(0)
    folder = save(z_family.make(), tmp_path / "sharded", max_shard_size="200KB")
    load = ZImageTransformer2DModel.from_pretrained
    expected = load(folder, torch_dtype=BF16, quantization_config=Int8Config())
    monkeypatch.setattr("diffusers.models.modeling_utils.HF_ENABLE_PARALLEL_LOADING", True)
    if online:
        found = load(folder, torch_dtype=BF16, quantization_config=Int8Config())
    else:
        expected.save_pretrained(tmp_path / "quantized", max_shard_size="100KB")
        found = load(tmp_path / "quantized", torch_dtype=BF16)
    assert torch.equal(z_family.run(found), z_family.run(expected))


def test_ignored_layers(checkpoint: Path, tmp_path: Path) -> None:
    config = Int8Config(ignored_layers=["feed_forward", "layers.0.attention.to_q"])
    model = ZImageTransformer2DModel.from_pretrained(checkpoint, torch_dtype=BF16, quantization_config=config)
    kept = {record.name: record.reason for record in model.lowbit_manifest.kept}
    assert kept["layers.0.attention.to_q"] == "ignored_layers"
    assert kept["layers.1.feed_forward.w1"] == "ignored_layers"
    assert isinstance(model.get_submodule("layers.1.attention.to_q"), QuantizedLinear)
    model.save_pretrained(tmp_path / "saved")
    reloaded = ZImageTransformer2DModel.from_pretrained(tmp_path / "saved", torch_dtype=BF16)
    assert {record.name for record in reloaded.lowbit_manifest.kept} == kept.keys()


@pytest.mark.parametrize("method", ["int8", "fp8"])
def test_the_dtype_of_a_model_is_that_of_activations(method: str) -> None:
    """Also where its first layer is quantized, whose weight and scales are of other floating dtypes."""
    model: Any = FAMILIES["flux"].make().to(torch.bfloat16)
    first = torch.nn.Sequential(torch.nn.Linear(64, 64, dtype=torch.bfloat16))
    quantize_model(first, method)
    tail = model._modules.copy()
    model._modules.clear()
    model._modules.update({"first": first, **tail})
    assert next(iter(model.parameters())).dtype != torch.bfloat16
    assert model.dtype == torch.bfloat16
    assert model.to(torch.float16).dtype == torch.float16


def test_float32_modules_stay_float32(tmp_path: Path) -> None:
    folder = save(FAMILIES["wan"].make(), tmp_path / "wan")
    model = WanTransformer3DModel.from_pretrained(folder, torch_dtype=BF16, quantization_config=Int8Config())
    assert model.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    assert model.scale_shift_table.dtype == torch.float32
    assert model.blocks[0].ffn.net[2].compute_dtype == BF16


def test_a_model_quantized_in_memory_can_be_saved(checkpoint: Path, tmp_path: Path, z_family: Family) -> None:
    model = ZImageTransformer2DModel.from_pretrained(checkpoint, torch_dtype=BF16)
    quantize_model(model, "int8")
    model.save_pretrained(tmp_path / "saved")
    assert stored_config(tmp_path / "saved")["is_checkpoint_int8_serialized"] is True
    reloaded = ZImageTransformer2DModel.from_pretrained(tmp_path / "saved", torch_dtype=BF16)
    assert torch.equal(z_family.run(reloaded), z_family.run(model))


@pytest.mark.parametrize("config", [Int8Config(), Fp8Config(), Fp8Config(weight_block_size=[32, 48])])
def test_dequantize(checkpoint: Path, tmp_path: Path, z_family: Family, config: QuantizationConfig) -> None:
    model = ZImageTransformer2DModel.from_pretrained(checkpoint, torch_dtype=BF16, quantization_config=config)
    expected = z_family.run(model)
    model.dequantize()
    assert type(model.get_submodule(z_family.quantized)) is torch.nn.Linear
    assert relative_error(z_family.run(model), expected) < 0.03
    model.to(torch.float32).save_pretrained(tmp_path / "plain")
    plain = ZImageTransformer2DModel.from_pretrained(tmp_path / "plain")
    assert not hasattr(plain, "lowbit_manifest")


def test_device_maps(checkpoint: Path, z_family: Family) -> None:
    load: Any = ZImageTransformer2DModel.from_pretrained
    plain = load(checkpoint, torch_dtype=BF16, quantization_config=Int8Config())
    mapped = load(checkpoint, torch_dtype=BF16, quantization_config=Int8Config(), device_map="cpu")
    assert torch.equal(z_family.run(plain), z_family.run(mapped))
    assert plain.to("cpu").device.type == "cpu"
    with pytest.raises(ConfigError, match="can't be spread over cpu, disk"):
        load(checkpoint, quantization_config=Int8Config(), device_map={"": "cpu", "layers": "disk"})


def test_an_unknown_kernel_is_refused_before_loading(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="Unknown int8 kernel: 'nonsense'"):
        ZImageTransformer2DModel.from_pretrained(checkpoint, quantization_config=Int8Config(kernel="nonsense"))


def test_a_quantized_checkpoint_is_not_quantized_again(checkpoint: Path, tmp_path: Path) -> None:
    load = ZImageTransformer2DModel.from_pretrained
    load(checkpoint, torch_dtype=BF16, quantization_config=Int8Config()).save_pretrained(tmp_path / "int8")
    with pytest.raises(ConfigError, match="already quantized with 'int8' and can't be quantized again with 'fp8'"):
        load(tmp_path / "int8", torch_dtype=BF16, quantization_config=Fp8Config())
    load(checkpoint, torch_dtype=BF16, quantization_config=Fp8Config()).save_pretrained(tmp_path / "fp8")
    with pytest.raises(ConfigError, match=r"can't be loaded with weight_block_size=\[128, 128\]"):
        load(tmp_path / "fp8", quantization_config=Fp8Config(weight_block_size=[128, 128]))


def test_a_config_without_the_flag_is_decided_by_the_tensors(checkpoint: Path, tmp_path: Path) -> None:
    load = ZImageTransformer2DModel.from_pretrained
    load(checkpoint, torch_dtype=BF16, quantization_config=Int8Config()).save_pretrained(tmp_path / "int8")
    file = tmp_path / "int8" / "config.json"
    text = file.read_text().replace('"quant_method"', '"method"')
    file.write_text(text.replace('    "is_checkpoint_int8_serialized": true,\n', ""))
    assert "is_checkpoint" not in file.read_text()
    assert load(tmp_path / "int8", torch_dtype=BF16).lowbit_config.is_serialized


def test_a_quantized_checkpoint_without_config_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    load = ZImageTransformer2DModel.from_pretrained
    load(checkpoint, torch_dtype=BF16, quantization_config=Int8Config()).save_pretrained(tmp_path / "int8")
    (tmp_path / "int8" / "config.json").write_text((checkpoint / "config.json").read_text())
    with pytest.raises(CheckpointError, match="fp8"):
        load(tmp_path / "int8", torch_dtype=BF16, quantization_config=Fp8Config())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is mapped where")
def test_a_quantized_checkpoint_is_multiplied_with_where_it_is_mapped(
    checkpoint: Path, tmp_path: Path, z_family: Family
) -> None:
    online = ZImageTransformer2DModel.from_pretrained(
        checkpoint, torch_dtype=BF16, quantization_config=Int8Config(kernel="float32")
    )
    online.save_pretrained(tmp_path / "int8")
    config = Int8Config(kernel="float32")
    model = ZImageTransformer2DModel.from_pretrained(tmp_path / "int8", torch_dtype=BF16, quantization_config=config)
    z_family.run(model)
    (file,) = (tmp_path / "int8").glob("*.safetensors")
    ranges = [*mapped_ranges(frozenset([str(file.resolve())]))]
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    addresses = [layer.get_parameter("weight").data_ptr() for layer in layers]
    assert layers
    assert all(any(begin <= address < end for begin, end in ranges) for address in addresses)


def test_progress_counts_the_bytes_that_were_read(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": False, "file": io.StringIO()})
            bars.append(self)

    monkeypatch.setattr("lowbit.hosts.diffusers.diffusers_logging.tqdm", Bar)
    model = ZImageTransformer2DModel.from_pretrained(checkpoint, torch_dtype=BF16, quantization_config=Int8Config())
    (bar,) = bars
    assert bar.total == sum(record.bytes_before for record in model.lowbit_manifest.quantized)
    assert (bar.n, bar.unit) == (bar.total, "B")


def test_no_progress_bar_where_there_is_no_terminal(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ZImageTransformer2DModel.from_pretrained(checkpoint, torch_dtype=BF16, quantization_config=Int8Config())
    assert "Quantizing" not in capfd.readouterr().err
