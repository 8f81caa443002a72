"""``lowbit bench``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowbit.bench import limits
from lowbit.cli.main import main


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["lowbit", "bench", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)


def test_a_step_of_the_embedded_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bench.json"
    options = ["--size", "64", "--methods", "bf16,int8", "--repetitions", "2", "--device", "cpu"]
    run(monkeypatch, *options, "--output-json", str(file))
    shown = capsys.readouterr()
    assert "embedded at 64x64" in shown.out
    assert "over bf16" in shown.out
    assert "warming int8" in shown.err
    found = json.loads(file.read_text())
    assert [row["variant"] for row in found["results"]] == ["bf16", "int8"]
    assert found["weights"] == "real"
    assert found["machine"]["packages"]["torch"]


def test_shapes_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(limits, "CPU_SIZES", ((64, 128, 128),))
    file = tmp_path / "shapes.json"
    options = ["--shapes", "embedded", "--size", "64", "--repetitions", "2", "--budget", "0", "--device", "cpu"]
    run(monkeypatch, *options, "--output-json", str(file))
    shown = capsys.readouterr().out
    for words in ("limit of int8", "of limit", "(kept: modulation)", "as it is", "speedup"):
        assert words in shown
    assert json.loads(file.read_text())["prediction"]["int8"]["seconds"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "int3"], "Unknown methods: int3"),
        (["--methods", "bf16,bf16"], "different names"),
        (["--peers", "tensorrt"], "Unknown methods: tensorrt"),
        (["--model", "sdxl"], "Unknown model: 'sdxl'"),
        (["--model", "flux", "--layers", "20"], "1 to 19 layers, not 20"),
        (["--layers", "2"], "measured whole"),
        (["--size", "100"], "multiple of 16"),
        (["--shapes", "flux", "--model", "flux"], "leave out --model"),
        (["--shapes", "flux", "--peers", "torchao"], "pip install|takes neither"),
        (["--device", "abacus"], "abacus"),
        (["--output-json", "/proc/nothing/x.json"], "--output-json"),
    ],
)
def test_bad_input_ends_with_its_message(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    monkeypatch.setattr("sys.argv", ["lowbit", "bench", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)
