"""setup.py compiles the native helper's units by themselves, again only what changed, and says so where it can't."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NATIVE = Path("src/lowbit/_native")
UNITS = sorted(path.name for path in (ROOT / NATIVE).rglob("*.cpp"))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree whose units are a line each: what is compiled, not what it computes, is tested."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "lowbit"\nversion = "1"\n')
    (tmp_path / NATIVE / "isa").mkdir(parents=True)
    (tmp_path / NATIVE / "one.h").write_text("inline int one() { return 1; }\n")
    for source in (ROOT / NATIVE).rglob("*.cpp"):
        to = tmp_path / source.relative_to(ROOT)
        include = (
            f'#include "{"../" if to.parent.name == "isa" else ""}one.h"\n' if source.stem in ("amx", "abi") else ""
        )
        to.write_text(f"{include}int from_{source.stem}() {{ return 1; }}\n")
    return tmp_path


def build(tree: Path, **variables: str) -> tuple[set[str], str]:
    """Return the units that were compiled and all that was said."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(
        command, cwd=tree, env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {name for name in UNITS if f"compiled {name} (" in done.stderr}, done.stderr


def touch(file: Path) -> None:
    later = time.time() + 2
    os.utime(file, (later, later))


@pytest.mark.skipif(shutil.which("c++") is None or sys.platform == "win32", reason="no C++ compiler")
def test_only_what_changed_is_compiled_again(tree: Path) -> None:
    library = tree / NATIVE / "lowbit_cpu.so"
    assert build(tree)[0] == set(UNITS)
    assert library.is_file()
    assert build(tree)[0] == set()
    touch(tree / NATIVE / "isa" / "avx2.cpp")
    assert build(tree)[0] == {"avx2.cpp"}
    for made in (tree / "build").rglob("*.o"):
        touch(made)
    later = time.time() + 4
    os.utime(tree / NATIVE / "one.h", (later, later))
    assert build(tree)[0] == {"amx.cpp", "abi.cpp"}
    assert build(tree, LOWBIT_BUILD_FLAGS="-DOTHER")[0] == set(UNITS)


def test_without_a_compiler_it_says_so_and_goes_on(tree: Path) -> None:
    compiled, said = build(tree, CC="/no/such/compiler", CXX="/no/such/compiler")
    assert compiled == set()
    assert "lowbit: no native helper: CPU kernels will run in plain torch, several times slower; install a C++" in said
    assert not list((tree / NATIVE).glob("lowbit_cpu.*"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None or sys.platform == "win32", reason="no C++ compiler")
def test_each_header_compiles_alone() -> None:
    headers = [path for path in sorted((ROOT / NATIVE).rglob("*.h")) if path.parent.name != "emulation"]
    assert len(headers) > 25
    command = ["c++", "-std=c++17", "-fsyntax-only", "-x", "c++", "-Wno-psabi"]

    def compiled(header: Path) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run([*command, header], check=False, capture_output=True)

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(compiled, headers))
    assert [result.stderr[:300] for result in done if result.returncode] == []
