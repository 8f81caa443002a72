from __future__ import annotations

from pathlib import Path

import pytest

from lowbit.errors import CheckpointError
from lowbit.models.embedded import embedded_model
from lowbit.models.generation_defaults import FILE_NAME, generation_defaults_text, read_generation_defaults


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_generation_defaults(tmp_path) == {}
    for defaults in ({"height": 128, "width": 64, "num_inference_steps": 20, "guidance_scale": 0.0}, {"height": 16}):
        (tmp_path / FILE_NAME).write_text(generation_defaults_text(defaults))
        assert read_generation_defaults(tmp_path) == defaults


def test_the_embedded_model_has_all() -> None:
    model = embedded_model()
    expected = {"height", "width", "num_inference_steps", "guidance_scale"}
    found = read_generation_defaults(model.folder)
    assert found == {name: getattr(model, name) for name in expected}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"height": 0}', "height: 0: it may hold height, width"),
        ('{"height": true, "width": 8}', "height: True: it may"),
        ('{"width": 64.0}', r"width: 64\.0: it may"),
        ('{"guidance_scale": NaN}', "guidance_scale: nan: it may"),
        ('{"guidance_scale": "5"}', "guidance_scale: '5': it may"),
        ('{"prompt": "a cat", "height": -1}', "prompt: 'a cat', height: -1: it may"),
        ("[]", "is not a JSON object"),
        ("{", "can't be read as JSON"),
    ],
)
def test_anything_else_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=rf"{FILE_NAME}: {message}"):
        read_generation_defaults(tmp_path)
