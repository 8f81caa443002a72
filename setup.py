"""Build the optional native helper; everything else about the package is in ``pyproject.toml``.

Without a compiler the package installs as pure Python, and the operators that would use the helper use plain torch.
"""

from __future__ import annotations

import os
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

# No contraction: the results are compared bit for bit with references that round after each operation.
GNU_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
LIBRARY_SUFFIXES = (".so", ".dll")
MSVC_FLAGS = ["/std:c++17", "/O2", "/fp:precise"]


class BuildHelper(build_ext):
    """Choose flags by compiler; the helper is a plain library loaded by ctypes, with no module initializer."""

    def build_extensions(self) -> None:
        """Set the compiler's flags and build."""
        flags = MSVC_FLAGS if self.compiler.compiler_type == "msvc" else GNU_FLAGS
        for extension in self.extensions:
            extension.extra_compile_args = flags
        super().build_extensions()

    def get_ext_filename(self, fullname: str) -> str:
        """Return the library's path without a version of Python in it: it depends on none."""
        return str(Path(*fullname.split("."))) + (".dll" if sys.platform == "win32" else ".so")

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """Return none: there is no module initializer to export, and the source marks its functions itself."""
        return []


class BuildWheel(bdist_wheel):
    """Tag the wheel for every Python 3 of this platform, or for every platform where no helper could be built."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tags of Python, of its ABI and of the platform."""
        platform = super().get_tag()[2]
        has_helper = any(file.suffix in LIBRARY_SUFFIXES for file in Path(self.bdist_dir).rglob("_native/lowbit_cpu.*"))
        return "py3", "none", platform if has_helper else "any"


HELPER = Extension(
    "lowbit._native.lowbit_cpu",
    sources=["src/lowbit/_native/lowbit_cpu.cpp"],
    depends=sorted(glob("src/lowbit/_native/*.h")),
    language="c++",
    optional=True,
)

setup(
    ext_modules=[] if os.environ.get("LOWBIT_BUILD_NATIVE") == "0" else [HELPER],
    cmdclass={"build_ext": BuildHelper, "bdist_wheel": BuildWheel},
)
