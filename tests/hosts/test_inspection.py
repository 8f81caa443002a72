"""What is told of a model before it is loaded is what loading it then does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowbit import Omni
from lowbit.cli.info import info
from lowbit.errors import ConfigError
from lowbit.models.embedded import embedded_model
from lowbit.quantization.manifest import Manifest
from tests.support.models import METHODS, STATIC, save_pipeline

WRITTEN = [name for name in METHODS if name not in STATIC and not {"smoothing", "kernel"} & METHODS[name].keys()]


def told(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    info(*arguments, *[None] * (8 - len(arguments)))
    return capsys.readouterr().out


def without_kernels(manifest: Manifest) -> str:
    layers = [replace(layer, kernel=None) for layer in manifest.layers]
    return replace(manifest, layers=layers).summary()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_pipeline(tmp_path_factory.mktemp("source") / "pipeline"))


@pytest.mark.parametrize("method", WRITTEN)
def test_manifests_are_foretold(method: str, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = {"transformer": METHODS[method], "text_encoder": METHODS[method]}
    omni = Omni(source, quantization_config=spec, device="cpu")
    omni.save_pretrained(str(tmp_path / "saved"))
    capsys.readouterr()
    for folder, loaded, found in (
        (source, omni, told(capsys, source, None, json.dumps(spec))),
        (str(tmp_path / "saved"), Omni(str(tmp_path / "saved"), device="cpu"), told(capsys, str(tmp_path / "saved"))),
    ):
        for name, manifest in loaded.manifests.items():
            size = sum(file.stat().st_size for file in (Path(folder) / name).glob("*.safetensors"))
            assert manifest.bytes_on_disk == size
            assert without_kernels(manifest) in found


def test_other_components_and_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(embedded_model().folder)
    assert "int8 takes" in told(capsys, folder)
    assert "vae: AutoencoderKL, as it is, " in told(capsys, folder)
    Omni(quantization="fp8", device="cpu").save_pretrained(str(tmp_path / "fp8"))
    capsys.readouterr()
    assert "fp8 takes" in told(capsys, str(tmp_path / "fp8"))
    with pytest.raises(ConfigError, match=r"fp8.transformer.*already quantized with 'fp8'.*'int8'"):
        info(str(tmp_path / "fp8"), "int8")
