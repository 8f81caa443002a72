"""Requests: taken in turn, from several threads, ended early; and the engine's three functions apart."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tqdm import tqdm

from lowbit import Omni, OmniDiffusionConfig, OmniDiffusionSamplingParams, OmniRequestOutput
from lowbit.engine import loading
from lowbit.engine.calibrate import calibrate
from lowbit.engine.call_adapter import CallAdapter
from lowbit.engine.load import load
from lowbit.engine.memory import PeakMemory
from lowbit.engine.optimize import optimize
from lowbit.engine.request import Request, pipeline_view
from lowbit.engine.runner import Runner
from lowbit.engine.scheduler import Scheduler, groups
from lowbit.engine.sizes import check_limits, least_bytes
from lowbit.errors import AbortedError, ConfigError, DeadlineError
from tests.models.steps.pipelines import make

Params = OmniDiffusionSamplingParams
LATENT = {"output_type": "latent"}  # decoding takes longer than all steps
CASES = [
    ("a large red circle left of a small blue square", Params(seed=1, num_inference_steps=5, extra_args=LATENT)),
    ("a green star", Params(seed=2, num_inference_steps=6, height=64, width=96, extra_args=LATENT)),
    (
        "a small yellow star",
        Params(seed=3, num_inference_steps=4, guidance_scale=1.5, negative_prompt="a circle", extra_args=LATENT),
    ),
    ("a blue square", Params(seed=4, num_inference_steps=2, height=32, width=32, num_outputs_per_prompt=2)),
]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "int8": {"quantization": "int8"},
    "tea_cache": {"quantization": "int8", "cache_backend": "tea_cache"},
}


def pixels(output: OmniRequestOutput) -> list[np.ndarray]:
    return [np.asarray(image) for image in output.images]


def same(one: OmniRequestOutput, other: OmniRequestOutput) -> bool:
    pairs = zip(pixels(one), pixels(other), strict=True)
    return list(one.skipped_steps) == list(other.skipped_steps) and all(np.array_equal(*pair) for pair in pairs)


def generate(omni: Omni, prompt: str, params: Params, **options: Any) -> OmniRequestOutput:
    output = omni.generate(prompt, params, progress=False, **options)
    assert isinstance(output, OmniRequestOutput)
    return output


@pytest.fixture(scope="module", params=OPTIONS)
def omni(request: pytest.FixtureRequest) -> Omni:
    return Omni(device="cpu", **OPTIONS[request.param])


@pytest.fixture(scope="module")
def plain() -> Omni:
    return Omni(device="cpu")


@pytest.fixture(scope="module")
def indivisible() -> Omni:
    """The embedded model behind a class of which no step adapter knows."""
    omni = Omni(device="cpu", quantization="int8", cache_backend="tea_cache")
    base: Any = type(omni.pipeline)
    omni.pipeline.__class__ = type("OwnPipeline", (base,), {"__module__": __name__})
    return omni


def test_four_threads_give_the_pictures_of_one_after_the_other(omni: Omni) -> None:
    expected = [generate(omni, *case) for case in CASES]
    barrier = threading.Barrier(len(CASES))

    def run(case: Any) -> OmniRequestOutput:
        barrier.wait()
        return generate(omni, *case)

    with ThreadPoolExecutor(len(CASES)) as pool:
        found = list(pool.map(run, CASES))
    assert all(same(*pair) for pair in zip(found, expected, strict=True))


def test_threads_on_a_pipeline_without_steps(indivisible: Omni) -> None:
    assert isinstance(indivisible.runner.model_of({}), CallAdapter)
    expected = [generate(indivisible, *case) for case in CASES]
    assert any(output.skipped_steps for output in expected)
    with ThreadPoolExecutor(len(CASES)) as pool:
        found = list(pool.map(lambda case: generate(indivisible, *case), CASES))
    assert all(same(*pair) for pair in zip(found, expected, strict=True))
    other = Omni(device="cpu", quantization="int8", cache_backend="tea_cache")
    assert all(same(generate(other, *case), output) for case, output in zip(CASES, expected, strict=True))


def test_requests_in_turn_give_the_bytes_of_each_alone(omni: Omni) -> None:
    expected = [generate(omni, *case) for case in CASES]
    scheduler = Scheduler(omni.runner, max_running=3)
    for case in CASES:
        scheduler.submit(omni.request(*case))
    done = {}
    while scheduler.is_busy:
        for state in scheduler.step():
            done[state.request.prompt] = state.output()
    for (prompt, _), output in zip(CASES, expected, strict=True):
        assert same(done[prompt], output)


def test_int8_in_one_batch_gives_the_bytes_of_each_alone() -> None:
    omni = Omni(device="cpu", quantization="int8")
    cases = [
        (prompt, Params(seed=seed, num_inference_steps=3, extra_args=LATENT)) for seed, (prompt, _) in enumerate(CASES)
    ]
    expected = [generate(omni, *case) for case in cases]
    runner, batches = omni.runner, []
    runner.max_batch = 4
    omni.pipeline.transformer.layers[0].register_forward_pre_hook(lambda _module, args: batches.append(len(args[0])))
    states = [runner.start(omni.request(*case)) for case in cases]
    while any(not state.is_done for state in states):
        runner.step([state for state in states if not state.is_done])
    assert set(batches) == {4}
    assert all(same(state.output(), output) for state, output in zip(states, expected, strict=True))


def test_the_shared_pipeline_is_left_alone(omni: Omni) -> None:
    pipeline = omni.pipeline
    before, config = dict(vars(pipeline)), dict(pipeline.config)
    scheduler = dict(vars(pipeline.scheduler))
    classes = [type(module) for module in pipeline.transformer.modules()]
    generate(omni, *CASES[0])
    assert vars(pipeline) == before
    assert dict(pipeline.config) == config
    assert all(vars(pipeline.scheduler)[name] is value for name, value in scheduler.items())
    assert [type(module) for module in pipeline.transformer.modules()] == classes


def test_a_view_has_a_scheduler_of_its_own(plain: Omni) -> None:
    view = pipeline_view(plain.pipeline)
    assert view.scheduler is not plain.pipeline.scheduler
    assert view.transformer is plain.pipeline.transformer
    view.scheduler.set_timesteps(3)
    view.set_progress_bar_config(disable=True)
    assert len(plain.pipeline.scheduler.timesteps) != 3


def test_a_deadline_ends_a_request_at_its_next_step(omni: Omni) -> None:
    with pytest.raises(DeadlineError, match=r"ended after 0 denoising steps: its deadline passed"):
        generate(omni, *CASES[0], timeout_s=0.0)

    def slow(step: int, latents: torch.Tensor) -> None:
        time.sleep(0.2 if step == 1 else 0.0)

    state = omni.runner.start(omni.request(*CASES[0], on_step=slow, deadline=time.monotonic() + 1e9))
    omni.runner.step([state])
    object.__setattr__(state.request, "deadline", time.monotonic() + 0.1)
    while not state.is_done:
        omni.runner.step([state])
    assert isinstance(state.error, TimeoutError)
    assert len(state.step_ends) == 2
    with pytest.raises(DeadlineError, match="ended after 2 denoising steps"):
        state.output()


def test_an_aborted_request_ends_and_no_other(omni: Omni) -> None:
    expected = generate(omni, *CASES[1])
    first, second = (omni.runner.start(omni.request(*case)) for case in CASES[:2])
    omni.runner.step([first, second])
    first.abort()
    while not second.is_done:
        omni.runner.step([state for state in (first, second) if not state.is_done])
    with pytest.raises(AbortedError, match="ended after 1 denoising steps: it was aborted"):
        first.output()
    assert same(second.output(), expected)


def test_calls_end_early_at_a_denoising_step(indivisible: Omni) -> None:
    states: list[Any] = []

    def abort(step: int, latents: torch.Tensor) -> None:
        if step == 1:
            states[0].abort()

    states.append(indivisible.runner.start(indivisible.request(*CASES[0], on_step=abort)))
    indivisible.runner.step(states)
    assert isinstance(states[0].error, AbortedError)
    assert len(states[0].step_ends) == 2


def test_an_error_of_a_hook_ends_its_request(plain: Omni) -> None:
    def fail(step: int, latents: torch.Tensor) -> None:
        raise RuntimeError("of the hook")

    with pytest.raises(RuntimeError, match="of the hook"):
        generate(plain, *CASES[0], on_step=fail)
    generate(plain, *CASES[3])


def test_times_of_every_step(omni: Omni, indivisible: Omni) -> None:
    for each in (omni, indivisible):
        output = generate(each, *CASES[0], on_step=lambda step, _: time.sleep(0.3 if step == 0 else 0.0))
        assert len(output.step_times_s) == output.num_inference_steps == 5
        assert min(output.step_times_s) > 0
        assert output.step_times_s[1] > 0.3  # the hook runs after the step's end
        assert output.generation_time_s > sum(output.step_times_s)


def test_prompts_may_be_any_iterable(plain: Omni) -> None:
    params = Params(seed=0, num_inference_steps=1, extra_args=LATENT)
    outputs = plain.generate((prompt for prompt, _ in CASES[:2]), params, progress=False)
    assert isinstance(outputs, list)
    assert [output.prompt for output in outputs] == [prompt for prompt, _ in CASES[:2]]


def test_each_request_has_a_bar(plain: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    totals: list[tuple[int, int]] = []
    close = tqdm.close
    monkeypatch.setattr(tqdm, "close", lambda bar: (totals.append((bar.total, bar.n)), close(bar)))
    params = Params(seed=0, num_inference_steps=2, height=32, width=32)
    states = [plain.runner.start(plain.request("a star", params, progress=shown)) for shown in (True, False)]
    assert [state.bar.disable for state in states] == [False, True]
    plain.runner.step(states)
    plain.runner.step(states)
    assert (2, 2) in totals


def test_grouping_keeps_order_and_bounds() -> None:
    assert groups([1, 2, 3, 4, 5], lambda value: value % 2, 2) == [[1, 3], [2, 4], [5]]
    assert groups([1, 2, 3], lambda _: 0) == [[1], [2], [3]]
    assert groups([], lambda _: 0, 4) == []


def test_the_scheduler_runs_no_more_than_asked() -> None:
    class Counting:
        def __init__(self) -> None:
            self.order: list[list[str]] = []

        def start(self, request: Request) -> Any:
            return SimpleNamespace(request=request, is_done=False, left=len(request.seeds))

        def step(self, states: Any) -> None:
            self.order.append([state.request.prompt for state in states])
            for state in states:
                state.left -= 1
                state.is_done = state.left == 0

    runner = Counting()
    scheduler = Scheduler(runner, max_running=2)
    for prompt, steps in (("a", 3), ("b", 1), ("c", 2)):
        scheduler.submit(Request(prompt=prompt, seeds=range(steps)))
    done = []
    while scheduler.is_busy:
        done += [state.request.prompt for state in scheduler.step()]
    assert runner.order == [["a", "b"], ["a", "c"], ["a", "c"]]
    assert done == ["b", "a", "c"]


def test_overlapping_measurements_keep_their_peaks() -> None:
    device = torch.device("cpu")
    outer = PeakMemory(device)
    block = torch.ones(50_000_000)  # 200 MB
    del block
    inner = PeakMemory(device)
    assert outer.megabytes() - inner.megabytes() > 150


def test_load_calibrate_and_optimize_apart() -> None:
    prompts = [CASES[0][0]]
    spec = {"method": "int8", "smoothing": 0.5}
    omni = Omni(quantization_config=spec, calibration_prompts=prompts, device="cpu")
    config = OmniDiffusionConfig(quantization_config=spec, calibration_prompts=prompts, device="cpu")
    loaded = load(config)
    assert "transformer" not in loaded.manifests
    calibrate(loaded, prompts)
    assert loaded.manifests["transformer"].by_kernel() == omni.manifests["transformer"].by_kernel()
    assert optimize(loaded).set_aside == omni.set_aside
    state = loaded.runner.start(omni.request(*CASES[0]))
    while not state.is_done:
        loaded.runner.step([state])
    assert same(state.output(), generate(omni, *CASES[0]))
    with pytest.raises(ConfigError, match="needs calibration_prompts"):
        calibrate(load(config), [])


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_model_is_resolved_and_read_once(monkeypatch: pytest.MonkeyPatch, quantization: str | None) -> None:
    import lowbit.engine.load as load_module

    counts = {"resolve_model": 0, "read_components": 0}
    for name in counts:
        original = getattr(loading, name)

        def counted(*args: Any, name: str = name, original: Any = original) -> Any:
            counts[name] += 1
            return original(*args)

        for module in (loading, load_module):
            monkeypatch.setattr(module, name, counted)
    Omni(quantization=quantization, device="cpu")
    assert counts == {"resolve_model": 1, "read_components": 1}


def test_a_configuration_is_not_changed() -> None:
    config = OmniDiffusionConfig(quantization_config="int8", dtype="bf16", device="cpu")
    resolved = config.resolved()
    assert (config.quantization_config, config.dtype, config.device) == ("int8", "bf16", "cpu")
    assert resolved.dtype == torch.bfloat16
    assert resolved.resolved() == resolved


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"height": 1040}, "height 1040: ZImageTransformer2DModel has positions for 64 tokens along it, .* 1024 at"),
        ({"width": 16 * 10**6}, "width 16000000: "),
        ({"num_outputs_per_prompt": 10**8}, "num_outputs_per_prompt 100000000: needs at least .* GB of memory"),
        ({"height": 1024, "width": 1024, "num_outputs_per_prompt": 10**5}, "Divide the number of pixels by"),
    ],
)
def test_sizes_that_can_not_be(plain: Omni, params: dict[str, int], message: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ConfigError, match=message):
        generate(plain, "a star", Params(**params))  # type: ignore[arg-type]
    assert time.perf_counter() - start < 1


def test_the_largest_size_with_positions_is_made(plain: Omni) -> None:
    output = generate(plain, "a star", Params(seed=0, num_inference_steps=1, height=16, width=1024, extra_args=LATENT))
    assert pixels(output)[0].shape[-1] == 1024 // 8


def test_prompts_past_the_positions_are_told(plain: Omni) -> None:
    args = {"max_sequence_length": 2048}
    with pytest.raises(ConfigError, match=r"prompt: \d+ tokens, of which the transformer has positions for 638"):
        generate(plain, "a star " * 700, Params(num_inference_steps=1, extra_args=args))


@pytest.mark.parametrize(
    ("family", "sizes", "message"),
    [
        ("qwen-image", {"height": 4 * 2 * (4096 - 512) + 4}, "height 28676: .* 7168 tokens"),
        ("z-image", {"width": 132}, "width 132: .* 32 tokens"),
        ("flux", {"height": 4 * 10**6, "width": 400}, "height 4000000, width 400: needs at least"),
    ],
)
def test_limits_of_other_families(family: str, sizes: dict[str, int], message: str) -> None:
    pipeline = make(family)
    with pytest.raises(ConfigError, match=message):
        check_limits(pipeline, sizes, torch.device("cpu"))
    check_limits(pipeline, {"height": 64, "width": 64}, torch.device("cpu"))


def test_the_least_memory_is_less_than_what_is_taken() -> None:
    """In a process of its own: others have memory left that they take again."""
    code = "from tests.engine.test_requests import check_least_memory; check_least_memory()"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)


def check_least_memory() -> None:
    pipeline = make("flux")
    pipeline.set_progress_bar_config(disable=True)
    run = {"height": 256, "width": 256, "num_inference_steps": 1, "max_sequence_length": 16}
    pipeline("a star", **{**run, "height": 32, "width": 32})
    peak = PeakMemory(torch.device("cpu"))
    before = peak.megabytes()
    pipeline("a star", **run)
    taken = (peak.megabytes() - before) * 1e6
    assert 0 < least_bytes(pipeline, pipeline.transformer, 256, 256, 1) < taken


def test_runners_take_turns_by_steps(plain: Omni) -> None:
    """A thread that waits gets its step while another's request is under way."""
    runner = Runner(plain.pipeline, torch.device("cpu"), plain.transformers)
    order: list[str] = []

    def run(name: str) -> None:
        request = plain.request(
            "a star", Params(seed=0, num_inference_steps=12, height=32, width=32), on_step=lambda *_: order.append(name)
        )
        state = runner.start(request)
        started.wait()
        while not state.is_done:
            runner.step([state])

    started = threading.Barrier(2)
    threads = [threading.Thread(target=run, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(order) == 24
    assert len(list(itertools.groupby(order))) > 2
