"""Pipelines without a step adapter: their ``__call__`` as one indivisible step."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from lowbit.engine.request import RequestState
from lowbit.errors import ConfigError
from lowbit.models.steps import StepModel, StepState


class CallAdapter(StepModel):
    """Runs ``__call__`` of the request's view of the pipeline in its only step.

    The view has a scheduler, a progress bar and settings of its own, so that requests do not meet. Where the pipeline
    calls back after each denoising step, times, hooks, deadline and abort work by denoising steps, too.
    """

    is_indivisible = True

    def prepare_encode(self, state: StepState) -> None:
        """Count as one step; the pipeline does the rest in it."""
        if state.arguments.get("return_dict") is False:
            raise ConfigError("return_dict=False: unsupported, the output is an OmniRequestOutput")
        state.timesteps = torch.zeros(1)

    def batch_key(self, state: StepState) -> Hashable:
        """Return the request itself: it goes alone."""
        return id(state)

    def denoise_step(self, states: Sequence[StepState]) -> None:
        """Run ``__call__`` of each."""
        for state in states:
            assert isinstance(state, RequestState)
            state.prediction = state.pipeline(**_with_callbacks(state))

    def step_scheduler(self, state: StepState) -> None:
        """Count the only step."""
        state.step += 1

    def post_decode(self, state: StepState) -> Any:
        """Return what ``__call__`` returned."""
        result, state.prediction = state.prediction, None
        return result


def _with_callbacks(state: RequestState) -> dict[str, Any]:
    """Return the arguments with a callback that tells the request of each step, and note when the first begins."""
    arguments, view = dict(state.given), state.pipeline
    show = view.progress_bar

    def begin(*args: Any, **kwargs: Any) -> Any:
        state.begin_steps()  # pipelines open their bar right before the first forward
        return show(*args, **kwargs)

    vars(view)["progress_bar"] = begin
    if "callback_on_step_end" in state.arguments:
        arguments["callback_on_step_end"] = _Callback(state, state.arguments["callback_on_step_end"])
        asked = state.arguments.get("callback_on_step_end_tensor_inputs", ())
        if state.request.on_step is not None and "latents" not in asked:
            arguments["callback_on_step_end_tensor_inputs"] = [*asked, "latents"]
    return arguments


class _Callback:
    """Calls the user's callback, then the request's hook."""

    def __init__(self, state: RequestState, own: Any) -> None:
        self.state, self.own = state, own

    def __call__(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents = tensors.get("latents")
        returned: dict[str, Any] = tensors if self.own is None else self.own(pipeline, step, timestep, tensors)
        replaced = self.state.end_step(step, returned.get("latents", latents))
        self.state.check()
        return returned if replaced is None else {**returned, "latents": replaced}
