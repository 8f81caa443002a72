"""Kernels of AVX-512, AVX512-VNNI, AVX512-BF16 and AMX on CPUs without them: this folder's tests, emulated.

Each file runs in a process of its own that loads the emulated library, and a part of its tests: those whose number is a
multiple of the file's step. ``-m exhaustive`` runs all.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from lowbit.ops.cpu import helper
from tests.ops.cpu import emulated
from tests.ops.cpu.conftest import SAMPLE_VARIABLE

# By file: every how many tests one runs.
STEPS = {
    "test_attention.py": 5,
    "test_bfloat16.py": 23,
    "test_bfloat16_units.py": 5,
    "test_elementwise.py": 3,
    "test_four_bits.py": 7,
    "test_gguf.py": 11,
    "test_grouped_rows.py": 13,
    "test_int8_native.py": 3,
    "test_int8_weight_only.py": 7,
    "test_integer_rows.py": 13,
    "test_native.py": 3,
}


def run(file: str, step: int) -> str:
    """Return the last line that pytest prints."""
    library = emulated.library()
    if isinstance(library, str):
        pytest.skip(library)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment |= {helper.LIBRARY_VARIABLE: str(library), SAMPLE_VARIABLE: str(step), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/ops/cpu/{file}"]
    done = subprocess.run(command, cwd=emulated.ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout.strip().splitlines()[-1]


def check(file: str, step: int) -> None:
    last = run(file, step)
    passed = re.search(r"(\d+) passed", last)
    assert passed is not None, last
    assert "not on this CPU" not in last
    assert int(passed[1]) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("file", STEPS)
def test_kernels_of_other_instruction_sets(file: str) -> None:
    check(file, STEPS[file])


@pytest.mark.exhaustive
@pytest.mark.parametrize("file", STEPS)
def test_kernels_of_other_instruction_sets_by_every_test(file: str) -> None:
    check(file, 1)
