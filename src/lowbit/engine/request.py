"""One generation as an object: everything that changes while it is made belongs to it."""

from __future__ import annotations

import copy
import inspect
import itertools
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lowbit.cache.base import RequestCache, Skips
from lowbit.engine.memory import PeakMemory
from lowbit.errors import AbortedError, ConfigError, DeadlineError
from lowbit.models.steps import StepModel, StepState
from lowbit.models.steps.base import call_arguments
from lowbit.outputs import OmniRequestOutput

StepHook = Callable[[int, torch.Tensor], torch.Tensor | None]

_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for.

    Attributes:
        prompt: text.
        arguments: of the pipeline's ``__call__``, other than prompt and generator; checked.
        seeds: of each picture's starting noise.
        progress: show a bar of the denoising steps.
        on_step: called after each denoising step with its index from 0 and the latents; what it returns, if not
            ``None``, takes their place.
        deadline: on the clock of ``time.monotonic``, in seconds; ``None`` for none.
    """

    prompt: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    seeds: Sequence[int] = (0,)
    progress: bool = False
    on_step: StepHook | None = None
    deadline: float | None = None


@dataclass(kw_only=True, eq=False)
class RequestState(StepState):
    """A request under way.

    Attributes:
        request: what is asked for.
        request_id: unique in this process.
        peak: memory since it was started.
        model: what advances it.
        cache: of this request, ``None`` for none.
        given: the arguments that differ from the pipeline's defaults.
        result: the pictures or videos, once decoded.
        error: that ended it.
        is_aborted: it ends at its next step.
        started: when it was started, by ``time.perf_counter``, in seconds.
        steps_begun: when the first forward began.
        step_ends: when each denoising step ended.
        ended: when it was done.
        peak_memory_mb: highest memory until then, in 10^6 bytes.
        bar: that shows its steps.
    """

    request: Request
    request_id: str
    peak: PeakMemory
    model: StepModel = field(repr=False)
    cache: RequestCache | None = None
    given: Mapping[str, Any] = field(default_factory=dict, repr=False)
    result: Any = field(default=None, repr=False)
    error: BaseException | None = None
    is_aborted: bool = False
    started: float = field(default_factory=time.perf_counter)
    steps_begun: float | None = None
    step_ends: list[float] = field(default_factory=list)
    ended: float | None = None
    peak_memory_mb: float = 0.0
    bar: Any = field(default=None, repr=False)

    @classmethod
    def of(cls, request: Request, pipeline: Any, device: torch.device, model: StepModel) -> RequestState:
        """Return the state of a request that has not begun: a view of the pipeline, noise generators, arguments."""
        view = pipeline_view(pipeline)
        view.set_progress_bar_config(disable=not request.progress, desc="denoising")
        # The noise is drawn on the CPU, so that a seed means the same start on every device.
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in request.seeds]
        given = {"prompt": request.prompt, "generator": generators, **request.arguments}
        return cls(
            pipeline=view,
            arguments=call_arguments(pipeline, given),
            given=given,
            request=request,
            request_id=f"request-{next(_numbers)}",
            peak=PeakMemory(device),
            model=model,
        )

    @property
    def is_done(self) -> bool:
        """It has a result or an error."""
        return self.result is not None or self.error is not None

    def abort(self) -> None:
        """End it with ``AbortedError`` at its next step. Any thread may call this."""
        self.is_aborted = True

    def check(self) -> None:
        """Raise where it is not to go on.

        Raises:
            AbortedError: ``abort`` was called.
            DeadlineError: its deadline has passed.
        """
        where = f"{self.request_id} ended after {len(self.step_ends)} denoising steps"
        if self.is_aborted:
            raise AbortedError(f"{where}: it was aborted")
        late = 0.0 if self.request.deadline is None else time.monotonic() - self.request.deadline
        if late > 0.0:
            raise DeadlineError(f"{where}: its deadline passed {late:.2f} s ago. Allow more time or take fewer steps")

    def begin_steps(self) -> None:
        """Note that the first forward begins."""
        if self.steps_begun is None:
            self.steps_begun = time.perf_counter()

    def end_step(self, index: int, latents: torch.Tensor | None) -> torch.Tensor | None:
        """Note that a step has ended, and return what the hook puts in its latents' place, ``None`` for nothing."""
        self.step_ends.append(time.perf_counter())
        hook = self.request.on_step
        return hook(index, latents) if hook is not None and latents is not None else None

    def close(self) -> None:
        """Take the last measurements and let go of what only steps need."""
        if self.ended is None:
            self.ended, self.peak_memory_mb = time.perf_counter(), self.peak.megabytes()
        if self.bar is not None:
            self.bar.close()
        if self.cache is not None:
            self.cache.end()

    def output(self) -> OmniRequestOutput:
        """Return the result with what making it took.

        Raises:
            BaseException: the error that ended the request.
        """
        if self.error is not None:
            raise self.error
        images, frames = pictures(self.result)
        skips = Skips() if self.cache is None else self.cache.skips
        marks = [*([] if self.steps_begun is None else [self.steps_begun]), *self.step_ends]
        return OmniRequestOutput(
            request_id=self.request_id,
            prompt=self.request.prompt,
            images=images,
            frames=frames,
            seeds=list(self.request.seeds),
            num_inference_steps=len(self.step_ends) or int(self.arguments.get("num_inference_steps") or 0),
            generation_time_s=(self.ended or time.perf_counter()) - self.started,
            step_times_s=[later - earlier for earlier, later in itertools.pairwise(marks)],
            peak_memory_mb=self.peak_memory_mb,
            skipped_steps=skips.steps(),
        )


def pipeline_view(pipeline: Any) -> Any:
    """Return a shallow copy of a pipeline with schedulers and settings of its own, and the same models."""
    view = copy.copy(pipeline)
    own = vars(view)  # past DiffusionPipeline.__setattr__, which rewrites the configuration
    for name, part in pipeline.components.items():
        if hasattr(part, "set_timesteps"):
            own[name] = copy.deepcopy(part)
    # Offloading keeps its list of hooks on the pipeline.
    own["maybe_free_model_hooks"] = pipeline.maybe_free_model_hooks
    return view


def draw_seeds(seed: int | None, count: int) -> list[int]:
    """Return the seeds of ``count`` pictures: counted up from ``seed``, or from a random one."""
    first = secrets.randbelow(2**32) if seed is None else seed
    return [first + index for index in range(count)]


def pictures(result: Any) -> tuple[list[Any], list[list[Any]]]:
    """Return the images and the videos' frames of a pipeline's output."""
    if hasattr(result, "images"):
        return list(result.images), []
    if hasattr(result, "frames"):
        return [], [list(video) for video in result.frames]
    return list(result), []


def check_hook(pipeline: Any, request: Request) -> None:
    """Raise ``ConfigError`` for a hook on steps where the pipeline does not call back after each."""
    if request.on_step is not None and "callback_on_step_end" not in parameters(pipeline):
        raise ConfigError(f"on_step: {type(pipeline).__name__} does not call back after each step")


def parameters(pipeline: Any) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of the pipeline's ``__call__``."""
    return inspect.signature(type(pipeline).__call__).parameters
