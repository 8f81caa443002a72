"""Every environment variable that lowbit reads; no other module reads the environment."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

LOG = "LOWBIT_LOG"
API_KEY = "LOWBIT_API_KEY"
NATIVE = "LOWBIT_NATIVE"
NATIVE_LIBRARY = "LOWBIT_NATIVE_LIBRARY"
MAX_ISA = "LOWBIT_MAX_ISA"
BUILD_NATIVE = "LOWBIT_BUILD_NATIVE"
KERNEL = "LOWBIT_<FAMILY>_KERNEL"


@dataclass(frozen=True)
class Variable:
    """An environment variable.

    Attributes:
        name: its name; ``<FAMILY>`` stands for each of ``KERNEL_FAMILIES``.
        default: its value where it is not set.
        values: what it may be.
        meaning: what it does, in a sentence.
        read: when it is read.
    """

    name: str
    default: str
    values: str
    meaning: str
    read: str


KERNEL_FAMILIES = (
    "attention",
    "fp8",
    "gguf",
    "int8",
    "int8_static",
    "mx",
    "nvfp4",
    "w4a16",
    "w4a4",
    "w8a16",
)
"""Families of kernels that lowbit's own methods select from. Other packages' methods may have others."""

VARIABLES: tuple[Variable, ...] = (
    Variable(
        KERNEL,
        "auto",
        "a name that `lowbit info` lists for the family, or `auto`",
        "The implementation that computes, where no option `kernel` names one. One that is named never falls back.",
        "when a layer selects its kernel",
    ),
    Variable(
        LOG,
        "warning",
        "`debug`, `info`, `warning`, `error`",
        "Messages that the command line shows, where `--log-level` does not say.",
        "when a command starts",
    ),
    Variable(
        API_KEY,
        "none",
        "text",
        "A key that requests to `lowbit serve` may bring, beside those of `--api-key`, which other users of the machine"
        " see.",
        "when the server starts",
    ),
    Variable(
        NATIVE,
        "1",
        "`0`, `1`",
        "`0` turns the compiled CPU kernels off: plain torch computes.",
        "at the first use of the kernels",
    ),
    Variable(
        NATIVE_LIBRARY,
        "the one in the package",
        "a file",
        "Another build of the compiled CPU kernels, such as one with sanitizers.",
        "at the first use of the kernels",
    ),
    Variable(
        MAX_ISA,
        "the best of the CPU",
        "`generic`, `AVX2`, `AVX-512`, `AVX512-BF16`, `AMX`",
        "The largest instruction set that the compiled CPU kernels use.",
        "at the first use of the kernels",
    ),
    Variable(
        BUILD_NATIVE,
        "1",
        "`0`, `1`",
        "`0` installs without compiling the CPU kernels.",
        "by `pip install`",
    ),
    Variable(
        "LOWBIT_BUILD_FLAGS",
        "none",
        "options of the compiler",
        "Further options to compile the CPU kernels with.",
        "by `pip install`",
    ),
    Variable(
        "LOWBIT_BUILD_QUIET",
        "0",
        "`0`, `1`",
        "`1` compiles the CPU kernels without saying how it goes.",
        "by `pip install`",
    ),
    Variable(
        "LOWBIT_BUILD_EARLY",
        "1",
        "`0`, `1`",
        "`0` does not compile the CPU kernels before pip asks for them.",
        "by `pip install`",
    ),
)

# What benchmarks write beside their times, and do not act upon: how memory is freed, and which instructions oneDNN may
# use.
RECORDED = ("MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_", "MALLOC_TRIM_THRESHOLD_", "THP_MEM_ALLOC_ENABLE")
RECORDED_INSTRUCTIONS = ("ONEDNN_MAX_CPU_ISA", MAX_ISA)

# What ``--quiet`` sets.
QUIET = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS")

_DEFAULTS = {variable.name: variable.default for variable in VARIABLES}


def read(name: str) -> str:
    """Return the value of a variable of ``VARIABLES``, empty where it is not set."""
    if name not in _DEFAULTS:
        raise KeyError(f"{name} is not in lowbit.env.VARIABLES")
    return os.environ.get(name, "").strip()


def read_kernel(family: str) -> str:
    """Return the kernel that is named for a family, empty where none is."""
    return os.environ.get(kernel_variable(family), "").strip()


def kernel_variable(family: str) -> str:
    """Return the name of a family's variable."""
    return KERNEL.replace("<FAMILY>", family.upper())


def snapshot(names: Iterable[str]) -> Mapping[str, str]:
    """Return the variables of ``names`` that are set, to write down with a result."""
    return {name: os.environ[name] for name in names if name in os.environ}


def hide_progress() -> None:
    """Have tqdm and the Hub's downloads show no bars, in this process and its children; before they are imported."""
    for name in QUIET:
        os.environ.setdefault(name, "1")


def unknown_names() -> list[str]:
    """Return the variables that are set, begin with ``LOWBIT_`` and are not read: most likely misspelt."""
    families = {kernel_variable(family) for family in KERNEL_FAMILIES}
    return sorted(name for name in os.environ if name.startswith("LOWBIT_") and name not in families | set(_DEFAULTS))


def table() -> str:
    """Return the variables as a table of Markdown, as ``docs/environment.md`` holds it."""
    rows = [f"| `{v.name}` | {v.default} | {v.values} | {v.meaning} | {v.read} |" for v in VARIABLES]
    return "\n".join(["| variable | default | values | meaning | read |", "|---|---|---|---|---|", *rows])
