"""Where in the network a candidate departs from its reference.

Two views. *Linear layers*, each by itself: the candidate's layer is given what entered the reference's, so that an
error belongs to the layer that shows it. *Blocks*, in a run: how far what enters and what leaves each block is from the
reference's, with the reference's latents before the step, so that one sees the error grow through the depth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowbit.evaluation.metrics import difference_metrics

if TYPE_CHECKING:
    from lowbit.engine import Omni

ROWS = 128
"""Tokens kept of every layer's input, evenly spaced: linear layers act on each by itself."""


class Watch:
    """Keeps samples of what enters and leaves modules while it is active.

    Attributes:
        samples: ``"name.input"`` and ``"name.output"`` -> [calls * rows, channels] on the CPU, of the present step.
        active: whether to keep.
    """

    def __init__(self) -> None:
        self.samples: dict[str, Tensor] = {}
        self.active = False

    @contextmanager
    def on(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Hook the modules for the duration of the context."""
        handles = [module.register_forward_hook(self._hook(name), with_kwargs=True) for name, module in modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not self.active:
                return
            entering = _main_input(args, kwargs)
            if entering is None:
                return
            self._add(f"{name}.input", entering)
            self._add(f"{name}.output", _main_output(output, entering))

        return keep

    def _add(self, key: str, value: Tensor) -> None:
        rows = sample_rows(value)
        self.samples[key] = torch.cat([self.samples[key], rows]) if key in self.samples else rows

    def take(self) -> dict[str, Tensor]:
        """Return the samples and forget them."""
        samples, self.samples = self.samples, {}
        return samples


def _main_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    candidates = (kwargs.get("hidden_states"), *args, *kwargs.values())
    return next((value for value in candidates if isinstance(value, Tensor) and value.dim() > 1), None)


def _main_output(output: Any, entering: Tensor) -> Tensor:
    """Return the output itself, or of several the one of the input's shape (the picture's stream, not the text's)."""
    if isinstance(output, Tensor):
        return output
    tensors = [value for value in output if isinstance(value, Tensor)]
    return next((value for value in tensors if value.shape == entering.shape), tensors[0])


def sample_rows(value: Tensor, count: int = ROWS) -> Tensor:
    """Return up to ``count`` evenly spaced rows of ``value`` [..., channels]: [rows, channels] on the CPU."""
    rows = value.detach().reshape(-1, value.shape[-1])
    if len(rows) > count:
        rows = rows[torch.linspace(0, len(rows) - 1, count, device=rows.device).round().long()]
    return rows.cpu().clone()


def linear_layers(omni: Omni) -> dict[str, nn.Module]:
    """Return the linear layers of all diffusion transformers by full name."""
    return {
        f"{component}.{name}": module
        for component, transformer in omni.transformers().items()
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear)
    }


def blocks(omni: Omni) -> dict[str, nn.Module]:
    """Return the repeated blocks of all diffusion transformers by full name, in order."""
    found: dict[str, nn.Module] = {}
    for component, transformer in omni.transformers().items():
        for name, child in transformer.named_children():
            if isinstance(child, nn.ModuleList):
                found |= {f"{component}.{name}.{index}": block for index, block in enumerate(child)}
    return found


def probe_steps(steps: int) -> tuple[int, ...]:
    """Return the first, the middle and the last of ``steps`` steps."""
    return tuple(sorted({0, steps // 2, steps - 1}))


def layer_errors(omni: Omni, samples: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Give each linear layer what entered the reference's and compare what leaves it.

    Args:
        omni: the candidate.
        samples: of the reference's linear layers, as ``Watch.take`` returns them.

    Returns:
        name -> ``relative_l2``, ``cosine_similarity``.
    """
    errors = {}
    for name, layer in linear_layers(omni).items():
        if f"{name}.input" not in samples:
            continue
        with torch.no_grad():
            found = layer(samples[f"{name}.input"].to(omni.device))
        errors[name] = _errors(samples[f"{name}.output"], found.cpu())
    return errors


def block_errors(reference: Mapping[str, Tensor], candidate: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Compare what enters and leaves each block.

    Returns:
        name -> ``input_relative_l2``, ``output_relative_l2`` and likewise with ``cosine_similarity``.
    """
    errors: dict[str, dict[str, float]] = {}
    for key, expected in reference.items():
        if key in candidate:
            name, end = key.rsplit(".", 1)
            found = _errors(expected, candidate[key])
            errors.setdefault(name, {}).update({f"{end}_{metric}": value for metric, value in found.items()})
    return errors


def _errors(expected: Tensor, found: Tensor) -> dict[str, float]:
    metrics = difference_metrics(expected.double().numpy(), found.double().numpy())
    return {key: metrics[key] for key in ("relative_l2", "cosine_similarity")}


def worst_layers(steps: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
    """Return linear layers with their greatest ``relative_l2`` over the steps looked at, the worst first."""
    worst: dict[str, float] = {}
    for step in steps:
        for name, errors in step["linear"].items():
            worst[name] = max(worst.get(name, 0.0), errors["relative_l2"])
    return sorted(worst.items(), key=lambda item: -item[1])
