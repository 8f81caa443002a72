"""Every variable that lowbit reads is in one table, and the page shows that table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lowbit import env
from lowbit.errors import ConfigError
from lowbit.ops import attention, int8
from lowbit.ops.dispatch import select
from lowbit.quantization.factory import SUPPORTED_QUANTIZATION_METHODS, config_class
from tests.ops.test_dispatch import PROBLEM

ROOT = Path(__file__).parent.parent
NAMES = {variable.name for variable in env.VARIABLES}


def test_the_page_holds_the_table() -> None:
    page = (ROOT / "docs" / "environment.md").read_text()
    assert env.table() in page
    for family in env.KERNEL_FAMILIES:
        assert f"`{family.upper()}`" in page
    for name in (*env.RECORDED, *env.RECORDED_INSTRUCTIONS):
        assert f"`{name}`" in page


def test_nothing_else_reads_the_environment() -> None:
    for file in [*(ROOT / "src").rglob("*.py"), ROOT / "setup.py"]:
        text = file.read_text()
        if file.name not in ("env.py", "setup.py"):
            assert not re.search(r"\bos\.environ|\bgetenv\b|import environ", text), file
        for name in re.findall(r"LOWBIT_[A-Z0-9_]+\b", text):
            assert name in NAMES | {env.kernel_variable(family) for family in env.KERNEL_FAMILIES} | {"LOWBIT_"}, file


def test_every_family_of_kernels_is_listed() -> None:
    families = {config_class(method)().linear_method().family for method in SUPPORTED_QUANTIZATION_METHODS}
    assert families <= set(env.KERNEL_FAMILIES)


def test_a_variable_that_is_not_in_the_table_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_OTHER", "1")
    with pytest.raises(KeyError, match="LOWBIT_OTHER"):
        env.read("LOWBIT_OTHER")


def test_misspelt_variables_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOWBIT_NATIVE", "LOWBIT_INT8_KERNEL", "LOWBIT_ATENTION_KERNEL", "LOWBIT_LOGS"):
        monkeypatch.setenv(name, "")
    assert env.unknown_names() == ["LOWBIT_ATENTION_KERNEL", "LOWBIT_LOGS"]


def test_an_unknown_kernel_names_the_variable_it_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_INT8_KERNEL", "fastest")
    with pytest.raises(ConfigError, match="'fastest' of LOWBIT_INT8_KERNEL. Expected one of: auto, "):
        select("int8", int8.IMPLEMENTATIONS, PROBLEM)
    monkeypatch.setenv("LOWBIT_ATTENTION_KERNEL", " reference ")
    problem = attention.AttentionProblem(PROBLEM.device, PROBLEM.dtype, "int8", 64)
    assert attention.select_kernel(problem) == "reference"
