"""Writing a pipeline with its components quantized, one at a time, so that an interrupted run can go on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

import lowbit
from lowbit.checkpoints.component import manifests
from lowbit.checkpoints.parts import parts_class
from lowbit.containers.json_file import read_json
from lowbit.engine.calibrate import missing_scales
from lowbit.engine.config import OmniDiffusionConfig
from lowbit.engine.load import PipelineLoader, check_prompts
from lowbit.engine.loading import local_pipeline, quantized_here, read_components, resolve_model, route
from lowbit.engine.omni import Omni
from lowbit.engine.partial_folder import PartialFolder, partial_folder
from lowbit.models.generation_defaults import FILE_NAME, generation_defaults_text, read_generation_defaults
from lowbit.quantization.calibration.static import uncalibrated_layers
from lowbit.quantization.manifest import LayerRecord, Manifest

# Of files of weights: what diffusers takes where nothing else is said; transformers would write larger ones.
SHARD_SIZE = "10GB"
INDEX = "model_index.json"
Card = Callable[[Mapping[str, Manifest]], str]
Report = Callable[[str, Manifest | None], None]
Begin = Callable[[str, int, int], None]


def export_pipeline(
    model: str | None,
    target: Path,
    *,
    quantization_config: str | Mapping[str, Any],
    dtype: str = "bfloat16",
    device: str | None = None,
    calibration_prompts: Sequence[str] = (),
    card: Card,
    report: Report | None = None,
    resumed: Callable[[Sequence[str]], None] | None = None,
    begin: Begin | None = None,
) -> dict[str, Manifest]:
    """Quantize ``model`` and write it to ``target``, component by component.

    The folder comes into being under the name ``target`` when all of it is written. Until then it is called
    ``<target>.partial``; the same call again goes on with the components that are not finished there. A component is
    loaded by itself and dropped when it is written; one that needs calibration is loaded with the whole pipeline.

    Args:
        model: a folder in diffusers' format or a Hub id; ``None`` is the embedded model.
        target: a folder that does not exist.
        quantization_config: plain data that ``build_quant_config`` takes.
        dtype: of what is not quantized.
        device: to quantize on; ``None`` takes an accelerator when there is one.
        calibration_prompts: for ``smoothing`` and the static activation scheme.
        card: makes README.md.
        report: called with every component that was written, and what was done to it.
        resumed: called with the components that an earlier run finished, if there are any.
        begin: called before each component is loaded and written, with its name, how many are finished and how many
            there are.

    Returns:
        Component -> what was done to it.

    Raises:
        ConfigError: a wrong option, or an unfinished export of something else.
        CheckpointError: files or tensors that are missing, damaged or of the wrong shape.
        UnsupportedError: no kernel can run a layer.
    """
    config = OmniDiffusionConfig(
        model=model,
        quantization_config=quantization_config,
        dtype=dtype,
        device=device,
        calibration_prompts=tuple(calibration_prompts),
    ).resolved()
    source = resolve_model(config.model)
    own = quantized_here(route(config.quantization, read_components(source)))
    check_prompts(config, own)
    elsewhere = {name: found.weights_from for name, found in own.items() if found.weights_from}
    if not Path(source).is_dir():
        config = replace(config, model=str(local_pipeline(source, without=elsewhere)))
    loader = PipelineLoader.check(config)
    fingerprint = {"quantization": quantization_config, **_settings(loader, elsewhere.values())}
    with partial_folder(target, fingerprint) as partial:
        if partial.finished and resumed is not None:
            resumed(list(partial.finished))
        _add_components(partial, loader, report, begin)
        made = _manifests(partial, loader.components)
        partial.finish({INDEX: _index(partial, loader), "README.md": card(made), **_defaults(loader)})
    return made


def _settings(loader: PipelineLoader, elsewhere: Iterable[str]) -> dict[str, Any]:
    """Return what the written bytes depend on beside the method's options."""
    config, source = loader.config, loader.source
    folders = [Path(source) / name for name in loader.components]
    roots = [Path(source) / INDEX, Path(source) / FILE_NAME, *folders, *(Path(place) for place in elsewhere)]
    libraries = (lowbit, torch, diffusers, transformers)
    return {
        "model": str(Path(source).absolute()),
        "files of the model": {str(file): stamp for root in roots for file, stamp in _stamps(root).items()},
        "dtype": str(config.dtype),
        "device": str(config.device),
        "calibration prompts": list(config.calibration_prompts),
        "versions": {library.__name__: library.__version__ for library in libraries},
    }


def _stamps(root: Path) -> dict[str, list[int]]:
    """Return size and time of modification [ns] of a file, or of every file in a folder."""
    files = sorted(root.rglob("*")) if root.is_dir() else [root]
    stats = {str(file): file.stat() for file in files if file.is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def _add_components(partial: PartialFolder, loader: PipelineLoader, report: Report | None, begin: Begin | None) -> None:
    """Add what is not finished, first what is quantized: it takes longest."""
    quantized = route(loader.config.quantization, loader.components)
    order = [*quantized, *(name for name in loader.components if name not in quantized)]
    _add(partial, loader, order, report, begin)


def _add(
    partial: PartialFolder, loader: PipelineLoader, names: Sequence[str], report: Report | None, begin: Begin | None
) -> None:
    unwatched = {name for name, config in loader.routed.items() if config.needs_calibration}
    whole: Omni | None = None
    for name in names:
        if name in partial.finished:
            continue
        if begin is not None:
            begin(name, len(partial.finished), len(names))
        pipeline = None if name in unwatched else loader.load([name])
        if pipeline is None or _is_uncalibrated(pipeline.components[name]):
            whole = whole or _calibrated(loader.config, name)
            pipeline = parts_class([name])(**{name: whole.pipeline.components[name]})
        manifest = manifests(pipeline).get(name)
        with partial.add(name, None if manifest is None else asdict(manifest)) as folder:
            pipeline.save_pretrained(str(folder), safe_serialization=True, max_shard_size=SHARD_SIZE)
        del pipeline  # before the next one is loaded
        if report is not None:
            report(name, manifest)


def _is_uncalibrated(part: Any) -> bool:
    return isinstance(part, torch.nn.Module) and bool(uncalibrated_layers(part))


def _calibrated(config: OmniDiffusionConfig, component: str) -> Omni:
    """Load the whole pipeline, calibrated; raises ``ConfigError`` where there are no prompts for ``component``."""
    if not config.calibration_prompts:
        raise missing_scales([component])
    return Omni(
        config.model,
        quantization_config=config.quantization,
        dtype=config.dtype,
        device=config.device,
        calibration_prompts=config.calibration_prompts,
    )


def _manifests(partial: PartialFolder, order: Iterable[str]) -> dict[str, Manifest]:
    """Return the manifests of finished components, of this run or an earlier one."""
    kept = {name: partial.finished[name] for name in order if partial.finished[name] is not None}
    return {
        name: Manifest(**{**about, "layers": [LayerRecord(**layer) for layer in about["layers"]]})
        for name, about in kept.items()
    }


def _defaults(loader: PipelineLoader) -> dict[str, str]:
    """Return the file that says how the pipeline is meant to be run, if the source has it."""
    defaults = read_generation_defaults(loader.source)
    return {FILE_NAME: generation_defaults_text(defaults)} if defaults else {}


def _index(partial: PartialFolder, loader: PipelineLoader) -> str:
    """Return ``model_index.json``: the source's, without where that was and without what diffusers can't save."""
    index = read_json(Path(loader.source) / INDEX)
    index.pop("_name_or_path", None)
    index["_diffusers_version"] = diffusers.__version__
    unsaved = [name for name in loader.components if not any((partial.path / name).iterdir())]
    index.update({name: [None, None] for name in unsaved})
    return json.dumps(index, indent=2, sort_keys=True) + "\n"
