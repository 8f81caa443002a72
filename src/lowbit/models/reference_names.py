"""From the names of diffusers to those of the reference implementations, in which single files are written.

The other direction is diffusers' own (``lowbit.checkpoints.single_file``); what is made here is held against it before
anything is written, so that a name that diffusers changes is an error and not a wrong file.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

# Layer of the reference -> the layers of diffusers whose rows it holds, in order. {} is a number. "weight" and "bias"
# keep their names. Layers that are not listed have the same name in both.
Layers = Mapping[str, tuple[str, ...]]

_DOUBLE, _SINGLE = "double_blocks.{}.", "single_blocks.{}."
_BLOCK, _SINGLE_BLOCK = "transformer_blocks.{}.", "single_transformer_blocks.{}."


def _qkv(source: str, target: str, names: tuple[str, str, str] = ("to_q", "to_k", "to_v")) -> Layers:
    return {source: tuple(f"{target}.{name}" for name in names)}


_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")

FLUX: Layers = {
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "txt_in": ("context_embedder",),
    "img_in": ("x_embedder",),
    _DOUBLE + "img_mod.lin": (_BLOCK + "norm1.linear",),
    _DOUBLE + "txt_mod.lin": (_BLOCK + "norm1_context.linear",),
    **_qkv(_DOUBLE + "img_attn.qkv", _BLOCK + "attn"),
    **_qkv(_DOUBLE + "txt_attn.qkv", _BLOCK + "attn", _ADDED),
    _DOUBLE + "img_attn.norm.query_norm": (_BLOCK + "attn.norm_q",),
    _DOUBLE + "img_attn.norm.key_norm": (_BLOCK + "attn.norm_k",),
    _DOUBLE + "txt_attn.norm.query_norm": (_BLOCK + "attn.norm_added_q",),
    _DOUBLE + "txt_attn.norm.key_norm": (_BLOCK + "attn.norm_added_k",),
    _DOUBLE + "img_mlp.0": (_BLOCK + "ff.net.0.proj",),
    _DOUBLE + "img_mlp.2": (_BLOCK + "ff.net.2",),
    _DOUBLE + "txt_mlp.0": (_BLOCK + "ff_context.net.0.proj",),
    _DOUBLE + "txt_mlp.2": (_BLOCK + "ff_context.net.2",),
    _DOUBLE + "img_attn.proj": (_BLOCK + "attn.to_out.0",),
    _DOUBLE + "txt_attn.proj": (_BLOCK + "attn.to_add_out",),
    _SINGLE + "modulation.lin": (_SINGLE_BLOCK + "norm.linear",),
    _SINGLE + "linear1": tuple(_SINGLE_BLOCK + name for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
    _SINGLE + "linear2": (_SINGLE_BLOCK + "proj_out",),
    _SINGLE + "norm.query_norm": (_SINGLE_BLOCK + "attn.norm_q",),
    _SINGLE + "norm.key_norm": (_SINGLE_BLOCK + "attn.norm_k",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}

FLUX2: Layers = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_guidance_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_guidance_embed.timestep_embedder.linear_2",),
    "guidance_in.in_layer": ("time_guidance_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_guidance_embed.guidance_embedder.linear_2",),
    "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
    "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
    "single_stream_modulation.lin": ("single_stream_modulation.linear",),
    **_qkv(_DOUBLE + "img_attn.qkv", _BLOCK + "attn"),
    **_qkv(_DOUBLE + "txt_attn.qkv", _BLOCK + "attn", _ADDED),
    _DOUBLE + "img_attn.norm.query_norm": (_BLOCK + "attn.norm_q",),
    _DOUBLE + "img_attn.norm.key_norm": (_BLOCK + "attn.norm_k",),
    _DOUBLE + "txt_attn.norm.query_norm": (_BLOCK + "attn.norm_added_q",),
    _DOUBLE + "txt_attn.norm.key_norm": (_BLOCK + "attn.norm_added_k",),
    _DOUBLE + "img_attn.proj": (_BLOCK + "attn.to_out.0",),
    _DOUBLE + "txt_attn.proj": (_BLOCK + "attn.to_add_out",),
    _DOUBLE + "img_mlp.0": (_BLOCK + "ff.linear_in",),
    _DOUBLE + "img_mlp.2": (_BLOCK + "ff.linear_out",),
    _DOUBLE + "txt_mlp.0": (_BLOCK + "ff_context.linear_in",),
    _DOUBLE + "txt_mlp.2": (_BLOCK + "ff_context.linear_out",),
    _SINGLE + "linear1": (_SINGLE_BLOCK + "attn.to_qkv_mlp_proj",),
    _SINGLE + "linear2": (_SINGLE_BLOCK + "attn.to_out",),
    _SINGLE + "norm.query_norm": (_SINGLE_BLOCK + "attn.norm_q",),
    _SINGLE + "norm.key_norm": (_SINGLE_BLOCK + "attn.norm_k",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}

_WAN_ATTENTION = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
    "k_img": "add_k_proj",
    "v_img": "add_v_proj",
    "norm_k_img": "norm_added_k",
}

WAN: Layers = {
    "time_embedding.0": ("condition_embedder.time_embedder.linear_1",),
    "time_embedding.2": ("condition_embedder.time_embedder.linear_2",),
    "text_embedding.0": ("condition_embedder.text_embedder.linear_1",),
    "text_embedding.2": ("condition_embedder.text_embedder.linear_2",),
    "time_projection.1": ("condition_embedder.time_proj",),
    **{f"blocks.{{}}.self_attn.{name}": (f"blocks.{{}}.attn1.{ours}",) for name, ours in _WAN_ATTENTION.items()},
    **{f"blocks.{{}}.cross_attn.{name}": (f"blocks.{{}}.attn2.{ours}",) for name, ours in _WAN_ATTENTION.items()},
    "blocks.{}.ffn.0": ("blocks.{}.ffn.net.0.proj",),
    "blocks.{}.ffn.2": ("blocks.{}.ffn.net.2",),
    "blocks.{}.norm3": ("blocks.{}.norm2",),
    "blocks.{}.modulation": ("blocks.{}.scale_shift_table",),
    "head.modulation": ("scale_shift_table",),
    "head.head": ("proj_out",),
    "img_emb.proj.0": ("condition_embedder.image_embedder.norm1",),
    "img_emb.proj.1": ("condition_embedder.image_embedder.ff.net.0.proj",),
    "img_emb.proj.3": ("condition_embedder.image_embedder.ff.net.2",),
    "img_emb.proj.4": ("condition_embedder.image_embedder.norm2",),
}


def _z_image_block(name: str) -> Layers:
    return {
        **_qkv(f"{name}.{{}}.attention.qkv", f"{name}.{{}}.attention"),
        f"{name}.{{}}.attention.out": (f"{name}.{{}}.attention.to_out.0",),
        f"{name}.{{}}.attention.q_norm": (f"{name}.{{}}.attention.norm_q",),
        f"{name}.{{}}.attention.k_norm": (f"{name}.{{}}.attention.norm_k",),
    }


Z_IMAGE: Layers = {
    **_z_image_block("layers"),
    **_z_image_block("noise_refiner"),
    **_z_image_block("context_refiner"),
    "x_embedder": ("all_x_embedder.2-1",),
    "final_layer.linear": ("all_final_layer.2-1.linear",),
    "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
}

_REFINER = "txt_in.individual_token_refiner.blocks.{}."
_REFINER_BLOCK = "context_embedder.token_refiner.refiner_blocks.{}."

HUNYUAN_VIDEO: Layers = {
    "img_in.proj": ("x_embedder.proj",),
    "time_in.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "guidance_in.mlp.0": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.mlp.2": ("time_text_embed.guidance_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "txt_in.input_embedder": ("context_embedder.proj_in",),
    "txt_in.t_embedder.mlp.0": ("context_embedder.time_text_embed.timestep_embedder.linear_1",),
    "txt_in.t_embedder.mlp.2": ("context_embedder.time_text_embed.timestep_embedder.linear_2",),
    "txt_in.c_embedder.linear_1": ("context_embedder.time_text_embed.text_embedder.linear_1",),
    "txt_in.c_embedder.linear_2": ("context_embedder.time_text_embed.text_embedder.linear_2",),
    _REFINER + "norm1": (_REFINER_BLOCK + "norm1",),
    _REFINER + "norm2": (_REFINER_BLOCK + "norm2",),
    **_qkv(_REFINER + "self_attn_qkv", _REFINER_BLOCK + "attn"),
    _REFINER + "self_attn_proj": (_REFINER_BLOCK + "attn.to_out.0",),
    _REFINER + "mlp.fc1": (_REFINER_BLOCK + "ff.net.0.proj",),
    _REFINER + "mlp.fc2": (_REFINER_BLOCK + "ff.net.2",),
    _REFINER + "adaLN_modulation.1": (_REFINER_BLOCK + "norm_out.linear",),
    _DOUBLE + "img_mod.linear": (_BLOCK + "norm1.linear",),
    _DOUBLE + "txt_mod.linear": (_BLOCK + "norm1_context.linear",),
    **_qkv(_DOUBLE + "img_attn_qkv", _BLOCK + "attn"),
    **_qkv(_DOUBLE + "txt_attn_qkv", _BLOCK + "attn", _ADDED),
    _DOUBLE + "img_attn_q_norm": (_BLOCK + "attn.norm_q",),
    _DOUBLE + "img_attn_k_norm": (_BLOCK + "attn.norm_k",),
    _DOUBLE + "txt_attn_q_norm": (_BLOCK + "attn.norm_added_q",),
    _DOUBLE + "txt_attn_k_norm": (_BLOCK + "attn.norm_added_k",),
    _DOUBLE + "img_attn_proj": (_BLOCK + "attn.to_out.0",),
    _DOUBLE + "txt_attn_proj": (_BLOCK + "attn.to_add_out",),
    _DOUBLE + "img_mlp.fc1": (_BLOCK + "ff.net.0.proj",),
    _DOUBLE + "img_mlp.fc2": (_BLOCK + "ff.net.2",),
    _DOUBLE + "txt_mlp.fc1": (_BLOCK + "ff_context.net.0.proj",),
    _DOUBLE + "txt_mlp.fc2": (_BLOCK + "ff_context.net.2",),
    _SINGLE + "modulation.linear": (_SINGLE_BLOCK + "norm.linear",),
    _SINGLE + "linear1": tuple(_SINGLE_BLOCK + name for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
    _SINGLE + "linear2": (_SINGLE_BLOCK + "proj_out",),
    _SINGLE + "q_norm": (_SINGLE_BLOCK + "attn.norm_q",),
    _SINGLE + "k_norm": (_SINGLE_BLOCK + "attn.norm_k",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}


@dataclass(frozen=True)
class Layout:
    """The layout of a model class's single files.

    Attributes:
        architecture: ``general.architecture`` of its GGUF files.
        layers: see ``Layers``.
        swapped: layers of the reference whose halves are in the other order.
        scales: layers of the reference whose weight is called "scale".
    """

    architecture: str
    layers: Layers
    swapped: frozenset[str] = frozenset()
    scales: re.Pattern[str] = re.compile(r"$^")


_FINAL = frozenset({"final_layer.adaLN_modulation.1"})
_NORMS = re.compile(r".*norm\.(query|key)_norm$")

LAYOUTS: Mapping[str, Layout] = {
    "FluxTransformer2DModel": Layout("flux", FLUX, _FINAL, _NORMS),
    "Flux2Transformer2DModel": Layout("flux", FLUX2, _FINAL, _NORMS),
    "WanTransformer3DModel": Layout("wan", WAN),
    "HunyuanVideoTransformer3DModel": Layout("hyvid", HUNYUAN_VIDEO, _FINAL),
    "QwenImageTransformer2DModel": Layout("qwen_image", {}),
    "ZImageTransformer2DModel": Layout("lumina2", Z_IMAGE),
}


@dataclass(frozen=True)
class Fused:
    """A tensor of a single file.

    Attributes:
        parts: the tensors of diffusers whose rows it holds, in order.
        swapped: the halves of its rows are in the other order.
    """

    parts: tuple[str, ...]
    swapped: bool = False


def reference_tensors(layout: Layout, names: Collection[str]) -> dict[str, Fused]:
    """Return the tensors of a single file for the tensors of a model of diffusers.

    Args:
        layout: of the model's class.
        names: of the model's tensors.
    """
    rules = [
        (_pattern(target), source, index)
        for source, targets in layout.layers.items()
        for index, target in enumerate(targets)
    ]
    found: dict[str, dict[int, str]] = {}
    swapped = set()
    for name in names:
        layer, dot, parameter = name.rpartition(".")
        if parameter not in ("weight", "bias"):
            layer, dot, parameter = name, "", ""
        source, index = _source_of(layer, rules)
        if parameter == "weight" and layout.scales.match(source):
            parameter = "scale"
        fused = f"{source}{dot}{parameter}"
        found.setdefault(fused, {})[index] = name
        if source in layout.swapped:
            swapped.add(fused)
    return {
        name: Fused(tuple(parts[index] for index in sorted(parts)), name in swapped) for name, parts in found.items()
    }


def names_of(layer: str, layers: Layers) -> tuple[str, ...]:
    """Return what ``layers`` has for ``layer``, with its numbers put in; nothing if it is not among them."""
    for source, targets in layers.items():
        match = _pattern(source).fullmatch(layer)
        if match:
            return tuple(target.format(*match.groups()) for target in targets)
    return ()


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\{\}", r"(\d+)"))


def _source_of(layer: str, rules: Collection[tuple[re.Pattern[str], str, int]]) -> tuple[str, int]:
    for pattern, source, index in rules:
        match = pattern.fullmatch(layer)
        if match:
            return source.format(*match.groups()), index
    return layer, 0
