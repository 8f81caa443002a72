"""The fixed prompts that validation, sensitivity and tuning use where none are given."""

from __future__ import annotations

from lowbit.models.embedded import EMBEDDED_NAME

# What quantization is known to hurt: text, faces and hands, counts, fine texture, smooth gradients, dark scenes.
_GENERAL = (
    "a cup of coffee on a wooden table beside a window, morning light, photograph",
    'a shop sign that reads "Fresh Bread", painted in white on blue wood',
    "portrait of an old fisherman with a grey beard, wrinkled skin, sharp focus",
    "two hands knitting a red scarf, close-up",
    "five green apples in a row on a white shelf",
    "a narrow street in the rain at night, neon lights mirrored in puddles",
    "a bird's feather on snow, macro photograph, every barb visible",
    "a hot-air balloon in a cloudless sky at sunset, smooth gradient",
    "isometric drawing of a small library with many books, ink and watercolour",
    "a black cat asleep on a dark velvet sofa in a dim room",
    "a map of an island with mountains, rivers and a compass rose, parchment",
    "a crowd at a train station seen from above, everyone with an umbrella",
)
_EMBEDDED = (
    "a large red circle left of a small blue square",
    "a small green star above a large orange triangle on a gray background",
    "a purple square",
    "a large yellow triangle right of a large blue circle on a black background",
    "a small orange circle below a small red star",
    "a large green square above a small purple circle on a gray background",
    "a blue triangle on a black background",
    "a small yellow star left of a large purple triangle",
    "a large orange star",
    "a small red triangle below a large green circle on a black background",
    "a large blue star right of a small yellow square on a gray background",
    "a small purple star left of a small orange square",
)


def validation_prompts(model: str | None) -> tuple[str, ...]:
    """Return twelve prompts for a model: the embedded one has a grammar of its own."""
    return _EMBEDDED if model in (None, EMBEDDED_NAME) else _GENERAL
