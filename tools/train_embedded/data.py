"""Pictures and their captions in bulk, the same for the same seed."""

import random

import torch
from torch import Tensor
from tqdm import tqdm

from .captions import training_scene
from .drawing import CANVAS, crowd, draw


def training_pictures(count: int, seed: int, loose: bool = False) -> tuple[Tensor, list[str]]:
    """Draw ``count`` scenes that are not held out, laid out loosely or on the grid.

    Returns uint8 pictures of shape (count, 3, CANVAS, CANVAS) and their captions.
    """
    rng = random.Random(f"training pictures {seed}")
    pictures = torch.empty((count, 3, CANVAS, CANVAS), dtype=torch.uint8)
    captions = []
    for index in tqdm(range(count), mininterval=5.0, desc="drawing"):
        scene = training_scene(rng)
        pictures[index] = torch.from_numpy(draw(scene, rng, loose).copy()).permute(2, 0, 1)
        captions.append(str(scene))
    return pictures, captions


def crowded_pictures(count: int, seed: int) -> Tensor:
    """Draw ``count`` crowds: uint8 pictures of shape (count, 3, CANVAS, CANVAS)."""
    rng = random.Random(f"crowded pictures {seed}")
    pictures = torch.empty((count, 3, CANVAS, CANVAS), dtype=torch.uint8)
    for index in tqdm(range(count), mininterval=5.0, desc="drawing"):
        pictures[index] = torch.from_numpy(crowd(rng).copy()).permute(2, 0, 1)
    return pictures


def to_model(pictures: Tensor) -> Tensor:
    """uint8 pictures to float32 in [-1, 1]."""
    return pictures.float().div_(127.5).sub_(1.0)
