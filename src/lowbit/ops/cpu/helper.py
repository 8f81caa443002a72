"""The optional native helper: whether it is there, what it can do on this CPU, and which instructions it may use.

Built by ``setup.py`` where there is a C++ compiler (``python setup.py build_ext --inplace`` in a source tree) and
called through ctypes, so it depends on no version of torch. It works on torch's own OpenMP threads. In the environment
``LOWBIT_NATIVE=0`` turns it off, ``LOWBIT_MAX_ISA=AVX2`` (a name of ``ISA_NAMES``) keeps it from using more than that,
``LOWBIT_NATIVE_LIBRARY`` names another build of it. ``lowbit.ops.cpu.native`` calls what it computes.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from lowbit import env
from lowbit.errors import ConfigError, expected_one_of

logger = logging.getLogger(__name__)

DIRECTORY = Path(__file__).parents[2] / "_native"
ISA_NAMES = ("generic", "AVX2", "AVX-512", "AVX512-BF16", "AMX")
BEST_ISA = -1
MAX_ISA_VARIABLE = env.MAX_ISA
LIBRARY_VARIABLE = env.NATIVE_LIBRARY
ABI = 1
"""Of the C functions below, ``kAbi`` of ``_native/abi.cpp``: a library with another number is not used."""
REBUILD = "build it with `pip install .` or `python setup.py build_ext --inplace`"

_pointer, _size, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_weight = (_int, _size, _pointer, _int, _pointer, *[_size] * 2, _pointer, _size, _pointer, _pointer)
_Types = tuple[Any, ...]

# Functions that compute: their arguments. Each returns a status.
_OPERATORS: dict[str, _Types] = {
    "lowbit_quantize": (_pointer, _int, *[_size] * 5, _pointer, _int, _pointer, _int),
    "lowbit_dequantize": (_pointer, _int, *[_size] * 5, _pointer, _pointer, _int, _int),
    "lowbit_decode_fp4": (_pointer, *[_size] * 3, _pointer, _pointer, _int, _int),
    "lowbit_scale_product": (_pointer, *[_size] * 2, *[_pointer] * 4, _size, _int, _int),
    "lowbit_int8_product": (_pointer, *[_size] * 2, *[_pointer] * 2, _size, *[_pointer] * 3, _int, _int),
    "lowbit_int8_linears": (_pointer, _int, *[_size] * 4, *[_pointer] * 5, _int, _int),
    "lowbit_attention": (*[_pointer] * 5, _int, *[_pointer] * 2, _float, *[_int] * 3),
    "lowbit_weight_only": (_pointer, *[_size] * 3, _pointer, *_weight, _int, _int),
    "lowbit_weight_only_bfloat16": (
        *(_pointer, *[_size] * 3, _pointer, *_weight, _pointer, _size, *[_pointer] * 2, _size, _int),
    ),
    "lowbit_int4_decode": (_pointer, *[_size] * 2, _pointer, _int, _pointer, _size, _pointer, _int),
    "lowbit_gguf_decode": (_pointer, _int, *[_size] * 3, _pointer, _int, _int),
    "lowbit_gguf_product": (_pointer, *[_size] * 2, _pointer, _int, *[_size] * 2, *[_pointer] * 2, _int, _int),
    "lowbit_gguf_product_bfloat16": (_pointer, *[_size] * 2, _pointer, _int, *[_size] * 2, *[_pointer] * 2, _int),
    "lowbit_normalize": (*(_pointer, _int, *[_size] * 2, _int, _float, *[_pointer] * 2, *[_size] * 2, _pointer, _int),),
    "lowbit_gate": (_pointer, _pointer, _int, _size, _pointer, _int),
}

# The others: their arguments and their result.
_QUERIES: dict[str, tuple[_Types, Any]] = {
    "lowbit_abi": ((), _int),
    "lowbit_failed_bytes": ((), _size),
    "lowbit_release_scratch": ((), None),
    "lowbit_scratch_size": ((), _size),
    "lowbit_set_parallel": ((_pointer,), None),
    "lowbit_select_isa": ((_int,), _int),
    "lowbit_selected_isa": ((), _int),
    "lowbit_has_int8_product": ((), _int),
    "lowbit_has_amx_products": ((), _int),
    "lowbit_has_gguf_product": ((), _int),
    "lowbit_multiplies_bfloat16": ((), _int),
}

_OK, _UNSUPPORTED, _OUT_OF_MEMORY = 0, 1, 2


@cache
def _load() -> ctypes.CDLL | str:
    """Return the library, or the reason there is none, which is logged unless the user asked for it."""
    if env.read(env.NATIVE) == "0":
        return f"turned off by {env.NATIVE}=0"
    found = _open()
    if isinstance(found, str):
        logger.warning("native helper %s: CPU kernels run in plain torch, several times slower", found)
        return found
    found.lowbit_set_parallel(_openmp_entry())
    found.lowbit_select_isa(_most_isa())
    return found


def _open() -> ctypes.CDLL | str:
    """Return the library with typed functions, or why it can't be used."""
    file = Path(env.read(env.NATIVE_LIBRARY) or DIRECTORY / f"lowbit_cpu{'.dll' if sys.platform == 'win32' else '.so'}")
    if not file.is_file():
        return f"not built (no {file}; it needs a C++ compiler: install g++ or clang++, then {REBUILD})"
    try:
        found = ctypes.CDLL(str(file))
        number = found.lowbit_abi() if hasattr(found, "lowbit_abi") else None
        if number != ABI:
            return f"of another version ({file} has ABI {number}, expected {ABI}; {REBUILD})"
        for name, arguments in _OPERATORS.items():
            function = getattr(found, name)
            function.argtypes, function.restype, function.errcheck = arguments, _int, _checked(found, name)
        for name, (arguments, result) in _QUERIES.items():
            function = getattr(found, name)
            function.argtypes, function.restype = arguments, result
    except (OSError, AttributeError) as error:
        return f"can't be loaded ({error}; {REBUILD})"
    return found


def _checked(found: ctypes.CDLL, name: str) -> Callable[[int, Any, _Types], int]:
    """Return what raises the error that a status stands for."""
    operator = name.removeprefix("lowbit_")

    def check(status: int, _function: Any, _arguments: _Types) -> int:
        if status == _OK:
            return status
        if status == _OUT_OF_MEMORY:
            wanted = found.lowbit_failed_bytes()
            size = f"{wanted:,} bytes of scratch memory" if wanted else "memory"
            raise MemoryError(f"{operator}: cannot allocate {size}; use fewer rows at a time or free memory")
        if status == _UNSUPPORTED:
            isa = ISA_NAMES[found.lowbit_selected_isa()]
            raise RuntimeError(f"{operator}: the native helper ({isa}) has no kernel for these arguments")
        raise RuntimeError(f"{operator}: the native helper failed (status {status})")

    return check


def _most_isa() -> int:
    """Return the index in ``ISA_NAMES`` that the environment limits to, or ``BEST_ISA``.

    Raises:
        ConfigError: it names no instruction set.
    """
    limit = env.read(env.MAX_ISA)
    names = [name.lower() for name in ISA_NAMES]
    if limit and limit.lower() not in names:
        raise ConfigError(f"{env.MAX_ISA}: no instruction set {limit!r}. {expected_one_of(ISA_NAMES)}")
    return names.index(limit.lower()) if limit else BEST_ISA


def _openmp_entry() -> int | None:
    """Return the address of the running OpenMP library's entry point, which torch has loaded, or ``None``."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError, TypeError):
        return None


def refusal() -> str | None:
    """Return why there is no native helper, ``None`` when there is."""
    found = _load()
    return found if isinstance(found, str) else None


def available() -> bool:
    """Whether the helper is there."""
    return not isinstance(_load(), str)


def reload() -> None:
    """Look for the helper again at the next use, for instance after a change of ``LOWBIT_NATIVE``."""
    _load.cache_clear()
    has_amx.cache_clear()
    multiplies_bfloat16.cache_clear()


def description() -> str:
    """Say in a few words which code runs, for ``lowbit info``."""
    reason = refusal()
    if reason is not None:
        return f"plain torch; native helper {reason}"
    threads = "torch's threads" if _openmp_entry() is not None else "one thread: no OpenMP of GNU's kind is loaded"
    return f"native helper ({ISA_NAMES[library().lowbit_selected_isa()]}, {threads})"


def select_isa(isa: int) -> int:
    """Use the instruction set ``isa`` (index in ``ISA_NAMES``), or the best there is; return the one in use."""
    has_amx.cache_clear()
    multiplies_bfloat16.cache_clear()
    return int(library().lowbit_select_isa(isa))


def library() -> ctypes.CDLL:
    """Return the helper, which has to be ``available``."""
    found = _load()
    assert not isinstance(found, str), found
    return found


def release_scratch() -> int:
    """Free the scratch memory that the helper keeps between calls, and return how many bytes it was.

    It waits for calls of other threads to end. What is needed again is allocated again.
    """
    if not available():
        return 0
    size = int(library().lowbit_scratch_size())
    library().lowbit_release_scratch()
    return size


def scratch_size() -> int:
    """Return the bytes of scratch memory that the helper keeps between calls; it grows to what the largest needed."""
    return int(library().lowbit_scratch_size()) if available() else 0


def multiplies_int8() -> bool:
    """Whether ``native.int8_product`` runs on this CPU: it needs AVX512-VNNI."""
    return available() and bool(library().lowbit_has_int8_product())


def multiplies_gguf() -> bool:
    """Whether ``native.gguf_product`` runs on this CPU: it needs AVX-512."""
    return available() and bool(library().lowbit_has_gguf_product())


@cache
def has_amx() -> bool:
    """Whether attention of bfloat16 and gated products of int8 run on this CPU: they need AMX for both, and Linux."""
    return available() and bool(library().lowbit_has_amx_products())


@cache
def multiplies_bfloat16() -> bool:
    """Whether the products with weights take rows of bfloat16 as they are: they need AVX512-BF16 or AMX."""
    return available() and bool(library().lowbit_multiplies_bfloat16())
