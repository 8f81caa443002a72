"""Options of vLLM-Omni's server that ``lowbit serve`` refuses, with the reason.

Those it takes are options of its own with the same names: ``--omni``, ``--quantization``,
``--diffusion-quantization-config``, ``--diffusion-kv-cache-dtype`` (here also ``--attention-quantization``),
``--cache-backend``, ``--cache-config``, ``--step-execution``, ``--vae-use-slicing``, ``--vae-use-tiling``,
``--enforce-eager``, ``--max-generated-image-size``, ``--default-sampling-params``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RefusedFlag:
    """An option that is refused.

    Attributes:
        name: with its dashes.
        reason: in a sentence without a full stop, with the cure where there is one.
        has_value: it takes a value.
        neutral: values that ask for nothing and are therefore taken.
    """

    name: str
    reason: str
    has_value: bool = True
    neutral: tuple[str, ...] = ()


_ONE_DEVICE = "the server computes on one device"
_OFFLOAD = "the server does not offload; quantize more of the model, or offload in Python (examples/offload.py)"
_ADAPTER = "the server loads no adapters; load the LoRA in Python and save the model"

REFUSED_FLAGS: tuple[RefusedFlag, ...] = (
    RefusedFlag("--diffusion-kv-cache-skip-steps", "attention is quantized in every step"),
    RefusedFlag("--diffusion-kv-cache-skip-layers", "name components in --attention-quantization instead"),
    RefusedFlag(
        "--diffusion-attention-backend", "the kernel follows from --attention-quantization and LOWBIT_ATTENTION_KERNEL"
    ),
    RefusedFlag("--request-batch-max-wait-ms", "a request joins at the next step, none waits for others", True, ("0",)),
    RefusedFlag("--lora-path", _ADAPTER),
    RefusedFlag("--lora-scale", _ADAPTER),
    RefusedFlag("--enable-cpu-offload", _OFFLOAD, False),
    RefusedFlag("--enable-layerwise-offload", _OFFLOAD, False),
    RefusedFlag("--boundary-ratio", "video models are not served"),
    RefusedFlag("--flow-shift", "the scheduler's configuration in the model's folder sets it"),
    RefusedFlag("--tensor-parallel-size", _ONE_DEVICE, True, ("1",)),
    RefusedFlag("--text-encoder-tp-size", _ONE_DEVICE, True, ("1",)),
    RefusedFlag("--ulysses-degree", _ONE_DEVICE, True, ("1",)),
    RefusedFlag("--ring-degree", _ONE_DEVICE, True, ("1",)),
    RefusedFlag("--usp", _ONE_DEVICE, True, ("1",)),
    RefusedFlag("--cfg-parallel-size", _ONE_DEVICE, True, ("1",)),
    RefusedFlag("--vae-patch-parallel-size", _ONE_DEVICE, True, ("1",)),
    RefusedFlag("--use-hsdp", _ONE_DEVICE, False),
    RefusedFlag("--enable-expert-parallel", _ONE_DEVICE, False),
    RefusedFlag("--data-parallel-size", "start a server per device behind a proxy", True, ("1",)),
    RefusedFlag("--stage-overrides", "a diffusion pipeline has one stage"),
)


def table() -> str:
    """Return the rows of the documentation's table."""
    return "\n".join(f"| `{flag.name}` | {flag.reason} |" for flag in REFUSED_FLAGS)
