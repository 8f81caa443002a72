"""Comparing videos: a small random Wan pipeline."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from lowbit.cli.main import main
from tests.support.models import wan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    words = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", "a", "cat", "walks"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    text_encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=8, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, decoder_start_token_id=0)
    )
    vae = AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    pipeline = WanPipeline(
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>"),
        text_encoder=text_encoder,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=wan(),
    )
    target = tmp_path_factory.mktemp("wan") / "model"
    pipeline.save_pretrained(target)
    return target


def test_frames_are_compared_and_the_report_shows_three(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compare", "--task", "t2v", "--model", str(folder), "--candidate-quantization", "int8"]
    arguments += ["--prompt", "a cat walks", "--height", "32", "--width", "32", "--num-frames", "9", "--device", "cpu"]
    arguments += ["--num-inference-steps", "2", "--guidance-scale", "3", "--output-json", str(tmp_path / "result.json")]
    arguments += ["--report", str(tmp_path / "report.html"), "--save-output-dir", str(tmp_path / "frames")]
    monkeypatch.setattr(sys, "argv", ["lowbit", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code, capsys.readouterr().err
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["output_metrics"]["num_frames"] == 9
    assert found["output_metrics"]["mid_frame_index"] == 4
    assert "all_frames_metrics" in found["output_metrics"]
    assert len(list((tmp_path / "frames").iterdir())) == 18
    page = (tmp_path / "report.html").read_text()
    assert page.count('class="pair"') == 3
    assert "3 of 9 frames are shown" in page
