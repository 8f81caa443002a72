"""What a request returns."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.containers.atomic import replace_when_written
from lowbit.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class OmniRequestOutput:
    """The pictures of one prompt, and what making them took.

    It is also a sequence of one, itself: scripts written for vLLM-Omni take ``omni.generate(prompt)[0].images``.

    Attributes:
        request_id: unique in this process.
        prompt: as given.
        images: PIL images, one per output asked for; none of a video.
        frames: of a video: per output asked for, its frames as PIL images; none of an image.
        skipped_steps: indices from 0 of the steps in which a cache spared the transformer's blocks.
        seeds: of each image's starting noise.
        num_inference_steps: denoising steps taken.
        generation_time_s: wall-clock seconds from encoding the prompt to the decoded picture.
        step_times_s: seconds of each denoising step: the first from the begin of its forward, the others from the end
            of the step before. Where requests take turns, their steps are in each other's times.
        peak_memory_mb: highest memory meanwhile, in 10^6 bytes: of the device's allocator, on a CPU resident.
    """

    request_id: str
    prompt: str
    images: Sequence[Image] = field(repr=False)
    seeds: Sequence[int]
    num_inference_steps: int
    generation_time_s: float
    step_times_s: Sequence[float] = field(repr=False)
    peak_memory_mb: float
    frames: Sequence[Sequence[Image]] = field(default=(), repr=False)
    skipped_steps: Sequence[int] = ()

    @property
    def final_output_type(self) -> str:
        """``"image"`` or ``"video"``."""
        return "video" if self.frames else "image"

    @property
    def step_time_s(self) -> float:
        """Median seconds per denoising step."""
        times = sorted(self.step_times_s) or [self.generation_time_s / max(1, self.num_inference_steps)]
        return times[len(times) // 2]

    @property
    def metrics(self) -> dict[str, Any]:
        """The figures as plain data."""
        return {
            "generation_time_s": self.generation_time_s,
            "step_time_s": self.step_time_s,
            "num_inference_steps": self.num_inference_steps,
            "peak_memory_mb": self.peak_memory_mb,
            "num_skipped_steps": len(self.skipped_steps),
        }

    def save_images(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write the images and return their paths.

        Args:
            path: the file of a single image; of several, ``picture.png`` becomes ``picture_0.png`` and so on.

        Raises:
            ConfigError: the path can't be written or has no image format's ending, or the output is a video.
        """
        if not self.images:
            raise ConfigError("The output is a video: its frames are in .frames (diffusers.utils.export_to_video)")
        target = check_image_path(path)
        if len(self.images) == 1:
            targets = [target]
        else:
            targets = [target.with_stem(f"{target.stem}_{index}") for index in range(len(self.images))]
        for image, file in zip(self.images, targets, strict=True):
            _write_image(image, file)
        return targets

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> OmniRequestOutput:
        return (self,)[index]

    def __iter__(self) -> Iterator[OmniRequestOutput]:
        return iter((self,))


def check_image_path(path: str | os.PathLike[str]) -> Path:
    """Return ``path`` if an image can be written there.

    Raises:
        ConfigError: its folder does not exist or is not writable, it is a folder, or its ending names no image format.
    """
    from PIL import Image

    target = Path(path)
    folder = target.parent
    if not folder.is_dir():
        raise ConfigError(f"Can't write {target}: the folder {folder} does not exist")
    if target.is_dir():
        raise ConfigError(f"Can't write {target}: it is a folder; name a file, such as {target / 'picture.png'}")
    Image.init()
    if target.suffix.lower() not in Image.registered_extensions() or target.suffix.lower() == ".pdf":
        raise ConfigError(f"Can't write {target}: {target.suffix or 'no ending'!r} is no image format; use .png")
    writable = os.access(target, os.W_OK) if target.exists() else os.access(folder, os.W_OK)
    if not writable:
        raise ConfigError(f"Can't write {target}: no permission")
    return target


def _write_image(image: Image, file: Path) -> None:
    from PIL.Image import registered_extensions

    with replace_when_written(file) as stream:
        image.save(stream, format=registered_extensions()[file.suffix.lower()])
