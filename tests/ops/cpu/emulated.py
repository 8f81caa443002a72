"""The native helper with AVX-512 and AMX emulated (``_native/emulation``), built once for the tests that run by it."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "build" / "emulated"
# -O1: its time to build and the time of the tests together are least so.
FLAGS = "-DLOWBIT_EMULATE -O1 -Wno-ignored-attributes"


def _can_build() -> str | None:
    """Return why there is no emulation here, ``None`` when there is."""
    try:
        cpu = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "the emulation needs Linux"
    if not {"avx2", "fma", "f16c"} <= set(cpu.split()):
        return "the emulation needs AVX2"
    version = subprocess.run(["c++", "--version"], capture_output=True, text=True, check=False)
    return None if "Free Software Foundation" in version.stdout else "the emulation needs GCC"


@cache
def library(flags: str = FLAGS, folder: Path = FOLDER) -> Path | str:
    """Return the library, built anew where a source has changed, or the reason there is none."""
    try:
        reason = _can_build()
    except FileNotFoundError:
        reason = "the emulation needs a C++ compiler"
    if reason is not None:
        return reason
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder)]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "tests.lock").open("w") as lock:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX)  # workers of pytest-xdist
        environment = {**os.environ, "LOWBIT_BUILD_FLAGS": flags}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    file = folder / "lowbit" / "_native" / "lowbit_cpu.so"
    assert file.is_file(), f"the emulation does not build:\n{done.stderr[-4000:]}"
    return file
