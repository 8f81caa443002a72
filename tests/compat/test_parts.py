"""The private parts of other libraries: each is in the table, in the installed version, and used in one room."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from lowbit.compat.parts import overrides
from lowbit.compat.parts.table import PARTS, SEEN, Part
from lowbit.errors import UnsupportedError

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src" / "lowbit"
# Private by spelling alone: documented, or Python's own.
PUBLIC = {"_replace", "_asdict", "_exit", "_parameters", "_modules"}


def found(part: Part) -> Any:
    module, _, name = part.path.partition(":")
    owner: Any = importlib.import_module(module)
    for each in name.split("."):
        owner = inspect.getattr_static(owner, each) if inspect.isclass(owner) else getattr(owner, each)
    return owner.__func__ if isinstance(owner, classmethod | staticmethod) else owner


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.path)
def test_the_installed_version_has_it(part: Part) -> None:
    pytest.importorskip(part.library)
    if part.until is not None and Version(version(part.library)) >= Version(part.until):
        return
    value = found(part)
    assert set(part.arguments) <= (set(inspect.signature(value).parameters) if part.arguments else set())


@pytest.mark.parametrize("library", SEEN)
def test_bounds_follow_from_the_table(library: str) -> None:
    tomllib = pytest.importorskip("tomllib")  # since Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [each for group in project["optional-dependencies"].values() for each in group]
    requirements = [Requirement(text) for text in [*project["dependencies"], *extras]]
    given = [each.specifier for each in requirements if each.name == library]
    assert given
    first, last = map(Version, SEEN[library])
    for specifier in given:
        assert first in specifier
        assert last in specifier
        bounds = {each.operator: Version(each.version) for each in specifier}
        assert bounds["<"].release == (last.major, last.minor + 1)
        assert bounds[">="].release == first.release[: len(bounds[">="].release)]


def private(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the lines and names of private attributes and imports, also those that ``getattr`` and others name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if not is_self(node.value):
                yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and not (node.module or "").startswith("lowbit"):
            for name in [*(node.module or "").split("."), *(each.name for each in node.names)]:
                yield node.lineno, name
        elif isinstance(node, ast.Call) and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
            yield node.lineno, str(node.args[1].value) if ast.unparse(node.func).endswith("attr") else ""


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def own_names(tree: ast.Module) -> Iterator[str]:
    """Yield the names that a module defines: functions, classes, variables and its objects' attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            yield node.attr


def test_no_other_room_uses_private_parts() -> None:
    trees = {file: ast.parse(file.read_text()) for file in SOURCES.rglob("*.py")}
    ours = PUBLIC.union(*map(own_names, trees.values()))
    outside = {file: tree for file, tree in trees.items() if file.relative_to(SOURCES).parts[0] != "compat"}
    uses = [
        f"{file.relative_to(SOURCES)}:{line} {name}"
        for file, tree in outside.items()
        for line, name in private(tree)
        if re.match(r"_(?!_|lowbit_)", name) and name not in ours
    ]
    assert not uses, "\n".join(uses)


def test_a_part_that_is_gone_is_named_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("accelerate.hooks")
    with pytest.raises(UnsupportedError, match=r"accelerate \S+ has no accelerate.hooks:set_module_.*1\.1\.0 to"):
        overrides.override(module, "set_module_tensor_to_device", SimpleNamespace)
