"""What a server is told once, at its start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lowbit.errors import ConfigError
from lowbit.inputs.data import OmniDiffusionSamplingParams


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may ask for at most.

    Attributes:
        max_images: pictures per request.
        max_pixels: height times width of a picture.
        max_steps: denoising steps.
        max_prompt_chars: characters of a prompt, and of a negative prompt.
        max_body_mb: megabytes (10^6 bytes) of a request's body.
        max_input_images: pictures that a request brings.
        max_input_pixels: height times width of a picture that a request brings.
        max_timeout_s: seconds from arrival to the result; also the default.
    """

    max_images: int = 10
    max_pixels: int = 4096 * 4096
    max_steps: int = 200
    max_prompt_chars: int = 32_000
    max_body_mb: float = 64.0
    max_input_images: int = 16
    max_input_pixels: int = 8192 * 8192
    max_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        for each in fields(self):
            if not getattr(self, each.name) > 0:
                raise ConfigError(f"{each.name}: expected more than 0, got {getattr(self, each.name)}")


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How to serve.

    Attributes:
        model_names: under which requests may ask for the model; the first is the one that answers name.
        api_keys: of which a request must bring one; none for a server that is open.
        limits: per request.
        max_running: requests under way at a time.
        max_queue: requests that wait at most.
        max_batch: requests that share a forward.
        default_params: sampling parameters where a request has none.
        ignored_fields: fields of requests that have no effect here and that clients send nevertheless.
        extra_params: arguments of the pipeline's own that requests may set.
        url_ttl_s: seconds for which a picture's URL works.
        stored_mb: megabytes (10^6 bytes) of pictures that URLs lead to; the oldest go first.
        public_url: what clients reach the server by, where it is not what their requests say.
        allowed_origins: web pages that may ask, for browsers.
        root_path: prefix that a proxy strips from paths.
        log_prompts: write prompts to the log.
    """

    model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    limits: Limits = field(default_factory=Limits)
    max_running: int = 4
    max_queue: int = 64
    max_batch: int = 1
    default_params: Mapping[str, Any] = field(default_factory=dict)
    ignored_fields: frozenset[str] = frozenset()
    extra_params: frozenset[str] = frozenset()
    url_ttl_s: float = 3600.0
    stored_mb: float = 256.0
    public_url: str | None = None
    allowed_origins: tuple[str, ...] = ()
    root_path: str = ""
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if not self.model_names or not all(self.model_names):
            raise ConfigError("served_model_name: expected a name that is not empty")
        if not all(self.api_keys) or not all(key.isascii() for key in self.api_keys):
            raise ConfigError("api_key: expected ASCII text that is not empty")
        for name in ("max_running", "max_queue", "max_batch", "url_ttl_s", "stored_mb"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}: expected more than 0, got {getattr(self, name)}")
        _check_defaults(self.default_params)


def _check_defaults(params: Mapping[str, Any]) -> None:
    known = [each.name for each in fields(OmniDiffusionSamplingParams) if each.name not in {"seed", "extra_args"}]
    unknown = [name for name in params if name not in known]
    if unknown:
        raise ConfigError(
            f"default_sampling_params: unknown {', '.join(unknown)}. Expected some of: {', '.join(known)}"
        )
    OmniDiffusionSamplingParams(**params)
