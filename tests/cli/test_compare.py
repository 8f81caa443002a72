"""``lowbit compare``, run as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lowbit.cli.main import main
from lowbit.cli.options import read_prompts
from lowbit.errors import ConfigError
from tests.support.commands import lowbit

DOOR = "lowbit.quantization.tools.compare_diffusion_trajectory_similarity"
PROMPT = "a red circle above a blue star"
SMOOTHED = '{"method": "int8", "smoothing": 0.5}'


COMMAND: tuple[str, ...] = ("--task", "t2i", "--model", "embedded", "--candidate-quantization", "fp8")
COMMAND += ("--ignored-layers", "feed_forward", "--prompt", PROMPT, "--height", "128", "--width", "128")
COMMAND += ("--num-inference-steps", "2", "--seed", "142")
COMMAND += ("--output-json", "out/result.json", "--save-output-dir", "out/images", "--enforce-eager")


def test_the_reference_systems_command_works_as_written(tmp_path: Path) -> None:
    command = [sys.executable, "-m", DOOR, *COMMAND, "--gate", "strict"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    check_comparison(result.stdout, tmp_path, "pass")


def test_a_gate_that_is_missed_ends_with_status_1(tmp_path: Path) -> None:
    result = lowbit("compare", *COMMAND, "--gate", "psnr_db>=1000", cwd=tmp_path)
    assert result.returncode == 1, result.stderr
    check_comparison(result.stdout, tmp_path, "FAIL")


def check_comparison(printed: str, folder: Path, verdict: str) -> None:
    for word in ("psnr_db", "relative_l2", "s per generation", "MB at most", "result.json", verdict):
        assert word in printed
    found = json.loads((folder / "out" / "result.json").read_text())
    assert found["output_metrics"]["num_images"] == 1
    assert sorted(path.name for path in (folder / "out" / "images").iterdir()) == [
        "000_000_candidate.png",
        "000_000_reference.png",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give a prompt"),
        (["--prompt", " "], "one is empty"),
        (["--prompts-file", "missing.txt"], "there is no file missing.txt"),
        (["--prompt", PROMPT, "--gate", "psnr>=25"], "did you mean psnr_db"),
        (["--prompt", PROMPT, "--gate", "ssim>=0.9"], "nothing called 'ssim' is computed"),
        (["--prompt", PROMPT, "--output-json", "."], "is a folder"),
        (["--prompt", PROMPT, "--output-json", "/proc/nothing/result.json"], "can't create the folder"),
        (["--prompt", PROMPT, "--candidate-quantization", "int3"], "Unknown quantization method: 'int3'"),
        (["--prompt", PROMPT, "--candidate-quantization", "int8", "--ignored-layers", "img_mlp"], "img_mlp"),
        (["--prompt", PROMPT, "--ignored-layers", "to_q"], "needs --candidate-quantization"),
        (["--prompt", PROMPT, "--num-frames", "5"], "--task t2v"),
        (["--prompt", PROMPT, "--report", "."], "is a folder"),
        (["--prompt", PROMPT, "--candidate-cache-backend", "teacache"], "Unknown cache_backend"),
        (["--prompt", PROMPT, "--candidate-quantization-config-json", SMOOTHED], "--calibration-prompt"),
        (
            ["--prompt", PROMPT, "--candidate-attention-quantization", "int4"],
            "--candidate-attention-quantization: 'int4'",
        ),
        (["--prompt", PROMPT, "--reference-attention-quantization", '{"unet": "int8"}'], "lacks: unet"),
        (["--prompt", PROMPT, "--seed", "1", "--seed", "1"], "different numbers"),
        (["--prompt", PROMPT, "--candidate-model", "./nowhere/at/all"], "There is no folder"),
    ],
)
def test_bad_input_is_found_before_anything_is_generated(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lowbit", "compare", *arguments])
    monkeypatch.setattr("lowbit.evaluation.comparison.record", lambda *_: pytest.fail("began to generate"))
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_prompts_come_from_both_places(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# comment\n a star \n\na square\n")
    assert read_prompts(["a circle"], file) == ["a circle", "a star", "a square"]
    file.write_text("# nothing\n")
    with pytest.raises(ConfigError, match="holds no prompt"):
        read_prompts([], file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_prompts([], file)
