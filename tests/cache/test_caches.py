"""The table of caches, and diffusers' own behind it."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from lowbit import Omni
from lowbit.cache import CACHE_BACKENDS, build_cache
from lowbit.cache.tea_cache import TeaCache
from lowbit.errors import ConfigError
from tests.support.denoising import STEPS, Loop


def test_names_and_defaults() -> None:
    assert build_cache(None) is None
    assert build_cache("none") is None
    found = build_cache("TEA-CACHE", {"rel_l1_thresh": 0.3})
    assert isinstance(found, TeaCache)
    assert found.rel_l1_thresh == 0.3


@pytest.mark.parametrize(
    ("backend", "config", "message"),
    [
        ("teacache", None, "Unknown cache_backend: 'teacache'. Expected one of: tea_cache"),
        (None, {"rel_l1_thresh": 0.2}, "needs a cache_backend"),
        ("tea_cache", {"threshold": 0.2}, "has no option 'threshold'. Expected one of: rel_l1_thresh"),
        ("tea_cache", {"rel_l1_thresh": 0}, "positive"),
        ("tea_cache", {"rel_l1_thresh": "0.2"}, "positive"),
        ("tea_cache", {"coefficients": [1, 2]}, "5 numbers"),
        ("first_block_cache", {"thresh": 1}, "has no option 'thresh'. Expected one of: threshold"),
        ("mag_cache", {}, "mag_ratios"),
    ],
)
def test_what_is_no_cache(backend: str | None, config: dict[str, Any] | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_cache(backend, config)


def test_cache_dit_is_an_extra() -> None:
    pytest.importorskip("diffusers")
    try:
        import cache_dit  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match=r"lowbit\[cache-dit\]"):
            build_cache("cache_dit")
    else:
        assert build_cache("cache_dit", {"Fn_compute_blocks": 1}) is not None
    assert "cache_dit" in CACHE_BACKENDS


@pytest.mark.parametrize(
    ("backend", "config", "skipped"),
    [
        ("first_block_cache", {"threshold": 1e9}, [1, 2, 3, 4, 5]),
        ("first_block_cache", {"threshold": 1e-12}, []),
        ("mag_cache", {"mag_ratios": [1.0] * STEPS, "retention_ratio": 0.2, "max_skip_steps": 2}, None),
        ("taylorseer", {"cache_interval": 2}, None),
        ("pyramid_attention", {"spatial_attention_block_skip_range": 2}, []),
    ],
)
def test_caches_of_diffusers_work_and_leave_nothing_behind(
    backend: str, config: dict[str, Any], skipped: list[int] | None
) -> None:
    loop = Loop("flux", branches=2)
    loop.pipeline.current_timestep = 500
    expected = loop.run(0.01)
    cache = build_cache(backend, config)
    assert cache is not None
    cache.check(loop.transformers)
    for _ in range(2):  # the second generation starts clean
        with cache.active(loop.pipeline, loop.transformers, STEPS) as skips:
            found = loop.run(0.01)
        if skipped is not None:
            assert skips.steps() == skipped
        assert all(torch.equal(*pair) for pair in zip(expected[0], found[0], strict=True))
    again = loop.run(0.01)
    assert all(torch.equal(first[0], second[0]) for first, second in zip(expected, again, strict=True))


@pytest.mark.parametrize(
    ("backend", "config"),
    [
        ("first_block_cache", {"threshold": 0.5}),
        ("mag_cache", {"mag_ratios": [1.0, 0.99, 1.01, 0.98, 1.0, 1.0], "max_skip_steps": 2, "threshold": 0.05}),
        ("taylorseer", {"cache_interval": 2, "disable_cache_before_step": 1}),
        ("pyramid_attention", {"spatial_attention_block_skip_range": 2}),
    ],
)
def test_two_generations_in_turn_have_caches_of_their_own(backend: str, config: dict[str, Any]) -> None:
    loop, cache = Loop("flux", branches=2), build_cache(backend, config)
    assert cache is not None
    moves = {0.02: 6, 0.2: 9}  # how fast the input changes -> steps

    def view() -> Any:
        return SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler(), current_timestep=500)

    expected, skips = {}, {}
    for move, steps in moves.items():
        own = view()
        with cache.active(own, loop.transformers, steps) as skips[move]:
            expected[move] = list(loop.stepping(own, move, steps))
    requests, runs = {}, {}
    found: dict[float, list[Any]] = {move: [] for move in moves}
    for move, steps in moves.items():
        own = view()
        requests[move] = cache.begin(own, loop.transformers, steps)
        runs[move] = loop.stepping(own, move, steps)
    for _ in range(max(moves.values())):
        for move, request in requests.items():
            with request.working():
                found[move] += itertools.islice(runs[move], 1)
    for move, request in requests.items():
        request.end()
        assert request.skips.steps() == skips[move].steps()
        for first, second in zip(expected[move], found[move], strict=True):
            assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert not loop.model.is_cache_enabled


def test_models_without_caches_in_diffusers_are_refused() -> None:
    with pytest.raises(ConfigError, match="no caches for ZImageTransformer2DModel"):
        Omni(device="cpu", cache_backend="first_block_cache")


def test_caches_that_do_not_work_compiled_are_refused() -> None:
    with pytest.raises(ConfigError, match="compiled"):
        Omni(device="cpu", cache_backend="first_block_cache", enforce_eager=False)
