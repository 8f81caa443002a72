"""Advancing requests step by step."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from lowbit.cache.base import GenerationCache
from lowbit.engine.call_adapter import CallAdapter
from lowbit.engine.request import Request, RequestState, check_hook, pictures
from lowbit.engine.scheduler import groups
from lowbit.errors import ConfigError
from lowbit.models.steps import StepModel, find_step_model


class Runner:
    """Runs requests on one pipeline. Any number of threads may use it: models run for one of them at a time.

    Models are shared and may keep buffers of their own (offloading hooks, autoencoders of videos, tables made at first
    use), so a lock guards each forward, not the whole request: threads take turns step by step.

    Attributes:
        pipeline: of diffusers.
        device: it computes on.
        transformers: returns its diffusion transformers by component name.
        cache: what lets denoising steps reuse earlier ones' work, ``None`` for nothing.
        max_batch: requests of equal shape that share a forward. With 1 a request's bytes do not depend on the others;
            with more they do where a kernel rounds differently for more rows (torch's BF16 GEMM does).
    """

    def __init__(
        self,
        pipeline: Any,
        device: torch.device,
        transformers: Callable[[], Mapping[str, Any]],
        cache: GenerationCache | None = None,
        max_batch: int = 1,
    ) -> None:
        self.pipeline, self.device, self.transformers = pipeline, device, transformers
        self.cache, self.max_batch = cache, max_batch
        self._lock = threading.RLock()
        self._call = CallAdapter()

    def model_of(self, arguments: Mapping[str, Any]) -> StepModel:
        """Return the pipeline's step adapter, or for want of one what runs its ``__call__`` as one step."""
        if self.cache is not None and self.cache.wraps_call:
            return self._call
        model = find_step_model(self.pipeline)
        return self._call if model is None or model.refusal(arguments) is not None else model

    def start(self, request: Request) -> RequestState:
        """Encode the prompts of a request and draw its noise.

        Returns:
            Its state; with an ``error`` where a parameter is wrong.

        Raises:
            ConfigError: the pipeline can't take the request.
        """
        check_hook(self.pipeline, request)
        model = self.model_of(request.arguments)
        state = RequestState.of(request, self.pipeline, self.device, model)
        with self._ending(state), self._models():
            state.check()
            state.model.prepare_encode(state)
            state.cache = self._begin_cache(state)
            if not state.model.is_indivisible:
                state.bar = state.pipeline.progress_bar(total=len(state.timesteps))
        return state

    def step(self, states: Sequence[RequestState]) -> None:
        """Advance each state by one step, and decode those that took their last.

        An error ends the requests it concerns and no other: it is in their ``error``.

        Args:
            states: begun by ``start``, none of them done.
        """
        ready = []
        for state in states:
            with self._ending(state):
                state.check()
                ready.append(state)
        running = [state for state in ready if state.error is None and not state.is_finished]
        for group in groups(running, self._group_key, self.max_batch):
            with self._ending(*group):
                self._denoise(group)
            for state in group:
                if state.error is None:
                    with self._ending(state):
                        self._advance(state)
        for state in states:
            if state.error is None and state.is_finished:
                self._decode(state)

    def preview(self, state: RequestState, before: torch.Tensor) -> list[Any]:
        """Decode what a request has come to, and leave it unchanged.

        Under flow matching x = (1 - sigma) * picture + sigma * noise, so the line through the samples before and after
        a step meets sigma = 0 at the picture that the step predicts; other schedulers' samples are decoded.

        Args:
            state: not done, with at least one step taken, on a pipeline with a step adapter.
            before: its latents before its latest step.

        Returns:
            PIL images.
        """
        if state.model.is_indivisible:
            raise ConfigError("no preview: the pipeline runs in one call")
        view = copy.copy(state)
        view.pipeline, view.latents = copy.copy(state.pipeline), _predicted(state, before)
        with self._models():
            return pictures(view.model.post_decode(view))[0]

    def _denoise(self, group: Sequence[RequestState]) -> None:
        with self._models(), ExitStack() as stack:
            for state in group:
                if not state.model.is_indivisible:
                    state.begin_steps()
                if state.cache is not None:
                    stack.enter_context(state.cache.working())
            group[0].model.denoise_step(group)

    def _advance(self, state: RequestState) -> None:
        """Take the scheduler's step and tell the hook. Needs no lock: all of it is the request's own."""
        index = state.step
        with torch.no_grad():
            state.model.step_scheduler(state)
            if state.model.is_indivisible:
                return
            replaced = state.end_step(index, state.latents)
        if replaced is not None:
            state.latents = replaced
        state.bar.update()
        if state.pipeline.interrupt:  # callbacks may end the denoising and keep what there is
            state.step = len(state.timesteps)

    def _decode(self, state: RequestState) -> None:
        with self._ending(state), self._models():
            state.result = state.model.post_decode(state)
            if not state.model.is_indivisible:
                state.pipeline.maybe_free_model_hooks()
            state.close()

    def _group_key(self, state: RequestState) -> Hashable:
        # A cache decides for one request at a time whether blocks run.
        return id(state) if state.cache is not None else (type(state.model), state.model.batch_key(state))

    def _begin_cache(self, state: RequestState) -> Any:
        if self.cache is None:
            return None
        return self.cache.begin(state.pipeline, self.transformers(), _step_count(state))

    @contextmanager
    def _models(self) -> Iterator[None]:
        with self._lock, torch.no_grad():
            yield

    @contextmanager
    def _ending(self, *states: RequestState) -> Iterator[None]:
        """End the states with an error that is raised within."""
        try:
            yield
        except BaseException as error:
            for state in states:
                state.error = error
                state.close()
            if not isinstance(error, Exception):
                raise


def _predicted(state: RequestState, before: torch.Tensor) -> torch.Tensor:
    """Return the latents that the latest step heads for."""
    scheduler = state.pipeline.scheduler
    if not type(scheduler).__name__.startswith("FlowMatchEuler"):
        return state.latents
    earlier, now = (float(scheduler.sigmas[index]) for index in (state.step - 1, state.step))
    if earlier == now:
        return state.latents
    return (state.latents + (state.latents - before) * (now / (earlier - now))).to(state.latents.dtype)


def _step_count(state: RequestState) -> int:
    """Return the number of denoising steps, of an indivisible call by its arguments."""
    if not state.model.is_indivisible:
        return len(state.timesteps)
    for name in ("timesteps", "sigmas"):
        if state.arguments.get(name) is not None:
            return len(state.arguments[name])
    return int(state.arguments.get("num_inference_steps") or 0)
