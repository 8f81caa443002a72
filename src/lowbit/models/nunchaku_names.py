"""What nunchaku calls the layers of diffusers' transformers.

The names are those of nunchaku's model classes (``nunchaku/models/transformers``) and, for FLUX.1, those that
deepcompressor writes (``deepcompressor/backend/nunchaku/convert.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lowbit.models.reference_names import Layers

_BLOCK, _SINGLE = "transformer_blocks.{}.", "single_transformer_blocks.{}."


def _qkv(source: str, target: str, names: Sequence[str] = ("to_q", "to_k", "to_v")) -> Layers:
    return {source: tuple(target + name for name in names)}


_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")

FLUX: Layers = {
    **_qkv(_BLOCK + "qkv_proj", _BLOCK + "attn."),
    **_qkv(_BLOCK + "qkv_proj_context", _BLOCK + "attn.", _ADDED),
    _BLOCK + "out_proj": (_BLOCK + "attn.to_out.0",),
    _BLOCK + "out_proj_context": (_BLOCK + "attn.to_add_out",),
    _BLOCK + "mlp_fc1": (_BLOCK + "ff.net.0.proj",),
    _BLOCK + "mlp_fc2": (_BLOCK + "ff.net.2",),
    _BLOCK + "mlp_context_fc1": (_BLOCK + "ff_context.net.0.proj",),
    _BLOCK + "mlp_context_fc2": (_BLOCK + "ff_context.net.2",),
    **{_BLOCK + name: (_BLOCK + "attn." + name,) for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")},
    **_qkv(_SINGLE + "qkv_proj", _SINGLE + "attn."),
    _SINGLE + "mlp_fc1": (_SINGLE + "proj_mlp",),
    **{_SINGLE + name: (_SINGLE + "attn." + name,) for name in ("norm_q", "norm_k")},
}
QWEN_IMAGE: Layers = {
    **_qkv(_BLOCK + "attn.to_qkv", _BLOCK + "attn."),
    **_qkv(_BLOCK + "attn.add_qkv_proj", _BLOCK + "attn.", _ADDED),
}


def _z_image_block(name: str) -> Layers:
    block = f"{name}.{{}}."
    return {
        **_qkv(block + "attention.to_qkv", block + "attention."),
        # diffusers' SwiGLU multiplies the first half of its rows by the activated second.
        block + "feed_forward.net.0.proj": (block + "feed_forward.w3", block + "feed_forward.w1"),
        block + "feed_forward.net.2": (block + "feed_forward.w2",),
    }


Z_IMAGE: Layers = {
    **_z_image_block("layers"),
    **_z_image_block("noise_refiner"),
    **_z_image_block("context_refiner"),
}


@dataclass(frozen=True)
class NunchakuLayout:
    """Where nunchaku has the layers of a class of diffusers.

    Attributes:
        class_names: ``model_class`` of its files.
        layers: nunchaku's layer -> the layers whose rows it holds.
        joined: layer -> nunchaku's layers that hold its columns, in order.
        after_gelu: nunchaku's layers whose input in int4 is shifted by ``GELU_SHIFT``.
        modulation: nunchaku's layer -> number of parts whose rows alternate.
    """

    class_names: tuple[str, ...]
    layers: Layers
    joined: Layers = field(default_factory=dict)
    after_gelu: tuple[str, ...] = ()
    modulation: Mapping[str, int] = field(default_factory=dict)


LAYOUTS: Mapping[str, NunchakuLayout] = {
    "FluxTransformer2DModel": NunchakuLayout(
        ("NunchakuFluxTransformer2dModel", "NunchakuFluxTransformer2DModelV2"),
        FLUX,
        {_SINGLE + "proj_out": (_SINGLE + "out_proj", _SINGLE + "mlp_fc2")},
        (_BLOCK + "mlp_fc2", _BLOCK + "mlp_context_fc2", _SINGLE + "mlp_fc2"),
        {_BLOCK + "norm1.linear": 6, _BLOCK + "norm1_context.linear": 6, _SINGLE + "norm.linear": 3},
    ),
    "QwenImageTransformer2DModel": NunchakuLayout(
        ("NunchakuQwenImageTransformer2DModel",),
        QWEN_IMAGE,
        after_gelu=(_BLOCK + "img_mlp.net.2", _BLOCK + "txt_mlp.net.2"),
        modulation={_BLOCK + "img_mod.1": 6, _BLOCK + "txt_mod.1": 6},
    ),
    "ZImageTransformer2DModel": NunchakuLayout(("NunchakuZImageTransformer2DModel",), Z_IMAGE),
}
