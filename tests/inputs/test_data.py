from __future__ import annotations

from typing import Any

import pytest

from lowbit.errors import ConfigError
from lowbit.inputs.data import OmniDiffusionSamplingParams


@pytest.mark.parametrize(
    "options",
    [
        {"height": 0},
        {"width": -16},
        {"num_inference_steps": 0},
        {"num_outputs_per_prompt": 0},
        {"seed": -1},
        {"seed": 2**63},
        {"height": 128.5},
    ],
)
def test_values_that_cannot_be_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        OmniDiffusionSamplingParams(**options)


def test_defaults_are_the_models() -> None:
    params = OmniDiffusionSamplingParams()
    assert params.height is None
    assert params.num_inference_steps is None
    assert params.num_outputs_per_prompt == 1
