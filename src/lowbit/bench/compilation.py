"""Compiling a transformer's blocks, and proof that what ran was compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lowbit.compat.parts.modules import repeated_blocks
from lowbit.compat.parts.tensors import compilation_counters, compiling_strictly

RECOMPILE_LIMIT = 256  # all variants' blocks share one code object, and each counts against its limit


@contextmanager
def compilation_allowed() -> Iterator[None]:
    """Make room for every variant, and make passing the limit an error where torch would fall back to eager."""
    with compiling_strictly(RECOMPILE_LIMIT):
        yield


def compile_blocks(model: nn.Module) -> int:
    """Compile the repeated blocks of a model of diffusers, each as one graph; returns how many.

    A block that can't be one graph is an error when it is first called, so nothing runs half in eager mode.
    """
    names = repeated_blocks(model)
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False)
    return len(blocks)


def warm_up(step: Callable[[], Any], compiled_blocks: int) -> tuple[Any, dict[str, int]]:
    """Call ``step`` twice and count what torch.compile did.

    Args:
        step: to be called.
        compiled_blocks: blocks that must be compiled; 0 for an eager variant, which may compile parts by itself.

    Returns:
        What ``step`` returned; and ``graphs`` and ``graph_breaks`` of the first call, ``late_graphs`` of the second,
        ``compiled_blocks``.

    Raises:
        RuntimeError: blocks should have been compiled and no graph was made.
    """
    counters = compilation_counters()
    counters.clear()
    step()
    found = {
        "compiled_blocks": compiled_blocks,
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
    }
    if compiled_blocks and not found["graphs"]:
        raise RuntimeError("torch.compile made no graph: the blocks ran in eager mode")
    result = step()
    return result, {**found, "late_graphs": counters["stats"]["unique_graphs"] - found["graphs"]}


@contextmanager
def nothing_new_compiled() -> Iterator[None]:
    """Make it an error to compile anything, or to leave compiled code for eager mode, inside the block."""
    with torch.compiler.set_stance("fail_on_recompile"):
        yield
