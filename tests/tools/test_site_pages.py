"""The pages of the documentation site that are made from other files; ``scripts/docs`` builds the site itself."""

from __future__ import annotations

import re
from pathlib import Path

import lowbit
import lowbit.quantization
from tools import site_pages

ROOT = Path(__file__).parents[2]


def test_every_public_name_is_documented() -> None:
    page = site_pages.reference_page()
    for package in (lowbit, lowbit.quantization):
        for name in set(package.__all__) - {"__version__"}:
            assert re.search(rf"^::: lowbit\.\S+\.{name}$", page, re.MULTILINE), name


def test_every_example_is_shown() -> None:
    page = site_pages.examples_page()
    for file in (ROOT / "examples").glob("*.py"):
        assert f"## {file.name}\n" in page
        assert file.read_text() in page


def test_every_guide_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().split("nav:")[1]
    named = set(re.findall(r": (\S+\.md)$", navigation, re.MULTILINE))
    made = {*site_pages.PAGES, "examples.md", "reference.md", "results/README.md"}
    assert named == made | {file.name for file in (ROOT / "docs").glob("*.md")}


def test_links_between_files_lead_to_pages() -> None:
    links = {
        "](../benchmarks/results/growth.json)": "](results/growth.json)",
        "](docs/int8.md#speed)": "](int8.md#speed)",
        "](../README.md)": "](index.md)",
        "](CONTRIBUTING.md)": "](contributing.md)",
        "](examples)": "](examples.md)",
        "](https://example.org/docs/int8.md)": "](https://example.org/docs/int8.md)",
    }
    for link, expected in links.items():
        assert site_pages.site_links(link) == expected
