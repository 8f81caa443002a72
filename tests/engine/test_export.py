"""Writing pipelines component by component: interrupted and gone on with, it comes to the same bytes."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lowbit import Omni
from lowbit.engine.partial_folder import STATE, partial_folder, partial_path
from lowbit.errors import CheckpointError, ConfigError
from lowbit.models.embedded import embedded_model
from lowbit.models.generation_defaults import FILE_NAME
from lowbit.quantization.calibration.static import static_layers, uncalibrated_layers
from tests.support.export import INT8, InterruptedExportError, card, export, stop_after
from tests.support.models import same_bytes, save_pipeline

# In which they are written: what is quantized goes first.
ORDER = ["transformer", "text_encoder", "scheduler", "tokenizer", "vae"]

KILLED = """
import os, signal, sys
from pathlib import Path
from tests.support.export import INT8, export

export(Path(sys.argv[1]), INT8, after=lambda name: os.kill(os.getpid(), signal.SIGKILL))
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file grow beyond ``size`` bytes: writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what an uninterrupted export writes."""
    target = tmp_path_factory.mktemp("whole") / "small"
    assert export(target) == ORDER
    return target


def test_a_folder_is_whole_and_loads_as_what_was_quantized(whole: Path) -> None:
    assert {path.name for path in whole.iterdir()} == {*ORDER, "model_index.json", "README.md", FILE_NAME}
    assert [path.name for path in whole.parent.iterdir()] == ["small"]
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in whole.rglob("*") if file.is_file())
    quantized, loaded = Omni(quantization_config=INT8, device="cpu"), Omni(str(whole), device="cpu")
    assert type(loaded.pipeline) is type(quantized.pipeline)
    for name, part in quantized.modules().items():
        assert same_bytes(loaded.modules()[name].state_dict(), part.state_dict()), name
    text = (whole / "README.md").read_text()
    assert text == card(quantized.manifests)
    assert loaded.defaults == quantized.defaults
    assert quantized.defaults["num_inference_steps"] == embedded_model().num_inference_steps


@pytest.mark.parametrize(
    "spec",
    [
        {"transformer": "auto-round", "text_encoder": {"method": "auto-round", "bits": 8, "sym": False}},
        {"transformer": {"method": "gguf", "gguf_type": "Q4_0"}, "text_encoder": "mxfp4"},
        {"transformer": "nvfp4", "text_encoder": "mxfp8"},
        {"transformer": {"method": "modelopt", "quant_algo": "W4A16_NVFP4"}},
        {"transformer": "svdquant", "text_encoder": "comfyui"},
        {"transformer": {"method": "mxfp4_dualscale", "num_bf16_fallback_layers": 1}, "text_encoder": "int8"},
    ],
    ids=str,
)
def test_every_method_comes_back(spec: dict[str, Any], tmp_path: Path) -> None:
    model = str(save_pipeline(tmp_path / "pipeline"))
    export(tmp_path / "small", spec, model=model)
    quantized = Omni(model, quantization_config=spec, device="cpu")
    loaded = Omni(str(tmp_path / "small"), device="cpu")
    assert loaded.defaults == {}
    assert loaded.manifests.keys() == spec.keys()
    for name, part in quantized.modules().items():
        assert same_bytes(loaded.modules()[name].state_dict(), part.state_dict()), name


def test_killed_and_out_of_space_it_goes_on_to_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    target, partial = tmp_path / "small", tmp_path / "small.partial"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(target)], check=False, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert set(json.loads((partial / STATE).read_text())["finished"]) == {"transformer"}
    weights = partial / "transformer" / "diffusion_pytorch_model.safetensors"
    first = weights.stat()
    with largest_file(1_500_000), pytest.raises(Exception, match="(?i)too large|limit|space"):  # the VAE is larger
        export(target)
    assert not target.exists()
    assert {path.name for path in partial.iterdir()} == {*ORDER, STATE} - {"vae"}
    assert export(target) == ["vae"]
    assert contents(target) == contents(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    last = (target / "transformer" / weights.name).stat()
    assert (last.st_ino, last.st_mtime_ns) == (first.st_ino, first.st_mtime_ns)


def test_calibration_is_not_repeated_when_what_needs_it_is_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lowbit")
    spec = {"transformer": {"method": "int8", "smoothing": 0.5}, "text_encoder": "int8"}
    settings: dict[str, Any] = {"calibration_prompts": ["a red circle"]}
    target = tmp_path / "small"
    uninterrupted = tmp_path / "other" / "small"
    uninterrupted.parent.mkdir()
    export(uninterrupted, spec, **settings)
    for component, watched in (("transformer", 1), ("scheduler", 0)):
        caplog.clear()
        with pytest.raises(InterruptedExportError):
            export(target, spec, after=stop_after(component), **settings)
        assert sum("Watching" in message for message in caplog.messages) == watched
    assert export(target, spec, **settings) == ["tokenizer", "vae"]
    assert contents(target) == contents(uninterrupted)


@pytest.mark.parametrize(
    "spec",
    [
        {"method": "fp8", "activation_scheme": "static"},
        {"method": "modelopt", "quant_algo": "FP8"},
        {"method": "modelopt", "quant_algo": "NVFP4"},
    ],
    ids=str,
)
def test_static_scales_are_found_and_written(spec: dict[str, Any], tmp_path: Path) -> None:
    assert export(tmp_path / "small", spec, calibration_prompts=["a red circle"])[0] == "transformer"
    transformer = Omni(str(tmp_path / "small"), device="cpu").transformers()["transformer"]
    assert static_layers(transformer)
    assert not uncalibrated_layers(transformer)


def test_prompts_that_are_missing_are_asked_for(tmp_path: Path) -> None:
    for spec in ({"method": "int8", "smoothing": 0.5}, {"method": "fp8", "activation_scheme": "static"}):
        with pytest.raises(ConfigError, match="calibration_prompts"):
            export(tmp_path / "small", spec)
        assert list(tmp_path.iterdir()) == []


def test_another_export_is_not_gone_on_with(tmp_path: Path) -> None:
    model = shutil.copytree(embedded_model().folder, tmp_path / "model")
    target = tmp_path / "small"
    with pytest.raises(InterruptedExportError):
        export(target, model=str(model), after=stop_after("transformer"))
    before = contents(partial_path(target))
    changed = {**INT8, "text_encoder": {"method": "int8"}}
    for options, different in (
        ({"spec": changed}, "quantization"),
        ({"dtype": "float32"}, "dtype"),
        ({"calibration_prompts": ["a red circle"]}, "calibration prompts"),
        ({"model": None}, "files of the model, model"),
    ):
        with pytest.raises(ConfigError, match=f"small.partial holds .* differs in: {different}. Repeat"):
            export(target, **{"model": str(model), **dict[str, Any](options)})
    file = model / "vae" / "config.json"
    os.utime(file, ns=(0, 0))
    with pytest.raises(ConfigError, match="differs in: files of the model. Repeat the command it was begun with"):
        export(target, model=str(model))
    assert contents(partial_path(target)) == before
    assert not target.exists()


def test_what_was_damaged_since_is_made_again(whole: Path, tmp_path: Path) -> None:
    target, partial = tmp_path / "small", tmp_path / "small.partial"
    with pytest.raises(InterruptedExportError):
        export(target, after=stop_after("text_encoder"))
    file = partial / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    (partial / "vae").mkdir()  # as if the process had ended before it could list it
    (partial / ".writing").mkdir()
    assert export(target) == ORDER[1:]
    assert contents(target) == contents(whole)


def test_what_is_in_the_way_is_left_alone(tmp_path: Path) -> None:
    target, partial = tmp_path / "small", tmp_path / "small.partial"
    partial.mkdir()
    (partial / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"small\.partial is in the way.*move or delete it"):
        export(target)
    assert contents(partial) == {"notes.txt": b"mine"}
    for damaged in ("{", "[]", "{}", '{"fingerprint": {}, "finished": {"vae": 1}}'):
        (partial / STATE).write_text(damaged)
        with pytest.raises(ConfigError, match=rf"{STATE} is damaged: delete .*small\.partial"):
            export(target)
    shutil.rmtree(partial)
    with partial_folder(target, {}), pytest.raises(ConfigError, match="being written by another process"):
        export(target)


def test_a_broken_component_is_found_before_anything_is_written(tmp_path: Path) -> None:
    model = shutil.copytree(embedded_model().folder, tmp_path / "model")
    file = model / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="vae"):
        export(tmp_path / "small", model=str(model))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
