"""The card of a quantized checkpoint, as the Hub's own library reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from lowbit.errors import ConfigError
from lowbit.evaluation.model_card import model_card, read_validation
from lowbit.quantization.manifest import LayerRecord, Manifest

ROWS = Path(__file__).parents[2] / "docs" / "validation"
MANIFEST = Manifest(
    "transformer",
    [
        LayerRecord("a", "int8", "native", "", 200, 104),
        LayerRecord("b", "int8", "onednn", "", 200, 104),
        LayerRecord("c", None, None, "modulation", 100, 100),
    ],
    500,
)


def test_the_hub_reads_what_it_was_made_from() -> None:
    card = ModelCard(model_card("z-image-int8", "Tongyi-MAI/Z-Image-Turbo", {"transformer": MANIFEST}))
    data: Any = card.data
    assert data.base_model == "Tongyi-MAI/Z-Image-Turbo"
    assert data.base_model_relation == "quantized"
    assert data.library_name == "diffusers"
    assert data.tags == ["lowbit", "quantized", "int8"]
    assert "| transformer | 2 layers int8 | 1 modulation | 0.0 → 0.0 MB (81%) |" in card.text
    assert "Not validated yet" in card.text


@pytest.mark.parametrize("model", [None, "a folder", "/some/where/z-image"])
def test_a_folder_is_no_base_model_of_the_hub(model: str | None) -> None:
    card = ModelCard(model_card("quantized", model, {"transformer": MANIFEST}))
    data: Any = card.data
    assert data.base_model is None
    assert "/some/where" not in card.text


def test_it_carries_the_validation() -> None:
    found = read_validation(ROWS / "embedded-int8.json")
    text = model_card("embedded-int8", None, {"transformer": MANIFEST}, [found])
    assert f"{found['summary']['median']['psnr_db']:.1f}" in text
    assert "Not validated" not in text


def test_what_is_no_validation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file"):
        read_validation(tmp_path / "nothing.json")
    for text in ("{", "[]", "{}", json.dumps({"settings": {}})):
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(ConfigError, match=r"--validation-json: .*wrong\.json"):
            read_validation(tmp_path / "wrong.json")
