"""Facts about model families, as data."""

from lowbit.models.families import (
    FAMILIES,
    Family,
    family_of,
    is_diffusion_transformer,
    kept_layers,
    weight_only_layers,
)

__all__ = ["FAMILIES", "Family", "family_of", "is_diffusion_transformer", "kept_layers", "weight_only_layers"]
