"""AutoRound's checkpoints: what ``auto-round`` exported (scripts/fixtures), and what lowbit writes."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lowbit.errors import CheckpointError, ConfigError, UnsupportedError
from lowbit.hosts.preflight import check_component
from lowbit.hosts.routing import claims
from lowbit.ops.auto_round import auto_round_dequantize
from lowbit.quantization import AutoRoundConfig, build_quant_config, quantize_model
from lowbit.quantization.linear import State
from lowbit.quantization.plan import quantized_layers
from tests.support.auto_round_files import FIXTURES, FLUX, complete, model_class
from tests.support.models import FAMILIES, language_model, stored_config, tensors

INTEGERS = [path for path in FIXTURES if path.name.startswith("w") or path.name == "flux"]
LAYER = "transformer_blocks.0.attn.to_q"


def load(folder: Path, **options: Any) -> Any:
    kind = model_class(json.loads((folder / "config.json").read_text()))
    return kind.from_pretrained(folder, torch_dtype=torch.float32, **options)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256((tensor + 0.0).contiguous().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda path: path.name)
class TestExports:
    def test_weights_decode_as_auto_round_decodes_them(self, fixture: Path, tmp_path: Path) -> None:
        expected = json.loads((fixture / "expected.json").read_text())
        layers = quantized_layers(load(complete(fixture, tmp_path / "model")))
        assert sorted(layers) == sorted(expected["weights"])
        for name, layer in layers.items():
            weight = layer.method.dequantize_weight(layer)
            if fixture in INTEGERS:
                weight = weight.half()  # in which auto-round multiplies codes and scales
            if fixture.name == "nvfp4":
                # auto-round multiplies by its two scales in the other order.
                scale = layer.get_parameter("weight_scale").float().repeat_interleave(16, 1)
                reciprocal = layer.get_parameter("weight_global_scale").reciprocal()
                elements = (weight / (scale * reciprocal)).nan_to_num()
                elements = (elements * 2).round() / 2
                close = elements * reciprocal * scale
                torch.testing.assert_close(weight, close, rtol=3e-7, atol=0)
                weight = close
            assert sha256(weight) == expected["weights"][name], name

    def test_what_was_read_is_written_and_read_again(self, fixture: Path, tmp_path: Path) -> None:
        folder = complete(fixture, tmp_path / "model")
        model = load(folder)
        model.save_pretrained(tmp_path / "again")
        before, after = tensors(folder), tensors(tmp_path / "again")
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            if name.rpartition(".")[0] in quantized_layers(model) and not name.endswith(".bias"):
                assert tensor.dtype == after[name].dtype, name
                assert tensor.shape == after[name].shape, name
                assert torch.equal(bytes_of(tensor), bytes_of(after[name])), name
        written, theirs = stored_config(tmp_path / "again"), stored_config(folder)
        for key in ("quant_method", "bits", "group_size", "sym", "data_type", "packing_format"):
            assert written[key] == theirs[key], key
        again = quantized_layers(load(tmp_path / "again"))
        assert again.keys() == quantized_layers(model).keys()

    def test_layers_compute_with_the_decoded_weight(self, fixture: Path, tmp_path: Path) -> None:
        layers = quantized_layers(load(complete(fixture, tmp_path / "model")))
        assert layers
        for name, layer in layers.items():
            x = torch.randn(3, layer.in_features)
            weight = layer.method.dequantize_weight(layer).double()
            expected = x.double() @ weight.t() + (0 if layer.bias is None else layer.bias.double())
            # On CPUs activations of MX and NVFP4 are left as they are too.
            assert (layer(x).double() - expected).norm() < 1e-5 * expected.norm(), name


@pytest.mark.parametrize("fixture", INTEGERS, ids=lambda path: path.name)
def test_public_decoder_reads_the_files(fixture: Path) -> None:
    expected = json.loads((fixture / "expected.json").read_text())["weights"]
    config = stored_config(fixture)
    content = tensors(fixture)
    for name, digest in expected.items():
        parts = (content[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
        own = {**config, **config.get("extra_config", {}).get(name, {})}
        weight = auto_round_dequantize(*parts, own["bits"], own["group_size"], own["packing_format"])
        assert sha256(weight.half()) == digest


def test_groups_that_nobody_named_are_auto_rounds_in_a_checkpoint_and_smaller_online() -> None:
    checkpoint = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4}
    assert build_quant_config(checkpoint).group_size == 128
    assert build_quant_config("auto-round").group_size == 32


def test_files_are_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    check_component(complete(FLUX, tmp_path / "model"))


def broken(tmp_path: Path, change: Any) -> Path:
    folder = complete(FLUX, tmp_path / "broken")
    (file,) = folder.glob("*.safetensors")
    content = load_file(file)
    change(content)
    save_file(content, file, {"format": "pt"})
    return folder


def replaced(name: str, make: Any) -> Any:
    return lambda content: content.update({f"{LAYER}.{name}": make(content[f"{LAYER}.{name}"])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop(f"{LAYER}.qzeros"), rf"1 missing: {LAYER}.qzeros"),
        (
            replaced("qweight", lambda t: t[1:].clone()),
            rf"{LAYER}.qweight: found int32 \[7, 64\], auto-round W4A16 needs",
        ),
        (replaced("qweight", lambda t: t.long()), rf"{LAYER}.qweight: found int64"),
        (replaced("scales", lambda t: t.t().contiguous()), rf"{LAYER}.scales: found float16 \[64, 2\]"),
        (replaced("scales", lambda t: t * torch.nan), rf"{LAYER}.scales: 128 of 128 values must be finite"),
        (
            lambda content: content.update({f"{LAYER}.g_idx": torch.arange(64, dtype=torch.int32) % 2}),
            "g_idx: inputs in another order",
        ),
    ],
)
def test_broken_checkpoints_name_file_and_tensor(change: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(broken(tmp_path, change))


def test_a_trivial_order_is_read(tmp_path: Path) -> None:
    order = torch.arange(64, dtype=torch.int32) // 32
    folder = broken(tmp_path, lambda content: content.update({f"{LAYER}.g_idx": order}))
    assert LAYER in quantized_layers(load(folder))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"group_size": 32},
        {"group_size": -1},
        {"sym": False},
        {"bits": 8},
        {"bits": 3, "group_size": 64},
        {"bits": 2, "sym": False, "packing_format": "auto_round:auto_awq", "group_size": 32},
    ],
    ids=str,
)
def test_online_writes_what_loads_back_bit_identically(options: dict[str, Any], tmp_path: Path) -> None:
    family = FAMILIES["flux"]
    torch.manual_seed(0)
    model = family.make().to(torch.bfloat16)
    quantize_model(model, "auto-round", **options)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert torch.equal(family.run(model), family.run(again))
    before, after = quantized_layers(model), quantized_layers(again)
    assert before.keys() == after.keys()
    for name, layer in before.items():
        held = {key: (tensor.shape, tensor.dtype) for key, tensor in layer.state_dict().items()}
        layer.state = State.AWAITING_TENSORS
        assert {key: (tensor.shape, tensor.dtype) for key, tensor in layer.state_dict().items()} == held
        assert layer.state_dict()["qweight"].is_meta
        for parameter in layer.quantized_names:
            assert torch.equal(layer.get_parameter(parameter), after[name].get_parameter(parameter))
    stored = stored_config(tmp_path)
    assert stored["packing_format"] == options.get(
        "packing_format", "auto_round:auto_gptq" if options.get("sym", True) else "auto_round"
    )
    assert tensors(tmp_path)[f"{LAYER}.qweight"].dtype == torch.int32
    assert tensors(tmp_path)[f"{LAYER}.scales"].dtype == torch.float16


def test_loading_quantizes_as_in_memory(tmp_path: Path) -> None:
    family = FAMILIES["qwen-image"]
    torch.manual_seed(0)
    model = family.make().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(
        tmp_path, torch_dtype=torch.bfloat16, quantization_config=build_quant_config("inc", group_size=32)
    )
    quantize_model(model, "auto_round", group_size=32)
    assert torch.equal(family.run(model), family.run(loaded))


def test_a_language_model_is_written_and_read(tmp_path: Path) -> None:
    language_model().to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    kind, auto = transformers.AutoModelForCausalLM, transformers.AutoModel
    config = build_quant_config("auto-round", group_size=32)
    model = kind.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16, quantization_config=config)
    model.save_pretrained(tmp_path / "quantized")
    ids = torch.arange(6)[None]
    again = kind.from_pretrained(tmp_path / "quantized", dtype=torch.bfloat16)
    assert torch.equal(model(ids).logits, again(ids).logits)
    base = auto.from_pretrained(tmp_path / "quantized", dtype=torch.bfloat16)
    assert len(quantized_layers(base)) == len(quantized_layers(again)) == 14


def test_names_of_the_method() -> None:
    for name in ("auto-round", "auto_round", "AutoRound".replace("R", "-r").lower(), "inc", "INC"):
        config = build_quant_config(name)
        assert isinstance(config, AutoRoundConfig)
    assert claims({"quant_method": "auto-round", "bits": 4}, {"auto-round"})
    assert build_quant_config({"method": "inc", "quant_method": "auto-round"}) == AutoRoundConfig()


def test_extra_config_takes_names_and_expressions() -> None:
    config = build_quant_config(
        {
            "quant_method": "auto-round",
            "packing_format": "auto_round",
            "autoround_version": "0.16.1",
            "seqlen": 2048,
            "bits": 4,
            "sym": False,
            "block_name_to_quantize": "blocks, lm_head",
            "extra_config": {".*to_out.*": {"bits": 8}, "blocks.0.to_q": {"bits": 16}, "other": {"bits": 2}},
        }
    )
    assert isinstance(config, AutoRoundConfig)
    linear = torch.nn.Linear(64, 64)
    names = {
        "blocks.1.to_q": "auto-round W4A16",
        "blocks.0.to_q": None,
        "blocks.0.to_out.0": "auto-round W8A16",
        "other": "auto-round W2A16",
        "elsewhere.0": None,
        "lm_head": "auto-round W4A16",
    }
    for name, expected in names.items():
        method = config.get_quant_method(linear, name)
        assert (method and method.name) == expected, name
    assert config.kept_reason("blocks.0.to_q") == "16 bits in extra_config"
    assert config.kept_reason("elsewhere.0") == "not in a block that is quantized"
    again = build_quant_config(config.to_dict())
    assert again == config
    nested = build_quant_config({"quant_method": "auto-round", "packing_format": "auto_round", "sym": True,
                                 "block_name_to_quantize": [["a.0", "a.1"], ["b.0"]]})  # fmt: skip
    assert nested.is_in_blocks("a.1.x")
    assert not nested.is_in_blocks("c.0.x")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bits": 9}, UnsupportedError, "bits=9.*is not supported"),
        ({"bits": "4"}, ConfigError, "bits must be a whole number"),
        ({"group_size": 48}, ConfigError, "group_size must be -1 or a multiple of 32, not 48"),
        ({"sym": 1}, ConfigError, "sym must be true or false"),
        ({"data_type": "mx_fp", "group_size": 32}, ConfigError, "is read, not made"),
        ({"data_type": "fp8_e4m3"}, UnsupportedError, "supported: data_type int"),
        ({"act_bits": 8}, UnsupportedError, "act_bits=8.*is not supported"),
        ({"packing_format": "auto_round:mlx"}, UnsupportedError, "auto_round:mlx"),
        ({"sym": False, "packing_format": "auto_gptq"}, ConfigError, "can't hold zero points of 0"),
        ({"extra_config": {"(": {"bits": 8}}}, ConfigError, "extra_config: '\\(' is no regular expression"),
        ({"extra_config": {4: {"bits": 8}}}, ConfigError, "must map layers"),
        ({"extra_config": ["a"]}, ConfigError, "must map layers"),
        ({"extra_config": {"a.0": {"bits": 1}}}, UnsupportedError, "bits=1"),
        ({"block_name_to_quantize": 5}, ConfigError, "must be names of blocks"),
        ({"surprise": 1}, ConfigError, "Unknown option 'surprise'"),
        ({"autoround_version": "1", "rotation_config": {"a": 1}}, UnsupportedError, "rotation_config"),
    ],
)  # fmt: skip
def test_what_can_not_be_done_is_said(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"(?s){message}"):
        build_quant_config({"method": "auto-round", **options})


def test_a_shape_that_can_not_be_read_is_named() -> None:
    config = build_quant_config({"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"})
    assert isinstance(config, AutoRoundConfig)
    with pytest.raises(UnsupportedError, match=r"a\.0 can't be read: 24 x 64 channels are not whole blocks of 32"):
        config.get_quant_method(torch.nn.Linear(64, 24), "a.0")
    assert AutoRoundConfig().linear_method().refusal(torch.nn.Linear(64, 24)) is not None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = [*(key for key in AutoRoundConfig.__dataclass_fields__), "autoround_version", "rotation_config", "seqlen", "x"]
VALUES = JSON | st.sampled_from(["int", "mx_fp", "nv_fp", "auto_round", "auto_awq", 2, 4, 8, 16, 32, -1, True])


# The first text drawn takes seconds on a busy machine: hypothesis builds its tables of characters.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(options=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6))
def test_mutated_configurations_give_errors_of_lowbits_own(options: dict[str, Any]) -> None:
    stored = stored_config(FLUX)
    with contextlib.suppress(ConfigError, UnsupportedError):
        config = build_quant_config({**stored, **options})
        assert isinstance(config, AutoRoundConfig)
        with contextlib.suppress(UnsupportedError):
            config.get_quant_method(torch.nn.Linear(64, 64), LAYER)
        json.dumps(config.to_dict())
