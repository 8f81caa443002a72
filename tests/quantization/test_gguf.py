from __future__ import annotations

import pytest
import torch
from torch import nn

from lowbit.errors import ConfigError, UnsupportedError
from lowbit.ops.gguf import gguf_dequantize, gguf_quantize
from lowbit.quantization import GgufConfig, QuantizedLinear, build_quant_config, quantize_model
from lowbit.quantization.methods.gguf import fitting_type


@pytest.mark.parametrize(
    ("wanted", "columns", "expected"),
    [
        ("Q4_K", 512, "Q4_K"),
        ("Q4_K", 288, "Q5_0"),
        ("Q5_K", 288, "Q5_1"),
        ("Q6_K", 288, "Q8_0"),
        ("Q8_0", 288, "Q8_0"),
        ("Q4_0", 300, None),
        ("Q6_K", 300, None),
    ],
)
def test_rows_that_are_not_whole_blocks_take_another_type(wanted: str, columns: int, expected: str | None) -> None:
    assert fitting_type(wanted, columns) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gguf_model": "a.gguf", "gguf_type": "Q8_0"}, "not both"),
        ({"gguf_model": ""}, "must be a file"),
        ({"gguf_type": "Q2_K"}, "use one of Q8_0, Q4_0"),
        ({"gguf_type": "BF16"}, "can't be quantized to"),
        ({"layer_types": ["Q8_0"]}, "must map layers to types"),
        ({"is_checkpoint_gguf_serialized": "yes"}, "true or false"),
        ({"gguf_file": "x"}, "Unknown option 'gguf_file'"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_quant_config("gguf", **options)


def test_an_unknown_type_in_a_checkpoint() -> None:
    with pytest.raises(UnsupportedError, match="Unknown GGUF type 'Q9'"):
        GgufConfig(layer_types={"a": "Q9"})


def test_neither_file_nor_type() -> None:
    with pytest.raises(ConfigError, match="give gguf_model"):
        quantize_model(nn.Sequential(nn.Linear(64, 64)), "gguf")


def test_configuration_survives_json() -> None:
    config = build_quant_config({"method": "gguf", "gguf_type": "q4_k"})
    assert isinstance(config, GgufConfig)
    assert config.gguf_type == "Q4_K"
    assert config.weights_from is None
    written = config.as_serialized(["0"]).to_dict()
    assert written == {
        "quant_method": "gguf",
        "gguf_type": "Q4_K",
        "ignored_layers": ["0"],
        "is_checkpoint_gguf_serialized": True,
    }
    assert build_quant_config(written) == config.as_serialized(["0"])
    from_file = GgufConfig(gguf_model="x.gguf")
    assert from_file.is_serialized
    assert from_file.weights_from == "x.gguf"
    assert "gguf_model" not in from_file.as_serialized([]).to_dict()


def test_layer() -> None:
    model = nn.Sequential(nn.Linear(256, 32), nn.Linear(32, 48), nn.Linear(48, 8))
    weight, x = next(model.parameters()).detach().clone(), torch.randn(3, 256)
    manifest = quantize_model(model, "gguf", gguf_type="Q4_K")
    assert [record.method for record in manifest.layers] == ["gguf Q4_K", "gguf Q5_0", None]
    assert "no multiple of 32" in manifest.layers[2].reason
    assert [record.bytes_after for record in manifest.layers] == [32 * 144, 48 * 22, 4 * 48 * 8]
    layer = model[0]
    assert isinstance(layer, QuantizedLinear)
    decoded = gguf_dequantize(gguf_quantize(weight, "Q4_K"), "Q4_K")
    assert torch.equal(layer.method.dequantize_weight(layer), decoded)
    assert torch.allclose(layer(x), x @ decoded.t() + layer.bias, atol=1e-5)
    assert torch.equal(model.state_dict()["0.weight"], gguf_quantize(weight, "Q4_K"))
    assert "gguf Q4_K" in repr(layer)
