"""What of the GPU benchmark runs without one: its command line, its files, its parts on the CPU with few layers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import gpu, gpu_kernels, gpu_steps
from benchmarks.gpu_timing import Context, copies_for, time_cases
from benchmarks.published_models import IMAGE_TOKENS, MODELS
from lowbit.ops.triton.tiles import FP8, FP8_BLOCKS, INT8

CPU = torch.device("cpu")


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        gpu.parse(["--help"])
    shown = capsys.readouterr().out
    assert all(part in shown for part in ("correctness", "--only", "--few-layers"))


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "No CUDA or ROCm device" in capsys.readouterr().out


def test_a_part_that_fails_is_recorded_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "gpu.json"

    def failing(context: Context) -> Iterator[gpu.Row]:
        yield {"value": 1}
        assert json.loads(output.read_text())["parts"]["gemm"]["rows"] == [{"value": 1}]  # saved already
        raise RuntimeError("out of luck")

    def working(context: Context) -> Iterator[gpu.Row]:
        context.notes.append("a note")
        yield {"kernel": "k", "passed": True}

    monkeypatch.setattr(gpu, "PARTS", {"gemm": failing, "correctness": working})
    assert gpu.main(["--only", "gemm", "correctness", "--device", "cpu", "--output", str(output)]) == 1
    results = json.loads(output.read_text())
    assert results["parts"]["gemm"]["error"] == "RuntimeError: out of luck"
    assert results["parts"]["correctness"]["rows"] == [{"kernel": "k", "passed": True}]
    assert results["parts"]["correctness"]["notes"] == ["a note"]
    assert results["machine"]["packages"]["torch"]


def test_a_check_that_fails_fails_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PARTS", {"correctness": lambda context: iter([{"passed": False}])})
    arguments = ["--only", "correctness", "--device", "cpu", "--output", str(tmp_path / "gpu.json")]
    assert gpu.main(arguments) == 1


def test_correctness_runs_and_would_see_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels, "CORRECTNESS_SHAPES", ((1, 128, 96), (17, 200, 51)))
    context = Context(CPU, list(MODELS))
    rows = list(gpu_kernels.correctness(context))
    assert len(rows) == 16
    assert all(row["passed"] for row in rows)
    right = gpu_kernels.product
    monkeypatch.setattr(gpu_kernels, "product", lambda kind, given: right(kind, given) * 1.02)
    assert not any(
        row["passed"] for row in gpu_kernels.correctness(context) if row["kernel"] in (INT8, FP8, FP8_BLOCKS)
    )


@pytest.mark.parametrize("name", gpu_steps.STEP_MODELS)
def test_a_step_of_few_layers_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (gpu_steps.SIDE // 2) ** 2 == IMAGE_TOKENS
    monkeypatch.setattr(gpu_steps, "SIDE", 16)
    model = MODELS[name]
    transformer = materialize_small(name)
    context = Context(CPU, [name], rounds=1)
    step = gpu_steps.make_step(model, transformer, CPU)
    with torch.no_grad():
        result = step()
    assert result.shape == ((16, 1, 16, 16) if name == "z-image" else (1, 64, 64))
    assert result.isfinite().all()
    assert gpu_steps.blocks_of(transformer)
    row = gpu_steps.quantize(transformer, "int8", CPU)
    assert row["bytes_after"] < row["bytes_before"]
    assert context.remaining > 0


def materialize_small(name: str) -> torch.nn.Module:
    """Return a narrow model: a true width takes a CPU too long."""
    from dataclasses import replace

    narrow = {
        "z-image": {"dim": 256, "n_heads": 2, "n_kv_heads": 2},
        "qwen-image": {"num_attention_heads": 2},
    }[name]
    component = MODELS[name].components["transformer"]
    changed = replace(MODELS[name], components={"transformer": replace(component, config=narrow)})
    return gpu_steps.materialize(changed, CPU, few_layers=True)


def test_cases_that_fail_are_named_beside_the_others() -> None:
    def broken() -> None:
        raise ValueError("no such kernel\nand more")

    timed = time_cases({"good": [lambda: None, lambda: None], "bad": [broken]}, Context(CPU, [], rounds=2))
    assert timed["good"] >= 0
    assert timed["bad"] == "ValueError: no such kernel"


def test_candidates_differ_and_hold_the_tables_choice() -> None:
    for kind in (INT8, FP8, FP8_BLOCKS):
        found = gpu_kernels.candidates(kind)
        assert len(set(found)) == len(found)
    assert copies_for(1) == 16
    assert copies_for(1 << 30) == 2
