"""One side of a comparison: a model generating in a process of its own, what it makes recorded in files.

A process per side, because two models must never sit in memory together, and because the memory of one must not count
for the other.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from lowbit.cache import build_cache
from lowbit.checkpoints.skeleton import empty_component
from lowbit.engine.config import parse_attention
from lowbit.engine.loading import ComponentIndex, read_components, resolve_model, route, route_attention
from lowbit.errors import ConfigError
from lowbit.evaluation.layers import Watch, block_errors, blocks, layer_errors, linear_layers, probe_steps
from lowbit.hosts.attention import check_attention
from lowbit.hosts.other_quantizers import kept_by_name
from lowbit.inputs.data import OmniDiffusionSamplingParams
from lowbit.models import is_diffusion_transformer
from lowbit.models.embedded import EMBEDDED_NAME
from lowbit.ops.cpu.features import processor_name
from lowbit.quantization.backends import BackendConfig
from lowbit.quantization.factory import build_quant_config
from lowbit.quantization.plan import plan_layers

if TYPE_CHECKING:
    from lowbit.engine import Omni
    from lowbit.outputs import OmniRequestOutput

_RECORD = "record.json"


@dataclass(frozen=True, kw_only=True)
class Side:
    """A model and how to run it. Plain data: it goes to another process.

    Attributes:
        name: ``"reference"`` or ``"candidate"``, or what else to call it.
        model: a folder or Hub id; ``None`` is the embedded model.
        quantization_config: what ``build_quant_config`` takes, as plain data.
        dtype: of what is not quantized.
        device: ``None`` takes an accelerator when there is one.
        enforce_eager: ``False`` compiles the transformer's blocks.
        cache_backend: as ``Omni`` takes it.
        cache_config: likewise.
        calibration_prompts: likewise.
        attention_quantization: likewise.
    """

    name: str
    model: str | None = None
    quantization_config: Any = None
    dtype: str = "bfloat16"
    device: str | None = None
    enforce_eager: bool = True
    cache_backend: str | None = None
    cache_config: Mapping[str, Any] | None = None
    calibration_prompts: tuple[str, ...] = ()
    attention_quantization: str | Mapping[str, str | None] | None = None

    def __post_init__(self) -> None:
        build_quant_config(self.quantization_config)
        parse_attention(self.attention_quantization)
        build_cache(self.cache_backend, self.cache_config)

    def check(self) -> dict[str, Any]:
        """Find out, without loading weights, whether the model can be quantized as asked.

        Returns:
            What ``check_comparable`` takes.

        Raises:
            ConfigError: no such model, component or layer.
            CheckpointError: a folder that is not a pipeline's.
        """
        source = resolve_model(None if self.model == EMBEDDED_NAME else self.model)
        components = read_components(source)
        chosen = route(build_quant_config(self.quantization_config), components)
        if not self.calibration_prompts and any(config.needs_calibration for config in chosen.values()):
            raise ConfigError(
                f"smoothing of the {self.name} is found by watching it generate: give --calibration-prompt"
            )
        for name, config in chosen.items():
            skeleton = empty_component(source, name, *components[name])
            if isinstance(config, BackendConfig):
                kept_by_name(skeleton, config)
            else:
                plan_layers(skeleton, config)
        transformers = [name for name, entry in components.items() if is_diffusion_transformer(*entry)]
        for name in route_attention(self.attention_quantization, components, transformers):
            check_attention(empty_component(source, name, *components[name]))
        return _read_comparable(source, components)

    def load(self) -> Omni:
        """Return the engine. Raises what ``Omni`` raises."""
        from lowbit.engine import Omni

        return Omni(
            self.model,
            quantization_config=self.quantization_config,
            dtype=self.dtype,
            device=self.device,
            enforce_eager=self.enforce_eager,
            cache_backend=self.cache_backend,
            cache_config=self.cache_config,
            calibration_prompts=self.calibration_prompts,
            attention_quantization=self.attention_quantization,
        )


@dataclass(frozen=True, kw_only=True)
class Task:
    """What both sides are to make: every prompt with every seed.

    Attributes:
        prompts: texts, in order.
        seeds: of the starting noise, drawn on the CPU.
        params: all else; its seed is not used.
        warmup_runs: generations of the first case that are not measured.
        measure_runs: generations of each case that are measured; the last one's pictures are kept.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    params: OmniDiffusionSamplingParams = field(default_factory=OmniDiffusionSamplingParams)
    warmup_runs: int = 0
    measure_runs: int = 1

    def __post_init__(self) -> None:
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise ConfigError("There is no prompt, or one is empty")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(f"Seeds must be different numbers, at least one: {list(self.seeds)}")
        if self.warmup_runs < 0 or self.measure_runs < 1:
            raise ConfigError("warmup_runs must be at least 0 and measure_runs at least 1")

    @property
    def cases(self) -> list[tuple[int, str, int]]:
        """Every prompt with every seed: (prompt's index, prompt, seed)."""
        return [(index, prompt, seed) for index, prompt in enumerate(self.prompts) for seed in self.seeds]


@dataclass(frozen=True)
class Recording:
    """What a side left in its folder.

    Attributes:
        folder: where.
        info: times, memory, manifests, versions, the scheduler, the sizes: ``record.json``.
    """

    folder: Path
    info: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Recording:
        """Read a recording that is complete."""
        return cls(folder, json.loads((folder / _RECORD).read_text()))

    def case(self, index: int, kind: str = "free") -> dict[str, torch.Tensor]:
        """Return a case's tensors.

        Args:
            index: into ``Task.cases``.
            kind: ``"free"`` or ``"forced"``.

        Returns:
            ``pictures`` uint8 [outputs or frames, height, width, 3] (only of ``"free"``) and ``latents`` float32
            [steps, ...], each step's latents after it.
        """
        tensors: dict[str, torch.Tensor] = load_file(case_file(self.folder, index, kind))
        return tensors


def case_file(folder: Path, index: int, kind: str) -> Path:
    """Return where a case is kept."""
    return folder / f"{kind}_{index:04}.safetensors"


def record(
    side: Side,
    task: Task,
    folder: Path,
    reference: Path | None = None,
    *,
    forced: bool = False,
    layers: bool = False,
) -> Recording:
    """Generate everything, in a process of its own.

    Args:
        side: the model.
        task: what to make.
        folder: an existing empty folder for the files.
        reference: the folder of the reference's recording: checked to be comparable before anything is generated.
        forced: generate once more with the reference's latents before each step.
        layers: look into the network at a few steps of the first case: without a reference keep what enters and leaves
            each layer and block, with one compare.

    Raises:
        ConfigError, CheckpointError, UnsupportedError: as ``Omni``; ConfigError also where the reference made something
            that is not comparable.
        RuntimeError: the process died.
    """
    recording: Recording = in_process(_record, side, task, folder, reference, forced, layers)
    return recording


# How a recording's process begins: it shares nothing with this one, which may have initialized a device.
START_METHOD = "spawn"

_DEATHS = {
    -9: ": killed, perhaps for want of memory",
    1: '; a script that compares needs `if __name__ == "__main__":` before its own calls, for the process imports it',
}


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return ``function(*arguments)``, called in a fresh process; its exceptions are raised here.

    Raises:
        RuntimeError: the process died (out of memory, most often), or raised what can't be sent.
    """
    context: Any = multiprocessing.get_context(START_METHOD)
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        ok, value = ours.recv()
    except EOFError:
        process.join()
        cause = _DEATHS.get(process.exitcode or 0, "")
        raise RuntimeError(f"The process that ran it ended with status {process.exitcode}{cause}") from None
    finally:
        ours.close()
        if process.is_alive():
            process.join(timeout=30)
        process.terminate()
        process.join()
    if ok:
        return value
    raise value


def _child(connection: Connection, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    try:
        connection.send((True, function(*arguments)))
    except Exception as error:
        try:
            connection.send((False, error))
        except Exception:  # an exception that can't be pickled
            connection.send((False, RuntimeError("".join(traceback.format_exception(error)))))


def _record(side: Side, task: Task, folder: Path, reference: Path | None, forced: bool, layers: bool) -> Recording:
    omni = side.load()
    information = describe(omni)
    other = Recording.read(reference) if reference is not None else None
    times: list[float] = []
    peaks: list[float] = []
    steps: list[int] = []
    skipped: list[int] = []
    first = task.cases[0]
    for _ in range(task.warmup_runs):
        generate(omni, task, first[1], first[2])
    for index, (_, prompt, seed) in enumerate(tqdm(task.cases, desc=side.name, unit="case")):
        for _ in range(task.measure_runs):
            latents: list[torch.Tensor] = []
            output = generate(omni, task, prompt, seed, _Keeper(latents))
            times.append(output.generation_time_s)
            peaks.append(output.peak_memory_mb)
        steps.append(output.num_inference_steps)
        skipped.append(len(output.skipped_steps))
        tensors = {"pictures": torch.from_numpy(stack_pictures(output)), "latents": torch.stack(latents)}
        if other is not None:
            check_same_shape(other.case(index), tensors)
        save_file(tensors, case_file(folder, index, "free"))
        if forced:
            save_file({"latents": _forced(omni, task, index, other)}, case_file(folder, index, "forced"))
    information |= {
        "num_inference_steps": steps[0],
        "per_case_skipped_steps": skipped,
        "per_run_generation_time_s": times,
        "avg_generation_time_s": sum(times) / len(times),
        "per_run_peak_memory_mb": peaks,
        "max_peak_memory_mb": max(peaks),
    }
    if layers and other is None:
        _keep_layers(omni, task, folder, steps[0])
    elif layers and other is not None:
        information["layers"] = _compare_layers(omni, task, other, steps[0])
    (folder / _RECORD).write_text(json.dumps(information, indent=1))
    return Recording(folder, information)


def _forced(omni: Omni, task: Task, index: int, reference: Recording | None) -> torch.Tensor:
    assert reference is not None
    _, prompt, seed = task.cases[index]
    known = reference.case(index)["latents"]
    latents: list[torch.Tensor] = []

    def replace(step: int, value: torch.Tensor) -> torch.Tensor:
        latents.append(_copy(value))
        return known[step].to(value)

    generate(omni, task, prompt, seed, replace)
    return torch.stack(latents)


def _layers_file(folder: Path, step: int) -> Path:
    return folder / f"layers_{step:04}.safetensors"


def _keep_layers(omni: Omni, task: Task, folder: Path, steps: int) -> None:
    """Write what enters and leaves linear layers and blocks at a few steps of the first case."""
    for step, samples in _watch(omni, task, {**linear_layers(omni), **blocks(omni)}, steps, None).items():
        save_file({key: value.contiguous() for key, value in samples.items()}, _layers_file(folder, step))


def _compare_layers(omni: Omni, task: Task, reference: Recording, steps: int) -> list[dict[str, Any]]:
    latents = reference.case(0)["latents"]
    found = _watch(omni, task, blocks(omni), steps, latents)
    result = []
    for step, samples in found.items():
        expected = load_file(_layers_file(reference.folder, step))
        result.append({"step": step, "linear": layer_errors(omni, expected), "blocks": block_errors(expected, samples)})
    return result


def _watch(
    omni: Omni, task: Task, modules: Mapping[str, Any], steps: int, latents: torch.Tensor | None
) -> dict[int, dict[str, torch.Tensor]]:
    """Generate the first case, with ``latents`` after each step if given, and return samples of the modules by step."""
    watch, wanted = Watch(), probe_steps(steps)
    watch.active = 0 in wanted
    found: dict[int, dict[str, torch.Tensor]] = {}

    def next_step(step: int, value: torch.Tensor) -> torch.Tensor | None:
        if watch.active:
            found[step] = watch.take()
        watch.active = step + 1 in wanted
        return latents[step].to(value) if latents is not None else None

    _, prompt, seed = task.cases[0]
    with watch.on(modules):
        generate(omni, task, prompt, seed, next_step)
    return found


class _Keeper:
    """A hook that keeps each step's latents."""

    def __init__(self, kept: list[torch.Tensor]) -> None:
        self.kept = kept

    def __call__(self, step: int, latents: torch.Tensor) -> None:
        self.kept.append(_copy(latents))


def _copy(latents: torch.Tensor) -> torch.Tensor:
    return latents.detach().float().cpu().clone()


def generate(
    omni: Omni,
    task: Task,
    prompt: str,
    seed: int,
    on_step: Callable[[int, torch.Tensor], torch.Tensor | None] | None = None,
) -> OmniRequestOutput:
    """Make one case."""
    from dataclasses import replace

    output = omni.generate(prompt, replace(task.params, seed=seed), progress=False, on_step=on_step)
    assert not isinstance(output, list)
    return output


def stack_pictures(output: OmniRequestOutput) -> np.ndarray:
    """Return the images or all frames of all videos: uint8 [N, height, width, 3]."""
    pictures = list(output.images) or [frame for video in output.frames for frame in video]
    return np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])


def describe(omni: Omni) -> dict[str, Any]:
    """Return what ran: model, pipeline, scheduler, quantization, times of loading, versions, machine."""
    import diffusers
    import transformers

    import lowbit

    return {
        "model": omni.config.model or "embedded",
        "pipeline": type(omni.pipeline).__name__,
        "scheduler": _scheduler_settings(omni.pipeline.scheduler),
        "dtype": str(omni.config.dtype).removeprefix("torch."),
        "device": str(omni.device),
        "device_name": _device_name(omni.device),
        "load_time_s": omni.load_time_s,
        "load_peak_memory_mb": omni.load_peak_memory_mb,
        "manifests": {name: manifest.to_dict() for name, manifest in omni.manifests.items()},
        "attention": {name: asdict(record) for name, record in omni.attention.items()},
        "versions": {
            "lowbit": lowbit.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def _scheduler_settings(scheduler: Any) -> dict[str, Any]:
    plain = (str, int, float, bool, type(None))
    settings = {key: value for key, value in scheduler.config.items() if isinstance(value, plain)}
    return {"class": type(scheduler).__name__, **{key: settings[key] for key in settings if not key.startswith("_")}}


def _read_comparable(source: str, components: ComponentIndex) -> dict[str, Any]:
    import diffusers

    pipeline = diffusers.DiffusionPipeline.load_config(source)["_class_name"]
    scheduler_class = getattr(diffusers, components["scheduler"][1])
    scheduler = scheduler_class.from_pretrained(source, subfolder="scheduler")
    return {"pipeline": pipeline, "scheduler": _scheduler_settings(scheduler)}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name()


def check_comparable(reference: Mapping[str, Any], candidate: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` where pipelines or schedulers differ: their pictures would, whatever the quantization."""
    if reference["pipeline"] != candidate["pipeline"]:
        raise ConfigError(
            f"The reference is a {reference['pipeline']}, the candidate a {candidate['pipeline']}: not comparable"
        )
    first, second = reference["scheduler"], candidate["scheduler"]
    different = sorted(key for key in {*first, *second} if first.get(key) != second.get(key))
    if different:
        found = "; ".join(f"{key}: {first.get(key)!r} and {second.get(key)!r}" for key in different)
        raise ConfigError(f"The schedulers of reference and candidate differ ({found}): not comparable")


def check_same_shape(reference: Mapping[str, torch.Tensor], candidate: Mapping[str, torch.Tensor]) -> None:
    """Raise ``ConfigError`` where counts, sizes or steps differ."""
    pictures = [list(tensors["pictures"].shape[:3]) for tensors in (reference, candidate)]
    if pictures[0] != pictures[1]:
        raise ConfigError(
            f"The reference made [pictures, height, width] {pictures[0]}, the candidate {pictures[1]}: not comparable."
            " Give --height and --width"
        )
    steps = [len(tensors["latents"]) for tensors in (reference, candidate)]
    if steps[0] != steps[1]:
        raise ConfigError(f"The reference took {steps[0]} steps, the candidate {steps[1]}. Give --num-inference-steps")
