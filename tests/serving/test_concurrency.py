"""Many clients at once: every picture is that of its request alone, whatever else happens."""

from __future__ import annotations

import base64
import http.client
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lowbit import Omni, OmniDiffusionSamplingParams, OmniRequestOutput
from lowbit.models.steps.z_image import ZImageSteps
from tests.support.server import KEY, QUICK, Running, running, until

REQUESTS: list[dict[str, Any]] = [
    {"prompt": "a large red circle left of a small blue square", "seed": 1, "num_inference_steps": 5},
    {"prompt": "a green star", "seed": 2, "num_inference_steps": 7, "width": 96, "height": 64},
    {"prompt": "a small yellow star", "seed": 3, "num_inference_steps": 4, "guidance_scale": 1.5},
    {"prompt": "a blue square", "seed": 4, "num_inference_steps": 2, "width": 32, "height": 32, "n": 2},
    {"prompt": "a small red square on a white background", "seed": 5, "num_inference_steps": 6},
    {"prompt": "a small green circle", "seed": 6, "num_inference_steps": 5},
]
LONG: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": 200, "seed": 0}


def pictures(answer: Any) -> list[np.ndarray]:
    assert answer.status == 200, answer.content
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(each["b64_json"])))) for each in answer.json["data"]]


def alone(omni: Omni, fields: dict[str, Any]) -> list[np.ndarray]:
    given = {name: value for name, value in fields.items() if name not in {"prompt", "n"}}
    params = OmniDiffusionSamplingParams(**given, num_outputs_per_prompt=fields.get("n", 1))
    output = omni.generate(fields["prompt"], params, progress=False)
    assert isinstance(output, OmniRequestOutput)
    return [np.asarray(image) for image in output.images]


def same(found: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    return len(found) == len(expected) and all(map(np.array_equal, found, expected))


@pytest.fixture(scope="module")
def expected(omni: Omni) -> list[list[np.ndarray]]:
    return [alone(omni, fields) for fields in REQUESTS]


def start(server: Running, body: dict[str, Any]) -> http.client.HTTPConnection:
    """Send a request and do not wait for its answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    connection.request("POST", "/v1/images/generations", json.dumps(body), headers)
    return connection


def is_idle(server: Running) -> bool:
    engine = server.service.omni.engine
    return not engine.waiting and not engine.running


@pytest.fixture(params=[1, 4], ids=["max_batch=1", "max_batch=4"])
def busy(request: pytest.FixtureRequest, omni: Omni) -> Iterator[Running]:
    with running(omni, max_running=3, max_batch=request.param) as server:
        yield server
    omni.runner.max_batch = 1


def test_concurrent_requests_give_the_bytes_of_each_alone(
    busy: Running, expected: list[list[np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = []
    step = busy.service.omni.omni.runner.step
    monkeypatch.setattr(
        busy.service.omni.omni.runner, "step", lambda states: (together.append(len(states)), step(states))[1]
    )
    with ThreadPoolExecutor(2 * len(REQUESTS)) as pool:
        answers = list(pool.map(busy.post, [*REQUESTS, *reversed(REQUESTS)]))
    for answer, pixels in zip(answers, [*expected, *reversed(expected)], strict=True):
        assert same(pictures(answer), pixels)
    assert max(together) == 3
    assert is_idle(busy)


def test_a_request_that_fails_hurts_no_other(
    server: Running, expected: list[list[np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    denoise = ZImageSteps.denoise_step

    def fail(self: ZImageSteps, states: Any) -> None:
        if any(state.request.seeds[0] == 2 and state.step == 1 for state in states):
            raise RuntimeError("a secret of the machine")
        denoise(self, states)

    monkeypatch.setattr(ZImageSteps, "denoise_step", fail)
    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        answers = list(pool.map(server.post, REQUESTS))
    assert [answer.status for answer in answers] == [200, 500, 200, 200, 200, 200]
    assert answers[1].error["type"] == "server_error"
    assert answers[1].headers["x-request-id"] in answers[1].error["message"]
    assert b"secret" not in answers[1].content
    for index in (0, 2, 3, 4, 5):
        assert same(pictures(answers[index]), expected[index])


@pytest.mark.parametrize("kind", [MemoryError, RuntimeError])
def test_out_of_memory_is_told(server: Running, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]) -> None:
    def fail(self: ZImageSteps, states: Any) -> None:
        raise kind("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    with monkeypatch.context() as patch:
        patch.setattr(ZImageSteps, "denoise_step", fail)
        answer = server.post(REQUESTS[0])
    assert (answer.status, answer.error["code"]) == (503, "out_of_memory")
    assert server.post(REQUESTS[3]).status == 200


@pytest.mark.parametrize("more", [{}, {"stream": True}, {"stream": True, "partial_images": 3}], ids=str)
def test_a_client_that_vanishes_frees_its_place(server: Running, more: dict[str, Any]) -> None:
    ended = server.service.metrics.aborted.labels("AbortedError")._value.get
    before = ended()
    connection = start(server, {**LONG, **more})
    engine = server.service.omni.engine
    until(lambda: any(job.state is not None and job.state.step > 0 for job in list(engine.running)))
    (state,) = [job.state for job in engine.running]
    connection.close()
    until(lambda: is_idle(server), 5)
    assert ended() == before + 1
    assert state is not None
    assert len(state.step_ends) < LONG["num_inference_steps"] // 2
    assert server.post({"prompt": "a star", **QUICK}).status == 200


def test_a_client_that_vanishes_leaves_the_queue(omni: Omni, expected: list[list[np.ndarray]]) -> None:
    with running(omni, max_running=1) as server:
        engine = server.service.omni.engine
        first = start(server, LONG)
        until(lambda: engine.running)
        second = start(server, LONG)
        until(lambda: engine.waiting)
        second.close()
        until(lambda: not engine.waiting, 5)
        assert engine.running
        first.close()
        assert same(pictures(server.post(REQUESTS[0])), expected[0])


def test_a_full_queue_answers_429(omni: Omni) -> None:
    with running(omni, max_running=1, max_queue=1) as server:
        engine = server.service.omni.engine
        first = start(server, LONG)
        until(lambda: engine.running)
        second = start(server, LONG)
        until(lambda: engine.waiting)
        for more in ({}, {"stream": True}):
            answer = server.post({**REQUESTS[0], **more})
            assert (answer.status, answer.error["code"], answer.error["type"]) == (
                429,
                "queue_full",
                "rate_limit_error",
            )
            assert int(answer.headers["retry-after"]) >= 1
        assert server.send("GET", "/ready").status == 503
        assert server.send("GET", "/health").status == 200
        first.close()
        second.close()
        until(lambda: is_idle(server))
        assert server.send("GET", "/ready").status == 200


def test_a_deadline_passes_in_the_queue(omni: Omni) -> None:
    with running(omni, max_running=1) as server:
        first = start(server, LONG)
        until(lambda: server.service.omni.engine.running)
        answer = server.post({**REQUESTS[0], "timeout_s": 0.1})
        assert (answer.status, answer.error["param"]) == (504, "timeout_s")
        assert "in the queue" in answer.error["message"]
        first.close()


def test_shutting_down_lets_requests_finish(omni: Omni, expected: list[list[np.ndarray]]) -> None:
    with running(omni, shutdown_timeout_s=60.0, max_running=2) as server, ThreadPoolExecutor(len(REQUESTS)) as pool:
        answers = [pool.submit(server.post, fields) for fields in REQUESTS]
        engine = server.service.omni.engine
        until(lambda: len(engine.running) + len(engine.waiting) == len(REQUESTS))
        server.stop()
        for answer, pixels in zip(answers, expected, strict=True):
            assert same(pictures(answer.result()), pixels)
        server.thread.join(30)
        assert not server.thread.is_alive()
        assert not engine.is_alive()


def test_shutting_down_answers_what_it_aborts(omni: Omni) -> None:
    with running(omni, shutdown_timeout_s=0.2, max_running=1) as server, ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(server.post, LONG) for _ in range(2)]
        engine = server.service.omni.engine
        until(lambda: engine.running and engine.waiting)
        server.stop()
        for answer in answers:
            found = answer.result(30)
            assert (found.status, found.error["code"]) == (503, "shutting_down")
            assert "retry-after" in found.headers


def test_what_is_open_when_the_server_shuts_down_gets_503(omni: Omni) -> None:
    with running(omni, shutdown_timeout_s=30.0, max_running=1) as server:
        first = start(server, {**LONG, "num_inference_steps": 60})
        until(lambda: server.service.omni.engine.running)
        server.service.omni.engine.close(30.0)
        answer = server.post(REQUESTS[0])
        assert (answer.status, answer.error["code"]) == (503, "shutting_down")
        assert server.send("GET", "/ready").status == 503
        assert first.getresponse().status == 200
        first.close()


def test_the_engine_thread_outlives_no_fault_in_silence(omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(omni) as server:
        engine = server.service.omni.engine
        with monkeypatch.context() as patch:
            patch.setattr(engine, "_admitted", lambda: 1 / 0)
            answer = server.post(REQUESTS[0])
        assert answer.status == 500
        until(lambda: not engine.is_alive())
        assert server.send("GET", "/health").status == 503
        assert server.post(REQUESTS[0]).status == 503


def test_the_thread_ends_with_the_server(omni: Omni) -> None:
    with running(omni) as server:
        assert server.service.omni.engine.is_alive()
    assert not server.service.omni.engine.is_alive()
