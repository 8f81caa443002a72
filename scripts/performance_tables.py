"""Put the predicted times and the memory plan into docs/performance.md.

python -m scripts.performance_tables
"""

from __future__ import annotations

from pathlib import Path

from benchmarks import gpu_model, memory_plan
from benchmarks.published_models import MODELS

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"


def replace_section(page: str, name: str, content: str) -> str:
    """Return ``page`` with what stands between the markers of ``name`` replaced."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = page.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def main() -> None:
    """Write both tables."""
    page = PAGE.read_text()
    page = replace_section(page, "predicted", gpu_model.table(gpu_model.predict(list(MODELS), list(gpu_model.CHIPS))))
    page = replace_section(
        page, "memory", memory_plan.table({name: memory_plan.plan_model(model) for name, model in MODELS.items()})
    )
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
