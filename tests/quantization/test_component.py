from __future__ import annotations

import pytest
import torch

from lowbit.errors import ConfigError
from lowbit.quantization import ComponentQuantizationConfig, Fp8Config, Int8Config, build_quant_config

CONFIG = ComponentQuantizationConfig(
    component_configs={"transformer": Fp8Config(), "transformer.refiner": Int8Config(), "vae": None},
    default_config=Int8Config(ignored_layers=["default"]),
)


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("transformer", Fp8Config()),
        ("transformer.layers.0.to_q", Fp8Config()),
        ("transformer.refiner.0.to_q", Int8Config()),
        ("transformer_2", Int8Config(ignored_layers=["default"])),
        ("transformer_2.layers.0", Int8Config(ignored_layers=["default"])),
        ("vae.decoder", None),
    ],
)
def test_the_longest_whole_prefix_wins(prefix: str, expected: object) -> None:
    assert CONFIG.resolve(prefix) == expected


def test_methods_are_routed() -> None:
    layer = torch.nn.Linear(4, 4)
    method = CONFIG.get_quant_method(layer, "transformer.layers.0")
    assert method is not None
    assert method.name == "fp8"
    assert CONFIG.get_quant_method(layer, "vae.decoder.linear") is None


def test_a_component_the_pipeline_lacks_is_named() -> None:
    with pytest.raises(ConfigError, match=r"transfomer\b.*Expected one of: transformer, vae"):
        ComponentQuantizationConfig({"transfomer": Int8Config()}).check_components({"transformer": 1, "vae": 2})
    CONFIG.check_components({"transformer": 1, "vae": 2})


def test_round_trip() -> None:
    assert build_quant_config(CONFIG.to_dict()) == CONFIG
