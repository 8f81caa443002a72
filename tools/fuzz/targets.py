"""What is fuzzed: seeds, and what one mutated input is given to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quant_shape_to_byte_shape

from lowbit.containers.gguf import open_gguf
from lowbit.errors import CheckpointError, ConfigError, UnsupportedError
from lowbit.hosts.preflight import check_component
from lowbit.ops.gguf import BLOCK_TYPES, gguf_dequantize
from tools.fuzz.mutations import Target, edit, refused
from tools.fuzz.readers import (
    read_ascend,
    read_auto_round,
    read_comfyui,
    read_nunchaku,
    write_ascend,
    write_auto_round,
    write_comfyui,
    write_nunchaku,
)

FIXTURES = Path(__file__).parents[2] / "tests" / "fixtures" / "modelopt"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def write_gguf(folder: Path) -> list[bytes]:
    """Write a GGUF file with a tensor of every type by the ``gguf`` package's own writer, and return it."""
    path = folder / "seed.gguf"
    writer = GGUFWriter(path, "flux")
    writer.add_string("general.name", "seed")
    writer.add_array("comfy.gguf.orig_shape.a", [2, 256])
    generator = torch.Generator().manual_seed(0)
    for name in BLOCK_TYPES:
        kind = GGMLQuantizationType[name]
        shape = quant_shape_to_byte_shape((2, 256), kind)
        raw = torch.randint(0, 256, tuple(shape), dtype=torch.uint8, generator=generator)
        writer.add_tensor(f"{name}.weight", raw.numpy(), raw_shape=shape, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [path.read_bytes()]


def read_gguf(folder: Path, data: bytes) -> None:
    """Open a file and decode all of its tensors."""
    path = folder / "mutated.gguf"
    path.write_bytes(data)
    try:
        file = open_gguf(path)
        for tensor in file.tensors.values():
            gguf_dequantize(file.rows(tensor), tensor.type.name)
    except (CheckpointError, UnsupportedError) as error:
        refused(error, path.name)


def copy_fixtures(folder: Path) -> list[Path]:
    """Copy small quantized transformers, two of each method, and return their folders."""
    chosen = sorted(FIXTURES.glob("z-image-*")) + sorted(FIXTURES.glob("flux-*"))
    return [Path(shutil.copytree(fixture, folder / fixture.name)) for fixture in chosen]


def prepare_weights(folder: Path) -> list[bytes]:
    """Return the weights' files, each after the number of its folder."""
    return [bytes([index]) + (path / WEIGHTS).read_bytes() for index, path in enumerate(copy_fixtures(folder))]


def read_weights(folder: Path, data: bytes) -> None:
    """Check a component whose weights are mutated."""
    folders = sorted(path for path in folder.iterdir() if path.is_dir())
    if not data:
        return
    chosen = folders[data[0] % len(folders)]
    (chosen / WEIGHTS).write_bytes(data[1:])
    try:
        check_component(chosen)
    except (CheckpointError, ConfigError, UnsupportedError) as error:
        refused(error, chosen.name)


def prepare_configs(folder: Path) -> list[bytes]:
    """Return a few ways to choose edits."""
    copy_fixtures(folder)
    return [bytes(range(start, start + 40)) for start in (0, 50, 100, 150)]


def read_config(folder: Path, data: bytes) -> None:
    """Check a component whose quantization configuration is edited as the bytes say."""
    folders = sorted(path for path in folder.iterdir() if path.is_dir())
    numbers = list(data)
    if len(numbers) < 2:
        return
    chosen = folders[numbers.pop() % len(folders)]
    original = (FIXTURES / chosen.name / "config.json").read_text()
    config = json.loads(original)
    for _ in range(1 + numbers.pop() % 4):
        edit(config, "quantization_config", numbers)
    (chosen / "config.json").write_text(json.dumps(config))
    try:
        check_component(chosen)
    except (CheckpointError, ConfigError, UnsupportedError) as error:
        refused(error, chosen.name)


TARGETS = {
    "gguf": Target(write_gguf, read_gguf),
    "safetensors": Target(prepare_weights, read_weights),
    "configs": Target(prepare_configs, read_config),
    "comfyui": Target(write_comfyui, read_comfyui),
    "nunchaku": Target(write_nunchaku, read_nunchaku),
    "auto-round": Target(write_auto_round, read_auto_round),
    "ascend": Target(write_ascend, read_ascend),
}
