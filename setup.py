"""Build the optional native helper; everything else about the package is in ``pyproject.toml``.

Without a compiler the package installs as pure Python, and the operators that would use the helper use plain torch.
"""

from __future__ import annotations

import os

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# No contraction: the results are compared bit for bit with references that round after each operation.
GNU_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
MSVC_FLAGS = ["/std:c++17", "/O2", "/fp:precise"]


class BuildHelper(build_ext):
    """Choose flags by compiler; the helper is a plain library loaded by ctypes, with no module initializer."""

    def build_extensions(self) -> None:
        """Set the compiler's flags and build."""
        flags = MSVC_FLAGS if self.compiler.compiler_type == "msvc" else GNU_FLAGS
        for extension in self.extensions:
            extension.extra_compile_args = flags
        super().build_extensions()

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """Return none: there is no module initializer to export, and the source marks its functions itself."""
        return []


HELPER = Extension(
    "lowbit._native.lowbit_cpu",
    sources=["src/lowbit/_native/lowbit_cpu.cpp"],
    depends=["src/lowbit/_native/kernels.h", "src/lowbit/_native/gguf.h", "src/lowbit/_native/int8_product.h"],
    language="c++",
    optional=True,
)

setup(ext_modules=[] if os.environ.get("LOWBIT_BUILD_NATIVE") == "0" else [HELPER], cmdclass={"build_ext": BuildHelper})
