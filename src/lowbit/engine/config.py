"""What an engine is told once, at its start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lowbit.cache import GenerationCache, build_cache
from lowbit.errors import ConfigError, expected_one_of
from lowbit.models.embedded import EMBEDDED_NAME
from lowbit.ops.attention import UNQUANTIZED, check_kind
from lowbit.quantization.factory import AnyQuantizationConfig, QuantizationSpec, build_quant_config

DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
}


@dataclass(frozen=True, kw_only=True)
class OmniDiffusionConfig:
    """A model and how to run it: options in any form that they take; ``resolved`` gives what the engine reads.

    Attributes:
        model: a folder in diffusers' format or a Hub id; ``None`` is the embedded model.
        quantization_config: anything ``build_quant_config`` takes.
        dtype: of weights that are not quantized and of activations: a torch dtype or its name.
        device: ``None`` takes an accelerator when there is one.
        enforce_eager: ``False`` compiles the transformers' repeated blocks with ``torch.compile``.
        calibration_prompts: for the static activation scheme where the checkpoint holds no input scales.
        trust_remote_code: run code that comes with the checkpoint.
        cache_backend: reuse what earlier denoising steps computed: a name of ``lowbit.cache.CACHE_BACKENDS``.
        cache_config: the cache's options.
        attention_quantization: ``"int8"`` or ``"fp8"``, or component -> kind; ``"none"`` leaves attention to
            diffusers; with ``None`` quantized transformers on a CPU may use ``speed_up_attention``.
    """

    model: str | None = None
    quantization_config: QuantizationSpec = None
    dtype: torch.dtype | str = torch.bfloat16
    device: torch.device | str | None = None
    enforce_eager: bool = True
    calibration_prompts: Sequence[str] = ()
    trust_remote_code: bool = False
    cache_backend: str | None = None
    cache_config: Mapping[str, Any] | None = None
    attention_quantization: str | Mapping[str, str | None] | None = None

    def resolved(self) -> OmniDiffusionConfig:
        """Return the configuration with every option in the form that the engine reads.

        Raises:
            ConfigError: an option that can't be honoured.
        """
        return replace(
            self,
            model=None if self.model == EMBEDDED_NAME else self.model,
            quantization_config=build_quant_config(self.quantization_config),
            dtype=parse_dtype(self.dtype),
            device=parse_device(self.device),
            attention_quantization=parse_attention(self.attention_quantization),
        )

    @property
    def quantization(self) -> AnyQuantizationConfig | None:
        """The quantization's configuration, built."""
        return build_quant_config(self.quantization_config)

    def build_cache(self) -> GenerationCache | None:
        """Return the cache; raises ``ConfigError`` for an unknown one or one that does not work with the rest."""
        cache = build_cache(self.cache_backend, self.cache_config)
        if cache is not None and not self.enforce_eager and not cache.runs_compiled:
            raise ConfigError(f"cache_backend {self.cache_backend!r} does not work with compiled blocks: use tea_cache")
        return cache


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return the dtype; raises ``ConfigError`` for one that pipelines can't run in."""
    if isinstance(dtype, str) and dtype.lower() in DTYPES:
        return DTYPES[dtype.lower()]
    if dtype in DTYPES.values():
        assert isinstance(dtype, torch.dtype)
        return dtype
    raise ConfigError(f"Unknown dtype {dtype!r}. {expected_one_of(DTYPES)}. For fewer bits use quantization")


def parse_attention(kind: str | Mapping[str, str | None] | None) -> str | dict[str, str] | None:
    """Return the kind of attention quantization, or that of each component (no component for ``"none"``).

    ``None`` stays ``None``: quantize nothing, compute attention the fastest way.

    Raises:
        ConfigError: an unknown kind.
    """
    if kind is None:
        return None
    if not isinstance(kind, Mapping):
        known = check_kind(kind)
        return {} if known == UNQUANTIZED else known
    kinds = {name: check_kind(each, f"attention_quantization of {name}") for name, each in kind.items()}
    return {name: each for name, each in kinds.items() if each != UNQUANTIZED}


def parse_device(device: torch.device | str | None) -> torch.device:
    """Return the device, an accelerator if there is one and none is named.

    Raises:
        ConfigError: there is no such device on this machine.
    """
    if device is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"Can't use device {str(device)!r}: {str(error).splitlines()[0]}") from error
    return found


def merge_quantization(quantization: QuantizationSpec, config: QuantizationSpec) -> QuantizationSpec:
    """Combine ``quantization="int8"`` with ``quantization_config={"ignored_layers": [...]}``.

    Raises:
        ConfigError: both say how to quantize, and differently.
    """
    if quantization is None or config is None:
        return quantization if config is None else config
    if isinstance(quantization, str) and isinstance(config, Mapping) and not _names_method(config):
        return {"method": quantization, **config}
    built, other = build_quant_config(quantization), build_quant_config(config)
    if (built and built.get_name()) != (other and other.get_name()):
        raise ConfigError(f"quantization={quantization!r} and quantization_config={config!r} contradict each other")
    return config


def _names_method(config: Mapping[str, Any]) -> bool:
    return "method" in config or "quant_method" in config or any(isinstance(v, Mapping) for v in config.values())
