"""Pages of the documentation site that are made from files outside docs/: a hook of mkdocs (see mkdocs.yml).

README, CONTRIBUTING and CHANGELOG become pages, and so do the examples and the public names; the result files that
pages cite are part of the site. Links that lead from one of these files to another are made to lead to its page.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
RESULTS = Path("benchmarks", "results")
PUBLIC = {"lowbit": "src/lowbit/__init__.py", "lowbit.quantization": "src/lowbit/quantization/__init__.py"}
# What a link in the repository names -> what it is called in the site.
_LINKS = (
    (re.compile(r"\]\((?:\.\./)?benchmarks/results/"), "](results/"),
    (re.compile(r"\]\(docs/"), "]("),
    (re.compile(r"\]\((?:\.\./)?examples/?\)"), "](examples.md)"),
    *((re.compile(rf"\]\((?:\.\./)?{re.escape(source)}"), f"]({page}") for page, source in PAGES.items()),
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and files that are not under docs/."""
    from mkdocs.structure.files import File

    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    files.append(File.generated(config, "examples.md", content=examples_page()))
    files.append(File.generated(config, "reference.md", content=reference_page()))
    for file in sorted((ROOT / RESULTS).iterdir()):
        files.append(File.generated(config, f"results/{file.name}", abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages."""
    return markdown if page.file.src_uri.startswith("results/") else site_links(markdown)


def site_links(markdown: str) -> str:
    """Return ``markdown`` with links to files of the repository turned into links to the site's pages."""
    for link, replacement in _LINKS:
        markdown = link.sub(replacement, markdown)
    return markdown


def examples_page() -> str:
    """Return the examples, each under the first line of its docstring."""
    parts = ["# Examples", "The test suite runs each of these on the embedded model."]
    for file in sorted((ROOT / "examples").glob("*.py")):
        code = file.read_text()
        title = (ast.get_docstring(ast.parse(code)) or file.stem).splitlines()[0].rstrip(".")
        parts += [f"## {file.name}", f"{title}.", f"```python\n{code}```"]
    return "\n\n".join(parts)


def public_names(init_file: str) -> dict[str, str]:
    """Return name -> module of the ``_PUBLIC`` table of a package's ``__init__.py``, without importing it."""
    for node in ast.walk(ast.parse((ROOT / init_file).read_text())):
        if isinstance(node, ast.Assign) and any(getattr(target, "id", None) == "_PUBLIC" for target in node.targets):
            table: dict[str, str] = ast.literal_eval(node.value)
            return table
    raise ValueError(f"{init_file} has no table _PUBLIC")


def reference_page() -> str:
    """Return a page that documents every public name, for mkdocstrings to fill in."""
    parts = ["# API reference"]
    tables = {package: public_names(init_file) for package, init_file in PUBLIC.items()}
    for package, table in tables.items():
        parts.append(f"## {package}")
        # A name that a lower package offers too is documented there.
        parts += [f"::: {module}.{name}" for name, module in table.items() if module not in tables]
    parts += ["## lowbit.errors", "::: lowbit.errors\n    options:\n      show_root_heading: false"]
    return "\n\n".join(parts)
