"""A schedule of one step under ``shift_terminal``."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import lowbit


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_one_step_is_from_noise_to_the_picture(steps: int) -> None:
    assert lowbit.__version__
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    scheduler.set_timesteps(steps, mu=0.8)
    sigmas = scheduler.sigmas
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert torch.isfinite(sigmas).all()
    if steps > 1:
        torch.testing.assert_close(sigmas[-2], torch.tensor(0.02))


def test_given_sigmas() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    scheduler.set_timesteps(sigmas=[1.0], mu=0.8)
    assert scheduler.sigmas.tolist() == [1, 0]
    assert scheduler.timesteps.tolist() == [1000]
