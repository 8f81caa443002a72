"""POST /v1/images/edits, and pictures in a chat: with a pipeline that takes a picture, and with one that takes none."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from lowbit import Omni, OmniDiffusionSamplingParams, OmniRequestOutput
from lowbit.models.embedded import embedded_model
from lowbit.serving.images import mask_of
from tests.support.server import Running, running

PROMPT = "a large red circle"
PARAMS = {"num_inference_steps": 4, "seed": 3}


def picture(size: tuple[int, int] = (64, 64), mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], len(mode)), np.uint8)
    return Image.fromarray(pixels, mode)


def as_file(image: Image.Image, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def pixels(data: str | None) -> np.ndarray:
    assert data is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Omni:
    """The embedded model behind diffusers' image-to-image pipeline, which is no step adapter's."""
    folder = tmp_path_factory.mktemp("editor")
    for each in embedded_model().folder.iterdir():
        (folder / each.name).symlink_to(each)
    index = folder / "model_index.json"
    content = json.loads(index.read_text()) | {"_class_name": "ZImageImg2ImgPipeline"}
    index.unlink()
    index.write_text(json.dumps(content))
    return Omni(str(folder), device="cpu", quantization="int8")


@pytest.fixture(scope="module")
def edits(editor: Omni) -> Iterator[Running]:
    with running(editor, limits={"max_input_images": 2, "max_input_pixels": 64 * 64}) as found:
        yield found


def alone(editor: Omni, image: Any, size: tuple[int, int] = (64, 64), **extra: Any) -> np.ndarray:
    params = OmniDiffusionSamplingParams(
        num_inference_steps=4, seed=3, width=size[0], height=size[1], extra_args={"image": image.resize(size), **extra}
    )
    output = editor.generate(PROMPT, params, progress=False)
    assert isinstance(output, OmniRequestOutput)
    return np.asarray(output.images[0])


def test_an_edit_is_that_of_generate(edits: Running, editor: Omni) -> None:
    found = edits.client().images.edit(
        model="embedded",
        image=("in.png", as_file(picture()), "image/png"),
        prompt=PROMPT,
        extra_body={**PARAMS, "strength": 0.5},
    )
    assert found.data is not None
    assert np.array_equal(pixels(found.data[0].b64_json), alone(editor, picture(), strength=0.5))
    other = edits.client().images.edit(
        image=("in.png", as_file(picture()), "image/png"), prompt=PROMPT, extra_body={**PARAMS, "strength": 0.9}
    )
    assert other.data is not None
    assert other.data[0].b64_json != found.data[0].b64_json


def test_a_stream_of_an_edit(edits: Running, editor: Omni) -> None:
    stream = edits.client().images.edit(
        image=[("in.webp", as_file(picture(), "WEBP"), "image/webp")], prompt=PROMPT, stream=True, extra_body=PARAMS
    )
    (event,) = list(stream)
    assert event.type == "image_edit.completed"
    assert pixels(event.b64_json).shape == (64, 64, 3)


def test_the_picture_gets_the_size_of_the_result(edits: Running, editor: Omni) -> None:
    image = ("in.png", as_file(picture((50, 40))), "image/png")
    found = edits.client().images.edit(image=image, prompt=PROMPT, size="64x32", extra_body=PARAMS)
    assert found.data is not None
    assert np.array_equal(pixels(found.data[0].b64_json), alone(editor, picture((50, 40)), (64, 32)))
    found = edits.client().images.edit(image=image, prompt=PROMPT, extra_body=PARAMS)
    assert found.size == "48x32"


def test_a_picture_in_a_chat(edits: Running, editor: Omni) -> None:
    url = "data:image/png;base64," + base64.b64encode(as_file(picture())).decode()
    parts = [{"type": "text", "text": PROMPT}, {"type": "image_url", "image_url": {"url": url}}]
    body = {"messages": [{"role": "user", "content": parts}], "strength": 0.5, **PARAMS}
    answer = edits.post(body, "/v1/chat/completions").json
    data = answer["choices"][0]["message"]["content"][0]["image_url"]["url"].partition(",")[2]
    assert np.array_equal(pixels(data), alone(editor, picture(), strength=0.5))


URLS = ["http://127.0.0.1/a.png", "file:///etc/passwd", "data:text/plain;base64,AAAA", "data:image/png,AAAA"]
URLS += ["data:image/png;base64,A", "data:image/png;base64,AAAA", "data:image/png;base64", "/etc/passwd", ""]


@pytest.mark.parametrize("url", URLS)
def test_no_other_url_is_read(edits: Running, url: str) -> None:
    parts = [{"type": "text", "text": PROMPT}, {"type": "image_url", "image_url": {"url": url}}]
    answer = edits.post({"messages": [{"role": "user", "content": parts}]}, "/v1/chat/completions")
    assert (answer.status, answer.error["param"]) == (400, "image_url")


def bomb() -> bytes:
    """Return a PNG of a few kilobytes whose header tells 60000 x 60000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")
    )


FILES: dict[str, bytes] = {
    "empty": b"",
    "text": b"not a picture",
    "cut": as_file(picture())[:500],
    "gif": as_file(picture().quantize(), "GIF"),
    "large": as_file(picture((65, 64))),
    "bomb": bomb(),
    "damaged": as_file(picture()).replace(b"IDAT", b"IDAX"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_picture_is_refused(edits: Running, name: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        edits.client().images.edit(image=("in.png", FILES[name], "image/png"), prompt=PROMPT)
    assert error.value.param == "image"


def form(*parts: tuple[str, str | None, bytes]) -> tuple[bytes, dict[str, str]]:
    """Return a multipart body and its header, of names, file names and contents."""
    body = b""
    for name, file, content in parts:
        more = f'; filename="{file}"' if file else ""
        body += f'--x\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + content + b"\r\n"
    return body + b"--x--\r\n", {"Content-Type": "multipart/form-data; boundary=x"}


PNG = as_file(picture())
IMAGE = ("image", "a.png", PNG)
TEXT = ("prompt", None, b"a star")
FORMS: dict[str, tuple[list[tuple[str, str | None, bytes]], str]] = {
    "no picture": ([TEXT], "image"),
    "no prompt": ([IMAGE], "prompt"),
    "two prompts": ([IMAGE, TEXT, TEXT], "prompt"),
    "a field as a file": ([IMAGE, ("prompt", "a.txt", b"a star")], "prompt"),
    "a picture as a field": ([("image", None, b"x"), TEXT], "image"),
    "unknown": ([IMAGE, TEXT, ("foo", None, b"1")], "foo"),
    "unknown file": ([IMAGE, TEXT, ("foo", "foo.png", PNG)], "foo"),
    "wrong number": ([IMAGE, TEXT, ("n", None, b"many")], "n"),
    "not UTF-8": ([IMAGE, TEXT, ("size", None, b"\xff\xfe")], "size"),
    "too many": ([IMAGE, IMAGE, IMAGE, TEXT], "image"),
    "two masks": ([IMAGE, ("mask", "a.png", PNG), ("mask", "a.png", PNG), TEXT], "mask"),
    "a mask where none is taken": ([IMAGE, ("mask", "a.png", PNG), TEXT], "mask"),
    "fidelity": ([IMAGE, TEXT, ("input_fidelity", None, b"high")], "input_fidelity"),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_wrong_form_is_refused(edits: Running, name: str) -> None:
    parts, param = FORMS[name]
    body, headers = form(*parts)
    answer = edits.post(body, "/v1/images/edits", headers=headers)
    assert (answer.status, answer.error["param"]) == (400, param), answer.error


@pytest.mark.parametrize("body", [b"", b"--x", b"--x\r\n\r\n", b"\xff" * 99, form(IMAGE, TEXT)[0][:300]], ids=repr)
def test_a_broken_form_is_refused(edits: Running, body: bytes) -> None:
    for kind in ("multipart/form-data; boundary=x", "multipart/form-data", "application/json", ""):
        answer = edits.post(body, "/v1/images/edits", headers={"Content-Type": kind})
        assert answer.status == 400, (kind, answer.content)


def test_values_of_a_form_are_read_as_what_they_stand_for(edits: Running) -> None:
    fields = {"n": b"1", "seed": b"7", "num_inference_steps": b"2", "strength": b"0.9", "return_stage_metrics": b"true"}
    body, headers = form(IMAGE, TEXT, *((name, None, value) for name, value in fields.items()))
    answer = edits.post(body, "/v1/images/edits", headers=headers)
    assert answer.status == 200, answer.content
    assert answer.json["data"][0]["seed"] == 7
    assert "metrics" in answer.json


def test_a_model_that_takes_no_picture_says_so(server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="takes none: use /v1/images/generations") as error:
        server.client().images.edit(image=("in.png", PNG, "image/png"), prompt=PROMPT)
    assert (error.value.param, error.value.code) == ("image", "unsupported_parameter")


def test_previews_of_a_pipeline_in_one_call_are_refused(edits: Running) -> None:
    body, headers = form(IMAGE, TEXT, ("stream", None, b"true"), ("partial_images", None, b"2"))
    answer = edits.post(body, "/v1/images/edits", headers=headers)
    assert (answer.status, answer.error["param"]) == (400, "partial_images")


def test_a_prompt_without_a_picture_is_refused(edits: Running) -> None:
    answer = edits.post({"prompt": PROMPT})
    assert (answer.status, answer.error["param"]) == (400, "image")


def test_openais_mask_is_transparent_where_diffusers_is_white() -> None:
    mask = Image.new("RGBA", (2, 1), (9, 9, 9, 255))
    mask.putpixel((1, 0), (9, 9, 9, 0))
    assert list(np.asarray(mask_of(mask))[0]) == [0, 255]
    assert list(np.asarray(mask_of(Image.new("RGB", (1, 1), (255, 255, 255))))[0]) == [255]
