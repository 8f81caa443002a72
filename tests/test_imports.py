"""Importing lowbit is light, and nothing imports a vendor's library without need."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("lowbit", ["torch", "diffusers", "transformers", "triton", "torch_npu"]),
        ("lowbit.quantization", ["diffusers", "transformers", "triton", "torch_npu"]),
        ("lowbit.engine", ["triton", "torch_npu"]),
    ],
)
def test_importing_leaves_out(module: str, absent: list[str]) -> None:
    code = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_names() -> None:
    import lowbit

    for name in lowbit.__all__:
        assert getattr(lowbit, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lowbit.nothing  # noqa: B018


def test_the_changelog_begins_with_this_version() -> None:
    from pathlib import Path

    import lowbit

    changelog = Path(__file__).parent.parent / "CHANGELOG.md"
    first = next(line for line in changelog.read_text().splitlines() if line.startswith("## "))
    assert first == f"## {lowbit.__version__}"
