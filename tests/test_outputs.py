from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import pytest
from PIL import Image

from lowbit.errors import ConfigError
from lowbit.outputs import OmniRequestOutput, check_image_path


def output(count: int) -> OmniRequestOutput:
    images = [Image.new("RGB", (4, 4), (index, 0, 0)) for index in range(count)]
    return OmniRequestOutput("request-0", "a circle", images, list(range(count)), 3, 0.9, [0.2, 0.4], 10.0)


def test_one_image_takes_the_name(tmp_path: Path) -> None:
    assert output(1).save_images(tmp_path / "a.png") == [tmp_path / "a.png"]
    assert os.listdir(tmp_path) == ["a.png"]


def test_several_are_numbered(tmp_path: Path) -> None:
    paths = output(3).save_images(tmp_path / "a.png")
    assert [path.name for path in paths] == ["a_0.png", "a_1.png", "a_2.png"]
    assert Image.open(paths[2]).getpixel((0, 0)) == (2, 0, 0)


def test_a_video_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a video"):
        output(0).save_images(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["missing/a.png", "a.txt", "a", "."])
def test_paths_that_cannot_be_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Can't write"):
        check_image_path(tmp_path / name)


def test_a_failed_save_leaves_nothing_and_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(b"old")

    def fail(self: Image.Image, stream: BinaryIO, format: str) -> None:
        stream.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        output(1).save_images(tmp_path / "a.png")
    assert os.listdir(tmp_path) == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == b"old"


def test_is_a_sequence_of_itself() -> None:
    single = output(1)
    assert single[0] is single
    assert list(single) == [single]
    with pytest.raises(IndexError):
        single[1]


def test_step_time_is_the_median() -> None:
    assert output(1).step_time_s == 0.4
    assert output(1).metrics["num_inference_steps"] == 3
