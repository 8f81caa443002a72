"""Which linear layers of which model family stay in high precision, and why.

Layer patterns are those of ``ignored_layers`` (see ``lowbit.models.patterns``). The shares of weights in the comments
were counted on the model classes of diffusers 0.42 with their default configurations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# What every transformer keeps. Quantizing modulation, timestep embeddings and the last projection with W8A8 raised
# LPIPS on Qwen-Image from 0.17 to 0.39 (vllm-omni #2728, #2795).
COMMON_KEPT_LAYERS: Mapping[str, tuple[str, ...]] = {
    "embedding": ("*embed*", "re:time_proj$", "caption_projection", "image_projector", "glyph_projector"),
    "modulation": ("*modulation*", "img_mod", "txt_mod", "norm*", "adaln*", "distilled_guidance_layer"),
    "first projection": ("re:(img_in|txt_in|proj_in)$",),
    "last projection": ("re:proj_out$", "*final_layer*", "lm_head", "codec_head"),
    "router": ("router", "shared_expert_gate", "re:.*mlp[.]gate$"),
}

# Of a denoising transformer every layer that is in no numbered block: first and last projections, embeddings, adapters
# of text and sound, whatever their names.
_OUTSIDE_BLOCKS = {"outside the blocks": (r"re:(?!(?:.*\.)?\d+(?:\.|$)).*$",)}


@dataclass(frozen=True)
class Family:
    """A family of diffusion transformers.

    Attributes:
        name: as its makers write it.
        classes: names of its transformer classes in diffusers.
        kept_layers: reason -> patterns, beyond ``COMMON_KEPT_LAYERS``.
        weight_only_layers: of those, what gives up its weights' precision but not its input's: modulation inside the
            blocks, where it is a tenth of the weights or more. It sees one row per image, so it reads its weight and
            does little else: at half the bytes it is no slower, and no activation is rounded.
        kept_share: share of the linear layers' weights that stay in high precision, 0 to 1.
        weight_only_share: share that ``weight_only_layers`` take.
        latent_patch: latent pixels along a patch's side; ``None`` where the pipeline alone checks sizes.
        note: what was reported about quantizing it, with its source.
    """

    name: str
    classes: tuple[str, ...]
    kept_layers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    weight_only_layers: tuple[str, ...] = ()
    kept_share: float = 0.0
    weight_only_share: float = 0.0
    latent_patch: int | None = None
    note: str = ""


# AdaLayerNormZero of double and of single blocks; ``norm_out``, before the last projection, stays.
_ADAPTIVE_NORMS = ("norm1.linear", "norm1_context.linear", "norm.linear")

FAMILIES: tuple[Family, ...] = (
    Family(
        "Z-Image",
        ("ZImageTransformer2DModel",),
        kept_share=0.022,
        latent_patch=2,
        note="Int8 and FP8 W8A8 of all attention and feed-forward layers: validated by vLLM-Omni (Z-Image-Turbo).",
    ),
    Family(
        "Qwen-Image",
        ("QwenImageTransformer2DModel",),
        weight_only_layers=("img_mod", "txt_mod"),
        kept_share=0.002,
        weight_only_share=0.333,
        latent_patch=2,
        note="vLLM-Omni: Int8 LPIPS 0.0197, with ignored_layers=['img_mlp'] 0.0027; keep img_mlp in FP8 when quality"
        " regresses.",
    ),
    Family(
        "FLUX.1",
        ("FluxTransformer2DModel",),
        weight_only_layers=_ADAPTIVE_NORMS,
        kept_share=0.0045,
        weight_only_share=0.2715,
        latent_patch=2,
        note="vLLM-Omni: FP8 of all layers.",
    ),
    Family(
        "FLUX.2",
        ("Flux2Transformer2DModel",),
        kept_share=0.026,
        latent_patch=2,
        note="vLLM-Omni: FP8 of all layers (klein).",
    ),
    Family("Wan", ("WanTransformer3DModel",), kept_share=0.016, note="Not validated by vLLM-Omni for Int8 or FP8."),
    Family(
        "HunyuanVideo",
        ("HunyuanVideoTransformer3DModel",),
        weight_only_layers=_ADAPTIVE_NORMS,
        kept_share=0.028,
        weight_only_share=0.265,
    ),
    Family(
        "HunyuanVideo-1.5",
        ("HunyuanVideo15Transformer3DModel",),
        weight_only_layers=_ADAPTIVE_NORMS,
        kept_share=0.02,
        weight_only_share=0.327,
        note="vLLM-Omni: FP8 of all layers.",
    ),
    Family(
        "HunyuanImage",
        ("HunyuanImageTransformer2DModel",),
        weight_only_layers=_ADAPTIVE_NORMS,
        kept_share=0.026,
        weight_only_share=0.266,
    ),
    Family(
        "GLM-Image",
        ("GlmImageTransformer2DModel",),
        weight_only_layers=("norm1.linear",),
        kept_share=0.005,
        weight_only_share=0.165,
        note="Not validated by vLLM-Omni.",
    ),
)


def family_of(class_name: str) -> Family | None:
    """Return the family whose transformer class is ``class_name``, or ``None``."""
    return next((family for family in FAMILIES if class_name in family.classes), None)


def kept_layers(class_name: str) -> dict[str, tuple[str, ...]]:
    """Return reason -> patterns of the layers that a model of class ``class_name`` keeps in high precision."""
    family = family_of(class_name)
    outside = _OUTSIDE_BLOCKS if is_diffusion_transformer("diffusers", class_name) else {}
    return {**COMMON_KEPT_LAYERS, **(family.kept_layers if family else {}), **outside}


def weight_only_layers(class_name: str) -> tuple[str, ...]:
    """Return patterns of the layers whose weights alone a model of class ``class_name`` has quantized."""
    family = family_of(class_name)
    if family is not None:
        return family.weight_only_layers
    return _ADAPTIVE_NORMS if is_diffusion_transformer("diffusers", class_name) else ()


def is_diffusion_transformer(library: str, class_name: str) -> bool:
    """Tell whether an entry of ``model_index.json`` is a denoising transformer (what a plain method applies to)."""
    return library == "diffusers" and "Transformer" in class_name
