"""The fuzzers' targets on a few mutations; ``python -m tools.fuzz`` runs them under atheris."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.fuzz.targets import TARGETS

# Their inputs are a file's bytes; those of the others are choices of what to change.
FILES = ("gguf", "safetensors")
CHOICES = [name for name in TARGETS if name not in FILES]


@pytest.mark.parametrize("name", FILES)
def test_mutated_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("name", CHOICES)
def test_changed_checkpoints_are_read_or_refused(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    target, folder = TARGETS[name], tmp_path_factory.mktemp(name)
    for seed in target.prepare(folder):
        target.run(folder, seed)

    @settings(max_examples=40, deadline=None)
    @given(st.binary(min_size=30, max_size=40))
    def run(data: bytes) -> None:
        target.run(folder, data)

    run()


@pytest.mark.parametrize("name", [name for name in CHOICES if name != "configs"])
def test_an_unchanged_checkpoint_is_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(error: Exception, where: str) -> None:
        raise error

    monkeypatch.setattr("tools.fuzz.readers.refused", refused)
    target = TARGETS[name]
    target.prepare(tmp_path)
    target.run(tmp_path, bytes(1))
