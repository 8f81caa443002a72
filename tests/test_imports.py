"""Importing lowbit is light, and nothing imports a vendor's library without need."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys

import pytest

HEAVY = [
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "triton",
    "torch_npu",
    "fastapi",
    "uvicorn",
    "prometheus_client",
]


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("lowbit", ["torch", "numpy", *HEAVY]),
        ("lowbit.quantization, lowbit.ops", ["torch", "numpy", *HEAVY]),
        ("lowbit.quantization.plan, lowbit.ops.int8, lowbit.ops.attention", HEAVY),
        ("lowbit.engine", ["triton", "torch_npu", "fastapi", "diffusers.pipelines.z_image", "peft"]),
    ],
)
def test_importing_leaves_out(module: str, absent: list[str]) -> None:
    code = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["lowbit", "lowbit.quantization"])
def test_names_that_are_imported_when_used_have_types(package: str) -> None:
    module = importlib.import_module(package)
    (block,) = (node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.If))
    typed = {
        (alias.asname, node.module) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert typed == set(module._PUBLIC.items())


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


@pytest.mark.parametrize("package", ["lowbit", "lowbit.quantization"])
def test_type_checkers_and_users_find_the_same_names(package: str) -> None:
    import ast
    import importlib
    from pathlib import Path

    module = importlib.import_module(package)
    tree = ast.parse(Path(str(module.__file__)).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    found = {name.asname: node.module for node in block.body if isinstance(node, ast.ImportFrom) for name in node.names}
    assert found == module._PUBLIC
