"""``lowbit calibrate-cache`` and ``--cache-backend``, run as a user runs them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lowbit.cli.main import main


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["lowbit", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_what_is_fitted_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    steps = ["--num-inference-steps", "8", "--device", "cpu"]
    assert run(["calibrate-cache", "--prompt", "a red circle", *steps, "--output", "cache.json"], monkeypatch) == 0
    assert "transformer: 7 steps" in capsys.readouterr().out
    coefficients = json.loads(Path("cache.json").read_text())["coefficients"]
    assert len(coefficients) == 5
    config = json.dumps({"coefficients": coefficients, "rel_l1_thresh": 5.0})
    cached = ["--cache-backend", "tea_cache", "--cache-config", config]
    assert run(["generate", "a red circle", *steps, *cached, "--output", "a.png"], monkeypatch) == 0
    assert "6 from the cache" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cache-backend", "teacache"], "Unknown cache_backend"),
        (["--cache-backend", "tea_cache", "--cache-config", "{"], "--cache-config: '{' is not valid JSON"),
        (["--cache-config", '{"rel_l1_thresh": 1}'], "needs a cache_backend"),
    ],
)
def test_bad_options(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["generate", "a red circle", *arguments], monkeypatch) == 2
    assert message in capsys.readouterr().err
