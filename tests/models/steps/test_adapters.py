"""Step adapters give the bytes of the pipelines' own calls."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

from lowbit.engine.call_adapter import CallAdapter
from lowbit.engine.request import Request, RequestState
from lowbit.engine.runner import Runner
from lowbit.errors import ConfigError
from lowbit.models.steps import find_step_model
from tests.models.steps.pipelines import MAKERS, make

PROMPT = "a small red circle"
SMALL = {"height": 32, "width": 48, "num_inference_steps": 3, "max_sequence_length": 32}

# (family, arguments): each reaches a branch of its own.
COMMON: dict[str, dict[str, Any]] = {
    "plain": {},
    "one step": {"num_inference_steps": 1},
    "several": {"num_images_per_prompt": 2},
    "sigmas": {"sigmas": [1.0, 0.7, 0.35, 0.1]},
    "array": {"output_type": "np"},
    "tensor": {"output_type": "pt"},
    "latent": {"output_type": "latent"},
}
TRUE_GUIDANCE: dict[str, dict[str, Any]] = {
    "guided": {"negative_prompt": "blur", "true_cfg_scale": 3.0},
    "guided, several": {"negative_prompt": "a large blur", "true_cfg_scale": 2.0, "num_images_per_prompt": 2},
    "scale without negative": {"true_cfg_scale": 3.0},
    "negative without scale": {"negative_prompt": "blur", "true_cfg_scale": 1.0},
    "not a multiple": {"height": 37, "width": 50},
}
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "z-image": {
        **COMMON,
        "unguided": {"guidance_scale": 0.0},
        "negative": {"negative_prompt": "a large blur", "guidance_scale": 3.0},
        "several negative": {"negative_prompt": "blur", "num_images_per_prompt": 2},
        "normalized": {"cfg_normalization": True},
        "normalized by half": {"cfg_normalization": 0.5},
        "truncated": {"cfg_truncation": 0.4, "num_inference_steps": 5},
        "not truncated": {"cfg_truncation": 2.0},
        "untruncated": {"cfg_truncation": None},
    },
    # One step is NaN with shift_terminal; guidance-distilled models fail in diffusers 0.42's transformer.
    "qwen-image": {
        **{name: case for name, case in COMMON.items() if name != "one step"},
        **TRUE_GUIDANCE,
        "guidance without effect": {"guidance_scale": 2.0},
    },
    "flux": {
        **COMMON,
        **TRUE_GUIDANCE,
        "second prompt": {"prompt_2": "a blue star"},
        "second negative": {"negative_prompt": "blur", "negative_prompt_2": "a star", "true_cfg_scale": 2.0},
        "guidance": {"guidance_scale": 1.0},
        "lora scale": {"joint_attention_kwargs": {"scale": 0.5}},
    },
    "flux-undistilled": {"plain": {}, "guided": {"negative_prompt": "blur", "true_cfg_scale": 3.0}},
}
ALL = [(family, case) for family, cases in CASES.items() for case in cases]
FAMILIES = ["z-image", "qwen-image", "flux"]
pipeline_of = functools.cache(make)


def request(arguments: dict[str, Any], seed: int = 3, **options: Any) -> Request:
    count = arguments.get("num_images_per_prompt", 1)
    return Request(prompt=PROMPT, arguments=arguments, seeds=[seed + index for index in range(count)], **options)


def runner_of(pipeline: Any, **options: Any) -> Runner:
    return Runner(pipeline, torch.device("cpu"), lambda: {"transformer": pipeline.transformer}, **options)


def drain(runner: Runner, state: RequestState) -> Any:
    while not state.is_done:
        runner.step([state])
    if state.error is not None:
        raise state.error
    return state.result


def called(pipeline: Any, asked: Request, **more: Any) -> Any:
    """What the pipeline's own call gives."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in asked.seeds]
    return pipeline(prompt=asked.prompt, generator=generators, **asked.arguments, **more).images


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(expected, np.ndarray):
        return np.array_equal(found, expected)
    pairs = zip(found, expected, strict=True)
    return all(np.array_equal(np.asarray(one), np.asarray(other)) for one, other in pairs)


@pytest.mark.parametrize(("family", "case"), ALL)
def test_steps_give_the_bytes_of_the_call(family: str, case: str) -> None:
    pipeline = pipeline_of(family)
    asked = request({**SMALL, **CASES[family][case]})
    expected = called(pipeline, asked)
    runner = runner_of(pipeline)
    state = runner.start(asked)
    assert not isinstance(state.model, CallAdapter)
    assert same(drain(runner, state), expected)
    assert same(called(pipeline, asked), expected)  # nothing was left behind


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes(family: str, dtype: torch.dtype) -> None:
    pipeline = make(family, dtype)
    asked = request({**SMALL, "negative_prompt": "blur", "output_type": "latent"})
    runner = runner_of(pipeline)
    assert same(drain(runner, runner.start(asked)), called(pipeline, asked))


@pytest.mark.parametrize("family", ["qwen-image", "flux"])
def test_default_sizes(family: str) -> None:
    pipeline = make(family)
    pipeline.default_sample_size = 16
    asked = request({"num_inference_steps": 2, "output_type": "latent", "max_sequence_length": 32})
    runner = runner_of(pipeline)
    assert same(drain(runner, runner.start(asked)), called(pipeline, asked))


@pytest.mark.parametrize("family", FAMILIES)
def test_given_embeddings_and_latents(family: str) -> None:
    pipeline = pipeline_of(family)
    encoded = pipeline.encode_prompt(PROMPT, max_sequence_length=32)
    given: dict[str, Any] = {"prompt_embeds": encoded[0]}
    if family == "z-image":
        given["negative_prompt_embeds"] = encoded[1]
    if family == "flux":
        given["pooled_prompt_embeds"] = encoded[1]
    first = called(pipeline, request({**SMALL, "output_type": "latent"}))
    given |= {"latents": torch.randn(first.shape, generator=torch.Generator().manual_seed(1)).to(first.dtype)}
    arguments = {**SMALL, **given, "output_type": "latent"}
    expected = pipeline(**arguments).images
    runner = runner_of(pipeline)
    asked = Request(prompt=None, arguments=arguments)  # type: ignore[arg-type]
    assert same(drain(runner, runner.start(asked)), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_callbacks_see_and_replace_what_they_do_in_the_call(family: str) -> None:
    pipeline = pipeline_of(family)

    def run(generate: Any) -> tuple[Any, list[Any]]:
        seen: list[Any] = []

        def callback(view: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
            seen.append((step, float(timestep), view.num_timesteps, view.guidance_scale, sorted(tensors)))
            seen.append(tensors["latents"].clone())
            if step == 0:
                tensors["prompt_embeds"] = [part * 2 for part in tensors["prompt_embeds"]]
                if family != "z-image":
                    tensors["prompt_embeds"] = torch.stack(tensors["prompt_embeds"])
            if step == 1:
                tensors["latents"] = tensors["latents"] * 0.5
            return tensors

        names = ["latents", "prompt_embeds"]
        asked = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}
        return generate(request({**SMALL, **asked})), seen

    runner = runner_of(pipeline)
    expected, seen = run(lambda asked: called(pipeline, asked))
    found, also_seen = run(lambda asked: drain(runner, runner.start(asked)))
    assert same(found, expected)
    assert len(seen) == 6
    for one, other in zip(seen, also_seen, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("family", FAMILIES)
def test_callbacks_may_interrupt(family: str) -> None:
    pipeline = pipeline_of(family)

    def callback(view: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        view._interrupt = step == 1
        return tensors

    asked = request({**SMALL, "callback_on_step_end": callback})
    runner = runner_of(pipeline)
    state = runner.start(asked)
    assert same(drain(runner, state), called(pipeline, asked))
    assert len(state.step_ends) == 2


def test_callbacks_may_change_the_guidance_of_z_image() -> None:
    pipeline = pipeline_of("z-image")

    def callback(view: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        view._guidance_scale = 0.0
        return tensors

    asked = request({**SMALL, "callback_on_step_end": callback})
    runner = runner_of(pipeline)
    assert same(drain(runner, runner.start(asked)), called(pipeline, asked))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_hook_sees_what_a_callback_sees(family: str) -> None:
    pipeline, runner = pipeline_of(family), runner_of(pipeline_of(family))
    expected: list[torch.Tensor] = []

    def callback(_view: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        expected.append(tensors["latents"].clone())
        return {"latents": tensors["latents"] * 0.5} if step == 1 else tensors

    picture = called(pipeline, request({**SMALL, "callback_on_step_end": callback}))
    seen: list[tuple[int, torch.Tensor]] = []

    def hook(step: int, latents: torch.Tensor) -> torch.Tensor | None:
        seen.append((step, latents.clone()))
        return latents * 0.5 if step == 1 else None

    assert same(drain(runner, runner.start(request(SMALL, on_step=hook))), picture)
    assert [step for step, _ in seen] == [0, 1, 2]
    assert all(torch.equal(one, other) for (_, one), other in zip(seen, expected, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_requests_stepped_in_turn_give_the_bytes_of_each_alone(family: str) -> None:
    pipeline, runner = pipeline_of(family), runner_of(pipeline_of(family))
    asked = [
        request(SMALL, seed=1),
        request({**SMALL, "height": 64, "width": 32, "num_inference_steps": 5, "negative_prompt": "blur"}, seed=2),
        request({**SMALL, "num_images_per_prompt": 2, "num_inference_steps": 2}, seed=7),
    ]
    expected = [called(pipeline, each) for each in asked]
    states = [runner.start(each) for each in asked]
    while any(not state.is_done for state in states):
        runner.step([state for state in states if not state.is_done])
    for state, picture in zip(states, expected, strict=True):
        assert same(state.result, picture)


@pytest.mark.parametrize("family", FAMILIES)
def test_requests_of_equal_shape_share_a_forward(family: str) -> None:
    pipeline = make(family, torch.float32)
    guidance = {"negative_prompt": "blur", "true_cfg_scale": 2.0} if family != "z-image" else {}
    arguments = {**SMALL, **guidance, "output_type": "latent"}
    asked = [request(arguments, seed=1), request({**arguments, "num_inference_steps": 5}, seed=2)]
    asked.append(request({**arguments, "height": 64}, seed=3))
    expected = [called(pipeline, each) for each in asked]
    runner, rows = runner_of(pipeline, max_batch=4), []
    name = "all_final_layer" if family == "z-image" else "proj_out"
    layer = next(part for part_name, part in pipeline.transformer.named_modules() if part_name.startswith(f"{name}"))
    layer = layer["2-1"] if family == "z-image" else layer
    layer.register_forward_hook(lambda _module, _inputs, output: rows.append(len(output)))
    states = [runner.start(each) for each in asked]
    runner.step(states)
    branches = 2 if family == "z-image" else 1
    assert sorted(set(rows)) == [branches, 2 * branches]
    while any(not state.is_done for state in states):
        runner.step([state for state in states if not state.is_done])
    for state, latents in zip(states, expected, strict=True):
        torch.testing.assert_close(state.result, latents, atol=1e-4, rtol=1e-4)


def test_what_needs_the_call_gets_it() -> None:
    pipeline = pipeline_of("flux")
    adapter = find_step_model(pipeline)
    assert adapter is not None
    assert adapter.refusal({"ip_adapter_image": None}) is None
    assert "ip_adapter_image" in (adapter.refusal({"ip_adapter_image": object()}) or "")

    class Own(type(pipeline)):  # type: ignore[misc]
        pass

    own = Own(**pipeline.components)
    assert find_step_model(own) is None
    runner = runner_of(own)
    state = runner.start(request(SMALL))
    assert isinstance(state.model, CallAdapter)
    assert same(drain(runner, state).images, called(pipeline, request(SMALL)))
    assert len(state.step_ends) == 3


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("z-image", {"height": 30}, "height 30: expected a multiple of 4"),
        ("z-image", {"callback_on_step_end_tensor_inputs": ["noise"]}, "unknown 'noise'. Expected some of: latents"),
        ("qwen-image", {"callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
        ("qwen-image", {"max_sequence_length": 2000}, "cannot be greater than 1024"),
        ("qwen-image-distilled", {}, "guidance-distilled: give guidance_scale"),
        ("flux", {"max_sequence_length": 2000}, "cannot be greater than 512"),
    ],
)
def test_what_the_pipelines_do_not_take(family: str, arguments: dict[str, Any], message: str) -> None:
    runner = runner_of(pipeline_of(family))
    state = runner.start(request({**SMALL, **arguments}))
    assert isinstance(state.error, ConfigError)
    assert message in str(state.error)


def test_the_table_names_pipelines_of_diffusers() -> None:
    import diffusers

    from lowbit.models.steps import STEP_MODELS

    assert all(hasattr(diffusers, name) for name in STEP_MODELS)
    assert {type(pipeline_of(name)).__name__ for name in MAKERS} == set(STEP_MODELS)
