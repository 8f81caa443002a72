"""Finding the cheapest recipe that meets a gate: a method, and the layers that stay as they are.

For each allowed method: measure what quantizing each layer alone does (``lowbit.evaluation.sensitivity``). Squared
errors of independent roundings add up, so the layers worth keeping are those with the most squared damage per byte. Of
that order the shortest beginning that meets the gate is found by bisection, in free-running generation; then kept
layers are given up, the least damaging first, as long as the gate holds. The cheapest recipe is verified in processes
of its own on prompts that the search has not seen, and keeps more layers until it passes there too.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn
from tqdm import tqdm

from lowbit.containers.atomic import write_text
from lowbit.errors import ConfigError
from lowbit.evaluation.comparison import WORST, Comparison, Plan, compare
from lowbit.evaluation.gates import RATIOS, Condition, judge
from lowbit.evaluation.metrics import OUTPUT_METRICS, median_and_worst, picture_metrics, to_json
from lowbit.evaluation.recording import Side, Task, generate, in_process, stack_pictures
from lowbit.evaluation.sensitivity import (
    LayerDamage,
    measure,
    one_method,
    quantizable_layers,
    rank,
    record_calls,
    swapped,
)
from lowbit.models.patterns import matches
from lowbit.quantization.plan import quantize_layer

if TYPE_CHECKING:
    from lowbit.engine import Omni

Say = Callable[[str], None]
_TRIALS = "trials.json"


@dataclass(frozen=True)
class Budget:
    """How long to search: a number of trials, or seconds; a trial that has begun is finished.

    What is bisected always gets its trials; the budget ends the giving up of kept layers.
    """

    trials: int | None = None
    seconds: float | None = None

    def is_spent(self, trials: int, seconds: float) -> bool:
        """Tell whether to stop."""
        return (self.trials is not None and trials >= self.trials) or (
            self.seconds is not None and seconds >= self.seconds
        )


def parse_budget(text: str) -> Budget:
    """Read ``"40"`` (trials), ``"90s"``, ``"30m"`` or ``"2h"``.

    Raises:
        ConfigError: anything else.
    """
    match = re.fullmatch(r"\s*(\d+)\s*([smh]?)\s*", text)
    if match is None or int(match[1]) == 0:
        raise ConfigError(
            f"--budget: {text!r} is neither a number of trials such as 40 nor a time such as 90s, 30m, 2h"
        )
    number, unit = int(match[1]), match[2]
    return Budget(seconds=number * {"s": 1.0, "m": 60.0, "h": 3600.0}[unit]) if unit else Budget(trials=number)


@dataclass(frozen=True)
class Trial:
    """A recipe that was tried.

    Attributes:
        method: index into the allowed methods.
        kept: names, with their component, of the layers that stay.
        linear_bytes: of all layers that the method could take, as the recipe has them.
        figures: medians and ``worst_`` ones over the search's prompts.
        generation_time_s: average of a picture.
        ok: whether the gate holds.
    """

    method: int
    kept: tuple[str, ...]
    linear_bytes: int
    figures: Mapping[str, float]
    generation_time_s: float
    ok: bool


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        best: the cheapest trial whose gate holds, ``None`` if there is none.
        trials: all, in order.
        layers: of each method, what quantizing each alone does.
    """

    best: Trial | None
    trials: Sequence[Trial]
    layers: Sequence[Sequence[LayerDamage]]


class Bench:
    """A model with layers to swap, and its own pictures to compare with.

    All layers are quantized once per method and kept beside the model: half as much memory again for 8 bits.
    """

    def __init__(self, omni: Omni, task: Task) -> None:
        self.omni, self.task = omni, task
        self.reference = [self._picture(prompt, seed)[0] for _, prompt, seed in tqdm(task.cases, desc="reference")]
        self.quantized: dict[str, nn.Module] = {}

    def take(self, spec: Any) -> None:
        """Quantize every layer that the method takes."""
        self.quantized.clear()
        layers = quantizable_layers(self.omni, one_method(spec))
        self.quantized.update({name: quantize_layer(layer, method, name) for name, (layer, method) in layers.items()})

    def figures(self, kept: Collection[str]) -> tuple[dict[str, float], float]:
        """Generate with all but ``kept`` quantized; return the figures and the average time of a picture in seconds."""
        rows, times = [], []
        with swapped(self.omni, {name: layer for name, layer in self.quantized.items() if name not in kept}):
            for (_, prompt, seed), expected in zip(self.task.cases, self.reference, strict=True):
                picture, elapsed = self._picture(prompt, seed)
                rows.append(picture_metrics(expected, picture))
                times.append(elapsed)
        summary = median_and_worst(rows, {name: info.higher_is_better for name, info in OUTPUT_METRICS.items()})
        worst = {WORST + name: value for name, value in summary["worst"].items()}
        return {**summary["median"], **worst}, sum(times) / len(times)

    def _picture(self, prompt: str, seed: int) -> tuple[np.ndarray, float]:
        output = generate(self.omni, self.task, prompt, seed)
        return stack_pictures(output), output.generation_time_s


def by_worth(layers: Iterable[LayerDamage]) -> list[LayerDamage]:
    """Return layers in the order in which to keep them: the most squared damage per byte saved first."""
    return sorted(layers, key=lambda layer: (-(layer.damage**2) / max(layer.saved_bytes, 1), layer.name))


def linear_bytes(layers: Iterable[LayerDamage], kept: Collection[str]) -> int:
    """Return the bytes of the layers with ``kept`` as they are and the others quantized."""
    return sum(layer.bytes_before if layer.name in kept else layer.bytes_after for layer in layers)


def search(
    side: Side,
    methods: Sequence[Any],
    task: Task,
    gate: Sequence[Condition],
    work: Path,
    budget: Budget | None = None,
    say: Say = print,
) -> Search:
    """Find the cheapest recipe that meets the gate on the task's prompts.

    Args:
        side: the reference; not quantized.
        methods: specifications of the methods to choose from.
        task: prompts and seeds of the search.
        gate: conditions; those on time and memory are left to the verification.
        work: folder of the state; what it knows of the same search is not done again.
        budget: ``None``: no limit.
        say: called with a line per trial.

    Raises:
        ConfigError: no single method, one that applies to no layer, or a ``work`` of another search.
    """
    omni = side.load()
    for spec in methods:
        quantizable_layers(omni, one_method(spec))
    log = _Log(work / _TRIALS, _question(side, methods, task, gate))
    bench = Bench(omni, task)
    calls = record_calls(omni, task)
    start, damages = time.perf_counter(), []
    for index, spec in enumerate(methods):
        damages.append(measure(omni, spec, task, work / f"sensitivity_{index}.json", calls=calls))
        bench.take(spec)
        finder = _Finder(bench, index, damages[-1], gate, log, say)
        kept = finder.shortest()
        if kept is not None:
            finder.give_up(kept, lambda: (budget or Budget()).is_spent(log.new, time.perf_counter() - start))
    passed = [trial for trial in log.trials if trial.ok]
    best = min(passed, key=lambda trial: (trial.linear_bytes, trial.generation_time_s), default=None)
    return Search(best, log.trials, damages)


def _question(side: Side, methods: Sequence[Any], task: Task, gate: Sequence[Condition]) -> dict[str, Any]:
    return {
        "reference": asdict(side),
        "methods": list(methods),
        "task": asdict(task),
        "gate": [str(condition) for condition in gate],
    }


class _Log:
    """Trials on disk, written after each."""

    def __init__(self, file: Path, question: Mapping[str, Any]) -> None:
        self.file = file
        self.question = json.loads(json.dumps(to_json(question)))
        self.trials: list[Trial] = []
        self.new = 0
        if file.exists():
            self.trials = self._read()

    def _read(self) -> list[Trial]:
        try:
            state = json.loads(self.file.read_text(encoding="utf-8"))
            question, rows = state["settings"], state["trials"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self.file} is no state of lowbit tune; name another --work-dir") from error
        if question != self.question:
            different = ", ".join(key for key in self.question if question.get(key) != self.question[key])
            raise ConfigError(
                f"{self.file} belongs to a search with other settings ({different}); name another --work-dir"
            )
        return [Trial(**{**row, "kept": tuple(row["kept"]), "figures": _floats(row["figures"])}) for row in rows]

    def find(self, method: int, kept: Collection[str]) -> Trial | None:
        return next((trial for trial in self.trials if trial.method == method and set(trial.kept) == set(kept)), None)

    def add(self, trial: Trial) -> None:
        self.trials.append(trial)
        self.new += 1
        state = {"settings": self.question, "trials": [asdict(trial) for trial in self.trials]}
        write_text(self.file, json.dumps(to_json(state), indent=1, allow_nan=False))


def _floats(figures: Mapping[str, Any]) -> dict[str, float]:
    return {name: float("nan") if value is None else float(value) for name, value in figures.items()}


class _Finder:
    """The search with one method."""

    def __init__(
        self,
        bench: Bench,
        method: int,
        layers: Sequence[LayerDamage],
        gate: Sequence[Condition],
        log: _Log,
        say: Say,
    ) -> None:
        self.bench, self.method, self.layers, self.log, self.say = bench, method, layers, log, say
        self.gate = [condition for condition in gate if condition.metric not in RATIOS]
        self.order = [layer.name for layer in by_worth(layers)]

    def trial(self, kept: Collection[str]) -> Trial:
        """Return what a recipe gives, from the log if it is there."""
        known = self.log.find(self.method, kept)
        if known is not None:
            return known
        figures, seconds = self.bench.figures(kept)
        ok = all(verdict.ok for verdict in judge(self.gate, figures))
        names = tuple(name for name in self.order if name in kept)
        trial = Trial(self.method, names, linear_bytes(self.layers, kept), figures, seconds, ok)
        self.log.add(trial)
        shown = ", ".join(f"{condition.metric} {figures[condition.metric]:.5g}" for condition in self.gate)
        self.say(
            f"trial {len(self.log.trials):3}  keeps {len(kept):3} of {len(self.order)} layers"
            f"  {trial.linear_bytes / 1e6:9,.2f} MB  {shown}  {'meets the gate' if ok else 'does not'}"
        )
        return trial

    def shortest(self) -> tuple[str, ...] | None:
        """Return the shortest beginning of the order that meets the gate; ``None`` if only keeping all would."""
        low, high = -1, len(self.order)
        if self.trial(()).ok:
            return ()
        while high - low > 1:
            middle = (low + high) // 2
            if self.trial(self.order[:middle]).ok:
                high = middle
            else:
                low = middle
        return tuple(self.order[:high]) if high < len(self.order) else None

    def give_up(self, kept: Sequence[str], is_spent: Callable[[], bool]) -> tuple[str, ...]:
        """Quantize kept layers too, several at once and then fewer, as long as the gate holds."""
        left = list(kept)
        size = max(1, len(left) // 4)
        while left:
            index = len(left)
            while index > 0:  # from the end of the order: the least worth keeping
                if is_spent():
                    return tuple(left)
                start = max(0, index - size)
                fewer = left[:start] + left[index:]
                if self.trial(fewer).ok:
                    left = fewer
                index = start
            if size == 1:
                return tuple(left)
            size //= 2
        return ()


def recipe(spec: Any, kept: Collection[str], layers: Iterable[str]) -> dict[str, Any]:
    """Return what ``--quantization-config`` takes for a method that keeps some layers.

    Args:
        spec: the method, with options if any.
        kept: names with their component.
        layers: all names, with their component, that the method would take.
    """
    config = one_method(spec)
    own = config.to_dict()
    options = {"method": own.pop("quant_method"), **own}
    names = list(layers)
    parts: dict[str, dict[str, Any]] = {}
    for component in dict.fromkeys(name.partition(".")[0] for name in names):
        of_component = [name.partition(".")[2] for name in names if name.startswith(f"{component}.")]
        ignored = [name.partition(".")[2] for name in kept if name.startswith(f"{component}.")]
        patterns = [*(config.ignored_layers or ()), *(exact_pattern(name, of_component) for name in ignored)]
        parts[component] = {**options, **({"ignored_layers": patterns} if patterns else {})}
    return next(iter(parts.values())) if len(parts) == 1 else parts


def exact_pattern(name: str, names: Iterable[str]) -> str:
    """Return a pattern of ``ignored_layers`` for this layer of ``names`` alone: its name, if that is enough."""
    alone = not any(matches(name, other) for other in names if other != name)
    return name if alone else f"re:^{re.escape(name)}$"


def tune(
    side: Side,
    methods: Sequence[Any],
    task: Task,
    verification: Task,
    gate: Sequence[Condition],
    work: Path,
    budget: Budget | None = None,
    say: Say = print,
) -> tuple[dict[str, Any], Comparison]:
    """Search, then verify on other prompts, keeping more layers until the gate holds there too.

    Args:
        side: the reference; not quantized.
        methods: to choose from.
        task: of the search.
        verification: of the full comparison; its prompts must be others.
        gate: conditions to meet.
        work: folder of the state, created where it is missing.
        budget: of the search.
        say: called with a line per trial; goes to another process, so no local function.

    Returns:
        The recipe, and the comparison that verified it.

    Raises:
        ConfigError: no recipe meets the gate, or prompts appear in both tasks.
    """
    shared = set(task.prompts) & set(verification.prompts)
    if shared:
        raise ConfigError(f"Verify on prompts that the search does not use; both have {sorted(shared)[0]!r}")
    work.mkdir(parents=True, exist_ok=True)
    found: Search = in_process(search, side, list(methods), task, tuple(gate), work, budget, say)
    if found.best is None:
        raise ConfigError(_no_recipe(found, gate))
    layers = found.layers[found.best.method]
    order, kept = [layer.name for layer in by_worth(layers)], list(found.best.kept)
    attempt = 0
    while True:
        spec = recipe(methods[found.best.method], kept, [layer.name for layer in layers])
        folder = _fresh(work / f"verification_{attempt}")
        candidate = replace(side, name="candidate", quantization_config=spec)
        done = compare(Plan(reference=side, candidate=candidate, task=verification, gate=gate), folder)
        say(f"verified keeping {len(kept)} layers: " + ", ".join(str(verdict) for verdict in done.verdicts))
        if done.ok:
            return spec, done
        more = [name for name in order if name not in kept][: max(1, len(order) // 16)]
        if not more:
            raise ConfigError("No recipe meets the gate on the verification's prompts, even with every layer kept")
        kept += more
        attempt += 1


def _fresh(folder: Path) -> Path:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _no_recipe(found: Search, gate: Sequence[Condition]) -> str:
    closest = max(found.trials, key=lambda trial: trial.figures.get("psnr_db", float("-inf")))
    worst = ", ".join(layer.name for layer in rank(found.layers[closest.method])[:3])
    return (
        f"No recipe meets {', '.join(map(str, gate))}: keeping {len(closest.kept)} layers gives psnr_db"
        f" {closest.figures['psnr_db']:.4g}. The most damaging layers are {worst}. Allow a gentler method, or lower the"
        " gate"
    )
