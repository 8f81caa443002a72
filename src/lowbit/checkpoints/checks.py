"""Checking a checkpoint's files before any work is done on them. Only headers are read."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from lowbit.checkpoints.component import Preparation
from lowbit.containers.json_file import read_json
from lowbit.errors import CheckpointError

# What diffusers and transformers call a model's weights.
STEMS = ("diffusion_pytorch_model", "model")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")

LARGEST = 1 << 56
"""Elements of a tensor."""

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES: Mapping[str, torch.dtype] = {
    **FLOATS,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E8M0": torch.float8_e8m0fnu,
}


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors file says of one tensor.

    Attributes:
        file: that holds it.
        dtype: as the format spells it, such as ``"BF16"``.
        shape: its extents.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"

    @property
    def is_absurd(self) -> bool:
        """Whether its extents, but for those of zero, are more than any memory holds: numbers that torch can't take."""
        return math.prod(max(extent, 1) for extent in self.shape) > LARGEST

    def empty(self) -> torch.Tensor:
        """Return a tensor like it on the meta device; of an unknown dtype, as bytes."""
        return torch.empty(self.shape, dtype=_DTYPES.get(self.dtype, torch.uint8), device="meta")


def refuse_pickles(files: Iterable[str | Path]) -> None:
    """Raise ``CheckpointError`` when one of a checkpoint's files is a pickle (or another format lowbit won't read)."""
    pickles = [str(file) for file in files if Path(file).suffix in PICKLE_SUFFIXES]
    if pickles:
        raise CheckpointError(
            f"{', '.join(pickles)}: refused, only safetensors are read (a pickle can run code when it is loaded)."
            " Convert it where you trust it: load it with diffusers or transformers and save_pretrained() it"
        )


def weight_files(folder: str | Path, variant: str | None = None) -> list[Path]:
    """Return the safetensors files of the model in ``folder``: one, or the shards its index lists.

    Args:
        folder: of one component, with ``config.json``.
        variant: such as ``"fp16"``; files without it serve when there are none with it.

    Raises:
        CheckpointError: there are none, only pickles, or some of the index are missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    for suffix in dict.fromkeys([f".{variant}" if variant else "", ""]):
        for stem in STEMS:
            for index in (f"{stem}.safetensors.index{suffix}.json", f"{stem}{suffix}.safetensors.index.json"):
                if (folder / index).is_file():
                    return _shards(folder / index)
            single = folder / f"{stem}{suffix}.safetensors"
            if single.is_file():
                return [single]
    refuse_pickles(sorted(file for file in folder.iterdir() if file.is_file()))
    raise CheckpointError(f"{folder}: no weights; looked for {' and '.join(f'{stem}.safetensors' for stem in STEMS)}")


def _shards(index: Path) -> list[Path]:
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: has no weight_map from tensors to files")
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{index}: names files outside its folder: {', '.join(outside)}")
    refuse_pickles(names)
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{index}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing)}")
    return [index.parent / name for name in names]


def separate_config(folder: Path) -> dict[str, Any] | None:
    """Return the ``quantization_config`` that ModelOpt wrote to ``hf_quant_config.json``, ``None`` if there is none."""
    file = folder / "hf_quant_config.json"
    return {**read_json(file), "quant_method": "modelopt"} if file.is_file() else None


def read_headers(files: Iterable[str | Path]) -> dict[str, TensorHeader]:
    """Return every tensor's header. The library checks that offsets are in order and end where the file ends.

    Raises:
        CheckpointError: files that are missing, truncated or damaged, and absurd shapes, all of them.
    """
    headers: dict[str, TensorHeader] = {}
    problems = []
    for file in map(Path, files):
        try:
            found = _read_header(file)
            problems += [
                f"{file}: {name} can't have the shape {list(header.shape)}"
                for name, header in found.items()
                if header.is_absurd
            ]
            headers.update(found)
        except (SafetensorError, OSError) as error:
            size = f"{file.stat().st_size:,} bytes" if file.is_file() else "missing"
            problems.append(f"{file} ({size}): not a whole safetensors file: {error}")
    if problems:
        raise CheckpointError("\n".join(problems))
    return headers


def _read_header(file: Path) -> dict[str, TensorHeader]:
    with safe_open(str(file), framework="pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
        return {
            name: TensorHeader(file, str(part.get_dtype()), tuple(part.get_shape())) for name, part in slices.items()
        }


def check_tensors(
    model: nn.Module,
    preparation: Preparation | None,
    headers: Mapping[str, TensorHeader],
    names: Collection[str] | None = None,
    ignored: Sequence[str] = (),
) -> None:
    """Compare a checkpoint's tensors with what a model needs.

    Args:
        model: on the meta device, its linear layers replaced already if ``preparation`` is given.
        preparation: how the quantized layers take their tensors.
        headers: of the checkpoint.
        names: of its tensors as the model is to see them, when those of ``headers`` are renamed on the way.
        ignored: regular expressions of tensors that are expected to be too many.

    Raises:
        CheckpointError: missing, unexpected and mis-shaped tensors, all in one message.
    """
    expected = model.state_dict()
    wanted = [name for name in expected if preparation is None or not preparation.is_made_here(name)]
    names = set(headers if names is None else names)
    missing = sorted(name for name in set(wanted) - names if preparation is None or not preparation.may_be_absent(name))
    unexpected = sorted(
        name for name in names - set(wanted) if not any(re.search(pattern, name) for pattern in ignored)
    )
    wrong = [
        f"{name}: {problem} ({headers[name].file.name})"
        for name in wanted
        if name in headers and (problem := _mismatch(name, expected[name], headers[name], preparation))
    ]
    where = ", ".join(sorted({str(header.file.parent) for header in headers.values()}))
    method = f" in {preparation.config.get_name()}" if preparation and preparation.config.is_serialized else ""
    refuse(f"{where}: not the tensors of {type(model).__name__}{method}", missing, unexpected, wrong)


def refuse(
    heading: str, missing: Sequence[str], unexpected: Sequence[str], wrong: Sequence[str], note: str = ""
) -> None:
    """Raise ``CheckpointError`` with what is wrong with a checkpoint's tensors, if anything is.

    Args:
        heading: first line.
        missing: names.
        unexpected: names.
        wrong: lines, such as ``"bias: found F32 [7], needs [64]"``.
        note: on those that are missing.
    """
    listed = [f"{len(missing)} missing: {', '.join(missing)}{note}"] if missing else []
    listed += [f"{len(unexpected)} unexpected: {', '.join(unexpected)}"] if unexpected else []
    listed += [f"{len(wrong)} wrong:", *(f"  {line}" for line in wrong)] if wrong else []
    if listed:
        raise CheckpointError("\n  ".join([heading, *listed]))


def _mismatch(name: str, expected: torch.Tensor, found: TensorHeader, preparation: Preparation | None) -> str | None:
    wrong = wrong_shape(name, expected, found, preparation)
    quantized = preparation.find(name) if preparation is not None else None
    if wrong is not None or (quantized is not None and preparation is not None and preparation.config.is_serialized):
        return wrong
    if (quantized is not None or expected.is_floating_point()) and found.dtype not in FLOATS:
        return f"found {found}, needs an unquantized floating dtype"
    return None


def wrong_shape(name: str, expected: torch.Tensor, found: TensorHeader, preparation: Preparation | None) -> str | None:
    """Return what a checkpoint's tensor is instead of what is needed; ``None`` if its shape is right.

    Of a quantized checkpoint's quantized data the dtype is compared as well.

    Args:
        name: of the tensor in the model.
        expected: it, on the meta device.
        found: what the checkpoint has.
        preparation: how the quantized layers take their tensors.
    """
    quantized = preparation.find(name) if preparation is not None else None
    if quantized is not None and preparation is not None and preparation.config.is_serialized:
        layer, parameter = quantized
        try:
            layer.method.canonical_tensor(layer, parameter, found.empty())
        except CheckpointError as error:
            return str(error).removeprefix(f"{name}: ")
        return None
    needed = tuple(expected.shape)
    if quantized is not None and quantized[1] == "weight":  # to be quantized: to bytes of another shape, maybe
        needed = (quantized[0].out_features, quantized[0].in_features)
    return None if needed == found.shape else f"found {found}, needs {list(needed)}"
