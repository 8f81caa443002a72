"""Models of two transformers whose files people name by noise level: Wan 2.2's experts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, replace

from lowbit.errors import ConfigError
from lowbit.quantization.base import QuantizationConfig

# Component -> the word in the names of its files. diffusers runs ``transformer`` above the boundary timestep.
_EXPERTS: Mapping[str, str] = {"transformer": "high", "transformer_2": "low"}
_WORDS = re.compile(r"(high|low)(?=[ _.-]?noise)", re.IGNORECASE)


def noise_pairs(foreign: Mapping[str, QuantizationConfig]) -> dict[str, QuantizationConfig]:
    """Give two transformers that were given one file each their own, told from the other by its name.

    Args:
        foreign: component -> configuration with ``weights_from``.

    Raises:
        ConfigError: components are to take the same file, and its name does not tell the other's.
    """
    found = dict(foreign)
    places = [config.weights_from for config in found.values()]
    shared = {place for place in places if place is not None and places.count(place) > 1}
    for place in shared:
        names = [name for name, config in found.items() if config.weights_from == place]
        if set(names) != _EXPERTS.keys() or not _WORDS.search(place):
            raise ConfigError(
                f"{place} holds one component, and {', '.join(names)} would all take it: give each its own with a"
                " configuration per component, or of two experts a name with HighNoise or LowNoise in it"
            )
        for name in names:
            found[name] = _elsewhere(found[name], place, _file_of(place, _EXPERTS[name]))
    return found


def _file_of(place: str, word: str) -> str:
    """Return the name of the file with the other word, spelled alike: ``HighNoise``, ``high_noise``, ``LOW-NOISE``."""

    def other(match: re.Match[str]) -> str:
        spelled = match[0]
        if spelled.isupper():
            return word.upper()
        return word.capitalize() if spelled[0].isupper() else word

    return _WORDS.sub(other, place)


def _elsewhere(config: QuantizationConfig, place: str, other: str) -> QuantizationConfig:
    option = next(item.name for item in fields(config) if getattr(config, item.name) == place)
    return replace(config, **{option: other})  # type: ignore[arg-type]
