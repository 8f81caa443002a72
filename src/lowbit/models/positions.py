"""How many positions a transformer's tables hold: past them a picture is wrong or the forward fails.

The limits are read off a loaded model's configuration and tables, which diffusers' classes name alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def position_limits(transformer: Any, text_tokens: int = 0) -> dict[str, int]:
    """Return the largest number of tokens along ``height``, ``width`` and ``num_frames``, for those with a limit.

    Args:
        transformer: of diffusers.
        text_tokens: that share the table with the picture, where the model puts them behind it.
    """
    config: Mapping[str, Any] = transformer.config
    lengths = config.get("axes_lens")
    if lengths is not None:  # rotary embeddings by table: text and frames, rows, columns
        return {"height": lengths[1], "width": lengths[2]}
    if config.get("rope_max_seq_len") is not None:
        return dict.fromkeys(("num_frames", "height", "width"), config["rope_max_seq_len"])
    embedding = getattr(transformer, "pos_embed", None)
    rotary = getattr(embedding, "pos_freqs", None)
    if rotary is not None:  # rows and columns count from the middle; text follows the larger half
        return dict.fromkeys(("height", "width"), 2 * (len(rotary) - text_tokens))
    table = getattr(embedding, "pos_embed", None)
    if config.get("pos_embed_max_size") is not None and table is not None:  # a square, cropped
        return dict.fromkeys(("height", "width"), math.isqrt(table.shape[1]))
    return {}


def hidden_width(transformer: Any) -> int:
    """Return the number of channels of the hidden states, 0 where it is unknown."""
    config: Mapping[str, Any] = transformer.config
    heads, width = config.get("num_attention_heads"), config.get("attention_head_dim")
    if isinstance(config.get("dim"), int):
        return int(config["dim"])
    return heads * width if isinstance(heads, int) and isinstance(width, int) else 0
