"""The fuzzers' targets on a few mutations; ``python -m tools.fuzz`` runs them under atheris."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tools.fuzz.targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_inputs_are_read_or_refused(name: str, tmp_path: Path) -> None:
    target, choose = TARGETS[name], random.Random(0)
    seeds = target.prepare(tmp_path)
    for seed in seeds:
        target.run(tmp_path, seed)
    for _ in range(100):
        data = bytearray(choose.choice(seeds))
        for _ in range(choose.randint(1, 4)):
            # Headers are where the structure is.
            place = choose.randrange(min(len(data), choose.choice((16, 600, len(data)))))
            data[place : place + choose.choice((0, 1, 1, 4))] = choose.randbytes(choose.choice((0, 1, 1, 4)))
        target.run(tmp_path, bytes(data[: choose.choice((None, None, None, choose.randrange(len(data) + 1)))]))
