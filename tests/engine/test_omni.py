"""The engine on the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch._dynamo.utils import counters

from lowbit import Omni, OmniDiffusionSamplingParams, OmniRequestOutput
from lowbit.errors import ConfigError
from lowbit.models.embedded import embedded_model
from tools.train_embedded.captions import parse
from tools.train_embedded.detector import judge

PROMPT = "a large red circle left of a small blue square"
FAST = OmniDiffusionSamplingParams(seed=0, num_inference_steps=2)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def one(output: OmniRequestOutput | list[OmniRequestOutput]) -> OmniRequestOutput:
    assert isinstance(output, OmniRequestOutput)
    return output


@pytest.fixture(scope="module")
def int8() -> Omni:
    return Omni(quantization="int8", device="cpu")


@pytest.mark.parametrize(
    "config",
    [None, "int8", {"method": "fp8", "kernel": "reference"}, {"method": "fp8", "kernel": "weight_only"}],
    ids=str,
)
def test_the_picture_shows_what_the_prompt_says(config: object) -> None:
    omni = Omni(quantization_config=config, device="cpu")  # type: ignore[arg-type]
    output = one(omni.generate(PROMPT, OmniDiffusionSamplingParams(seed=0), progress=False))
    verdict = judge(parse(PROMPT), pixels(output.images[0]))
    assert verdict.ok, verdict.reasons
    assert len(output.step_times_s) == output.num_inference_steps
    assert output.peak_memory_mb > 0
    assert output.generation_time_s > sum(output.step_times_s)


def test_the_manifest_says_what_loading_did(int8: Omni) -> None:
    assert list(int8.manifests) == ["transformer"]
    manifest = int8.manifests["transformer"]
    assert {layer.method for layer in manifest.quantized} == {"int8"}
    assert {"modulation", "embedding", "last projection"} >= {layer.reason for layer in manifest.kept}
    assert manifest.bytes_after < 0.7 * manifest.bytes_before
    assert int8.load_time_s > 0


def test_same_seed_same_bytes(int8: Omni) -> None:
    first, again, other = (
        one(int8.generate(PROMPT, OmniDiffusionSamplingParams(seed=seed, num_inference_steps=2), progress=False))
        for seed in (5, 5, 6)
    )
    assert np.array_equal(pixels(first.images[0]), pixels(again.images[0]))
    assert not np.array_equal(pixels(first.images[0]), pixels(other.images[0]))


def test_several_outputs_count_seeds_up(int8: Omni) -> None:
    params = OmniDiffusionSamplingParams(seed=7, num_inference_steps=2, num_outputs_per_prompt=2)
    both = one(int8.generate(PROMPT, params, progress=False))
    assert both.seeds == [7, 8]
    second = one(int8.generate(PROMPT, OmniDiffusionSamplingParams(seed=8, num_inference_steps=2), progress=False))
    difference = pixels(both.images[1]).astype(int) - pixels(second.images[0]).astype(int)
    assert np.abs(difference).mean() < 2  # a batch sums in another order


def test_several_prompts(int8: Omni) -> None:
    outputs = int8.generate([PROMPT, "a green star"], FAST, progress=False)
    assert isinstance(outputs, list)
    assert [output.prompt for output in outputs] == [PROMPT, "a green star"]


def test_a_saved_pipeline_makes_the_same_picture(int8: Omni, tmp_path: Path) -> None:
    int8.save_pretrained(str(tmp_path / "saved"))
    again = Omni(str(tmp_path / "saved"), device="cpu")
    assert again.manifests["transformer"].by_kernel() == int8.manifests["transformer"].by_kernel()
    params = OmniDiffusionSamplingParams(seed=0, num_inference_steps=2)
    first, second = (one(omni.generate(PROMPT, params, progress=False)) for omni in (int8, again))
    assert first.images[0].size == (embedded_model().width, embedded_model().height)
    assert np.array_equal(pixels(first.images[0]), pixels(second.images[0]))


def test_static_fp8_is_calibrated_on_prompts() -> None:
    config = {"method": "fp8", "activation_scheme": "static", "kernel": "reference"}
    with pytest.raises(ConfigError, match="Give calibration_prompts"):
        Omni(quantization_config=config, device="cpu")
    omni = Omni(quantization_config=config, calibration_prompts=[PROMPT, "a green star"], device="cpu")
    output = one(omni.generate(PROMPT, OmniDiffusionSamplingParams(seed=0), progress=False))
    assert judge(parse(PROMPT), pixels(output.images[0])).ok


def test_the_text_encoder_too() -> None:
    omni = Omni(quantization_config={"transformer": "int8", "text_encoder": "int8"}, device="cpu")
    assert set(omni.manifests) == {"transformer", "text_encoder"}
    assert omni.manifests["text_encoder"].quantized
    output = one(omni.generate(PROMPT, OmniDiffusionSamplingParams(seed=0), progress=False))
    assert judge(parse(PROMPT), pixels(output.images[0])).ok


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"height": 130}, "multiples of 16, not height 130; try height 128"),
        ({"height": 100, "width": 3}, "multiples of"),
        ({"num_frames": 8}, "ZImagePipeline takes no num_frames"),
        ({"extra_args": {"stepz": 1}}, "takes no stepz"),
    ],
)
def test_parameters_the_model_cannot_take(int8: Omni, params: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        int8.generate(PROMPT, OmniDiffusionSamplingParams(**params), progress=False)  # type: ignore[arg-type]


def test_parameters_one_by_one_and_a_prompt_with_its_negative(int8: Omni) -> None:
    plain = one(int8.generate(PROMPT, FAST, progress=False))
    again = one(int8.generate({"prompt": PROMPT}, num_inference_steps=2, seed=0, progress=False))
    assert again.prompt == PROMPT
    assert np.array_equal(pixels(plain.images[0]), pixels(again.images[0]))
    steered: dict[str, Any] = {"num_inference_steps": 2, "seed": 0, "guidance_scale": 4.0, "progress": False}
    expected = one(int8.generate(PROMPT, negative_prompt="a green star", **steered))
    (found,) = int8.generate([{"prompt": PROMPT, "negative_prompt": "a green star"}], **steered)
    assert np.array_equal(pixels(found.images[0]), pixels(expected.images[0]))
    assert not np.array_equal(pixels(found.images[0]), pixels(plain.images[0]))
    with pytest.raises(ConfigError, match="Unknown parameter: 'steps'"):
        int8.generate(PROMPT, steps=4)


@pytest.mark.parametrize("prompt", ["", "  ", [], [""]])
def test_empty_prompts(int8: Omni, prompt: object) -> None:
    with pytest.raises(ConfigError, match="prompt"):
        int8.generate(prompt, FAST)  # type: ignore[arg-type]


@pytest.mark.slow
def test_compiled_blocks_make_nearly_the_same_picture(int8: Omni) -> None:
    compiled = Omni(quantization="int8", enforce_eager=False, device="cpu")
    first = one(int8.generate(PROMPT, FAST, progress=False))
    counters.clear()
    second = one(compiled.generate(PROMPT, FAST, progress=False))
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    difference = pixels(first.images[0]).astype(int) - pixels(second.images[0]).astype(int)
    assert np.abs(difference).mean() < 3


def test_attention_in_int8_and_what_it_says() -> None:
    omni = Omni(attention_quantization="int8", device="cpu")
    record = omni.attention["transformer"]
    assert (record.kind, record.layers) == ("int8", 7)
    assert record.summary() == f"7 attention layers int8 ({record.kernel})"
    output = one(omni.generate(PROMPT, OmniDiffusionSamplingParams(seed=0), progress=False))
    assert judge(parse(PROMPT), pixels(output.images[0])).ok
    plain = one(Omni(device="cpu").generate(PROMPT, FAST, progress=False))
    assert not np.array_equal(
        pixels(plain.images[0]), pixels(one(omni.generate(PROMPT, FAST, progress=False)).images[0])
    )


def test_short_sequences_keep_the_library_s_attention(int8: Omni) -> None:
    left = Omni(quantization="int8", attention_quantization="none", device="cpu")
    assert left.attention == {}
    assert {record.kind for record in int8.attention.values()} <= {"none"}
    first, second = (one(omni.generate(PROMPT, FAST, progress=False)) for omni in (int8, left))
    assert np.array_equal(pixels(first.images[0]), pixels(second.images[0]))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("int4", "Unknown attention_quantization: 'int4'. Expected one of: int8, fp8, none"),
        ({"transformer": "int4"}, "Unknown attention_quantization of transformer: 'int4'"),
        ({"unet": "int8"}, "names components that the pipeline lacks: unet"),
        ({"text_encoder": "int8"}, "Qwen3Model has no attention of diffusers' kind"),
        ({"vae": "int8"}, "AutoencoderKL"),
    ],
)
def test_attention_that_cannot_be_quantized(spec: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Omni(attention_quantization=spec, device="cpu")  # type: ignore[arg-type]
