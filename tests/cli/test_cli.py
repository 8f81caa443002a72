"""The command line, run as a user runs it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lowbit.cli.main import main
from tests.support.commands import lowbit, spawned
from tests.support.export import InterruptedExportError, export, stop_after
from tools.train_embedded.captions import parse
from tools.train_embedded.detector import judge

PROMPT = "a large red circle left of a small blue square"


def test_generate_writes_the_picture_and_says_what_it_did(tmp_path: Path) -> None:
    result = spawned(
        "generate",
        PROMPT,
        "-q",
        "int8",
        "--attention-quantization",
        "int8",
        "--output",
        "picture.png",
        "--seed",
        "0",
        cwd=tmp_path,
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
        "steps, median",
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
        (["--gguf-type", "Q8_0"], "--gguf-type needs --quantization"),
        (["-q", "gguf"], "give gguf_model"),
        (["-q", "gguf", "--gguf-model", "none.gguf"], "there is no file none.gguf"),
        (["-q", "int8", "--gguf-type", "Q8_0"], "Unknown option 'gguf_type'"),
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
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert "error:" in error
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_without_a_seed_the_one_that_was_drawn_repeats_the_picture(tmp_path: Path) -> None:
    first = spawned("generate", PROMPT, "--steps", "1", "-o", "a.png", "--quiet", cwd=tmp_path)
    (seed,) = re.findall(r"^wrote       a.png \(seed (\d+)\)$", first.stdout, re.MULTILINE)
    assert len(first.stdout.splitlines()) == 1
    assert first.stderr == ""
    second = lowbit("generate", PROMPT, "--steps", "1", "-o", "b.png", "--seed", seed, cwd=tmp_path)
    assert f"wrote       b.png (seed {seed})" in second.stdout
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_quantizing_shows_one_bar(tmp_path: Path) -> None:
    shown = lowbit("quantize", "-q", "int8", "-o", "a", cwd=tmp_path)
    assert "Loading" not in shown.stderr
    assert "Writing" not in shown.stderr
    assert "text_encoder: 2/5 components" in shown.stderr
    quiet = lowbit("quantize", "-q", "int8", "-o", "b", "--quiet", cwd=tmp_path)
    assert quiet.stdout == "wrote       b\n"
    assert "components" not in quiet.stderr


def test_quantize_writes_a_checkpoint_that_generates(tmp_path: Path) -> None:
    result = lowbit("quantize", "-q", "int8", "--output", "small", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    assert "# small" in (tmp_path / "small" / "README.md").read_text()
    result = lowbit("info", "small", cwd=tmp_path)
    assert "int8 takes" in result.stdout, result.stderr
    result = lowbit("generate", PROMPT, "--model", "small", "--output", "picture.png", cwd=tmp_path)
    assert " 20 steps, " in result.stdout, result.stderr
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (128, 128)
    result = lowbit("quantize", "-q", "int8", "--output", "small", cwd=tmp_path)
    assert result.returncode == 2
    assert "exists already" in result.stderr


def test_an_interrupted_export_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lowbit", "quantize", *arguments, "-o", "small"])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    with pytest.raises(InterruptedExportError):
        export(tmp_path / "small", {"method": "int8"}, dtype="bfloat16", device=None, after=stop_after("transformer"))
    status, _, error = run("embedded", "-q", "int8", "--ignored-layers", "to_out")
    assert status == 2
    assert "small.partial holds an unfinished export that differs in: quantization" in error
    status, output, _ = run("embedded", "-q", "int8")
    assert status == 0
    assert "resuming    small.partial: there already: transformer" in output
    assert [line.split()[0] for line in output.splitlines()] == ["resuming", *["written"] * 4, "wrote"]
    assert "layers int8" in (tmp_path / "small" / "README.md").read_text()
    assert "Name the model once" in run("embedded", "-q", "int8", "--model", "embedded")[2]


def test_info_tells_which_kernels_run_and_why_not_the_others(tmp_path: Path) -> None:
    result = lowbit("info", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for word in (
        "kernels on cpu:",
        "  fp8  ",
        "  int8 attention  ",
        "lowbit info --verbose",
        "native helper",
    ):
        assert word in result.stdout
    assert len(result.stdout.splitlines()) <= 40
    one = lowbit("info", "-q", "int8", cwd=tmp_path)
    assert re.search(r"triton +no: runs on cuda", one.stdout)
    assert "fp8" not in one.stdout
    for name in ("reference", "weight_only"):  # once, whatever the number of devices it has implementations for
        assert len(re.findall(rf"^  {name} ", one.stdout.partition("attention")[0], re.MULTILINE)) == 1
    assert "give the MODEL" in lowbit("info", "--gguf-type", "Q8_0", cwd=tmp_path).stderr
    assert "kernels of its own" in lowbit("info", "-q", "torchao", cwd=tmp_path).stderr
    assert "fp8:" in lowbit("info", "--verbose", cwd=tmp_path).stdout


def test_info_lists_what_would_be_quantized(tmp_path: Path) -> None:
    result = lowbit("info", "embedded", "--quantization", "fp8", "--ignored-layers", "to_out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for word in ("layers.*.feed_forward.w1", "kept: modulation", "kept: ignored_layers", "fp8 takes"):
        assert word in result.stdout


def test_help_has_examples(tmp_path: Path) -> None:
    assert "Examples" in lowbit("generate", "--help", cwd=tmp_path).stdout
    assert "0.1.0" in spawned("--version", cwd=tmp_path).stdout


def test_a_gguf_file_is_written_and_generated_with(tmp_path: Path) -> None:
    written = lowbit("quantize", "-q", "gguf", "--gguf-type", "Q4_K", "-o", "model.gguf", cwd=tmp_path)
    assert written.returncode == 0, written.stderr
    for word in ("42 layers gguf Q5_0", "7 layers gguf Q4_K", "7 modulation", "model.gguf"):
        assert word in written.stdout
    arguments = ("-q", "gguf", "--gguf-model", "model.gguf", "--output", "picture.png", "--steps", "8")
    result = lowbit("generate", PROMPT, *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "7 layers gguf Q4_K" in result.stdout
    assert "12 BF16 in the file" in result.stdout
    again = lowbit("quantize", "-q", "gguf", "--gguf-type", "Q4_K", "-o", "model.gguf", cwd=tmp_path)
    assert again.returncode == 2
    assert "exists already" in again.stderr
    other = lowbit("quantize", "-q", "int8", "-o", "other.gguf", cwd=tmp_path)
    assert "the method is int8: use --quantization gguf" in other.stderr
    assert not (tmp_path / "other.gguf").exists()


def test_a_comfyui_file_is_written_and_generated_with(tmp_path: Path) -> None:
    written = lowbit("quantize", "-q", "comfyui", "-o", "model.safetensors", cwd=tmp_path)
    assert written.returncode == 0, written.stderr
    assert "layers comfyui float8_e4m3fn" in written.stdout
    arguments = ("-q", "comfyui", "--comfyui-model", "model.safetensors", "--output", "picture.png", "--steps", "2")
    result = lowbit("generate", "a red circle", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    other = lowbit("quantize", "-q", "int8", "-o", "other.safetensors", cwd=tmp_path)
    assert "the method is int8: use --quantization comfyui" in other.stderr
