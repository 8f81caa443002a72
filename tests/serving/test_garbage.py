"""Whatever a body holds, the answer is no 500, and an error has OpenAI's shape."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowbit import Omni
from lowbit.serving.app import POSTS
from lowbit.serving.fields import CHAT, IMAGES
from lowbit.serving.schemas import ChatRequest, EditRequest
from tests.support.server import KEY, Answer, Running, running

PATHS = list(POSTS)
NAMES = sorted({*EditRequest.model_fields, *ChatRequest.model_fields, *IMAGES, *CHAT, "extra_body", "image", "mask"})

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
numbers = st.integers(-2, 40) | st.sampled_from([2**31, 2**63, 2**64, 10**30, 0.5, 1e308, -0.0])
likely = st.sampled_from(
    ["16x16", "auto", "png", "jpeg", "url", "file", "b64_json", "embedded", "a star", "", "x" * 600]
)
values = st.recursive(
    scalars | numbers | likely,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
parts = st.fixed_dictionaries({}, optional={"type": likely | st.sampled_from(["text", "image_url"]), "text": values})
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]) | values, "content": parts | values})
)
bodies = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), values, max_size=5)
asked = st.builds(lambda body, more: {**body, **more}, st.just({"prompt": "a star"}), bodies)
chats = st.builds(lambda body, found: {**body, "messages": found}, bodies, messages)
quick = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def tiny(omni: Omni) -> Iterator[Running]:
    with running(
        omni,
        default_params={"num_inference_steps": 1, "height": 16, "width": 16},
        limits={"max_steps": 2, "max_pixels": 32 * 32, "max_images": 2, "max_body_mb": 0.2},
    ) as server:
        yield server


def check(answer: Answer) -> None:
    if answer.status == 504:  # a tiny timeout_s
        assert answer.error["param"] == "timeout_s"
        return
    assert answer.status < 500, answer.content
    if answer.status == 200:
        return
    assert answer.status in {400, 401, 404, 413}
    error = answer.error
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert "\n" not in error["message"]
    assert len(error["message"]) < 2000


@quick
@given(st.sampled_from(PATHS), asked | bodies | chats)
def test_json(tiny: Running, path: str, body: Any) -> None:
    check(tiny.post(body, path))


@quick
@given(st.sampled_from(PATHS), st.binary(max_size=300) | st.text().map(lambda text: text.encode("utf-8", "replace")))
def test_bytes(tiny: Running, path: str, body: bytes) -> None:
    check(tiny.post(body, path))


@quick
@given(
    st.lists(
        st.tuples(st.sampled_from(NAMES), st.booleans(), st.binary(max_size=60) | likely.map(str.encode)), max_size=4
    ),
    st.integers(0, 400) | st.none(),
)
def test_forms(tiny: Running, fields: list[tuple[str, bool, bytes]], cut: int | None) -> None:
    body = b""
    for name, is_file, content in fields:
        more = '; filename="a"' if is_file else ""
        body += f'--x\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + content + b"\r\n"
    whole = body + b"--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    check(tiny.post(whole[:cut], "/v1/images/edits", headers=headers))
    check(tiny.post(whole[:cut], headers=headers))


RAW: dict[str, bytes] = {
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "deep": b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "deep object": b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    "not a number": b'{"prompt": "a", "guidance_scale": NaN}',
    "infinite": b'{"prompt": "a", "guidance_scale": -Infinity}',
    "overflow": b'{"prompt": "a", "guidance_scale": 1e999}',
    "many digits": b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}",
    "twice": b'{"prompt": "a", "prompt": "b"}',
    "surrogate": b'{"prompt": "\\ud800"}',
    "surrogate name": b'{"prompt": "a", "\\ud800": 1}',
    "surrogate model": b'{"prompt": "a", "model": "\\udfff"}',
    "control": b'{"prompt": "a\\u0000b\\u001b[31m", "seed": "\\u0007\\n"}',
    "latin": '{"prompt": "é"}'.encode("latin-1"),
    "utf-16": '{"prompt": "a"}'.encode("utf-16"),
    "mark": b'\xef\xbb\xbf{"prompt": "a"}',
    "cut": b'{"prompt": "a',
    "large": b'{"prompt": "' + b"a" * 300_000 + b'"}',
    "long name": b'{"' + b"a" * 100_000 + b'": 1}',
    "long value": b'{"prompt": "a", "size": "' + b"9" * 100_000 + b'"}',
    "html": b'{"prompt": "a", "<script>": 1}',
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", RAW)
def test_raw(tiny: Running, path: str, name: str) -> None:
    for kind in (
        "application/json",
        "application/json; charset=latin-1",
        "text/plain",
        "",
        "multipart/form-data; boundary=",
    ):
        answer = tiny.post(RAW[name], path, headers={"Content-Type": kind})
        assert answer.status in {400, 413} or (name, answer.status) == ("control", 200), answer.content
        check(answer)


LINES = [
    b"GARBAGE\r\n\r\n",
    b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999999\r\n\r\n",
    b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET /v1/models/%ff%00%0d%0a HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer a-key\r\n\r\n",
    b"GET /files/..%2f..%2fetc%2fpasswd HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: \xff\xfe\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xc3\xa9\r\n\r\n",
]


@pytest.mark.parametrize("line", LINES, ids=repr)
def test_raw_http(tiny: Running, line: bytes) -> None:
    with socket.create_connection(("127.0.0.1", tiny.port), timeout=30) as sock:
        sock.sendall(line)
        status = int(sock.recv(4096).split()[1])
    assert 400 <= status < 500
    assert tiny.send("GET", "/health").status == 200


def test_a_host_is_only_told_back(tiny: Running) -> None:
    body = {"prompt": "a star", "response_format": "url"}
    answer = tiny.post(body, headers={"Host": "example.org", "X-Forwarded-Host": "evil.example"})
    assert answer.json["data"][0]["url"].startswith("http://example.org/files/")
    assert KEY not in json.dumps(answer.json)
