"""Letting go of mapped memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.ops.cpu.memory import MappedTensors

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is mapped where")


def resident_file_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile:"))
    return 1024 * int(line.split()[1])


def test_pages_that_were_read_are_let_go_and_can_be_read_again(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    expected = torch.randn(4096, 2048)  # 34 MB
    save_file({"small": torch.ones(3), "weight": expected}, file)
    tensors = load_file(file)
    mapped = MappedTensors(tensors, [file])
    assert torch.equal(tensors["weight"], expected)
    before = resident_file_bytes()
    released = mapped.release("weight")
    assert expected.nbytes - 2 * 4096 <= released <= expected.nbytes
    assert resident_file_bytes() <= before - 0.9 * released
    assert torch.equal(tensors["weight"], expected)
    assert mapped.release("small") == 0, "its page holds other tensors"
    assert torch.equal(tensors["small"], torch.ones(3))


def test_memory_that_is_no_mapping_of_the_files_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    tensor = torch.randn(1024, 1024)
    save_file({"weight": tensor}, file)
    copy = tensor.clone()
    assert MappedTensors({"weight": tensor}, [file]).release("weight") == 0
    assert torch.equal(tensor, copy)
