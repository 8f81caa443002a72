"""The command line, run as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lowbit.cli.main import main
from tools.train_embedded.captions import parse
from tools.train_embedded.detector import judge

PROMPT = "a large red circle left of a small blue square"


def lowbit(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    code = "from lowbit.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True, check=False, timeout=300
    )


def test_generate_writes_the_picture_and_says_what_it_did(tmp_path: Path) -> None:
    result = lowbit(
        "generate", PROMPT, "-q", "int8", "--attention-quantization", "int8", "--output", "picture.png", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    picture = np.asarray(Image.open(tmp_path / "picture.png").convert("RGB"))
    assert judge(parse(PROMPT), picture).ok
    for word in (
        "embedded",
        "int8",
        "7 attention layers int8",
        "kept",
        "loaded",
        "steps of",
        "peak memory",
        "picture.png",
    ):
        assert word in result.stdout
    assert "denoising" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-q", "int3"], "Unknown quantization method: 'int3'"),
        (["-q", "int8", "--ignored-layers", "img_mlp"], "img_mlp"),
        (["-q", "int8", "--kernel", "fastest"], "Unknown int8 kernel: 'fastest'"),
        (["--ignored-layers", "to_q"], "needs --quantization"),
        (["--output", "missing/picture.png"], "does not exist"),
        (["--output", "picture.xyz"], "no image format"),
        (["--model", "./nowhere/at/all"], "There is no folder"),
        (["--height", "100"], "multiples of 16"),
        (["--quantization-config", "{"], "not valid JSON"),
        (["--quantization-config", '{"unet": "int8"}'], "lacks: unet"),
        (["--attention-quantization", "int4"], "Unknown --attention-quantization: 'int4'"),
        (["--steps", "0"], "num_inference_steps"),
    ],
)
def test_bad_input_ends_with_its_message_and_writes_nothing(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lowbit", "generate", PROMPT, *arguments])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 1
    error = capsys.readouterr().err
    assert "error:" in error
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_quantize_writes_a_checkpoint_that_generates(tmp_path: Path) -> None:
    result = lowbit("quantize", "-q", "int8", "--output", "small", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    result = lowbit("info", "small", "-q", "int8", cwd=tmp_path)
    assert "int8 takes" in result.stdout, result.stderr
    result = lowbit("quantize", "-q", "int8", "--output", "small", cwd=tmp_path)
    assert result.returncode == 1
    assert "exists already" in result.stderr


def test_info_tells_which_kernels_run_and_why_not_the_others(tmp_path: Path) -> None:
    result = lowbit("info", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for word in (
        "int8 on cpu",
        "fp8 on cpu",
        "int8 attention on cpu",
        "in use",
        "triton       no: runs on cuda",
        "native helpers",
    ):
        assert word in result.stdout


def test_info_lists_what_would_be_quantized(tmp_path: Path) -> None:
    result = lowbit("info", "embedded", "--quantization", "fp8", "--ignored-layers", "to_out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for word in ("layers.*.feed_forward.w1", "kept: modulation", "kept: ignored_layers", "fp8 takes"):
        assert word in result.stdout


def test_help_has_examples(tmp_path: Path) -> None:
    assert "Examples" in lowbit("generate", "--help", cwd=tmp_path).stdout
    assert "0.1.0" in lowbit("--version", cwd=tmp_path).stdout
