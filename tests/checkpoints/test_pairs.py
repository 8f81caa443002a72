"""Wan 2.2's two experts from the name of one file."""

from __future__ import annotations

import pytest

from lowbit.checkpoints.pairs import noise_pairs
from lowbit.errors import ConfigError
from lowbit.quantization import ComfyUiConfig, GgufConfig, QuantizationConfig


@pytest.mark.parametrize(
    ("given", "high", "low"),
    [
        ("w/Wan2.2-HighNoise-Q4_K_M.gguf", "w/Wan2.2-HighNoise-Q4_K_M.gguf", "w/Wan2.2-LowNoise-Q4_K_M.gguf"),
        ("o/r/LowNoise/w-LowNoise.gguf", "o/r/HighNoise/w-HighNoise.gguf", "o/r/LowNoise/w-LowNoise.gguf"),
        ("o/r:HighNoise-Q4_K_M", "o/r:HighNoise-Q4_K_M", "o/r:LowNoise-Q4_K_M"),
        ("wan_low_noise_14B.gguf", "wan_high_noise_14B.gguf", "wan_low_noise_14B.gguf"),
        ("WAN-HIGH-NOISE.gguf", "WAN-HIGH-NOISE.gguf", "WAN-LOW-NOISE.gguf"),
    ],
)
def test_each_expert_gets_its_own(given: str, high: str, low: str) -> None:
    config = GgufConfig(gguf_model=given)
    found = noise_pairs({"transformer": config, "transformer_2": config})
    assert [found[name].weights_from for name in ("transformer", "transformer_2")] == [high, low]
    comfy = noise_pairs(dict.fromkeys(("transformer_2", "transformer"), ComfyUiConfig(comfyui_model=given)))
    assert (comfy["transformer"].weights_from, comfy["transformer_2"].weights_from) == (high, low)


def test_files_of_their_own_stay() -> None:
    given: dict[str, QuantizationConfig] = {
        "transformer": GgufConfig(gguf_model="a-HighNoise.gguf"),
        "transformer_2": GgufConfig(gguf_model="b.gguf"),
    }
    assert noise_pairs(given) == given
    assert noise_pairs({"transformer": given["transformer"]}) == {"transformer": given["transformer"]}


@pytest.mark.parametrize("names", [("transformer", "transformer_2"), ("transformer", "text_encoder")])
def test_one_file_for_two_is_refused(names: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"{names[0]}, {names[1]} would all take it: give each its own"):
        noise_pairs(dict.fromkeys(names, GgufConfig(gguf_model="wan2.2-Q8_0.gguf")))
