"""Where smoothing can be folded, as data: a channel's scale moves out of a linear layer's input into what makes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Fold:
    """Layers that share an input, and what can scale its channels.

    Between source and consumers there may be only what acts on each channel by itself and linearly: a modulation's
    factor, attention's mixing of tokens, a product with something else.

    Attributes:
        source: a norm with a weight, or a linear layer whose outputs are the channels; relative to the block.
        consumers: all linear layers that read the input, relative to the block.
    """

    source: str
    consumers: tuple[str, ...]


# RMSNorm(x) * weight * (1 + scale), so the norm's weight can scale; value -> attention -> output; silu(w1 x) * (w3 x).
_Z_IMAGE = (
    Fold("attention_norm1", ("attention.to_q", "attention.to_k", "attention.to_v")),
    Fold("attention.to_v", ("attention.to_out.0",)),
    Fold("ffn_norm1", ("feed_forward.w1", "feed_forward.w3")),
    Fold("feed_forward.w3", ("feed_forward.w2",)),
)

FOLDS: Mapping[str, tuple[Fold, ...]] = {"ZImageTransformer2DModel": _Z_IMAGE}
