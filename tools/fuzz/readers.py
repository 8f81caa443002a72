"""Checkpoints of other tools: small whole ones, changed tensor by tensor and value by value, then loaded."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lowbit.checkpoints.external import load_component
from lowbit.checkpoints.msmodelslim.read import described
from lowbit.errors import CheckpointError, ConfigError, UnsupportedError
from lowbit.hosts import routing as dispatch
from lowbit.hosts.preflight import check_component
from lowbit.quantization import ComfyUiConfig, SvdQuantConfig
from lowbit.quantization.base import QuantizationConfig
from tests.support import ascend_files, comfyui_files
from tests.support.auto_round_files import FLUX, complete
from tests.support.models import FAMILIES, save
from tests.support.nunchaku_files import Written
from tools.fuzz.mutations import change_tensor, edit, refused, take, write_changed

SEED, MUTATED = "seed.safetensors", "mutated.safetensors"
COMPONENT = "transformer"


def choices() -> list[bytes]:
    """Return a few ways to choose changes."""
    return [bytes((start + 7 * place) % 256 for place in range(40)) for start in range(0, 250, 31)]


@cache
def seed_of(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a file that is not changed."""
    with safe_open(str(path), framework="pt") as opened:
        return load_file(path), dict(opened.metadata() or {})


def edit_text(text: str, numbers: list[int]) -> str:
    """Return JSON with some values changed."""
    whole: dict[str, Any] = {"": json.loads(text)}
    for _ in range(1 + take(numbers) % 3):
        if "" in whole:
            edit(whole, "", numbers)
    return json.dumps(whole.get(""))


def change(folder: Path, seed: str, mutated: str, numbers: list[int]) -> None:
    """Write a changed copy of a file: its tensors, and JSON in its metadata and in tensors of bytes."""
    original, texts = seed_of(folder / seed)
    tensors, metadata = dict(original), dict(texts)
    for _ in range(take(numbers) % 3):
        change_tensor(tensors, numbers)
    keys = sorted(metadata)
    if keys and take(numbers) % 2:
        key = keys[take(numbers) % len(keys)]
        metadata[key] = edit_text(metadata[key], numbers) if metadata[key].startswith("{") else "?"
    markers = sorted(name for name in tensors if name.endswith(".comfy_quant") and name in original)
    if markers and take(numbers) % 2:
        name = markers[take(numbers) % len(markers)]
        text = edit_text(bytes(original[name].tolist()).decode(), numbers)
        tensors[name] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    write_changed(folder / mutated, tensors, metadata, numbers)


def load_flux(source: Path, config: QuantizationConfig, name: str) -> None:
    """Load a small Flux transformer with its weights from elsewhere, or see it refused."""
    try:
        load_component(
            str(source), COMPONENT, "diffusers", FluxTransformer2DModel.__name__, config, dtype=torch.bfloat16
        )
    except (CheckpointError, ConfigError, UnsupportedError) as error:
        refused(error, name)


def write_comfyui(folder: Path) -> list[bytes]:
    """Write a file with a layer of every format of ComfyUI's."""
    torch.manual_seed(0)
    model = FAMILIES["flux"].make()
    save(model, folder / COMPONENT, torch.float32)
    tensors, layers = comfyui_files.every_format(model)
    save_file(tensors, folder / SEED, {comfyui_files.METADATA: json.dumps({"format_version": "1.0", "layers": layers})})
    return choices()


def read_comfyui(folder: Path, data: bytes) -> None:
    """Load a changed file of ComfyUI's."""
    change(folder, SEED, MUTATED, list(data))
    load_flux(folder, ComfyUiConfig(comfyui_model=str(folder / MUTATED)), MUTATED)


def write_nunchaku(folder: Path) -> list[bytes]:
    """Write files of nunchaku's in both precisions."""
    for precision in ("int4", "nvfp4"):
        Written("flux", precision, folder)
    return choices()


def read_nunchaku(folder: Path, data: bytes) -> None:
    """Load a changed file of nunchaku's."""
    numbers = list(data)
    precision = ("int4", "nvfp4")[take(numbers) % 2]
    change(folder, f"svdq-{precision}.safetensors", MUTATED, numbers)
    load_flux(folder, SvdQuantConfig(svdquant_model=str(folder / MUTATED)), MUTATED)


def write_ascend(folder: Path) -> list[bytes]:
    """Write checkpoints of msModelSlim's with layers of every type."""
    torch.manual_seed(0)
    cases = [*ascend_files.LAYERS, "mix"]
    for index in range(len(cases) // 2):
        source = folder / str(index)
        ascend_files.write_types(source, cases[2 * index : 2 * index + 2])
        place = source / COMPONENT
        (place / "quant_model_weights.safetensors").rename(source / SEED)
        (place / "quant_model_description.json").rename(source / "seed.json")
    return choices()


def read_ascend(folder: Path, data: bytes) -> None:
    """Load a changed checkpoint of msModelSlim's."""
    numbers, sources = list(data), sorted(path for path in folder.iterdir() if path.is_dir())
    source = sources[take(numbers) % len(sources)]
    place = source / COMPONENT
    text = (source / "seed.json").read_text()
    if take(numbers) % 2:
        text = edit_text(text, numbers)
    (place / "quant_model_description.json").write_text(text)
    change(source, SEED, f"{COMPONENT}/quant_model_weights.safetensors", numbers)
    config = described(place, None)
    assert config is not None
    load_flux(source, config, COMPONENT)


def write_auto_round(folder: Path) -> list[bytes]:
    """Write a checkpoint that AutoRound exported."""
    complete(FLUX, folder / COMPONENT)
    (folder / COMPONENT / "diffusion_pytorch_model.safetensors").rename(folder / SEED)
    (folder / COMPONENT / "config.json").rename(folder / "seed.json")
    return choices()


def read_auto_round(folder: Path, data: bytes) -> None:
    """Load a changed checkpoint of AutoRound's; its configuration, layers' names and expressions included."""
    numbers, place = list(data), folder / COMPONENT
    config = json.loads((folder / "seed.json").read_text())
    for _ in range(take(numbers) % 3):
        edit(config, "quantization_config", numbers)
    (place / "config.json").write_text(json.dumps(config))
    change(folder, SEED, f"{COMPONENT}/diffusion_pytorch_model.safetensors", numbers)
    try:
        check_component(place)
    except (CheckpointError, ConfigError, UnsupportedError) as error:
        refused(error, COMPONENT)
        return
    stored = config.get("quantization_config")
    if stored and dispatch.claims(stored):
        try:
            FluxTransformer2DModel.from_pretrained(place, torch_dtype=torch.bfloat16)
        except CheckpointError as error:
            refused(error, COMPONENT)
