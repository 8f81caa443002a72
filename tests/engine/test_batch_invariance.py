"""A result is that of its request alone, whatever arrives, is cancelled, or shares its forwards (Int8 on a CPU)."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from lowbit import Omni, OmniDiffusionSamplingParams
from lowbit.engine.async_engine import Done, EngineThread, Failed, Job
from lowbit.errors import AbortedError

PROMPTS = ("a red circle", "a large red circle left of a small blue square on a white background", "a star")
Case = tuple[int, int, int, int, float]

cases = st.tuples(
    st.sampled_from(range(len(PROMPTS))),
    st.integers(0, 2),  # seed
    st.integers(1, 4),  # steps
    st.sampled_from([16, 32]),  # width
    st.sampled_from([0.0, 1.5]),  # guidance
)


@functools.cache
def omni() -> Omni:
    return Omni(device="cpu", quantization="int8")


def request(case: Case) -> Any:
    prompt, seed, steps, width, guidance = case
    params = OmniDiffusionSamplingParams(
        seed=seed,
        num_inference_steps=steps,
        width=width,
        height=16,
        guidance_scale=guidance,
        extra_args={"output_type": "latent"},  # decoding takes longer than the steps
    )
    return omni().request(PROMPTS[prompt], params)


def latents(output: Any) -> torch.Tensor:
    return torch.stack(list(output.images))


@functools.cache
def alone(case: Case) -> torch.Tensor:
    runner = omni().runner
    state = runner.start(request(case))
    while not state.is_done:
        runner.step([state])
    return latents(state.output())


class Clients(RuleBasedStateMachine):
    """Drives the engine's loop by hand, so that a failure can be repeated."""

    max_batch = 1

    def __init__(self) -> None:
        super().__init__()
        self.engine = EngineThread(omni(), max_running=3, max_queue=100)
        self.jobs: list[tuple[Case, Job]] = []
        self.events: dict[Job, list[Any]] = {}

    @rule(case=cases, previews=st.integers(0, 2))
    def arrive(self, case: Case, previews: int) -> None:
        events: list[Any] = []
        job = Job(request(case), events.append, previews)
        self.events[job] = events
        self.jobs.append((case, job))
        self.engine.waiting.append(job)

    @rule(place=st.integers(0, 5))
    def cancel(self, place: int) -> None:
        if place < len(self.jobs):
            self.jobs[-1 - place][1].cancel()

    @rule(turns=st.integers(1, 3))
    def advance(self, turns: int) -> None:
        omni().runner.max_batch = self.max_batch
        for _ in range(turns):
            if self.engine.waiting or self.engine.running:
                self.engine._turn()

    @invariant()
    def results_are_those_of_each_alone(self) -> None:
        for case, job in self.jobs:
            for event in self.events[job]:
                if isinstance(event, Done):
                    assert torch.equal(latents(event.output), alone(case))
                if isinstance(event, Failed):
                    assert isinstance(event.error, AbortedError)
                    assert job.is_cancelled

    def teardown(self) -> None:
        while self.engine.waiting or self.engine.running:
            self.advance(1)
        self.results_are_those_of_each_alone()
        for _, job in self.jobs:
            assert isinstance(self.events[job][-1], Done | Failed)
            assert sum(isinstance(event, Done | Failed) for event in self.events[job]) == 1
        omni().runner.max_batch = 1


@pytest.mark.slow
@pytest.mark.parametrize("max_batch", [1, 3])
def test_every_request_gets_its_own_result(max_batch: int) -> None:
    machine: Any = type("Machine", (Clients,), {"max_batch": max_batch})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=5,
            stateful_step_count=16,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],  # to shrink an example takes minutes of denoising
            suppress_health_check=list(HealthCheck),
        ),
    )
