from __future__ import annotations

import contextlib
import copy
import dataclasses
from typing import Any

import pytest

from lowbit.errors import CheckpointError, ConfigError, UnsupportedError
from lowbit.quantization import (
    SUPPORTED_QUANTIZATION_METHODS,
    ComponentQuantizationConfig,
    Fp8Config,
    Int8Config,
    build_quant_config,
)
from lowbit.quantization.factory import config_class


@pytest.mark.parametrize("spec", [None, "none", "None", {"method": None}, {"method": "none"}])
def test_no_quantization(spec: Any) -> None:
    assert build_quant_config(spec) is None


@pytest.mark.parametrize(
    ("spec", "options", "expected"),
    [
        ("int8", {}, Int8Config()),
        (" INT8 ", {}, Int8Config()),
        ("fp8", {"activation_scheme": "static"}, Fp8Config(activation_scheme="static")),
        ({"method": "fp8", "ignored_layers": ["img_mlp"]}, {}, Fp8Config(ignored_layers=["img_mlp"])),
        ({"quant_method": "int8"}, {"ignored_layers": ["a"]}, Int8Config(ignored_layers=["a"])),
        ({"method": "int8", "modules_to_not_convert": ["a"]}, {}, Int8Config(ignored_layers=["a"])),
        ({"method": "int8", "quant_method": "INT8"}, {}, Int8Config()),
        ({"method": "fp8", "weight_block_size": [128, 128]}, {}, Fp8Config(weight_block_size=[128, 128])),
        (Int8Config(kernel="reference"), {}, Int8Config(kernel="reference")),
    ],
)
def test_one_method(spec: Any, options: dict[str, Any], expected: Any) -> None:
    before = copy.deepcopy(spec)
    assert build_quant_config(spec, **options) == expected
    assert spec == before


def test_per_component() -> None:
    spec = {"transformer": {"method": "fp8"}, "text_encoder": "int8", "vae": None, "default": "int8"}
    before = copy.deepcopy(spec)
    config = build_quant_config(spec)
    assert isinstance(config, ComponentQuantizationConfig)
    assert config.get_name() == "component"
    assert config.component_configs == {"transformer": Fp8Config(), "text_encoder": Int8Config(), "vae": None}
    assert config.default_config == Int8Config()
    assert spec == before


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("foo", {}, r"Unknown quantization method: 'foo'.*int8, fp8"),
        ({"method": "foo"}, {}, "Unknown quantization method"),
        ({"activation_scheme": "static"}, {}, "must have a 'method' key"),
        ({}, {}, "must have a 'method' key"),
        ({"transformer": "foo"}, {}, "must have a 'method' key"),
        ({"transformer": {"bits": 8}}, {}, "must have a 'method' key"),
        ({"transformer": {"method": "foo"}}, {}, "Unknown quantization method"),
        ("int8", {"bits": 4}, r"Unknown option 'bits' for quantization method 'int8'.*activation_scheme"),
        ("int8", {"activation_scheme": "static"}, "int8 has no activation_scheme 'static'"),
        ("int8", {"is_checkpoint_fp8_serialized": True}, "Unknown option 'is_checkpoint_fp8_serialized'"),
        ("fp8", {"activation_scheme": "magic"}, "magic.*dynamic, static"),
        ("fp8", {"weight_block_size": [128]}, "weight_block_size must be"),
        ("fp8", {"weight_block_size": [0, 128]}, "weight_block_size must be"),
        ("fp8", {"weight_block_size": 128}, "weight_block_size must be"),
        ("fp8", {"weight_block_size": [128, 128], "activation_scheme": "static"}, "needs activation_scheme 'dynamic'"),
        ("int8", {"ignored_layers": "img_mlp"}, "must be a list"),
        ("int8", {"ignored_layers": ""}, "must be a list"),
        ("int8", {"weight_only_layers": False}, "weight_only_layers must be a list"),
        ("int8", {"ignored_layers": ["a"], "modules_to_not_convert": ["b"]}, "contradict"),
        ({"method": "int8", "quant_method": "fp8"}, {}, "contradict"),
        ({"method": "int8", "ignored_layers": ["a"]}, {"ignored_layers": ["b"]}, "given twice"),
        (None, {"ignored_layers": ["a"]}, "can't be given with no quantization"),
        ({"transformer": "fp8"}, {"ignored_layers": ["a"]}, "can't be given with a dictionary of components"),
        (3, {}, "not 3"),
        ({"method": 3}, {}, "must be a name"),
    ],
)
def test_bad_input_is_named(spec: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_quant_config(spec, **options)


@pytest.mark.parametrize("method", SUPPORTED_QUANTIZATION_METHODS)
def test_what_is_written_is_read_again(method: str) -> None:
    config = build_quant_config(method, ignored_layers=["layers.0"])
    assert not isinstance(config, ComponentQuantizationConfig)
    assert config is not None
    written = config.as_serialized(["layers.1.w1"]).to_dict()
    assert written["quant_method"] == method
    again = build_quant_config(written)
    assert again == config.as_serialized(["layers.1.w1"])
    assert again is not None
    assert again.is_serialized


def test_what_is_written_holds_nothing_a_strict_reader_refuses() -> None:
    # vLLM-Omni's constructor takes these keys and fails on any other.
    written = Int8Config(kernel="reference").as_serialized(["proj_out"]).to_dict()
    assert written == {
        "quant_method": "int8",
        "activation_scheme": "dynamic",
        "is_checkpoint_int8_serialized": True,
        "ignored_layers": ["proj_out"],
    }


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"method": "int8", "ignored_layers": ["re:("]}, "ignored_layers: '\\(' is no regular expression"),
        ({"method": "modelopt", "quant_algo": "FP8", "lora_rank": []}, "lora_rank must be from 1"),
        ({"method": "modelopt", "quant_algo": "FP8", "producer": {}, "ignore": [0]}, "ignore must be a list"),
        ({"method": "modelopt", "quant_algo": "FP8", "config_groups": [1]}, "config_groups must map"),
    ],
)
def test_values_of_the_wrong_kind_are_named(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_quant_config(spec)


# Of every JSON type, and numbers, names and containers that some option takes.
VALUES: tuple[Any, ...] = (
    *(
        None,
        False,
        True,
        0,
        1,
        -1,
        3,
        64,
        10**30,
        0.0,
        0.5,
        float("nan"),
        float("inf"),
        "",
        "x",
        "fp8",
        "nvfp4",
        "re:(",
    ),
    *([], [0], ["a"], [None], [[1]], [["a"]], ["re:("], [128, 128], [0, 0]),
    *({}, {"a": 1}, {"a": {}}, {"a": None}, {"*": "fp8"}, {"re:(": 1}),
)
ALGORITHMS = ("FP8", "NVFP4", "MXFP8", "MIXED_PRECISION", "NVFP4_SVD", "FP8_PER_CHANNEL_PER_TOKEN")
# That some checkpoint's configuration has, whatever the method.
FOREIGN_OPTIONS = (
    *("quant_algo", "producer", "quantization", "config_groups", "kv_cache_scheme", "modules_to_not_convert", "ignore"),
    *("exclude_modules", "lora_rank", "group_size", "quantized_layers", "extra_config", "packing_format", "data_type"),
)


@pytest.mark.parametrize("method", SUPPORTED_QUANTIZATION_METHODS)
def test_any_value_of_an_option_is_taken_or_refused(method: str) -> None:
    options = (*(field.name for field in dataclasses.fields(config_class(method))), *FOREIGN_OPTIONS)
    given = [{"quant_algo": algorithm} for algorithm in ALGORITHMS] if method == "modelopt" else [{}]
    for others in given:
        for option in dict.fromkeys(options):
            for value in VALUES:
                with contextlib.suppress(ConfigError, CheckpointError, UnsupportedError):
                    build_quant_config({"method": method, **others, option: value})
