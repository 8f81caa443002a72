from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from lowbit.errors import ConfigError
from lowbit.inputs.arguments import call_arguments, for_prompt
from lowbit.inputs.data import OmniDiffusionSamplingParams, merge_params
from lowbit.inputs.prompts import Prompt, is_single, parse_prompts

COUNTS = ("height", "width", "num_inference_steps", "num_outputs_per_prompt", "num_frames", "fps")
NOT_COUNTS = (0, -16, 1.5, 8.0, True, False, "7", math.nan, math.inf, [4], b"4", 1 + 0j)
NOT_NUMBERS = ("x", "4.5", True, math.nan, math.inf, -math.inf, -1.0, [1.0], 1 + 0j)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, value) for name in COUNTS for value in NOT_COUNTS],
        *[("seed", value) for value in (-1, 2**63, 1.5, "7", True, math.nan, [1])],
        *[("guidance_scale", value) for value in NOT_NUMBERS],
        *[("negative_prompt", value) for value in (5, ["blur"], b"blur", {"a": 1})],
        *[("extra_args", value) for value in (None, "x=1", [1], {1: 2})],
        ("num_outputs_per_prompt", None),
    ],
    ids=repr,
)
def test_values_that_cannot_be_are_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as raised:
        OmniDiffusionSamplingParams(**{name: value})
    message = str(raised.value)
    assert message.startswith(f"{name}: expected ")
    assert repr(value) in message
    assert "\n" not in message


def test_seeds_that_count_up_stay_below_the_largest() -> None:
    OmniDiffusionSamplingParams(seed=2**63 - 2, num_outputs_per_prompt=2)
    with pytest.raises(ConfigError, match="count up"):
        OmniDiffusionSamplingParams(seed=2**63 - 1, num_outputs_per_prompt=2)


def test_numpys_numbers_become_pythons() -> None:
    params = OmniDiffusionSamplingParams(height=np.int64(64), seed=np.uint32(7), guidance_scale=np.float32(2.0))
    assert [type(value) for value in (params.height, params.seed, params.guidance_scale)] == [int, int, float]


def test_defaults_are_the_models() -> None:
    params = OmniDiffusionSamplingParams()
    assert params.height is None
    assert params.num_inference_steps is None
    assert params.num_outputs_per_prompt == 1


def test_parameters_one_by_one() -> None:
    assert merge_params(None, {"seed": 1, "height": 64}) == OmniDiffusionSamplingParams(seed=1, height=64)
    some = OmniDiffusionSamplingParams(height=32)
    assert merge_params(some, {"seed": 1}) == OmniDiffusionSamplingParams(seed=1, height=32)
    assert merge_params(some, {}) == some
    with pytest.raises(ConfigError, match="height: given in sampling_params and by itself"):
        merge_params(some, {"height": 32})
    with pytest.raises(ConfigError, match=r"Unknown parameter: 'steps'. Expected one of: .*num_inference_steps"):
        merge_params(None, {"steps": 4})
    with pytest.raises(ConfigError, match="seed: expected a whole number"):
        merge_params(None, {"seed": "7"})
    with pytest.raises(ConfigError, match="expected OmniDiffusionSamplingParams"):
        merge_params({"seed": 1}, {})  # type: ignore[arg-type]


IMAGE: tuple[str, ...] = (
    *("prompt", "height", "width", "num_inference_steps", "num_images_per_prompt", "negative_prompt", "generator"),
    *("latents", "callback_on_step_end", "return_dict", "guidance_scale", "sigmas"),
)
VIDEO: tuple[str, ...] = (*IMAGE[:4], "num_frames", "num_videos_per_prompt", "output_type", "frame_rate")


def arguments(known: tuple[str, ...] = IMAGE, defaults: dict[str, Any] | None = None, **params: Any) -> dict[str, Any]:
    return call_arguments(OmniDiffusionSamplingParams(**params), defaults or {}, known, "Pipe")


def test_arguments_are_the_users_over_the_models() -> None:
    found = arguments(defaults={"height": 64, "guidance_scale": 2.0}, height=32, extra_args={"sigmas": [1.0]})
    assert found == {"height": 32, "guidance_scale": 2.0, "sigmas": [1.0]}


def test_videos_have_names_of_their_own() -> None:
    found = arguments(VIDEO, num_outputs_per_prompt=2, num_frames=5, fps=24)
    assert found == {"num_frames": 5, "num_videos_per_prompt": 2, "frame_rate": 24, "output_type": "pil"}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"fps": 24}, r"fps: Pipe takes no frame_rate or fps: it has no effect on the frames"),
        ({"num_frames": 3}, "num_frames: Pipe takes no num_frames"),
        ({"extra_args": {"stepz": 1}}, "extra_args: Pipe takes no stepz. Expected one of: .*num_inference_steps"),
        ({"extra_args": {"height": 64}, "height": 32}, "extra_args can't hold height: height is given by height"),
        ({"extra_args": {"height": 64}}, "extra_args can't hold height"),
        ({"extra_args": {"num_images_per_prompt": 2}}, "is given by num_outputs_per_prompt"),
        *[
            ({"extra_args": {name: None}}, f"extra_args can't hold {name}")
            for name in ("prompt", "generator", "callback_on_step_end", "return_dict")
        ],
    ],
)
def test_arguments_that_a_pipeline_or_lowbit_refuses(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        arguments(**params)


def test_defaults_that_the_pipeline_does_not_take_are_said_to_be_the_models() -> None:
    with pytest.raises(ConfigError, match="generation defaults hold strength, which Pipe does not take"):
        arguments(defaults={"strength": 0.5})


def test_a_dictionary_is_one_prompt() -> None:
    prompt = {"prompt": "a star", "negative_prompt": "blur"}
    assert is_single(prompt)
    assert parse_prompts(prompt) == [Prompt("a star", "blur")]
    assert parse_prompts(["a", prompt]) == [Prompt("a"), Prompt("a star", "blur")]
    params = OmniDiffusionSamplingParams(seed=1)
    assert for_prompt(params, Prompt("a", "blur")) == OmniDiffusionSamplingParams(seed=1, negative_prompt="blur")
    assert for_prompt(params, Prompt("a")) is params
    with pytest.raises(ConfigError, match="negative_prompt: given in the prompt and in the parameters"):
        for_prompt(OmniDiffusionSamplingParams(negative_prompt="x"), Prompt("a", "blur"))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("", "not empty, got ''"),
        ("  ", "not empty"),
        ([], "at least one"),
        ([""], "not empty"),
        (5, "got 5"),
        (None, "got None"),
        (b"a star", "got b'a star'"),
        (["a star", 7], "got 7"),
        ({}, "not empty, got None"),
        ({"prompt": ""}, "not empty"),
        ({"negative_prompt": "blur"}, "not empty, got None"),
        ({"prompt": "a", "negative_prompt": 3}, "expected text, got 3"),
        ({"prompt": "a", "prmpt": "b"}, "Unknown key of a prompt: 'prmpt'. Expected one of: prompt, negative_prompt"),
        ({"prompt": "a", "multi_modal_data": {}}, "multi_modal_data of a prompt: .*not supported as input"),
        ({"prompt_token_ids": [1]}, "prompt_token_ids of a prompt: .*give the text"),
    ],
)
def test_prompts_that_cannot_be(prompts: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_prompts(prompts)
