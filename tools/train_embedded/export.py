"""Writes the trained parts as a pipeline folder of diffusers, in BF16."""

import json
import os
import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import PreTrainedTokenizerFast, Qwen3Model

SHIFT = 1.5
"""How far the sampler leans to high noise, where the scene is decided."""
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
"""The name that transformers 4 and 5 both know."""


def build_pipeline(
    transformer: ZImageTransformer2DModel,
    text_encoder: Qwen3Model,
    vae: AutoencoderKL,
    tokenizer: PreTrainedTokenizerFast,
) -> ZImagePipeline:
    """The stock pipeline around the trained parts, in whatever precision they have."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    return ZImagePipeline(scheduler, vae, text_encoder, tokenizer, transformer)


def _edit_json(path: Path, **changes: object) -> None:
    values = json.loads(path.read_text())
    values.update(changes)
    for name in ("_name_or_path", "name_or_path"):
        values.pop(name, None)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def export(pipeline: ZImagePipeline, folder: Path) -> None:
    """Save in BF16, in place of what is in ``folder`` of the same names."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline.to(torch.bfloat16).save_pretrained(temporary, safe_serialization=True)
    _edit_json(temporary / "tokenizer/tokenizer_config.json", tokenizer_class=TOKENIZER_CLASS)
    index = temporary / "model_index.json"
    _edit_json(index, tokenizer=["transformers", TOKENIZER_CLASS])
    for part in ("transformer", "vae", "text_encoder"):
        _edit_json(temporary / part / "config.json")
    folder.mkdir(parents=True, exist_ok=True)
    for item in temporary.iterdir():
        target = folder / item.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(item, target)
    temporary.rmdir()


def folder_bytes(folder: Path) -> int:
    """Size of all files below ``folder``."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
