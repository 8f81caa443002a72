"""Requests of many clients on one engine thread, advanced step by step in turn."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lowbit.engine.request import Request, RequestState
from lowbit.errors import AbortedError, ConfigError, DeadlineError
from lowbit.inputs.data import OmniDiffusionSamplingParams
from lowbit.outputs import OmniRequestOutput

if TYPE_CHECKING:
    from lowbit.engine.omni import Omni

logger = logging.getLogger(__name__)

_SMOOTHING = 0.2
"""Weight of the newest request in the mean time per request."""


class QueueFullError(RuntimeError):
    """A request that found the queue full.

    Attributes:
        retry_after_s: whole seconds after which a place is likely free, from the measured rate.
    """

    def __init__(self, waiting: int, retry_after_s: int) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(f"{waiting} requests wait, which is the limit. Try again in {retry_after_s} s")


class ClosedError(AbortedError):
    """A request that met an engine that is shutting down, or whose thread has ended."""


@dataclass(frozen=True)
class Preview:
    """Pictures decoded before the last step.

    Attributes:
        index: of the preview, from 0.
        images: PIL images, one per output.
    """

    index: int
    images: list[Any] = field(repr=False)


@dataclass(frozen=True)
class Done:
    """A finished request."""

    output: OmniRequestOutput


@dataclass(frozen=True)
class Failed:
    """A request that ended with an error."""

    error: BaseException


Event = Preview | Done | Failed


class Observer(Protocol):
    """Is told what the engine does; called on the engine's thread."""

    def started(self, wait_s: float) -> None:
        """A request leaves the queue after ``wait_s`` seconds."""
        ...

    def stepped(self, requests: int, seconds: float) -> None:
        """A step of ``requests`` requests took ``seconds``."""
        ...

    def ended(self, event: Done | Failed) -> None:
        """A request has ended."""
        ...


class _NoObserver:
    def started(self, wait_s: float) -> None:
        pass

    def stepped(self, requests: int, seconds: float) -> None:
        pass

    def ended(self, event: Done | Failed) -> None:
        pass


@dataclass(eq=False)
class Job:
    """A request with the function that its events go to.

    Attributes:
        request: what is asked for.
        notify: takes events, on the engine's thread.
        previews: how many pictures to decode before the last step.
        arrived: when it was submitted, by ``time.monotonic``, in seconds.
        state: once begun.
        is_cancelled: nobody waits for it.
        sent: previews so far.
    """

    request: Request
    notify: Callable[[Event], None]
    previews: int = 0
    arrived: float = field(default_factory=time.monotonic)
    state: RequestState | None = None
    is_cancelled: bool = False
    sent: int = 0

    def cancel(self) -> None:
        """End it at its next step. Any thread may call this, more than once."""
        self.is_cancelled = True
        state = self.state
        if state is not None:
            state.abort()

    def refusal(self) -> Exception | None:
        """Return why it is not to begin, ``None`` if it is."""
        if self.is_cancelled:
            return AbortedError("the request ended in the queue: it was aborted")
        deadline = self.request.deadline
        if deadline is not None and time.monotonic() > deadline:
            return DeadlineError("the request ended in the queue: its deadline passed. Allow more time")
        return None

    def is_preview_due(self) -> bool:
        """Whether the step just taken is one after which a preview is due: they are spread evenly over the steps."""
        state = self.state
        if state is None or state.is_done or self.sent >= self.previews:
            return False
        total = len(state.timesteps)
        return state.step < total and state.step * (self.previews + 1) >= total * (self.sent + 1)


class EngineThread(threading.Thread):
    """The only thread that runs the models of an ``Omni``.

    Attributes:
        omni: the loaded pipeline.
        max_running: requests under way at a time; each holds its latents, embeddings and scheduler.
        max_queue: requests that wait at most.
        waiting: requests not yet begun, in order of arrival.
        running: requests under way.
        observer: is told what happens.
        seconds_per_request: mean time between two finished requests while busy, exponentially smoothed.
    """

    def __init__(self, omni: Omni, max_running: int = 4, max_queue: int = 64, observer: Observer | None = None) -> None:
        super().__init__(name="lowbit-engine", daemon=True)
        self.omni, self.max_running, self.max_queue = omni, max_running, max_queue
        self.observer: Observer = observer or _NoObserver()
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.seconds_per_request = 1.0
        self._changed = threading.Condition()
        self._close_at: float | None = None
        self._busy_since = time.monotonic()

    @property
    def is_closing(self) -> bool:
        """It takes no more requests."""
        return self._close_at is not None

    def submit(self, job: Job) -> None:
        """Put a request at the end of the queue. Any thread may call this.

        Raises:
            QueueFullError: ``max_queue`` requests wait.
            ClosedError: the engine is shutting down or its thread has ended.
        """
        with self._changed:
            if self.is_closing or not self.is_alive():
                raise ClosedError("the engine is shutting down or has stopped")
            if len(self.waiting) >= self.max_queue:
                raise QueueFullError(len(self.waiting), self.retry_after_s())
            self.waiting.append(job)
            self._changed.notify()

    def retry_after_s(self) -> int:
        """Return whole seconds until a place in the queue is likely free, 1 to 600."""
        return min(600, max(1, math.ceil(self.seconds_per_request)))

    def close(self, timeout_s: float = 0.0) -> None:
        """Take no more requests, and abort those that are not done ``timeout_s`` seconds from now."""
        with self._changed:
            self._close_at = time.monotonic() + timeout_s
            self._changed.notify()

    def run(self) -> None:
        """Advance requests until the engine is closed and idle."""
        try:
            while self._wait():
                self._turn()
        except BaseException as error:
            logger.exception("the engine's thread has ended")
            self._end_all(error)

    def _wait(self) -> bool:
        """Wait for work; return whether there is some."""
        with self._changed:
            if not self.running and not self.waiting:
                while not self.waiting and not self.is_closing:
                    self._changed.wait()
                self._busy_since = time.monotonic()
            return bool(self.waiting or self.running)

    def _turn(self) -> None:
        """Begin the requests that there is room for, and advance each that runs by a step."""
        if self._close_at is not None and time.monotonic() >= self._close_at:
            self._end_all(ClosedError("the server shut down before the request was done"))
            return
        for job in self._admitted():
            self._begin(job)
        self._end_done()
        jobs = list(self.running)
        before = {job: job.state.latents for job in jobs if job.state is not None and job.sent < job.previews}
        began = time.perf_counter()
        self.omni.runner.step([job.state for job in jobs if job.state is not None])
        if jobs:
            self.observer.stepped(len(jobs), time.perf_counter() - began)
        for job, latents in before.items():
            if job.is_preview_due():
                self._preview(job, latents)
        self._end_done()

    def _admitted(self) -> list[Job]:
        """Take from the queue what there is room for, and end what is not to begin."""
        admitted: list[Job] = []
        room = self.max_running - len(self.running)
        with self._changed:
            queue, refused = list(self.waiting), []
            self.waiting.clear()
            for job in queue:
                error = job.refusal()
                if error is not None:
                    refused.append((job, error))
                elif len(admitted) < room:
                    admitted.append(job)
                else:
                    self.waiting.append(job)
        for job, error in refused:
            self._end(job, Failed(error))
        return admitted

    def _begin(self, job: Job) -> None:
        self.observer.started(time.monotonic() - job.arrived)
        try:
            job.state = self.omni.runner.start(job.request)
        except Exception as error:  # the pipeline can't take the request
            self._end(job, Failed(error))
            return
        if job.is_cancelled:  # while it was started
            job.state.abort()
        self.running.append(job)

    def _preview(self, job: Job, before: torch.Tensor) -> None:
        """Send a preview; where decoding fails, the request goes on without."""
        assert job.state is not None
        try:
            images = self.omni.runner.preview(job.state, before)
        except Exception:
            logger.warning("%s: can't decode a preview", job.state.request_id, exc_info=True)
            job.sent = job.previews
            return
        job.notify(Preview(job.sent, images))
        job.sent += 1

    def _end_done(self) -> None:
        done = [job for job in self.running if job.state is not None and job.state.is_done]
        self.running = [job for job in self.running if job not in done]
        for job in done:
            self._end(job, _result(job))

    def _end(self, job: Job, event: Done | Failed) -> None:
        job.state = None
        if isinstance(event, Done):
            now = time.monotonic()
            self.seconds_per_request += _SMOOTHING * (now - self._busy_since - self.seconds_per_request)
            self._busy_since = now
        self.observer.ended(event)
        job.notify(event)

    def _end_all(self, error: BaseException) -> None:
        with self._changed:
            jobs = [*self.running, *self.waiting]
            self.running, self._close_at = [], self._close_at or time.monotonic()
            self.waiting.clear()
        for job in jobs:
            if job.state is not None:
                job.state.error = error
                job.state.close()
            self._end(job, Failed(error))


def _result(job: Job) -> Done | Failed:
    assert job.state is not None
    try:
        return Done(job.state.output())
    except BaseException as error:
        return Failed(error)


class Ticket(AsyncIterator[Event]):
    """A submitted request, as an asynchronous iterator of its events, of which ``Done`` or ``Failed`` is the last."""

    def __init__(self, engine: EngineThread, request: Request, previews: int = 0) -> None:
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        self._is_over = False
        self._job = Job(request, self._notify, previews)
        engine.submit(self._job)

    def _notify(self, event: Event) -> None:
        with suppress(RuntimeError):  # the event loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def __anext__(self) -> Event:
        """Wait for the next event."""
        if self._is_over:
            raise StopAsyncIteration
        event = await self._events.get()
        self._is_over = not isinstance(event, Preview)
        return event

    async def output(self) -> OmniRequestOutput:
        """Wait for the result, and raise the error that ended the request if one did."""
        async for event in self:
            if isinstance(event, Done):
                return event.output
            if isinstance(event, Failed):
                raise event.error
        raise AbortedError("the request has no result")

    def cancel(self) -> None:
        """End the request at its next step, if it is not over."""
        self._job.cancel()


class AsyncOmni:
    """An ``Omni`` for asynchronous code: requests wait in one queue and advance step by step in turn.

    A result is byte for byte that of ``Omni.generate`` with the same arguments and seed.
    """

    def __init__(
        self,
        omni: Omni,
        *,
        max_running: int = 4,
        max_queue: int = 64,
        max_batch: int = 1,
        observer: Observer | None = None,
    ) -> None:
        """Start the engine's thread.

        Args:
            omni: nothing else may use it meanwhile, but to read.
            max_running: requests under way at a time.
            max_queue: requests that wait at most.
            max_batch: requests that share a forward; see ``Runner``.
            observer: is told what happens.
        """
        for name, value, least in (
            ("max_running", max_running, 1),
            ("max_queue", max_queue, 1),
            ("max_batch", max_batch, 1),
        ):
            if value < least:
                raise ConfigError(f"{name}: expected at least {least}, got {value}")
        omni.runner.max_batch = max_batch
        self.omni = omni
        self.engine = EngineThread(omni, max_running, max_queue, observer)
        self.engine.start()

    def submit(self, request: Request, previews: int = 0) -> Ticket:
        """Put a request that ``omni.request`` made at the end of the queue.

        Args:
            request: checked.
            previews: pictures to decode before the last step.

        Raises:
            QueueFullError: too many wait.
            ClosedError: the engine is shutting down.
        """
        return Ticket(self.engine, request, previews)

    async def generate(
        self,
        prompt: str | Mapping[str, Any],
        sampling_params: OmniDiffusionSamplingParams | None = None,
        *,
        timeout_s: float | None = None,
    ) -> OmniRequestOutput:
        """Make the pictures of one prompt; a task that is cancelled ends the request at its next step."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        ticket = self.submit(self.omni.request(prompt, sampling_params, deadline=deadline))
        try:
            return await ticket.output()
        finally:
            ticket.cancel()

    def close(self, timeout_s: float = 0.0) -> None:
        """Abort what is not done after ``timeout_s`` seconds, and end the thread."""
        self.engine.close(timeout_s)
        self.engine.join()
