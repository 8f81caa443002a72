"""Calibration: what is found by watching the pipeline generate."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

from lowbit.engine.load import Loaded
from lowbit.engine.request import Request
from lowbit.engine.scheduler import Scheduler
from lowbit.errors import ConfigError
from lowbit.quantization.calibration.smoothing import watched_inputs
from lowbit.quantization.calibration.static import calibration, uncalibrated_layers
from lowbit.quantization.plan import quantize_model

logger = logging.getLogger(__name__)


def calibrate(loaded: Loaded, prompts: Sequence[str]) -> None:
    """Find on ``prompts`` what the configuration leaves open: smoothing, then static input scales.

    Args:
        loaded: changed in place; nothing is done where nothing is open.
        prompts: to generate with, each with seed 0 and the pipeline's defaults.

    Raises:
        ConfigError: something is open and there are no prompts.
    """
    _smooth(loaded, prompts)
    _find_scales(loaded, prompts)


def missing_scales(components: Iterable[str]) -> ConfigError:
    """Return the error for components with static activations whose input scales are still to be found."""
    return ConfigError(
        f"The static activation scheme needs input scales that {', '.join(components)} lacks. Give"
        " calibration_prompts, load a checkpoint that holds them, or use activation_scheme='dynamic'"
    )


def _smooth(loaded: Loaded, prompts: Sequence[str]) -> None:
    """Quantize what must be watched first: generate with the unquantized model, then quantize it in place."""
    waiting = {name: config for name, config in loaded.routed.items() if config.needs_calibration}
    if not waiting:
        return
    if not prompts:
        raise ConfigError(f"smoothing of {', '.join(waiting)} needs calibration_prompts")
    parts = loaded.modules()
    with ExitStack() as stack:
        seen = {name: stack.enter_context(watched_inputs(parts[name])) for name in waiting}
        logger.info("Watching %d prompts for smoothing", len(prompts))
        _generate(loaded, prompts)
    for name, config in waiting.items():
        quantize_model(parts[name], config, seen_inputs=seen[name])


def _find_scales(loaded: Loaded, prompts: Sequence[str]) -> None:
    waiting = {name: part for name, part in loaded.transformers().items() if uncalibrated_layers(part)}
    if not waiting:
        return
    if not prompts:
        raise missing_scales(waiting)
    logger.info("Calibrating input scales on %d prompts", len(prompts))
    for part in waiting.values():
        with calibration(part):
            _generate(loaded, prompts)


def _generate(loaded: Loaded, prompts: Sequence[str]) -> None:
    scheduler = Scheduler(loaded.runner)
    for prompt in prompts:
        scheduler.submit(Request(prompt=prompt, arguments=loaded.defaults, progress=True))
    while scheduler.is_busy:
        for state in scheduler.step():
            state.output()
