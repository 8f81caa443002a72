"""``lowbit sensitivity`` and ``lowbit tune``, run as a user runs them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lowbit.cli.main import main
from lowbit.evaluation import recording
from lowbit.evaluation.prompts import validation_prompts
from tools.train_embedded.captions import parse

PROMPT = "a red circle"
HARSH = '{"method": "int8", "activation_bits": 4, "ignored_layers": ["re:(?!layers.3)"]}'


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["lowbit", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_sensitivity_prints_a_table_and_writes_a_chart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["sensitivity", "-q", "int8", "--prompt", PROMPT, "--num-inference-steps", "2", "--probes", "1"]
    arguments += ["--ignored-layers", "feed_forward", "--device", "cpu"]
    assert run([*arguments, "--output-json", "out/a.json", "--report", "out/a.html"], monkeypatch) == 0
    shown = capsys.readouterr().out
    found = json.loads(Path("out/a.json").read_text())
    assert found["layers"][0]["name"] in shown
    assert "█" in shown
    assert found["layers"][0]["name"] in Path("out/a.html").read_text()


def test_tune_writes_a_recipe_that_other_commands_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recording, "START_METHOD", "spawn")  # a fork server writes where it was started
    Path("verify.txt").write_text("a blue star\n")
    arguments = ["tune", "-q", HARSH, "--prompt", PROMPT, "--num-inference-steps", "2", "--gate", "psnr_db>=12"]
    arguments += ["--height", "64", "--width", "64"]
    arguments += ["--verification-prompts-file", "verify.txt", "--budget", "1", "--device", "cpu", "-o", "recipe.json"]
    assert run(arguments, monkeypatch) == 0
    shown = capfd.readouterr().out
    for word in ("trial", "size", "time", "pass", "recipe.json"):
        assert word in shown
    assert json.loads(Path("recipe.json").read_text())["activation_bits"] == 4
    assert json.loads(Path("recipe.proof.json").read_text())["gate"]["passed"]
    assert run(["info", "embedded", "--quantization-config", "recipe.json"], monkeypatch) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sensitivity"], "--quantization"),
        (["sensitivity", "-q", "int3"], "Unknown quantization method"),
        (["sensitivity", "-q", "int8", "--ignored-layers", "img_mlp"], "img_mlp"),
        (["sensitivity", "-q", "int8", "--report", "."], "is a folder"),
        (["sensitivity", "./nowhere/at/all", "-q", "int8"], "There is no folder"),
        (["tune"], "--quantization"),
        (["tune", "-q", "int8", "--gate", "psnr>=3"], "did you mean psnr_db"),
        (["tune", "-q", "int8", "--budget", "soon"], "--budget"),
        (["tune", "-q", '{"transformer": "int8"}'], "quantization methods for the diffusion transformers"),
        (["tune", "-q", "int8", "--prompts-file", "missing.txt"], "there is no file"),
    ],
)
def test_bad_input_is_found_before_a_model_is_loaded(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lowbit.evaluation.recording.Side.load", lambda _: pytest.fail("loaded a model"))
    assert run(arguments, monkeypatch) == 2
    assert message in capsys.readouterr().err


def test_the_fixed_prompts_are_twelve_and_the_embedded_models_grammar() -> None:
    for model in (None, "Qwen/Qwen-Image"):
        assert len(set(validation_prompts(model))) == 12
    for prompt in validation_prompts("embedded"):
        parse(prompt)
