"""The check of built wheels sees what is missing."""

from __future__ import annotations

import importlib.util
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_wheel.py"
LIBRARY = "lowbit/_native/lowbit_cpu.so"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_wheel", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_wheel(folder: Path, name: str, names: set[str]) -> Path:
    wheel = folder / name
    with zipfile.ZipFile(wheel, "w") as opened:
        for member in sorted(names):
            opened.writestr(member, "")
    return wheel


def test_a_whole_wheel_has_no_problems(script: ModuleType, tmp_path: Path) -> None:
    names = script.tracked_data() | script.python_files()
    wheel = make_wheel(tmp_path, "lowbit-1-py3-none-linux_x86_64.whl", names | {LIBRARY})
    assert script.wheel_problems(wheel) == []
    pure = make_wheel(tmp_path, "lowbit-1-py3-none-any.whl", names)
    assert script.wheel_problems(pure) == []


@pytest.mark.parametrize(
    "missing",
    [
        "lowbit/assets/embedded/transformer/diffusion_pytorch_model.safetensors",
        "lowbit/assets/report/report.html.j2",
        "lowbit/_native/common.h",
        "lowbit/_native/isa/amx.cpp",
        "lowbit/_native/kernels/quantize.h",
        "lowbit/ops/int8.py",
        "lowbit/py.typed",
    ],
)
def test_what_is_missing_is_named(script: ModuleType, tmp_path: Path, missing: str) -> None:
    names = (script.tracked_data() | script.python_files() | {LIBRARY}) - {missing}
    wheel = make_wheel(tmp_path, "lowbit-1-py3-none-linux_x86_64.whl", names)
    assert script.wheel_problems(wheel) == [f"{wheel.name}: lacks {missing}"]


def test_tags_must_tell_the_truth(script: ModuleType, tmp_path: Path) -> None:
    names = script.tracked_data() | script.python_files()
    lacking = make_wheel(tmp_path, "lowbit-1-py3-none-linux_x86_64.whl", names)
    assert script.wheel_problems(lacking) == [f"{lacking.name}: lacks the native helper"]
    tied = make_wheel(tmp_path, "lowbit-1-cp311-cp311-linux_x86_64.whl", names | {LIBRARY, "tests/x.py"})
    assert script.wheel_problems(tied) == [
        f"{tied.name}: is tied to a version of Python",
        f"{tied.name}: holds tests/x.py",
    ]


def test_a_folder_must_hold_one_of_each(script: ModuleType, tmp_path: Path) -> None:
    assert script.problems_of(tmp_path) == [f"{tmp_path}: 0 wheels and 0 source distributions, not one of each"]
