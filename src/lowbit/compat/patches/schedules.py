"""One denoising step under ``shift_terminal`` (Qwen-Image, LTX): diffusers stretches the schedule by 0 / 0.

Its only sigma is 1, which the stretch should keep and also bring to the terminal value; 0.42.1 makes it NaN, and every
picture black (``findings/diffusers_one_step_shift_terminal.sh``). Here it stays 1: pure noise, denoised once.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from lowbit.compat.parts.overrides import override


def register(module: ModuleType) -> None:
    """Prepare ``diffusers.schedulers.scheduling_flow_match_euler_discrete``."""
    override(module.FlowMatchEulerDiscreteScheduler, "stretch_shift_to_terminal", _stretch)


def _stretch(original: Callable[..., Any], scheduler: Any, t: Any) -> Any:
    return t if bool(torch.as_tensor(t)[-1] == 1) else original(scheduler, t)
