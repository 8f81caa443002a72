#!/usr/bin/env python3
"""Checks what the wheel and the source distribution in a folder hold: ``check_wheel.py dist``."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("lowbit/_native/lowbit_cpu.so", "lowbit/_native/lowbit_cpu.dll")


def tracked_data() -> set[str]:
    """Return what belongs to the package beside its Python files, as paths from ``src``."""
    package = ROOT / "src" / "lowbit"
    native = package / "_native"
    found = [*(package / "assets").rglob("*"), *native.rglob("*.cpp"), *native.rglob("*.h")]
    return {file.relative_to(ROOT / "src").as_posix() for file in [*found, package / "py.typed"] if file.is_file()}


def python_files() -> set[str]:
    """Return the package's modules as paths from ``src``."""
    return {file.relative_to(ROOT / "src").as_posix() for file in (ROOT / "src" / "lowbit").rglob("*.py")}


def wheel_problems(wheel: Path) -> list[str]:
    """Return what is wrong with a wheel."""
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
    problems = [f"{wheel.name}: lacks {name}" for name in sorted((tracked_data() | python_files()) - names)]
    has_library = any(name in names for name in LIBRARIES)
    platform = wheel.stem.split("-")[-1]
    if "-py3-none-" not in wheel.name:
        problems.append(f"{wheel.name}: is tied to a version of Python")
    if has_library == (platform == "any"):
        problems.append(f"{wheel.name}: {'has' if has_library else 'lacks'} the native helper")
    foreign = [name for name in names if not name.startswith("lowbit")]
    return [*problems, *(f"{wheel.name}: holds {name}" for name in foreign)]


def source_problems(archive: Path) -> list[str]:
    """Return what a source distribution lacks."""
    with tarfile.open(archive) as opened:
        names = {name.split("/", 1)[1] for name in opened.getnames() if "/" in name}
    wanted = {f"src/{name}" for name in tracked_data() | python_files()} | {"setup.py", "pyproject.toml", "LICENSE"}
    return [f"{archive.name}: lacks {name}" for name in sorted(wanted - names)]


def problems_of(folder: Path) -> list[str]:
    """Return what is wrong with the one wheel and the one source distribution in ``folder``."""
    wheels, archives = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    if len(wheels) != 1 or len(archives) != 1:
        return [f"{folder}: {len(wheels)} wheels and {len(archives)} source distributions, not one of each"]
    return [*wheel_problems(wheels[0]), *source_problems(archives[0])]


def main() -> None:
    """Check the folder that the command line names."""
    folder = Path(sys.argv[1])
    problems = problems_of(folder)
    if problems:
        raise SystemExit("\n".join(problems))
    print(*(f"{file.name}: {file.stat().st_size / 1e6:.1f} MB" for file in sorted(folder.iterdir())), sep="\n")


if __name__ == "__main__":
    main()
