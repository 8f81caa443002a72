"""Denoising loops over small random transformers."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.support.models import FAMILIES as MODELS

STEPS = 6


class Loop:
    """Denoising as a pipeline does it, with inputs that do not depend on what the model returns."""

    def __init__(self, name: str, branches: int = 1) -> None:
        torch.manual_seed(0)
        self.family = MODELS[name]
        self.model: Any = self.family.make().float().eval()
        self.pipeline = SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler())
        torch.manual_seed(1)
        self.inputs = [self.family.inputs(torch.float32) for _ in range(branches)]

    @property
    def transformers(self) -> dict[str, Any]:
        return {"transformer": self.model}

    def run(self, move: float = 0.0, steps: int = STEPS) -> list[list[torch.Tensor]]:
        """Return the output of every step and branch; each step the picture's input moves a little farther."""
        return list(self.stepping(self.pipeline, move, steps))

    def stepping(self, pipeline: Any, move: float, steps: int = STEPS) -> Iterator[list[torch.Tensor]]:
        """Yield the outputs of one step after the other."""
        pipeline.scheduler.set_timesteps(steps)
        for index, timestep in enumerate(pipeline.scheduler.timesteps):
            row = []
            for inputs in self.inputs:
                with torch.no_grad():
                    out = self.model(**shifted(inputs, move * index**2), return_dict=False)[0]
                row.append(out[0] if isinstance(out, list) else out)
            pipeline.scheduler.step(torch.zeros(1), timestep, torch.zeros(1))
            yield row


def shifted(inputs: dict[str, Any], by: float) -> dict[str, Any]:
    key = "x" if "x" in inputs else "hidden_states"
    time = "t" if "t" in inputs else "timestep"
    value = inputs[key]
    moved = [part + by for part in value] if isinstance(value, list) else value + by
    return {**inputs, key: moved, time: inputs[time] * (1 - by / 10)}
