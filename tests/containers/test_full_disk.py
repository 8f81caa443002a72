"""A full disk: one error that names file and disk, and nothing half-written. The disk is real."""

from __future__ import annotations

import errno
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lowbit.cli import app
from lowbit.containers.atomic import DiskFullError, naming_full_disk, replace_when_written
from lowbit.containers.safetensors_writer import TensorToWrite, write_safetensors
from lowbit.outputs import OmniRequestOutput


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("not allowed to mount a disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_file_that_does_not_fit(disk: Path) -> None:
    def write() -> None:
        tensor = TensorToWrite("w", torch.uint8, (8 << 20,), lambda: torch.zeros(8 << 20, dtype=torch.uint8))
        write_safetensors(disk / "w.safetensors", {}, [tensor])

    with pytest.raises(DiskFullError) as raised:
        write()
    assert raised.value.errno == errno.ENOSPC
    assert raised.value.filename == str(disk / "w.safetensors")
    assert f"0.0 of 4.2 MB are free on {disk}" in str(raised.value)
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "target"),
    [
        (["-q", "int8"], "small"),
        (["-q", "gguf", "--gguf-type", "Q8_0"], "small.gguf"),
        (["-q", "comfyui"], "small.safetensors"),
    ],
)
def test_quantizing_onto_a_full_disk(
    arguments: list[str], target: str, disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert app.run(["quantize", *arguments, "-o", str(disk / target), "--quiet"]) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {disk / target}")
    assert re.search(rf"No space left on device: [0-9.]+ of 4.2 MB are free on {disk}. Free some", lines[0])
    left = [path for path in disk.rglob("*") if path.is_file()]
    # Components that are finished stay, for the same command to go on with.
    assert not left or all(f"{target}.partial" in str(path) for path in left)


def test_errors_of_libraries_that_write(tmp_path: Path) -> None:
    full = pytest.raises(DiskFullError, match=r"No space left on device: .* MB are free on /")
    with full, naming_full_disk(tmp_path / "not" / "there" / "x"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    with pytest.raises(PermissionError, match="no"), naming_full_disk(tmp_path):
        raise PermissionError(errno.EACCES, "no")
    with pytest.raises(DiskFullError) as raised, naming_full_disk("outer"), naming_full_disk("inner"):
        raise OSError(errno.EDQUOT, "quota")
    assert raised.value.filename == "inner"


def test_any_error_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    file.write_text("old")

    def write() -> None:
        with replace_when_written(file) as stream:
            stream.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]
    assert file.read_text() == "old"


def test_a_picture_that_does_not_fit(disk: Path) -> None:
    from PIL import Image

    noise = Image.frombytes("RGB", (1200, 1200), torch.randint(0, 256, (1200 * 1200 * 3,)).byte().numpy().tobytes())
    output = OmniRequestOutput("r", "p", [noise], [0], 1, 1.0, [], 0.0)
    with pytest.raises(DiskFullError, match="free on"):
        output.save_images(disk / "a.png")
    assert list(disk.iterdir()) == []
