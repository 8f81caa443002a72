#!/usr/bin/env python3
"""Writes docs/supported-models.md from the JSON files of ``lowbit validate`` in docs/validation."""

from __future__ import annotations

from pathlib import Path

from lowbit.evaluation.validation import table

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = """# Supported models

Each row was made by `lowbit validate`: twelve fixed prompts (`lowbit/evaluation/prompts.py`), two seeds, against the
model as it is. Speed is the reference's time over the candidate's, on the device named, where the reference is BF16
unless the figures say otherwise; a kernel called `reference` computes a method's numbers, not its speed. The embedded
model is so small that its speed says little. To add a row, run

```
lowbit validate MODEL --quantization METHOD --output-json docs/validation/MODEL-METHOD.json
python scripts/supported_models.py
```

{table}
"""


def page() -> str:
    """Return the page."""
    return PAGE.format(table=table((DOCS / "validation").glob("*.json"), DOCS))


def main() -> None:
    """Write the page."""
    (DOCS / "supported-models.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
