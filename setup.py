"""Build the optional native helper; everything else about the package is in ``pyproject.toml``.

One object for each unit of ``src/lowbit/_native``, compiled in parallel; an object is built again only where the unit,
a header that it includes, or the command has changed. Without a compiler the package installs as pure Python, says so,
and the operators that would use the helper use plain torch.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from glob import glob
from itertools import chain
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info
from setuptools.errors import BaseError, CCompilerError, CompileError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NATIVE = "src/lowbit/_native"
# No contraction: the results are compared bit for bit with references that round after each operation. -g0: what Python
# was built with has -g, which doubles the time and multiplies the size by six.
GNU_FLAGS = [
    *("-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"),
    *("-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
]
LIBRARY_SUFFIXES = (".so", ".dll")
MSVC_FLAGS = ["/std:c++17", "/O2", "/EHsc", "/fp:precise"]
WITHOUT = (
    "no native helper: CPU kernels will run in plain torch, several times slower; "
    "install a C++ compiler (g++ or clang++), then lowbit again"
)


def say(message: str) -> None:
    """Tell the user: on standard error, and on the terminal, because pip shows the former only with ``-v``."""
    print(f"lowbit: {message}", file=sys.stderr, flush=True)
    if sys.stderr.isatty() or os.environ.get("LOWBIT_BUILD_QUIET") == "1":
        return
    with contextlib.suppress(OSError), open("/dev/tty", "w", encoding="utf-8") as terminal:
        terminal.write(f"\r  lowbit: {message}\n")


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process builds in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("waiting for the C++ build that began earlier")
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class BuildHelper(build_ext):
    """Build a plain library, loaded by ctypes: it has no module initializer and depends on no version of Python."""

    def finalize_options(self) -> None:
        """Keep objects in one folder, also where pip builds for an editable install, so that they are found again."""
        is_given = self.build_temp is not None
        super().finalize_options()
        if not is_given:
            self.build_temp = "build/native"

    def build_extension(self, ext: Extension) -> None:
        """Compile what has changed and link; where that fails, say so and install without the helper."""
        try:
            self.build_library(ext)
        except (CCompilerError, BaseError, OSError) as error:
            say(f"{WITHOUT} ({error})")
            raise CompileError(str(error)) from error

    def build_library(self, ext: Extension) -> None:
        """Compile the units whose objects are missing or out of date, the longest first, and link all."""
        with alone_in(Path(self.build_temp)):
            self.build_alone(ext)

    def build_alone(self, ext: Extension) -> None:
        """Build while no other process does."""
        units = [Unit(self, source) for source in ext.sources]
        stale = [unit for unit in units if not unit.is_current()]
        workers = min(len(stale), self.parallel if isinstance(self.parallel, int) and self.parallel > 1 else cores())
        if stale:
            say(f"compiling {len(stale)} of {len(units)} C++ files for CPUs, {workers} at a time")
            compile_all(stale, workers)
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        library.unlink(missing_ok=True)  # a new file: processes may have the old one in memory
        self.compiler.link_shared_object([unit.object for unit in units], str(library), target_lang="c++")

    def get_ext_filename(self, fullname: str) -> str:
        """Return the library's path without a version of Python in it: it depends on none."""
        return str(Path(*fullname.split("."))) + (".dll" if sys.platform == "win32" else ".so")

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """Return none: there is no module initializer to export, and the source marks its functions itself."""
        return []


class Unit:
    """A C++ file, its object and the record of what the object was made of."""

    def __init__(self, build: BuildHelper, source: str) -> None:
        self.build, self.source = build, Path(source)
        self.is_gnu = build.compiler.compiler_type != "msvc"
        self.flags = [*(GNU_FLAGS if self.is_gnu else MSVC_FLAGS), *os.environ.get("LOWBIT_BUILD_FLAGS", "").split()]
        [self.object] = build.compiler.object_filenames([source], output_dir=build.build_temp)
        self.depends = Path(self.object).with_suffix(".d")
        self.command = Path(self.object).with_suffix(".cmd")

    def signature(self) -> str:
        """Return what the object depends on beside files."""
        compiler = self.build.compiler
        commands = [getattr(compiler, name, None) or [] for name in ("compiler_so", "compiler_so_cxx")]
        return " ".join([compiler.compiler_type, *chain(*commands), *self.flags])

    def files(self) -> list[Path]:
        """Return the files that the object was made of, or all there are where the compiler does not tell."""
        if not self.depends.is_file():
            return [self.source, *map(Path, glob(f"{NATIVE}/**/*.h", recursive=True))]
        names = self.depends.read_text().replace("\\\n", " ").split(":", 1)[1].split()
        return [Path(name) for name in names]

    def is_current(self) -> bool:
        """Whether the object is as new as all that it is made of."""
        made = Path(self.object)
        if not made.is_file() or not self.command.is_file() or self.command.read_text() != self.signature():
            return False
        return all(file.is_file() and file.stat().st_mtime <= made.stat().st_mtime for file in self.files())

    def compile(self) -> None:
        """Make the object."""
        self.command.unlink(missing_ok=True)
        record = ["-MMD", "-MF", str(self.depends)] if self.is_gnu else []
        flags = [*self.flags, *record]
        self.build.compiler.compile([str(self.source)], output_dir=self.build.build_temp, extra_postargs=flags)
        self.command.write_text(self.signature())


def compile_all(units: list[Unit], workers: int) -> None:
    """Compile units in parallel and say which are done."""
    begun = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        running = {pool.submit(unit.compile): unit for unit in units}
        for done, future in enumerate(as_completed(running), 1):
            try:
                future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            name = running[future].source.name
            say(f"compiled {name} ({done} of {len(units)}, {time.perf_counter() - begun:.0f} s)")


class BeginEarly(dist_info):
    """Describe the package and begin to compile: pip asks for the description first, then downloads dependencies.

    ``build_ext`` waits for what was begun. A build that is not wanted in the end costs a minute of low priority.
    """

    def run(self) -> None:
        """Write the description and start ``build_ext`` in a process of its own."""
        super().run()
        if os.name != "posix" or not self.distribution.ext_modules or os.environ.get("LOWBIT_BUILD_EARLY") == "0":
            return
        command = ["nice", sys.executable, sys.argv[0] if Path(sys.argv[0]).name == "setup.py" else "setup.py"]
        with contextlib.suppress(OSError):
            subprocess.Popen(
                [*command, "-q", "build_ext"],
                env={**os.environ, "LOWBIT_BUILD_EARLY": "0"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )


class BuildWheel(bdist_wheel):
    """Tag the wheel for every Python 3 of this platform, or for every platform where no helper could be built."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tags of Python, of its ABI and of the platform."""
        platform = super().get_tag()[2]
        has_helper = any(file.suffix in LIBRARY_SUFFIXES for file in Path(self.bdist_dir).rglob("_native/lowbit_cpu.*"))
        return "py3", "none", platform if has_helper else "any"


# In the order in which they are compiled: the longest first.
UNITS = ("isa/amx", "isa/avx512", "isa/avx512_bf16", "isa/avx512_vnni", "isa/generic", "isa/avx2", "abi", "runtime")
HELPER = Extension(
    "lowbit._native.lowbit_cpu",
    sources=[f"{NATIVE}/{unit}.cpp" for unit in UNITS],
    depends=sorted(glob(f"{NATIVE}/**/*.h", recursive=True)),
    language="c++",
    optional=True,
)

setup(
    ext_modules=[] if os.environ.get("LOWBIT_BUILD_NATIVE") == "0" else [HELPER],
    cmdclass={"build_ext": BuildHelper, "bdist_wheel": BuildWheel, "dist_info": BeginEarly},
)
