from __future__ import annotations

import importlib
import logging
import pkgutil

import pytest
import torch

from lowbit import ops
from lowbit.errors import ConfigError, UnsupportedError
from lowbit.ops import dispatch
from lowbit.ops.attention import AttentionProblem
from lowbit.ops.dispatch import ANY_DEVICE, AnyProblem, Implementation, Problem, select
from lowbit.ops.weight_format import WeightFormat

PROBLEM = Problem(torch.device("cpu"), torch.bfloat16, 64, 64)
GPU_ONLY = Implementation("gpu", "lowbit.ops.int8", frozenset({"cuda"}))
ABSENT = Implementation("absent", "lowbit.ops.no_such_module", ANY_DEVICE)
REFERENCE = Implementation("reference", "lowbit.ops.int8", ANY_DEVICE, slow="it is the reference")
HIDDEN = Implementation("hidden", "lowbit.ops.int8", ANY_DEVICE, automatic=False)


def test_auto_takes_the_first_that_can() -> None:
    assert select("int8", [GPU_ONLY, ABSENT, HIDDEN, REFERENCE], PROBLEM) is REFERENCE


def test_auto_tells_a_slow_choice_once_with_reasons(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._tell_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        select("int8", [GPU_ONLY, REFERENCE], PROBLEM)
        select("int8", [GPU_ONLY, REFERENCE], PROBLEM)
    assert len(caplog.records) == 1
    assert "it is the reference" in caplog.text
    assert "gpu: runs on cuda, not on cpu" in caplog.text


def test_a_named_one_never_falls_back() -> None:
    assert select("int8", [REFERENCE, HIDDEN], PROBLEM, "hidden") is HIDDEN
    with pytest.raises(UnsupportedError, match="runs on cuda, not on cpu"):
        select("int8", [GPU_ONLY, REFERENCE], PROBLEM, "gpu")


def test_the_environment_names_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_INT8_KERNEL", "hidden")
    assert select("int8", [REFERENCE, HIDDEN], PROBLEM) is HIDDEN
    assert select("int8", [REFERENCE, HIDDEN], PROBLEM, "reference") is REFERENCE
    assert select("fp8", [REFERENCE, HIDDEN], PROBLEM) is REFERENCE


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="Unknown int8 kernel: 'fast'. Expected one of: auto, gpu, reference"):
        select("int8", [GPU_ONLY, REFERENCE], PROBLEM, "fast")


def test_nothing_fits_lists_every_reason() -> None:
    with pytest.raises(UnsupportedError) as error:
        select("int8", [GPU_ONLY, ABSENT], PROBLEM)
    assert len(error.value.reasons) == 2
    assert "gpu: runs on cuda" in str(error.value)
    assert "absent: can't be imported" in str(error.value)


FAMILIES = {
    module.name: getattr(importlib.import_module(f"lowbit.ops.{module.name}"), "IMPLEMENTATIONS", ())
    for module in pkgutil.iter_modules(ops.__path__)
}
WEIGHT_FORMATS = {"gguf": "Q4_K", "mx": "mxfp4"}


@pytest.mark.parametrize("device", ["cpu", "meta", "cuda", "xpu", "mps"])
@pytest.mark.parametrize("family", [name for name, table in FAMILIES.items() if table])
def test_auto_finds_something_for_every_family_on_every_device(family: str, device: str) -> None:
    weight_format = WeightFormat(WEIGHT_FORMATS.get(family, ""))
    problem: AnyProblem = Problem(torch.device(device), torch.bfloat16, 64, 128, weight_format)
    if family == "attention":
        problem = AttentionProblem(torch.device(device), torch.bfloat16, "int8", 64)
    chosen = select(family, FAMILIES[family], problem)
    assert chosen.automatic
    assert chosen.devices == ANY_DEVICE or device in chosen.devices
