from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lowbit.errors import CheckpointError, ConfigError
from lowbit.quantization import NvFp4Config, QuantizedLinear, SvdQuantConfig, build_quant_config, quantize_model
from lowbit.quantization.calibration.smoothing import watched_inputs
from lowbit.quantization.plan import quantize_layer
from tests.quantization.models import run_transformer, small_transformer
from tests.support.models import FAMILIES, language_model, relative_error, save, stored_config, tensors

PRECISIONS = ("nvfp4", "int4")


def outlier_layer(dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A layer whose weight has a few directions that are much larger, as SVDQuant is for."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(256, 192)
    weight = torch.randn(192, 256, generator=generator)
    weight += 30 * torch.randn(192, 4, generator=generator) @ torch.randn(4, 256, generator=generator) / 4
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer.to(dtype)


def quantized(layer: nn.Linear, config: Any) -> QuantizedLinear:
    return quantize_layer(layer, config.linear_method(), "layer")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_outliers_cost_less_than_in_nvfp4(precision: str) -> None:
    layer = outlier_layer()
    ours = quantized(layer, SvdQuantConfig(precision=precision, rank=8))
    plain = quantized(layer, NvFp4Config())
    error, plain_error = (
        relative_error(each.method.dequantize_weight(each), layer.weight) for each in (_stored(ours), _stored(plain))
    )
    assert error < 0.5 * plain_error


def _stored(layer: QuantizedLinear) -> QuantizedLinear:
    """The layer with its weight in the checkpoint's layout."""
    layer.leave_kernel()
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_result_is_that_of_both_products(precision: str, kernel: str, dtype: torch.dtype) -> None:
    layer = outlier_layer(dtype)
    ours = quantized(layer, SvdQuantConfig(precision=precision, rank=8, kernel=kernel))
    x = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = ours(x)
    assert found.shape == (2, 3, 192)
    assert found.dtype == dtype
    _stored(ours)
    weight = ours.method.dequantize_weight(ours).double()
    expected = x.double() @ weight.t() + layer.bias.double()
    # The reference rounds activations to 4 bits too, of the smaller product.
    exact = 1e-5 if dtype == torch.float32 else 5e-3
    bound = exact if kernel == "auto" else 0.1
    assert relative_error(found, expected) < bound


def test_smoothing_is_exact_in_both_products() -> None:
    layer = outlier_layer()
    scale = torch.exp2(torch.randint(-3, 4, (256,), generator=torch.Generator().manual_seed(2)).float())
    divided = nn.Linear(256, 192)
    divided.weight, divided.bias = nn.Parameter(layer.weight / scale, requires_grad=False), layer.bias
    plain = quantize_layer(divided, SvdQuantConfig(rank=8).linear_method())
    smoothed = quantize_layer(divided, SvdQuantConfig(rank=8).linear_method(), "layer", scale)
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1))
    assert torch.equal(smoothed(x), plain(x * scale)) or relative_error(smoothed(x), plain(x * scale)) < 1e-6
    _stored(smoothed), _stored(plain)
    assert (
        torch.equal(smoothed.method.dequantize_weight(smoothed), plain.method.dequantize_weight(plain) * scale)
        or relative_error(smoothed.method.dequantize_weight(smoothed), plain.method.dequantize_weight(plain) * scale)
        < 1e-6
    )


def test_channel_scales_are_applied() -> None:
    layer = quantized(outlier_layer(), SvdQuantConfig(rank=8))
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(1))
    state = layer.state_dict()
    scales = (0.5 + torch.rand(192)).bfloat16()
    layer.load_state_dict({**state, "wcscales": scales})
    found = layer(x)
    _stored(layer)
    expected = x.double() @ layer.method.dequantize_weight(layer).double().t() + layer.bias.double()
    assert relative_error(found, expected) < 1e-5
    assert torch.equal(layer.state_dict()["wcscales"], scales)


def test_the_state_dict_is_vllm_omnis() -> None:
    layer = quantized(outlier_layer(), SvdQuantConfig(rank=8))
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in layer.state_dict().items()}
    assert found == {
        "qweight": ((192, 128), torch.int8),
        "wscales": ((16, 192), torch.float8_e4m3fn),
        "smooth_factor": ((256,), torch.bfloat16),
        "proj_down": ((256, 8), torch.bfloat16),
        "proj_up": ((192, 8), torch.bfloat16),
        "wcscales": ((192,), torch.bfloat16),
        "wtscale": ((1,), torch.bfloat16),
        "bias": ((192,), torch.float32),
    }
    int4 = quantized(outlier_layer(), SvdQuantConfig(precision="int4")).state_dict()
    assert int4["wscales"].shape == (4, 192)
    assert int4["wscales"].dtype == torch.bfloat16
    assert "wcscales" not in int4


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_model_is_written_and_loads_again_bit_for_bit(precision: str, tmp_path: Path) -> None:
    family = FAMILIES["qwen-image"]
    torch.manual_seed(0)
    folder = save(family.make(), tmp_path / "model")
    kind = type(family.make())
    config = SvdQuantConfig(precision=precision, rank=8)
    first = kind.from_pretrained(folder, quantization_config=config, torch_dtype=torch.bfloat16)
    assert {r.method for r in first.lowbit_manifest.quantized} == {f"svdquant {precision}"}
    first.save_pretrained(tmp_path / "written")
    written = stored_config(tmp_path / "written")
    assert written.keys() == {"quant_method", "rank", "precision", "modules_to_not_convert"}
    assert written["precision"] == precision
    again = kind.from_pretrained(tmp_path / "written", torch_dtype=torch.bfloat16)
    assert {r.name for r in again.lowbit_manifest.quantized} == {r.name for r in first.lowbit_manifest.quantized}
    stored, loaded = tensors(tmp_path / "written"), again.state_dict()
    assert stored.keys() == loaded.keys() == first.state_dict().keys()
    assert all(torch.equal(stored[key], loaded[key]) for key in stored)
    assert torch.equal(family.run(first), family.run(again))
    again.save_pretrained(tmp_path / "twice")
    twice = tensors(tmp_path / "twice")
    assert all(torch.equal(stored[key], twice[key]) for key in stored)


def test_vllm_omnis_configuration_and_tensors_are_read(tmp_path: Path) -> None:
    """``modules_to_not_convert`` are parts of names there; scales above the groups' may be missing."""
    family = FAMILIES["qwen-image"]
    torch.manual_seed(0)
    folder = save(family.make(), tmp_path / "model")
    kind = type(family.make())
    model = kind.from_pretrained(folder, quantization_config=SvdQuantConfig(rank=8), torch_dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "written")
    file = next((tmp_path / "written").glob("*.safetensors"))
    found = {name: tensor for name, tensor in load_file(file).items() if not name.endswith(".wcscales")}
    save_file(found, file, {"format": "pt"})
    config = tmp_path / "written" / "config.json"
    text = config.read_text()
    kept = stored_config(tmp_path / "written")["modules_to_not_convert"]
    assert "norm_out.linear" in kept
    config.write_text(text.replace('"norm_out.linear"', '"norm_out"'))
    again = kind.from_pretrained(tmp_path / "written", torch_dtype=torch.bfloat16)
    assert torch.equal(family.run(again), family.run(model))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    family = FAMILIES["qwen-image"]
    folder = save(family.make(), tmp_path / "model")
    kind = type(family.make())
    model = kind.from_pretrained(folder, quantization_config=SvdQuantConfig(rank=8), torch_dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "written")
    file = next((tmp_path / "written").glob("*.safetensors"))
    good = load_file(file)
    name = f"{family.quantized}.proj_up"
    for change, message in (
        ({name: None}, f"1 missing: {name}"),
        ({name: torch.zeros(3, 8).bfloat16()}, f"{name}: found bfloat16 .3, 8."),
        ({name: torch.zeros(64, 5).bfloat16()}, "different ranks"),
        ({f"{family.quantized}.wtscale": torch.tensor([0.0]).bfloat16()}, "wtscale: .* above zero"),
        ({f"{family.quantized}.wscales": torch.full((16, 64), torch.nan).to(torch.float8_e4m3fn)}, "not finite"),
        ({f"{family.quantized}.qweight": torch.zeros(64, 64, dtype=torch.int8)}, "qweight|weight: found"),
    ):
        changed = {key: tensor for key, tensor in {**good, **change}.items() if tensor is not None}
        save_file(changed, file, {"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            kind.from_pretrained(tmp_path / "written", torch_dtype=torch.bfloat16)


def test_smoothing_is_found_on_inputs_and_kept(tmp_path: Path) -> None:
    model = small_transformer()
    reference = run_transformer(model)
    with watched_inputs(model) as seen:
        run_transformer(model)
    manifest = quantize_model(model, SvdQuantConfig(rank=8, smoothing=0.5), seen_inputs=seen)
    assert manifest.quantized
    output = run_transformer(model)
    assert relative_error(output, reference) < 0.3
    model.save_pretrained(tmp_path / "written")
    again = type(model).from_pretrained(tmp_path / "written", torch_dtype=torch.bfloat16)
    assert torch.equal(run_transformer(again), output)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be"),
        ({"rank": True}, "rank must be"),
        ({"precision": "int8"}, "precision must be one of nvfp4, int4"),
        ({"smoothing": 2}, "smoothing must be"),
        ({"act_unsigned": True}, "act_unsigned=True is not supported"),
        ({"svdquant_model": 3}, "svdquant_model must be"),
        ({"svdquant_model": "a", "smoothing": 0.5}, "quantized already"),
        ({"group_size": 64}, "Unknown option 'group_size'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_quant_config("svdquant", **options)


def test_layers_of_other_widths_are_kept() -> None:
    model = nn.Sequential(nn.Linear(72, 16), nn.Linear(128, 72))
    manifest = quantize_model(model, SvdQuantConfig(rank=4))
    assert [(record.name, record.reason) for record in manifest.kept] == [("0", "input features are no multiple of 16")]


@pytest.mark.parametrize("host", ["diffusers", "transformers"])
def test_a_scale_that_one_layer_lacks_is_missing_and_one_that_all_lack_is_not(host: str, tmp_path: Path) -> None:
    model: Any = FAMILIES["qwen-image"].make() if host == "diffusers" else language_model()
    model.to(torch.bfloat16).requires_grad_(False)
    quantize_model(model, "svdquant", rank=8)
    model.save_pretrained(tmp_path)
    kind = type(model)
    (file,) = tmp_path.glob("*.safetensors")
    whole = load_file(file)
    first = next(key for key in whole if key.endswith(".wtscale"))
    save_file({key: tensor for key, tensor in whole.items() if key != first}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"1 tensors are missing: {first}$"):
        kind.from_pretrained(tmp_path, dtype=torch.bfloat16)
    save_file({k: v for k, v in whole.items() if not k.endswith(".wtscale")}, file, {"format": "pt"})
    kind.from_pretrained(tmp_path, dtype=torch.bfloat16)
