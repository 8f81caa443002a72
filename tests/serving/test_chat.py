"""POST /v1/chat/completions: a picture in the message."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from lowbit import Omni, OmniDiffusionSamplingParams, OmniRequestOutput
from tests.support.server import QUICK, Running

PROMPT = "a large red circle"
PATH = "/v1/chat/completions"
PARAMS = {"num_inference_steps": 2, "seed": 3}


def said(text: Any = PROMPT) -> list[Any]:
    return [{"role": "user", "content": text}]


def pixels(part: Any) -> np.ndarray:
    head, _, data = part["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


@pytest.fixture(scope="module")
def expected(omni: Omni) -> np.ndarray:
    output = omni.generate(PROMPT, OmniDiffusionSamplingParams(num_inference_steps=2, seed=3), progress=False)
    assert isinstance(output, OmniRequestOutput)
    return np.asarray(output.images[0])


def test_the_message_holds_the_picture(server: Running, expected: np.ndarray) -> None:
    found = server.client().chat.completions.create(model="embedded", messages=said(), extra_body=PARAMS)
    message: Any = found.choices[0].message
    assert (message.role, found.choices[0].finish_reason, found.object) == ("assistant", "stop", "chat.completion")
    (part,) = message.content
    assert np.array_equal(pixels(part), expected)
    assert found.usage is not None
    assert found.usage.total_tokens == found.usage.prompt_tokens + 64


def test_extra_body_of_plain_http(server: Running, expected: np.ndarray) -> None:
    parts = [{"type": "text", "text": PROMPT}]
    answer = server.post({"messages": said(parts), "extra_body": PARAMS}, PATH).json
    assert np.array_equal(pixels(answer["choices"][0]["message"]["content"][0]), expected)
    answer = server.post({"messages": said(parts), "extra_body": {**PARAMS, "num_outputs_per_prompt": 2}}, PATH).json
    assert len(answer["choices"][0]["message"]["content"]) == 2
    assert answer["seeds"] == [3, 4]
    assert "warnings" not in answer
    twice = server.post({"messages": said(), "seed": 1, "extra_body": {"seed": 2}}, PATH)
    assert (twice.status, twice.error["param"]) == (400, "seed")


def test_a_stream(server: Running, expected: np.ndarray) -> None:
    stream = server.client().chat.completions.create(
        model="embedded", messages=said(), stream=True, stream_options={"include_usage": True}, extra_body=PARAMS
    )
    chunks: list[Any] = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert np.array_equal(pixels(chunks[1].choices[0].delta.content[0]), expected)
    assert chunks[2].choices[0].finish_reason == "stop"
    assert chunks[3].usage.completion_tokens == 64


def test_a_stream_ends_with_its_error(server: Running) -> None:
    body: Any = {"model": "embedded", "messages": said(), "stream": True}
    with pytest.raises(openai.APIError, match="deadline passed"):
        list(server.client().chat.completions.create(**body, extra_body={"timeout_s": 0.05, "num_inference_steps": 99}))


def test_what_is_not_read_is_told(server: Running, expected: np.ndarray) -> None:
    history = [{"role": "system", "content": "Be brief"}, *said("a star"), {"role": "assistant", "content": "no"}]
    answer = server.post({"messages": [*history, *said()], **PARAMS}, PATH).json
    assert np.array_equal(pixels(answer["choices"][0]["message"]["content"][0]), expected)
    assert "(3) were not read" in answer["warnings"][0]


def test_a_field_that_the_operator_overlooks(server: Running) -> None:
    assert server.post({"messages": said(), "temperature": 0.7, **QUICK}, PATH).status == 200


PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
TOOL = {"type": "function", "function": {"name": "f"}}
WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": [TOOL]}, "tools", "calls no tools"),
    ({"tool_choice": "required"}, "tool_choice", "calls no tools"),
    ({"response_format": {"type": "json_object"}}, "response_format", "schema"),
    ({"n": 2}, "n", "num_outputs_per_prompt"),
    ({"max_tokens": 10}, "max_tokens", "language models"),
    ({"top_p": 0.5}, "top_p", "language models"),
    ({"audio": {"voice": "alloy"}}, "audio", "does not speak"),
    ({"modalities": ["text"]}, "modalities", "image among them"),
    ({"modalities": ["audio"]}, "modalities.0", "image"),
    ({"lora": {"name": "x"}}, "lora", "adapters"),
    ({"foo": 1}, "foo", "Unknown field"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "messages.0.role", "the user's"),
    ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
    ({"messages": [{"role": "user", "content": "x", "id": 1}]}, "messages.0.id", "Unknown field"),
    ({"messages": said([{"type": "input_audio", "input_audio": {}}])}, "messages.0.content", "tag"),
    ({"messages": said([{"type": "text", "text": "x"}, PICTURE])}, "messages.0.content", "makes pictures from text"),
    ({"messages": said("")}, "prompt", "not empty"),
]


@pytest.mark.parametrize(("fields", "param", "text"), WRONG, ids=lambda each: str(each)[:40])
def test_what_is_wrong_is_named(server: Running, fields: dict[str, Any], param: str, text: str) -> None:
    answer = server.post({"messages": said(), **fields}, PATH)
    assert answer.status == 400, answer.content
    assert (answer.error["param"] or "").startswith(param)
    assert any(each in answer.error["message"] for each in text.split("|")), answer.error
