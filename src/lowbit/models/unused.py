"""Layers that a pipeline's components hold and compute, and whose results it never looks at, as data."""

from __future__ import annotations

from collections.abc import Mapping

UNUSED_LAYERS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    # Takes the input of the last block, ``hidden_states[-2]``.
    "ZImagePipeline": {"text_encoder": ("layers.-1", "norm")},
    # Take the normalized output of the last block; the head gives scores for 152,064 tokens.
    "QwenImagePipeline": {"text_encoder": ("lm_head",)},
    "QwenImageImg2ImgPipeline": {"text_encoder": ("lm_head",)},
    "QwenImageInpaintPipeline": {"text_encoder": ("lm_head",)},
    "QwenImageEditPipeline": {"text_encoder": ("lm_head",)},
    "QwenImageEditPlusPipeline": {"text_encoder": ("lm_head",)},
}
"""Pipeline class -> component -> dotted names; a number counts in a list, from its end if negative."""
