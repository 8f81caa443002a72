"""Everything of the API that is no picture: models, health, figures, keys, sizes of bodies, paths, the document."""

from __future__ import annotations

import json
import socket
from typing import Any

import openai
import pytest

import lowbit
from lowbit import Omni
from lowbit.serving.app import NOT_SERVED, POSTS
from tests.support.server import KEY, QUICK, Running, running


def test_models(server: Running) -> None:
    client = server.client()
    assert [each.id for each in client.models.list()] == ["embedded"]
    found = client.models.retrieve("embedded")
    assert (found.object, found.owned_by) == ("model", "lowbit")
    with pytest.raises(openai.NotFoundError, match="Expected one of: embedded"):
        client.models.retrieve("owner/other")


def test_several_names(omni: Omni) -> None:
    with running(omni, model_names=("owner/model", "alias")) as server:
        assert [each.id for each in server.client().models.list()] == ["owner/model", "alias"]
        assert server.client().models.retrieve("owner/model").id == "owner/model"
        assert server.post({"prompt": "a star", "model": "alias", **QUICK}).status == 200


def test_health_needs_no_key_and_all_else_does(server: Running) -> None:
    paths = server.send("GET", "/openapi.json").json["paths"]
    for path, methods in paths.items():
        for method in methods:
            for headers in (
                {"Authorization": ""},
                {"Authorization": "Bearer wrong"},
                {"Authorization": f"Basic {KEY}"},
            ):
                answer = server.send(method.upper(), path.replace("{name}", "x"), headers=headers)
                is_open = path in {"/health", "/ready"}
                assert answer.status == (200 if is_open else 404 if path.startswith("/files") else 401), path
    for path in ("/docs", "/openapi.json", "/metrics", "/nothing"):
        answer = server.send("GET", path, headers={"Authorization": ""})
        assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")


def test_a_server_without_keys_is_open(omni: Omni) -> None:
    with running(omni, api_keys=()) as server:
        assert server.send("GET", "/v1/models", headers={"Authorization": ""}).status == 200


def test_version_and_docs(server: Running) -> None:
    assert server.send("GET", "/version").json == {"version": lowbit.__version__}
    assert b"openapi.json" in server.send("GET", "/docs").content


def test_figures(server: Running) -> None:
    server.post({"prompt": "a star", **QUICK})
    server.post({"prompt": 3})
    answer = server.send("GET", "/metrics")
    lines = dict(line.rsplit(" ", 1) for line in answer.content.decode().splitlines() if not line.startswith("#"))
    assert answer.headers["content-type"].startswith("text/plain")
    assert float(lines["lowbit_images_total"]) >= 1
    assert float(lines["lowbit_denoising_steps_total"]) >= 2
    assert float(lines['lowbit_requests_total{path="/v1/images/generations",status="400"}']) >= 1
    assert float(lines['lowbit_errors_total{code="invalid_value"}']) >= 1
    assert lines["lowbit_queue_length"] == lines["lowbit_running_requests"] == "0.0"
    assert f'lowbit_info{{model="embedded",quantization="int8",version="{lowbit.__version__}"}}' in lines
    for name in ("queue_wait_seconds", "step_seconds", "batch_size", "generation_seconds"):
        assert float(lines[f"lowbit_{name}_count"]) >= 1
    assert float(lines["process_resident_memory_bytes"]) > 1e8


@pytest.mark.parametrize("path", NOT_SERVED)
def test_what_is_not_served_says_why(server: Running, path: str) -> None:
    answer = server.post({}, path)
    assert (answer.status, answer.error["code"]) == (404, "not_served")
    assert NOT_SERVED[path] in answer.error["message"]


def test_speech_of_the_client_is_refused(server: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="speech models are not supported"):
        server.client().audio.speech.create(model="embedded", voice="alloy", input="hello")


def test_paths_and_methods(server: Running) -> None:
    assert server.send("GET", "/v1/nothing").error["code"] == "not_found"
    answer = server.send("GET", "/v1/images/generations")
    assert (answer.status, answer.error["code"], answer.headers["allow"]) == (405, "method_not_allowed", "POST")


def test_every_answer_has_an_id(server: Running) -> None:
    answers = [server.send("GET", path) for path in ("/health", "/v1/nothing", "/v1/models")]
    assert len({answer.headers["x-request-id"] for answer in answers}) == 3


def test_a_large_body_is_refused(omni: Omni) -> None:
    with running(omni, limits={"max_body_mb": 0.01}) as server:
        answer = server.post({"prompt": "x" * 20_000})
        assert (answer.status, answer.error["code"]) == (413, "body_too_large")
        assert chunked(server, 20_000) == 413
        assert chunked(server, 100) == 400
        assert server.post({"prompt": "a star", **QUICK}).status == 200


def chunked(server: Running, size: int) -> int:
    """Send a body whose length no header tells, and return the status."""
    head = (
        f"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n"
        "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as sock:
        sock.sendall(f"{head}{size:x}\r\n{'x' * size}\r\n0\r\n\r\n".encode())
        return int(sock.recv(4096).split()[1])


def test_the_document_describes_requests(server: Running) -> None:
    document = server.send("GET", "/openapi.json").json
    text = json.dumps(document)
    for path, (_, request, _, _) in POSTS.items():
        schema = document["components"]["schemas"][request.__name__]
        assert schema["additionalProperties"] is False
        assert set(schema["properties"]) >= set(request.model_fields)
        assert "200" in document["paths"][path]["post"]["responses"]
        assert "422" not in document["paths"][path]["post"]["responses"]
    assert {"image/png", "image/jpeg", "image/webp", "application/zip", "text/event-stream", "application/json"} == set(
        document["paths"]["/v1/images/generations"]["post"]["responses"]["200"]["content"]
    )
    assert set(document["paths"]["/metrics"]["get"]["responses"]["200"]["content"]) == {"text/plain"}
    references = {each.split('"')[0] for each in text.split('"#/components/schemas/')[1:]}
    assert references <= set(document["components"]["schemas"])


def test_pages_of_allowed_origins_may_ask(omni: Omni) -> None:
    with running(omni, allowed_origins=("https://example.org",)) as server:
        headers = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST", "Authorization": ""}
        answer = server.send("OPTIONS", "/v1/images/generations", headers=headers)
        assert answer.headers["access-control-allow-origin"] == "https://example.org"
        other = server.send("GET", "/v1/models", headers={"Origin": "https://example.com"})
        assert "access-control-allow-origin" not in other.headers


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"model_names": ()}, "served_model_name"),
    ({"api_keys": ("",)}, "api_key"),
    ({"max_running": 0}, "max_running"),
    ({"limits": {"max_steps": 0}}, "max_steps"),
    ({"default_params": {"steps": 4}}, "unknown steps"),
    ({"default_params": {"num_inference_steps": 0}}, "num_inference_steps"),
    ({"default_params": {"height": 33}}, "multiples of 16"),
    ({"extra_params": frozenset({"nothing"})}, "takes no nothing"),
]


@pytest.mark.parametrize(("settings", "text"), SETTINGS, ids=str)
def test_wrong_settings_are_errors(omni: Omni, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(lowbit.errors.ConfigError, match=text), running(omni, **settings):
        pass


def test_defaults_of_the_operator(omni: Omni) -> None:
    with running(omni, default_params={"num_inference_steps": 3, "height": 32, "width": 48}) as server:
        body = {"prompt": "a star", "return_stage_metrics": True}
        answer = server.post(body).json
        assert (answer["metrics"]["num_inference_steps"], answer["size"]) == (3, "48x32")
        assert server.post({**body, "num_inference_steps": 2}).json["metrics"]["num_inference_steps"] == 2
