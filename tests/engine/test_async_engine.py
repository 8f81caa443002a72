"""``AsyncOmni``: one engine thread, many tasks."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import pytest
import torch

from lowbit import Omni, OmniDiffusionSamplingParams, OmniRequestOutput
from lowbit.engine.async_engine import AsyncOmni, ClosedError, Done, Preview, QueueFullError
from lowbit.engine.request import Request
from lowbit.engine.runner import Runner
from lowbit.errors import ConfigError, DeadlineError
from tests.models.steps.pipelines import make

Params = OmniDiffusionSamplingParams
CASES = [
    ("a large red circle", Params(seed=1, num_inference_steps=4)),
    ("a green star", Params(seed=2, num_inference_steps=3, height=32, width=48)),
    ("a blue square", Params(seed=3, num_inference_steps=5, guidance_scale=1.5)),
]


def pixels(output: Any) -> np.ndarray:
    assert isinstance(output, OmniRequestOutput)
    return np.asarray(output.images[0])


@pytest.fixture(scope="module")
def omni() -> Omni:
    return Omni(device="cpu", quantization="int8")


def test_tasks_get_the_pictures_of_each_alone(omni: Omni) -> None:
    expected = [pixels(omni.generate(*case, progress=False)) for case in CASES]

    async def run() -> list[OmniRequestOutput]:
        engine = AsyncOmni(omni, max_running=2)
        try:
            return await asyncio.gather(*(engine.generate(*case) for case in CASES))
        finally:
            engine.close()

    found = asyncio.run(run())
    assert all(np.array_equal(pixels(output), other) for output, other in zip(found, expected, strict=True))


def test_a_cancelled_task_ends_its_request(omni: Omni) -> None:
    async def run() -> None:
        engine = AsyncOmni(omni)
        task = asyncio.ensure_future(engine.generate("a star", Params(num_inference_steps=500)))
        while not engine.engine.running:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        start = time.monotonic()
        while engine.engine.running:
            await asyncio.sleep(0.01)
        assert time.monotonic() - start < 5
        engine.close()

    asyncio.run(run())


def test_the_queue_the_deadline_and_the_end(omni: Omni) -> None:
    async def run() -> None:
        engine = AsyncOmni(omni, max_running=1, max_queue=1)
        long = omni.request("a star", Params(num_inference_steps=500))
        first = engine.submit(long)
        while not engine.engine.running:
            await asyncio.sleep(0.01)
        second = engine.submit(long)
        with pytest.raises(QueueFullError) as full:
            engine.submit(long)
        assert full.value.retry_after_s >= 1
        first.cancel()
        second.cancel()
        while engine.engine.running or engine.engine.waiting:
            await asyncio.sleep(0.01)
        with pytest.raises(DeadlineError):
            await engine.generate("a star", Params(num_inference_steps=500), timeout_s=0.05)
        last = engine.submit(long)
        engine.engine.close()
        with pytest.raises(ClosedError):
            await last.output()
        with pytest.raises(ClosedError, match="shutting down"):
            engine.submit(long)
        engine.close()

    asyncio.run(run())


def test_events_of_a_request(omni: Omni) -> None:
    async def run() -> list[Any]:
        engine = AsyncOmni(omni)
        events = [event async for event in engine.submit(omni.request(*CASES[2]), previews=2)]
        engine.close()
        return events

    first, second, last = asyncio.run(run())
    assert isinstance(first, Preview)
    assert isinstance(last, Done)
    assert (first.index, second.index) == (0, 1)
    assert np.array_equal(pixels(last.output), pixels(omni.generate(*CASES[2], progress=False)))


@pytest.mark.parametrize("name", ["max_running", "max_queue", "max_batch"])
def test_wrong_limits(omni: Omni, name: str) -> None:
    limits: Any = {name: 0}
    with pytest.raises(ConfigError, match=f"{name}: expected at least 1"):
        AsyncOmni(omni, **limits)


@pytest.mark.parametrize("family", ["z-image", "qwen-image", "flux"])
def test_a_preview_leaves_the_request_alone(family: str) -> None:
    runner = Runner(make(family), torch.device("cpu"), dict)
    arguments = {"num_inference_steps": 3, "height": 32, "width": 48}

    def request() -> Request:
        return Request(prompt="a red star", arguments=arguments, seeds=[5])

    plain, state = runner.start(request()), runner.start(request())
    previews = []
    while not state.is_done:
        before = state.latents
        runner.step([state])
        runner.step([plain])
        if not state.is_done:
            previews.append(np.asarray(runner.preview(state, before)[0]))
    assert np.array_equal(pixels(state.output()), pixels(plain.output()))
    assert [each.shape for each in previews] == 2 * [(32, 48, 3)]
    assert not np.array_equal(previews[0], previews[1])


def test_a_preview_is_the_picture_where_the_velocity_is_constant(omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    velocity = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))

    def constant(_self: Any, states: Any) -> None:
        for state in states:
            state.prediction = velocity[:, : state.latents.shape[1], : state.latents.shape[2], : state.latents.shape[3]]

    monkeypatch.setattr("lowbit.models.steps.z_image.ZImageSteps.denoise_step", constant)
    state = omni.runner.start(omni.request("a star", Params(seed=1, num_inference_steps=5)))
    before = state.latents
    omni.runner.step([state])
    first = np.asarray(omni.runner.preview(state, before)[0]).astype(int)
    while not state.is_done:
        omni.runner.step([state])
    assert np.abs(first - pixels(state.output()).astype(int)).max() <= 1
