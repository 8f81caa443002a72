"""Which requests take their next step, and which of them share a forward."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Protocol, TypeVar

from lowbit.engine.request import Request, RequestState

T = TypeVar("T")


class Steps(Protocol):
    """What the scheduler drives: ``engine.runner.Runner``."""

    def start(self, request: Request) -> RequestState:
        """Begin a request."""
        ...

    def step(self, states: Sequence[RequestState]) -> None:
        """Advance each state by a step."""
        ...


def groups(states: Iterable[T], key: Callable[[T], Hashable], max_batch: int = 1) -> list[list[T]]:
    """Return ``states`` in groups that share a forward, first come first.

    Args:
        states: in order of arrival.
        key: what must be equal within a group.
        max_batch: states per group.
    """
    found: dict[Hashable, list[list[T]]] = {}
    order: list[list[T]] = []
    for state in states:
        same = found.setdefault(key(state) if max_batch > 1 else id(state), [])
        if not same or len(same[-1]) >= max_batch:
            same.append([])
            order.append(same[-1])
        same[-1].append(state)
    return order


class Scheduler:
    """Takes requests in order of arrival and advances those that run, a step of each at a time.

    It belongs to one thread; several may share a ``Runner``.

    Attributes:
        waiting: not yet begun.
        running: begun and not done.
    """

    def __init__(self, runner: Steps, max_running: int = 1) -> None:
        self.runner, self.max_running = runner, max_running
        self.waiting: deque[Request] = deque()
        self.running: list[RequestState] = []

    @property
    def is_busy(self) -> bool:
        """Something waits or runs."""
        return bool(self.waiting or self.running)

    def submit(self, request: Request) -> None:
        """Put a request at the end of the line."""
        self.waiting.append(request)

    def step(self) -> list[RequestState]:
        """Begin what there is room for, advance all that runs by a step, and return what is done."""
        while self.waiting and len(self.running) < self.max_running:
            self.running.append(self.runner.start(self.waiting.popleft()))
        self.runner.step([state for state in self.running if not state.is_done])
        done = [state for state in self.running if state.is_done]
        self.running = [state for state in self.running if not state.is_done]
        return done
