"""TeaCache on small random transformers of every family it knows, step by step."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from lowbit.cache.tea_cache import FAMILIES, Recording, TeaCache, fit, polynomial
from lowbit.errors import ConfigError
from lowbit.models.tea_cache import COEFFICIENTS, find_coefficients
from tests.support.denoising import STEPS, Loop

NAMES = ["z-image", "flux", "qwen-image", "wan"]
IDENTITY = (0.0, 0.0, 0.0, 1.0, 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_skipped_is_exactly_the_model(name: str) -> None:
    loop = Loop(name, branches=2)
    expected = loop.run(0.01)
    cache = TeaCache(1e-12, IDENTITY)
    with cache.active(loop.pipeline, loop.transformers, STEPS) as skips:
        found = loop.run(0.01)
    assert skips.steps() == []
    for first, second in zip(expected, found, strict=True):
        assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_skipped_step_adds_its_own_branchs_residual(name: str) -> None:
    loop = Loop(name, branches=2)
    (expected, *_) = loop.run()
    ran = []
    block = loop.model.get_submodule(FAMILIES[type(loop.model).__name__].blocks[-1])[-1]
    block.register_forward_hook(lambda *_: ran.append(1))
    with TeaCache(1e9, IDENTITY).active(loop.pipeline, loop.transformers, STEPS) as skips:
        found = loop.run()
    assert skips.steps() == [1, 2, 3, 4]
    assert len(ran) == 2 * 2  # both branches of the first and of the last step
    assert not torch.equal(expected[0], expected[1])
    for row in found:
        for one, other in zip(expected, row, strict=True):
            torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_decisions_are_those_of_the_accumulated_changes(name: str) -> None:
    loop = Loop(name)
    recording = Recording()
    with recording.active(loop.pipeline, loop.transformers, STEPS):
        loop.run(0.02)
    changes = [change for change, _ in recording.pairs["transformer"]]
    assert len(changes) == STEPS - 1
    threshold = 1.5 * float(np.median(changes))
    total, expected = 0.0, []
    for step in range(1, STEPS - 1):
        total += changes[step - 1]
        if total < threshold:
            expected.append(step)
        else:
            total = 0.0
    assert 0 < len(expected) < STEPS - 2
    with TeaCache(threshold, IDENTITY).active(loop.pipeline, loop.transformers, STEPS) as skips:
        loop.run(0.02)
    assert skips.steps() == expected


def test_a_new_generation_starts_clean() -> None:
    loop = Loop("z-image")
    cache = TeaCache(1e9, IDENTITY)
    for _ in range(2):
        with cache.active(loop.pipeline, loop.transformers, STEPS) as skips:
            loop.run()
        assert skips.steps() == [1, 2, 3, 4]


def test_blocks_run_after_an_error() -> None:
    loop = Loop("z-image")
    expected = loop.run(0.01)
    feature = loop.inputs[0].pop("cap_feats")
    with (
        TeaCache(1e9, IDENTITY).active(loop.pipeline, loop.transformers, STEPS),
        pytest.raises(TypeError, match="cap_feats"),
    ):
        loop.run()
    loop.inputs[0]["cap_feats"] = feature
    found = loop.run(0.01)
    assert all(torch.equal(first[0], second[0]) for first, second in zip(expected, found, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_blocks_stay_what_they_are(name: str) -> None:
    loop = Loop(name)
    state, names = loop.model.state_dict(), [type(module).__name__ for module in loop.model.modules()]
    modules = list(loop.model.modules())
    TeaCache(0.1, IDENTITY).install(loop.transformers)
    assert list(loop.model.modules()) == modules
    assert [type(module).__name__ for module in loop.model.modules()] == names
    assert loop.model.state_dict().keys() == state.keys()
    classes = [type(module) for module in modules]
    TeaCache(0.1, IDENTITY).install(loop.transformers)
    assert [type(module) for module in modules] == classes
    copied = copy.deepcopy(loop.model)
    assert [type(module) for module in copied.modules()] == classes


@pytest.mark.parametrize("name", NAMES)
def test_two_generations_in_turn_do_not_meet(name: str) -> None:
    loop, cache = Loop(name), TeaCache(0.02, IDENTITY)
    moves = {0.02: 3, 0.2: 7}  # how fast the input changes -> steps

    def alone(move: float, steps: int) -> tuple[list[torch.Tensor], list[int]]:
        with cache.active(loop.pipeline, loop.transformers, steps) as skips:
            return [row[0] for row in loop.run(move, steps)], skips.steps()

    expected = {move: alone(move, steps) for move, steps in moves.items()}
    runs: dict[Any, Any] = {}
    for move, steps in moves.items():
        own = SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler())
        runs[move] = (own, cache.begin(own, loop.transformers, steps), [], loop.stepping(own, move, steps))
    while any(len(found) < moves[move] for move, (_, _, found, _) in runs.items()):
        for _, request, found, steps in runs.values():
            with request.working():
                found += [row[0] for row in itertools.islice(steps, 1)]
    for move, (_, request, found, _) in runs.items():
        assert request.skips.steps() == expected[move][1]
        assert all(torch.equal(*pair) for pair in zip(found, expected[move][0], strict=True))


def test_compiled_blocks_stay_compiled() -> None:
    loop = Loop("z-image")
    expected = loop.run(0.01)
    for block in loop.model.layers:
        block.compile(fullgraph=True, backend="eager")
    with TeaCache(0.05, IDENTITY).active(loop.pipeline, loop.transformers, STEPS) as skips:
        found = loop.run(0.01)
    assert skips.steps()
    ran = [step for step in range(STEPS) if step not in skips.steps()]
    for step in ran:
        torch.testing.assert_close(found[step][0], expected[step][0], atol=1e-5, rtol=1e-4)


def test_fitting_finds_a_polynomial_again() -> None:
    coefficients = [2.0, -1.0, 0.5, 0.25, 0.01]
    changes = np.linspace(0.01, 1.5, 40)
    pairs = [(float(x), float(np.polyval(coefficients, x))) for x in changes]
    assert fit(pairs) == pytest.approx(coefficients, abs=1e-8)
    assert polynomial(coefficients, 0.3) == pytest.approx(np.polyval(coefficients, 0.3))
    with pytest.raises(ConfigError, match="too few"):
        fit(pairs[:4])


def test_coefficients_are_found_by_class_and_configuration() -> None:
    assert all(len(entry.values) == 5 for entry in COEFFICIENTS)
    large = find_coefficients("WanTransformer3DModel", {"num_layers": 40, "image_dim": None})
    small = find_coefficients("WanTransformer3DModel", {"num_layers": 30, "image_dim": None})
    assert large is not None
    assert small is not None
    assert large.values != small.values
    assert find_coefficients("WanTransformer3DModel", {"num_layers": 3}) is None
    loop = Loop("wan")
    with pytest.raises(ConfigError, match="calibrate-cache"):
        TeaCache().check(loop.transformers)
    with pytest.raises(ConfigError, match="does not know Linear"):
        TeaCache().check({"transformer": torch.nn.Linear(1, 1)})
