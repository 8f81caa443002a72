"""The README.md of a quantized checkpoint, in the form the Hugging Face Hub reads (front matter in YAML, Markdown)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from lowbit.errors import ConfigError
from lowbit.evaluation.validation import HEADER, row
from lowbit.quantization.manifest import Manifest

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")

CARD = """---
{front_matter}---

# {title}

{source} quantized with [lowbit](https://pypi.org/project/lowbit/).

| component | methods | kept as it was | size |
|---|---|---|---|
{components}

## Use

```python
import lowbit
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{title}")
```

or `lowbit generate "a prompt" --model {title}`.

## Validation

{validation}
"""


def read_validation(file: Path) -> dict[str, Any]:
    """Return what ``lowbit validate --output-json`` wrote.

    Raises:
        ConfigError: the file is missing or holds no validation.
    """
    if not file.is_file():
        raise ConfigError(f"--validation-json: there is no file {file}")
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        row(found)
    except (ValueError, ConfigError) as error:
        raise ConfigError(f"--validation-json: {file}: {error}") from error
    return found


def model_card(
    title: str,
    model: str | None,
    manifests: Mapping[str, Manifest],
    validations: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Return the card of a checkpoint.

    Args:
        title: the folder's name.
        model: what was quantized: a folder, a Hub id, or ``None`` for the embedded model.
        manifests: component -> what was done to it.
        validations: results of ``lowbit validate`` with the same method.
    """
    methods = sorted({layer.method for manifest in manifests.values() for layer in manifest.quantized if layer.method})
    base = model if model is not None and _HUB_ID.fullmatch(model) and not Path(model).exists() else None
    front = ModelCardData(
        base_model=base,
        base_model_relation="quantized" if base else None,
        library_name="diffusers",
        tags=["lowbit", "quantized", *methods],
    )
    return CARD.format(
        front_matter=front.to_yaml() + "\n",
        title=title,
        source=_source(model, base),
        components="\n".join(_component(name, manifest) for name, manifest in manifests.items()),
        validation=_validation(validations),
    )


def _source(model: str | None, base: str | None) -> str:
    if model is None:
        return "lowbit's embedded model,"
    return f"[{base}](https://huggingface.co/{base})," if base else f"`{Path(model).name}`,"


def _component(name: str, manifest: Manifest) -> str:
    methods: dict[str, int] = {}
    for (method, _), count in manifest.by_kernel().items():
        methods[method] = methods.get(method, 0) + count
    used = ", ".join(f"{count} layers {method}" for method, count in methods.items())
    kept = ", ".join(f"{count} {reason}" for reason, count in manifest.by_reason().items())
    before, after = manifest.bytes_before / 1e6, manifest.bytes_after / 1e6
    return f"| {name} | {used} | {kept or 'nothing'} | {before:,.1f} → {after:,.1f} MB ({after / before:.0%}) |"


def _validation(validations: Sequence[Mapping[str, Any]]) -> str:
    if not validations:
        return (
            "Not validated yet. `lowbit compare --reference-model BASE --candidate-model THIS --report report.html`"
            " compares it with the model it was made from; `lowbit validate BASE --quantization METHOD` makes the row"
            " that belongs here."
        )
    rows = "\n".join(row(result).markdown() for result in validations)
    return f"Twelve fixed prompts, two seeds, against the model as it was (`lowbit validate`):\n\n{HEADER}\n{rows}"
