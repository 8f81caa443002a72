"""Scratch memory that is reused from call to call.

glibc returns large freed blocks to the system, so a large temporary tensor costs a page fault for every 4 KiB each time
it is made. One buffer per thread and purpose, small enough for the cache, avoids that.
"""

from __future__ import annotations

import math
import threading

import torch

_buffers = threading.local()


def scratch(purpose: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return an uninitialized dense tensor that the next call with the same ``purpose`` in this thread overwrites."""
    size = math.prod(shape) * dtype.itemsize
    buffer: torch.Tensor | None = getattr(_buffers, purpose, None)
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):  # an inference tensor could not be written outside inference mode
            buffer = torch.empty(size, dtype=torch.uint8)
        setattr(_buffers, purpose, buffer)
    return buffer[:size].view(dtype).view(shape)
