"""POST /v1/images/generations with OpenAI's client and with plain HTTP."""

from __future__ import annotations

import base64
import io
import zipfile
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from lowbit import Omni, OmniDiffusionSamplingParams, OmniRequestOutput
from tests.support.server import QUICK, Running

PROMPT = "a large red circle left of a small blue square"


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def of(data: str | None) -> bytes:
    assert data is not None
    return base64.b64decode(data)


def alone(omni: Omni, prompt: str = PROMPT, **params: Any) -> list[np.ndarray]:
    output = omni.generate(prompt, OmniDiffusionSamplingParams(**params), progress=False)
    assert isinstance(output, OmniRequestOutput)
    return [np.asarray(image) for image in output.images]


def test_the_picture_of_the_client_is_that_of_generate(server: Running, omni: Omni) -> None:
    found = server.client().images.generate(
        model="embedded", prompt=PROMPT, size="64x96", n=2, extra_body={"seed": 7, "num_inference_steps": 3}
    )
    assert found.data is not None
    expected = alone(omni, seed=7, num_inference_steps=3, width=64, height=96, num_outputs_per_prompt=2)
    assert [np.array_equal(pixels(of(each.b64_json)), other) for each, other in zip(found.data, expected, strict=True)]
    assert all(
        np.array_equal(pixels(of(each.b64_json)), other) for each, other in zip(found.data, expected, strict=True)
    )
    assert (found.size, found.output_format, found.background) == ("64x96", "png", "opaque")
    assert [each.model_extra for each in found.data] == [{"seed": 7}, {"seed": 8}]
    assert found.usage is not None
    assert found.usage.input_tokens > 5
    assert found.usage.output_tokens == 2 * (64 // 16) * (96 // 16)
    assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens


def test_the_model_has_defaults(server: Running, omni: Omni) -> None:
    found = server.client().images.generate(prompt=PROMPT, size="auto", extra_body={"seed": 3})
    assert found.data is not None
    assert np.array_equal(pixels(of(found.data[0].b64_json)), alone(omni, seed=3)[0])


def test_extensions_reach_the_model(server: Running, omni: Omni) -> None:
    given: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 2.0, "negative_prompt": "a star", "seed": 1}
    answer = server.post(
        {"prompt": PROMPT, "width": 32, "height": 48, "extra_params": {"cfg_truncation": 0.5}, **given}
    )
    expected = alone(omni, width=32, height=48, extra_args={"cfg_truncation": 0.5}, **given)
    assert np.array_equal(pixels(of(answer.json["data"][0]["b64_json"])), expected[0])
    assert not np.array_equal(expected[0], alone(omni, width=32, height=48, seed=1, num_inference_steps=2)[0])


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_formats(server: Running, output_format: Any) -> None:
    found = server.client().images.generate(prompt=PROMPT, output_format=output_format, extra_body=QUICK)
    assert found.data is not None
    image = Image.open(io.BytesIO(of(found.data[0].b64_json)))
    assert (image.format or "").lower() == found.output_format == output_format
    assert image.size == (32, 32)


def test_compression(server: Running) -> None:
    body = {"prompt": PROMPT, "output_format": "jpeg", "seed": 1, **QUICK}
    sizes = [len(server.post({**body, "output_compression": each}).content) for each in (1, 50, 100)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2]
    refused = server.post({**body, "output_format": "png", "output_compression": 5})
    assert (refused.status, refused.error["param"]) == (400, "output_compression")


def test_a_url_leads_to_the_picture(server: Running, omni: Omni) -> None:
    found = server.client().images.generate(
        prompt=PROMPT, response_format="url", extra_body={"seed": 1, "num_inference_steps": 2}, size="32x32"
    )
    assert found.data is not None
    assert found.data[0].b64_json is None
    url = found.data[0].url
    assert url is not None
    assert url.startswith(f"{server.url}/files/")
    path = url.removeprefix(server.url)
    answer = server.send("GET", path, headers={"Authorization": ""})
    assert answer.headers["content-type"] == "image/png"
    assert np.array_equal(pixels(answer.content), alone(omni, seed=1, num_inference_steps=2, width=32, height=32)[0])
    assert server.send("GET", path[:-8] + "AAAA.png").status == 404


def test_a_file_is_the_picture_itself(server: Running) -> None:
    body = {"prompt": PROMPT, "seed": 1, "response_format": "file", **QUICK}
    answer = server.post(body)
    assert answer.headers["content-type"] == "image/png"
    assert "image.png" in answer.headers["content-disposition"]
    several = server.post({**body, "n": 2, "output_format": "webp"})
    with zipfile.ZipFile(io.BytesIO(several.content)) as archive:
        assert archive.namelist() == ["image_0.webp", "image_1.webp"]
    assert pixels(answer.content).shape == (32, 32, 3)


def test_a_stream_sends_previews_that_near_the_picture(server: Running, omni: Omni) -> None:
    stream = server.client().images.generate(
        prompt=PROMPT, stream=True, partial_images=3, extra_body={"seed": 5, "num_inference_steps": 8}
    )
    events = list(stream)
    assert [each.type for each in events] == 3 * ["image_generation.partial_image"] + ["image_generation.completed"]
    assert [each.partial_image_index for each in events[:3]] == [0, 1, 2]
    pictures = [pixels(of(each.b64_json)) for each in events]
    assert np.array_equal(pictures[3], alone(omni, seed=5, num_inference_steps=8)[0])
    errors = [float(np.abs(each.astype(float) - pictures[3]).mean()) for each in pictures]
    assert errors[0] > errors[1] > errors[2] > errors[3] == 0
    assert errors[0] < 40  # a prediction of the picture, not noise
    last = events[-1]
    assert last.type == "image_generation.completed"
    assert (last.size, last.output_format, last.background) == ("128x128", "png", "opaque")
    assert last.usage.output_tokens == 64


def test_a_stream_without_previews(server: Running) -> None:
    stream = server.client().images.generate(prompt=PROMPT, stream=True, extra_body=QUICK)
    assert [each.type for each in stream] == ["image_generation.completed"]


def test_no_more_previews_than_steps(server: Running) -> None:
    stream = server.client().images.generate(prompt=PROMPT, stream=True, partial_images=3, extra_body=QUICK)
    assert [each.type for each in stream] == ["image_generation.partial_image", "image_generation.completed"]


def test_metrics_in_the_answer(server: Running) -> None:
    answer = server.post({"prompt": PROMPT, "return_stage_metrics": True, "user": "u1", **QUICK}).json
    assert answer["metrics"]["num_inference_steps"] == 2
    assert answer["safety_identifier"] == "u1"


# Field and value -> the field that the error names, and a word of its message.
WRONG: list[tuple[dict[str, Any], str | None, str]] = [
    ({"prompt": None}, "prompt", "valid string"),
    ({"prompt": 3}, "prompt", "valid string"),
    ({"prompt": "  "}, "prompt", "not empty"),
    ({"n": 0}, "n", "greater"),
    ({"n": 11}, "n", "allows 10"),
    ({"n": True}, "n", "integer"),
    ({"n": "1"}, "n", "integer"),
    ({"size": "64"}, "size", "WIDTHxHEIGHT"),
    ({"size": "65x64"}, "size", "multiples of 16"),
    ({"size": "0x64"}, "size", "height|width|size"),
    ({"size": "99999x99999"}, "size", "allows"),
    ({"size": "4096x4096"}, "size", "positions|memory"),
    ({"size": "64x64", "width": 64, "height": 64}, "size", "not both"),
    ({"width": 64}, "height", "both or neither"),
    ({"seed": -1}, "seed", "greater"),
    ({"seed": 2**63}, "seed", "less"),
    ({"seed": 2**63 - 1, "n": 2}, "seed", "smaller seed"),
    ({"num_inference_steps": 0}, "num_inference_steps", "greater"),
    ({"num_inference_steps": 201}, "num_inference_steps", "allows 200"),
    ({"guidance_scale": 21}, "guidance_scale", "less"),
    ({"guidance_scale": "2"}, "guidance_scale", "number"),
    ({"true_cfg_scale": 2.0}, "true_cfg_scale", "does not take it"),
    ({"timeout_s": 0}, "timeout_s", "greater"),
    ({"timeout_s": 1e9}, "timeout_s", "allows 600"),
    ({"response_format": "svg"}, "response_format", "b64_json"),
    ({"output_format": "gif"}, "output_format", "png"),
    ({"output_format": "jpeg", "output_compression": 101}, "output_compression", "less"),
    ({"partial_images": 1}, "partial_images", "needs stream"),
    ({"partial_images": 4, "stream": True}, "partial_images", "less"),
    ({"stream": True, "response_format": "url"}, "response_format", "b64_json"),
    ({"quality": "hd"}, "quality", "num_inference_steps"),
    ({"style": "vivid"}, "style", "prompt"),
    ({"background": "transparent"}, "background", "opaque"),
    ({"lora": {"path": "/etc/passwd"}}, "lora", "adapters"),
    ({"layers": 2}, "layers", "layered"),
    ({"flow_shift": 3.0}, "flow_shift", "scheduler"),
    ({"generator_device": "cuda"}, "generator_device", "CPU"),
    ({"vae_use_tiling": True}, "vae_use_tiling", "--vae-use-tiling"),
    ({"extra_params": {"output_type": "np"}}, "extra_params", "cfg_truncation"),
    ({"extra_params": {"cfg_truncation": [1]}}, "extra_params.cfg_truncation", "valid"),
    ({"steps": 4}, "steps", "num_inference_steps"),
    ({"prompt": "a red circle " * 4000}, "prompt", "allows 32000"),
    ({"negative_prompt": "x" * 32001}, "negative_prompt", "allows 32000"),
]


@pytest.mark.parametrize(("fields", "param", "text"), WRONG, ids=lambda each: str(each)[:40])
def test_what_is_wrong_is_named(server: Running, fields: dict[str, Any], param: str | None, text: str) -> None:
    answer = server.post({"prompt": PROMPT, **fields})
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"
    assert (answer.error["param"] or "").split(".")[0] == (param or "").split(".")[0]
    assert any(each in answer.error["message"] for each in text.split("|"))


NEUTRAL: list[dict[str, Any]] = [
    {"quality": "auto"},
    {"background": "opaque"},
    {"moderation": "low"},
    {"style": None},
    {"lora": None},
    {"generator_device": "cpu"},
    {"vae_use_slicing": False},
    {"temperature": 0.7},  # the operator overlooks it
    dict.fromkeys(("n", "size", "seed", "stream", "response_format", "output_format", "model", "user")),
]


@pytest.mark.parametrize("fields", NEUTRAL, ids=str)
def test_what_asks_for_nothing_is_taken(server: Running, fields: dict[str, Any]) -> None:
    assert server.post({"prompt": PROMPT, **QUICK, **fields}).status == 200


def test_errors_are_those_of_the_client(server: Running) -> None:
    client = server.client()
    with pytest.raises(openai.BadRequestError, match="Unknown field: 'foo'") as bad:
        client.images.generate(prompt=PROMPT, extra_body={"foo": 1})
    assert (bad.value.param, bad.value.code, bad.value.type) == ("foo", "unknown_parameter", "invalid_request_error")
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-image-2'") as missing:
        client.images.generate(prompt=PROMPT, model="gpt-image-2")
    assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.AuthenticationError, match="API key is wrong") as key:
        server.client("another").images.generate(prompt=PROMPT)
    assert key.value.code == "invalid_api_key"
    with pytest.raises(openai.APIStatusError, match="deadline passed") as late:
        client.images.generate(prompt=PROMPT, extra_body={"timeout_s": 0.05, "num_inference_steps": 100})
    assert late.value.status_code == 504
