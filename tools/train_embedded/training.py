"""What both trainers share: the loop with its checkpoints, weight averaging, the schedule."""

import copy
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

Modules = dict[str, nn.Module]
Loss = Callable[[Modules, int, int], tuple[Tensor, dict[str, float]]]


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """``torch.save`` under a temporary name, then rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(path.suffix + ".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def cosine_rate(step: int, steps: int, warmup: int, floor: float = 0.02) -> float:
    """Learning rate's factor: linear warm-up, then cosine decay down to ``floor``."""
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


SHARDS = 2
"""Parts of every batch, each computed by a thread of its own on a CPU.

Two single threads beat one pair of OpenMP threads: no barrier after each small operation, and
no time lost where other programs share the cores. It is part of the recipe: it fixes the noise.
"""


def shard_generator(seed: int, step: int, shard: int) -> torch.Generator:
    """A generator of its own for each part of a step: a resumed run draws what it would have."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * SHARDS + shard)


def _replicas(modules: Modules) -> list[Modules]:
    """The modules, then SHARDS - 1 copies that share their values but not their gradients."""
    copies = [modules]
    for _ in range(SHARDS - 1):
        replica = copy.deepcopy(modules)
        for name, module in modules.items():
            pairs = zip(module.parameters(), replica[name].parameters(), strict=True)
            for source, target in pairs:
                target.data = source.data
        copies.append(replica)
    return copies


def shard_workers(device: torch.device) -> ThreadPoolExecutor:
    """One single-threaded worker per shard on a CPU, one for all on an accelerator."""
    if device.type != "cpu":
        return ThreadPoolExecutor(1)
    return ThreadPoolExecutor(SHARDS, initializer=torch.set_num_threads, initargs=(1,))


class Average:
    """Exponential moving average of parameters, with a window that grows up to ``decay``."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.values = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after ``step`` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the parameters' values with the averages."""
        for parameter, value in zip(self.parameters, self.values, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)


@dataclass(frozen=True)
class Schedule:
    """How long to train and how; ``rate`` is AdamW's peak learning rate.

    After ``steps`` the rate rises once more, to ``refine_rate``, and falls over ``refine_steps`` (a warm restart,
    Loshchilov and Hutter, 2017).
    """

    steps: int
    rate: float
    refine_steps: int = 0
    refine_rate: float = 0.0
    warmup: int = 100
    decay: float = 0.998
    weight_decay: float = 0.01
    checkpoint_seconds: float = 120.0

    @property
    def all_steps(self) -> int:
        """Steps with those of the restart."""
        return self.steps + self.refine_steps

    def rate_at(self, step: int) -> float:
        """The learning rate of a step."""
        if step < self.steps:
            return self.rate * cosine_rate(step, self.steps, self.warmup)
        return self.refine_rate * cosine_rate(step - self.steps, self.refine_steps, self.warmup)


class Loop:
    """Steps an optimizer over ``modules``, with checkpoints from which it resumes exactly.

    ``loss(modules, step, shard)`` returns one shard's scalar loss and numbers to show. All its
    randomness must come from ``shard_generator``.
    """

    def __init__(self, modules: Modules, schedule: Schedule, path: Path) -> None:
        self.modules, self.schedule, self.path = modules, schedule, path
        self.prepare: Callable[[Modules], None] = lambda modules: None
        self.parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=schedule.rate,
            betas=(0.9, 0.98),
            weight_decay=schedule.weight_decay,
            fused=True,
        )
        self.average = Average(self.parameters, schedule.decay)
        self.step = self.first = 0
        self.seconds = 0.0

    def resume(self) -> bool:
        """Continue from the checkpoint if there is one."""
        if not self.path.exists():
            return False
        state = torch.load(self.path, weights_only=True, map_location=self.parameters[0].device)
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.values = state["average"]
        self.step, self.seconds = state["step"], state["seconds"]
        return True

    def save(self) -> None:
        """Write the checkpoint."""
        state = {
            "modules": {name: m.state_dict() for name, m in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.values,
            "step": self.step,
            "seconds": self.seconds,
        }
        save_atomically(state, self.path)

    def run(
        self,
        loss: Loss,
        on_checkpoint: Callable[[int], None] | None = None,
    ) -> None:
        """Train up to the schedule's end, then save."""
        end = self.schedule.all_steps
        saved = began = time.monotonic()
        before = self.seconds
        self.first = self.step
        replicas = _replicas(self.modules)
        for modules in replicas:
            self.prepare(modules)
        bar = tqdm(total=end, initial=self.step, mininterval=5.0, desc=self.path.stem)
        with shard_workers(self.parameters[0].device) as workers:
            while self.step < end:
                shown = self._one_step(loss, replicas, workers)
                bar.update()
                bar.set_postfix({k: f"{v:.4f}" for k, v in shown.items()}, refresh=False)
                self.seconds = before + time.monotonic() - began
                if time.monotonic() - saved > self.schedule.checkpoint_seconds:
                    self.save()
                    if on_checkpoint:
                        on_checkpoint(self.step)
                    saved = time.monotonic()
        bar.close()
        self.save()

    def _one_step(self, loss: Loss, replicas: list[Modules], workers: ThreadPoolExecutor) -> dict[str, float]:
        rate = self.schedule.rate_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

        def part(shard: int) -> dict[str, float]:
            modules = replicas[shard]
            for module in modules.values():
                module.zero_grad(set_to_none=True)
            value, shown = loss(modules, self.step, shard)
            if not torch.isfinite(value):
                raise FloatingPointError(f"loss is {value.item()} at step {self.step}")
            (value / SHARDS).backward()
            return shown

        if self.step == self.first:  # compiling is not for two threads at once
            shown = workers.submit(lambda: [part(shard) for shard in range(SHARDS)]).result()
        else:
            shown = list(workers.map(part, range(SHARDS)))
        self._gather(replicas[1:])
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.average.update(self.step)
        self.step += 1
        return {name: sum(s[name] for s in shown) / SHARDS for name in shown[0]}

    @torch.no_grad()
    def _gather(self, replicas: list[Modules]) -> None:
        """Add the replicas' gradients to the modules' own."""
        for replica in replicas:
            others = [p for m in replica.values() for p in m.parameters() if p.requires_grad]
            for own, other in zip(self.parameters, others, strict=True):
                if own.grad is not None and other.grad is not None:
                    own.grad.add_(other.grad)
