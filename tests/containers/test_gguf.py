"""The reader against the ``gguf`` package's writer, the writer against its reader, and both against damage."""

from __future__ import annotations

import random
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowbit.containers import gguf_writer
from lowbit.containers.gguf import GgufFile, LongArray, open_gguf
from lowbit.containers.gguf_writer import TensorToWrite, write_gguf
from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.ops.gguf import BLOCK_TYPES, gguf_dequantize, gguf_quantize
from lowbit.ops.gguf_types import block_type

package = pytest.importorskip("gguf")

WEIGHTS = {
    "a.weight": (torch.linspace(-1, 1, 4 * 256).reshape(4, 256), "Q4_K"),
    "b": (torch.linspace(-2, 2, 21).reshape(3, 7), "F32"),
    "c": (torch.linspace(-3, 3, 128).reshape(2, 2, 32), "Q8_0"),
    "d": (torch.linspace(0, 1, 5), "BF16"),
}


def to_write(name: str) -> TensorToWrite:
    weight, kind = WEIGHTS[name]
    return TensorToWrite(
        name, kind, tuple(weight.shape), lambda: gguf_quantize(weight.reshape(-1, weight.shape[-1]), kind)
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    metadata: dict[str, Any] = {
        "general.architecture": "flux",
        "general.file_type": 14,
        "comfy.gguf.orig_shape.b": [7, 3],
    }
    write_gguf(tmp_path / "model.gguf", metadata, [to_write(name) for name in WEIGHTS])
    return tmp_path / "model.gguf"


def test_writer_is_read_by_the_package(path: Path) -> None:
    reader = package.GGUFReader(path)
    assert reader.get_field("general.architecture").contents() == "flux"
    assert reader.get_field("general.file_type").contents() == 14
    assert reader.get_field("comfy.gguf.orig_shape.b").contents() == [7, 3]
    assert [tensor.name for tensor in reader.tensors] == list(WEIGHTS)
    for tensor in reader.tensors:
        weight, kind = WEIGHTS[tensor.name]
        assert tensor.tensor_type.name == kind
        assert [int(extent) for extent in reversed(tensor.shape)] == list(weight.shape)
        raw = gguf_quantize(weight.reshape(-1, weight.shape[-1]), kind).numpy()
        assert np.array_equal(tensor.data.view(np.uint8).reshape(-1), raw.reshape(-1))


def test_reader_reads_the_package(tmp_path: Path) -> None:
    writer = package.GGUFWriter(tmp_path / "theirs.gguf", "wan")
    writer.add_string("general.name", "name é")
    writer.add_array("numbers", [1, 2, 3])
    writer.add_array("words", ["one", "two"])
    writer.add_array("vocabulary", [f"token {index}" for index in range(5000)])
    writer.add_array("scores", [0.5] * 5000)
    writer.add_float32("half", 0.5)
    writer.add_bool("yes", True)
    data = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    kinds = ("F32", "F16", "Q8_0", "Q5_1")
    for kind in kinds:
        number = package.GGMLQuantizationType[kind]
        writer.add_tensor(kind, package.quants.quantize(data, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "theirs.gguf")
    assert file.metadata["general.architecture"] == "wan"
    assert file.metadata["general.name"] == "name é"
    assert file.metadata["numbers"] == [1, 2, 3]
    assert file.metadata["words"] == ["one", "two"]
    assert file.metadata["vocabulary"] == file.metadata["scores"] == LongArray(5000)
    assert (file.metadata["half"], file.metadata["yes"]) == (0.5, True)
    for kind in kinds:
        tensor = file.tensors[kind]
        expected = package.quants.dequantize(
            package.quants.quantize(data, package.GGMLQuantizationType[kind]), package.GGMLQuantizationType[kind]
        )
        assert np.array_equal(gguf_dequantize(file.rows(tensor), kind).numpy(), expected)
        part = gguf_dequantize(file.rows(tensor, 2, 5), kind).numpy()
        assert np.array_equal(part, expected[2:5])


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    def fail() -> torch.Tensor:
        raise RuntimeError("no more")

    broken = TensorToWrite("broken", "F32", (2, 2), fail)
    with pytest.raises(RuntimeError, match="no more"):
        write_gguf(tmp_path / "model.gguf", {}, [to_write("a.weight"), broken])
    assert list(tmp_path.iterdir()) == []
    done: list[tuple[int, int]] = []
    write_gguf(tmp_path / "model.gguf", {}, [to_write("a.weight"), to_write("b")], lambda *step: done.append(step))
    assert done == [(1, 2), (2, 2)]
    with pytest.raises(UnsupportedError, match="does not hold"):
        write_gguf(tmp_path / "m.gguf", {}, [TensorToWrite("n" * 200, "F32", (1,), fail)])


def test_a_large_file_opens_at_once(tmp_path: Path) -> None:
    """Six gigabytes with a hole in the middle: opening reads the header alone."""
    sizes = [("big", "Q8_0", (1 << 16, 1 << 12)), *((f"t{i}", "Q4_K", (1 << 14, 1 << 12)) for i in range(150))]
    planned = [TensorToWrite(name, kind, shape, lambda: torch.empty(0)) for name, kind, shape in sizes]
    with (tmp_path / "large.gguf").open("wb") as file:
        gguf_writer._write_header(file, {"general.architecture": "flux"}, planned)
        file.truncate(file.tell() + 64 + sum(-(-tensor.bytes // 32) * 32 for tensor in planned))
    assert (tmp_path / "large.gguf").stat().st_size > 5.9e9
    start = time.perf_counter()
    file_ = open_gguf(tmp_path / "large.gguf")
    assert time.perf_counter() - start < 2  # the promise, not a measurement: it takes milliseconds
    assert not file_.rows(file_.tensors["t149"], 5, 7).any()


def patched(path: Path, old: bytes, new: bytes) -> Path:
    data = path.read_bytes()
    assert data.count(old) >= 1
    damaged = path.with_name("damaged.gguf")
    damaged.write_bytes(data.replace(old, new, 1))
    return damaged


def entry(name: str, dimensions: list[int], kind: int, offset: int) -> bytes:
    text = name.encode()
    return (
        struct.pack("<Q", len(text)) + text + struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    ) + struct.pack("<IQ", kind, offset)


A, B = entry("a.weight", [256, 4], 12, 0), entry("b", [7, 3], 0, 576)

DAMAGE = {
    "magic": (b"GGUF", b"GGML", "is no GGUF file"),
    "version 1": (b"GGUF\x03\0\0\0", b"GGUF\x01\0\0\0", "version 1 is not supported"),
    "big-endian": (b"GGUF\x03\0\0\0", b"GGUF\0\0\0\x03", "big-endian"),
    "tensor count": (struct.pack("<Q", 4), struct.pack("<Q", 2**60), "claims 1152921504606846976 tensors"),
    "name length": (b"\x08\0\0\0\0\0\0\0a.weight", b"\xff\xff\xff\xff\0\0\0\0a.weight", "string of 4294967295 bytes"),
    "utf-8": (b"a.weight", b"a.w\xffight", "not UTF-8"),
    "no dimensions": (B[:9] + B[9:13], B[:9] + b"\0\0\0\0", "0 dimensions"),
    "many dimensions": (B[:13], B[:9] + b"\xff\0\0\0", "255 dimensions"),
    "not whole blocks": (
        A,
        entry("a.weight", [255, 4], 12, 0),
        "'a.weight': rows of 255 elements are not whole blocks",
    ),
    "no rows": (A, entry("a.weight", [256, 0], 12, 0), r"'a.weight': shape \[0, 256\] has no elements"),
    "overflow": (A, entry("a.weight", [2**40, 2**40], 12, 0), "is it cut short"),
    "beyond the end": (B, entry("b", [7, 3], 0, 2**40), "'b'.*is it cut short"),
    "misaligned": (B, entry("b", [7, 3], 0, 577), "offset 577 is not aligned to 32"),
    "overlap": (B, entry("b", [7, 3], 0, 32), "'b': overlaps 'a.weight'"),
    "unknown type": (B, entry("b", [7, 3], 999, 576), r"b \(number 999\).*Expected one of: F32"),
    "known type not read": (B, entry("b", [7, 3], 15, 576), r"b \(Q8_K\)"),
    "twice": (B, entry("d", [7, 3], 0, 576), "'d': is there twice"),
    "string that is too short": (b"flux", b"flu", "metadata entry 1: a string of"),
    "architecture's type": (b"architecture" + struct.pack("<I", 8), b"architecture" + struct.pack("<I", 77), "type 77"),
    "array": (struct.pack("<IIQ", 9, 5, 2), struct.pack("<IIQ", 9, 5, 2**50), "claims 1125899906842624 elements"),
    "nested array": (struct.pack("<IIQ", 9, 5, 2), struct.pack("<IIQ", 9, 9, 2), "arrays of type 9"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name: str, path: Path) -> None:
    old, new, message = DAMAGE[name]
    damaged = patched(path, old, new)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_gguf(damaged)
    assert str(damaged) in str(caught.value)


@pytest.mark.parametrize("alignment", [0, 3, 2**31])
def test_alignment(alignment: int, path: Path) -> None:
    number = struct.pack("<I", 4)
    damaged = patched(
        path,
        b"general.file_type" + number + struct.pack("<I", 14),
        b"general.alignment" + number + struct.pack("<I", alignment),
    )
    with pytest.raises(CheckpointError, match="power of two"):
        open_gguf(damaged)


def test_every_truncation_is_an_error(path: Path) -> None:
    data = path.read_bytes()
    for size in [*range(0, 700, 7), len(data) - 64]:
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            open_gguf(path)


def test_tensors_are_the_mapped_file(path: Path) -> None:
    file = open_gguf(path)
    tensor = file.tensors["a.weight"]
    rows = file.rows(tensor)
    assert rows.data_ptr() == file.rows(tensor).data_ptr()
    assert rows.numpy().tobytes() == path.read_bytes()[tensor.offset : tensor.offset + tensor.bytes]


def test_what_is_done_to_a_tensor_or_the_name_leaves_the_other_alone(path: Path) -> None:
    data = path.read_bytes()
    rows = (file := open_gguf(path)).rows(file.tensors["a.weight"])
    before = rows.clone()
    path.unlink()
    path.write_bytes(data[:400])
    assert torch.equal(rows, before)
    path.write_bytes(data)
    opened = open_gguf(path)
    opened.rows(opened.tensors["a.weight"]).fill_(1)
    assert path.read_bytes() == data


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="can't be read"):
        open_gguf(tmp_path / "missing.gguf")


def read_all(path: Path) -> GgufFile | None:
    """Open and decode everything; ``None`` for a file that is refused."""
    file, message = None, ""
    try:
        file = open_gguf(path)
    except CheckpointError as error:
        message = str(error)
    if file is None:
        assert str(path) in message
        assert len(message) < 2000
        return None
    for tensor in file.tensors.values():
        values = gguf_dequantize(file.rows(tensor), tensor.type.name)
        assert values.numel() == torch.Size(tensor.shape).numel()
        assert tensor.type.name in BLOCK_TYPES
    return file


@settings(max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(
        st.tuples(st.integers(0, 480), st.sampled_from([1, 4, 8]), st.integers(0, 2**64 - 1) | st.integers(0, 300)),
        min_size=1,
        max_size=6,
    ),
    cut=st.none() | st.integers(0, 1200),
)
def test_mutated_files_are_read_or_refused(path: Path, edits: list[tuple[int, int, int]], cut: int | None) -> None:
    data = bytearray(path.read_bytes())
    for position, size, value in edits:
        data[position : position + size] = (value % 256**size).to_bytes(size, "little")
    mutated = path.with_name("mutated.gguf")
    mutated.write_bytes(data[:cut])
    read_all(mutated)


def test_noise_is_refused(tmp_path: Path) -> None:
    generator = random.Random(0)
    for size in (0, 1, 4, 24, 1000):
        (tmp_path / "noise").write_bytes(b"GGUF\x03\0\0\0"[: size // 2] + generator.randbytes(size))
        assert read_all(tmp_path / "noise") is None


def test_what_is_written_is_what_the_gguf_package_writes(tmp_path: Path) -> None:
    tensors = {
        "a.weight": ("F32", (3, 7)),
        "b.weight": ("Q8_0", (5, 64)),
        "c.bias": ("BF16", (9,)),
        "d": ("Q4_K", (2, 256)),
    }
    ours, raw = [], {}
    for name, (weight_type, shape) in tensors.items():
        rows = shape[0] if len(shape) > 1 else 1
        raw[name] = torch.randint(0, 256, (rows, block_type(weight_type).row_bytes(shape[-1])), dtype=torch.uint8)
        ours.append(TensorToWrite(name, weight_type, shape, lambda name=name: raw[name]))  # type: ignore[misc]
    metadata: dict[str, Any] = {
        "general.architecture": "flux",
        "general.name": "é",
        "general.file_type": 7,
        "x.shape": [3, -7],
    }
    write_gguf(tmp_path / "ours.gguf", metadata, ours)
    theirs = package.GGUFWriter(tmp_path / "theirs.gguf", "flux")
    theirs.add_string("general.name", "é")
    theirs.add_uint32("general.file_type", 7)
    theirs.add_array("x.shape", [3, -7])
    for name, (weight_type, shape) in tensors.items():
        data = raw[name].numpy() if len(shape) > 1 else raw[name][0].numpy()
        theirs.add_tensor(name, data, raw_dtype=package.GGMLQuantizationType[weight_type])
    theirs.write_header_to_file()
    theirs.write_kv_data_to_file()
    theirs.write_tensors_to_file()
    theirs.close()
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()
