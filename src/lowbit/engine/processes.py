"""Refusing to compute where it would never end: in a child of ``fork`` whose parent computed on several threads.

OpenMP's threads do not survive ``fork``, and GNU's OpenMP, on which torch and lowbit's kernels compute, waits for them
in the child for ever (https://gcc.gnu.org/bugzilla/show_bug.cgi?id=60035).
"""

from __future__ import annotations

import os

import torch

from lowbit.errors import UnsupportedError

_computed = False
_parent_computed = False


def enter(device: torch.device) -> None:
    """Note that this process computes on ``device``.

    Raises:
        UnsupportedError: it is a child whose parent did before the fork, and it is to use several threads.
    """
    global _computed  # noqa: PLW0603  # a fact of the process
    if _parent_computed and device.type == "cpu" and torch.get_num_threads() > 1:
        raise UnsupportedError(
            "This process was forked from one that had computed on several threads, whose threads it lacks: it would"
            " wait for them for ever. Start it with multiprocessing.get_context('spawn'), or fork before the parent"
            " loads a model, or call torch.set_num_threads(1) in it"
        )
    _computed = True


def _after_fork() -> None:
    global _computed, _parent_computed
    _parent_computed, _computed = _parent_computed or _computed, False


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_after_fork)
