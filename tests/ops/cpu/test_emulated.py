"""Kernels of AVX-512, AVX512-VNNI, AVX512-BF16 and AMX on CPUs without them: this folder's tests, emulated.

One process loads the emulated library and runs a part of each file's tests: those whose number is a multiple of the
file's step. ``-m exhaustive`` runs all.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from xml.etree import ElementTree

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


def run(steps: dict[str, int]) -> dict[str, Counter[str]]:
    """Run a part of every file's tests in one process; return how many of each file ended in which way."""
    library = emulated.library()
    if isinstance(library, str):
        pytest.skip(library)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    sample = ",".join(f"{file}={step}" for file, step in steps.items())
    environment |= {helper.LIBRARY_VARIABLE: str(library), SAMPLE_VARIABLE: sample, "OMP_NUM_THREADS": "1"}
    files = [f"tests/ops/cpu/{file}" for file in steps]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *files]
        done = subprocess.run(command, cwd=emulated.ROOT, env=environment, capture_output=True, text=True, check=False)
        assert report.exists(), done.stdout[-4000:] + done.stderr[-4000:]
        return count(report)


def count(report: Path) -> dict[str, Counter[str]]:
    """Return the outcomes by file, and print what failed."""
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        found = next((each for each in case if each.tag in ("failure", "error", "skipped")), None)
        kind = "passed" if found is None else found.tag
        text = "" if found is None else f"{found.get('message')}\n{found.text or ''}"
        if kind == "skipped" and "the CPU has no" in text:
            kind = "no emulation"
        if kind not in ("passed", "skipped"):
            print(f"{case.get('classname')}::{case.get('name')}: {kind}\n{text[-2000:]}")
        outcomes[f"{case.get('classname', '').rpartition('.')[2]}.py"][kind] += 1
    return outcomes


def check(found: Counter[str]) -> None:
    assert found["passed"] >= 5, found
    assert set(found) <= {"passed", "skipped"}, found


@pytest.fixture(scope="module")
def sampled() -> dict[str, Counter[str]]:
    return run(STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("file", STEPS)
def test_kernels_of_other_instruction_sets(file: str, sampled: dict[str, Counter[str]]) -> None:
    check(sampled[file])


@pytest.mark.exhaustive
@pytest.mark.parametrize("file", STEPS)
def test_kernels_of_other_instruction_sets_by_every_test(file: str) -> None:
    check(run({file: 1})[file])
