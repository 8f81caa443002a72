"""Every example, run as a user runs it, on the embedded model."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lowbit import Omni, OmniDiffusionSamplingParams
from lowbit.models.embedded import embedded_model
from tests.support.methods import forget_method

EXAMPLES = Path(__file__).parents[2] / "examples"


class Runner:
    """Runs examples in a folder of the test's own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, name: str, *arguments: str) -> str:
        """Run ``examples/name`` as the main program; return what it prints."""
        self.monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return self.capsys.readouterr().out


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    monkeypatch.chdir(tmp_path)
    return Runner(monkeypatch, capsys)


def size(file: str) -> tuple[int, int]:
    with Image.open(file) as picture:
        return picture.size


PROMPT = "a large red circle left of a small blue square"  # which all examples take if none is given
SIZE = (embedded_model().width, embedded_model().height)


def test_all_have_a_test() -> None:
    named = set(re.findall(r'run\("([a-z_]+\.py)"', Path(__file__).read_text()))
    assert {file.name for file in EXAMPLES.glob("*.py")} == named


def test_text_to_image(run: Runner) -> None:
    printed = run("text_to_image.py", "--quantization", "int8", "--num-inference-steps", "2")
    assert "int8" in printed
    assert size("output.png") == SIZE


def test_quantize(run: Runner) -> None:
    printed = run("quantize.py", "--output", "small")
    assert "transformer: " in printed
    assert "byte for byte" in printed
    assert Omni("small").manifests["transformer"].quantized


def test_load_gguf(run: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from lowbit.cli.main import main

    command = ["lowbit", "quantize", "-q", "gguf", "--gguf-type", "Q4_0", "--output", "shapes-Q4_0.gguf"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    printed = run("load_gguf.py", "shapes-Q4_0.gguf")
    assert "Q4_0" in printed
    assert size("picture.png") == SIZE


def test_lora(run: Runner) -> None:
    pytest.importorskip("peft")
    printed = run("lora.py")
    assert "the adapter changed the picture: True" in printed
    assert "without it the picture is the first one again: True" in printed


@pytest.mark.parametrize("place", [[], ["--disk", "weights"]], ids=["memory", "disk"])
def test_offload(run: Runner, place: list[str]) -> None:
    run("offload.py", "--device", "cpu", *place)
    expected = Omni(quantization="int8", device="cpu").generate(PROMPT, OmniDiffusionSamplingParams(seed=0))[0]
    with Image.open("offloaded.png") as picture:
        assert picture.tobytes() == expected.images[0].tobytes()
    assert bool(place) == Path("weights").is_dir()


def test_compare(run: Runner) -> None:
    printed = run("compare.py")
    errors = [float(value) for value in re.findall(r"step \d+: relative error of the latents (\S+)", printed)]
    assert len(errors) == embedded_model().num_inference_steps
    assert 0 < errors[-1] < 0.1
    assert float(re.findall(r"PSNR (\S+) dB", printed)[0]) > 40


def test_train_lora_resumes_exactly_and_plain_diffusers_reads_the_adapter(run: Runner) -> None:
    pytest.importorskip("peft")
    run("train_lora.py", "--steps", "4", "--batch", "2", "--output", "whole")
    run("train_lora.py", "--steps", "2", "--batch", "2", "--output", "parts")
    printed = run("train_lora.py", "--steps", "4", "--batch", "2", "--output", "parts", "--resume")
    assert re.search(r"yellow in pictures of held-out captions: \d+% before, \d+% after", printed)
    whole, parts = (load_file(Path(name, "pytorch_lora_weights.safetensors")) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    plain: Any = Omni().pipeline
    plain.load_lora_weights("whole")
    found = {name: tensor for name, tensor in plain.transformer.named_parameters() if ".lora_B." in name}
    assert len(found) == len(whole) // 2
    assert all(tensor.any() for tensor in found.values())


def test_custom_method(run: Runner) -> None:
    try:
        printed = run("custom_method.py")
    finally:
        forget_method("toy_int8")
    assert "toy_int8" in printed
