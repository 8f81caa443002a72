"""From a checked request to pictures: limits, sampling parameters, waiting, giving up when the client is gone."""

from __future__ import annotations

import asyncio
import copy
import inspect
import logging
import re
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from dataclasses import fields as dataclass_fields
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest

from lowbit.engine.async_engine import AsyncOmni, Ticket
from lowbit.engine.omni import Omni
from lowbit.engine.request import Request
from lowbit.engine.sizes import pixels_per_token, size_multiple
from lowbit.errors import AbortedError, ConfigError, expected_one_of
from lowbit.inputs.data import OmniDiffusionSamplingParams
from lowbit.outputs import OmniRequestOutput
from lowbit.serving.errors import ApiError, as_api_error, invalid
from lowbit.serving.metrics import Metrics
from lowbit.serving.pictures import PictureStore
from lowbit.serving.schemas import Extensions, TokenDetails, Usage
from lowbit.serving.settings import ServerSettings

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")
_STARTS_FROM_PICTURE = re.compile("Img2Img|Inpaint")
"""In the names of diffusers' pipelines that paint over one picture, which must have the size of the result."""
_NEEDS_PICTURE = re.compile("Img2Img|Inpaint|Edit")
_PARAMS = frozenset(each.name for each in dataclass_fields(OmniDiffusionSamplingParams))


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a request asks for, whatever its endpoint.

    Attributes:
        prompt: text.
        count: pictures.
        size: WIDTHxHEIGHT, ``"auto"`` or ``None``.
        body: its other fields.
        extra: arguments of the pipeline's own, by name: pictures that it brings, strength.
    """

    prompt: str
    count: int
    size: str | None
    body: Extensions
    extra: Mapping[str, Any] = field(default_factory=dict)


class Service:
    """A model behind the endpoints.

    Attributes:
        omni: runs the requests.
        settings: how to serve.
        metrics: figures.
        store: what URLs lead to.
        created: when it began to serve, Unix time in seconds.
        takes: names of the arguments that the pipeline takes.
        is_draining: the server shuts down: no new requests.
    """

    def __init__(self, omni: AsyncOmni, settings: ServerSettings, metrics: Metrics) -> None:
        self.omni, self.settings, self.metrics = omni, settings, metrics
        self.store = PictureStore(int(settings.stored_mb * 1e6), settings.url_ttl_s)
        self.created = int(time.time())
        pipeline = omni.omni.pipeline
        self.pipeline_name = type(pipeline).__name__
        self.takes = arguments_of(pipeline)
        self._tokenizer = copy.deepcopy(getattr(pipeline, "tokenizer", None))  # a fast one is not for two threads

    @property
    def model(self) -> str:
        """The name that answers give."""
        return self.settings.model_names[0]

    @property
    def is_alive(self) -> bool:
        """The engine's thread runs."""
        return self.omni.engine.is_alive()

    @property
    def takes_pictures(self) -> bool:
        """The model edits a picture that a request brings."""
        return "image" in self.takes

    def refuse_edits(self, param: str) -> None:
        """Raise ``ApiError`` where the model takes no picture."""
        if not self.takes_pictures:
            raise invalid(
                f"{self.model} ({self.pipeline_name}) makes pictures from text and takes none: use"
                " /v1/images/generations, or serve a model that edits",
                param,
                "unsupported_parameter",
            )

    def check_pictures(self, count: int, param: str) -> None:
        """Raise ``ApiError`` where a request brings more pictures than the operator or the pipeline allows."""
        most = 1 if _STARTS_FROM_PICTURE.search(self.pipeline_name) else self.settings.limits.max_input_images
        if count > most:
            raise invalid(f"{param}: {count} pictures, of which this server takes {most}", param, "limit_exceeded")

    def fitted(self, asked: Asked) -> Asked:
        """Return a request whose picture has the size of the result, where the pipeline needs that.

        Without a size the result has the picture's, rounded to what the model can make.

        Raises:
            ApiError: the model needs a picture and there is none.
        """
        image = asked.extra.get("image")
        if image is None and _NEEDS_PICTURE.search(self.pipeline_name):
            raise invalid(f"image: {self.pipeline_name} needs a picture: use /v1/images/edits", "image")
        if image is None or not _STARTS_FROM_PICTURE.search(self.pipeline_name):
            return asked
        step = size_multiple(self.omni.omni.pipeline)
        sides = self._sides(asked) or {
            name: max(step, side // step * step) for name, side in (("width", image.width), ("height", image.height))
        }
        size = (sides["width"], sides["height"])
        names = {"image", "mask_image"}
        extra = {name: value.resize(size) if name in names else value for name, value in asked.extra.items()}
        return replace(asked, size=asked.size if asked.body.width else f"{size[0]}x{size[1]}", extra=extra)

    def check_model(self, name: str | None) -> None:
        """Raise ``ApiError`` where a request asks for another model."""
        if name is not None and name not in self.settings.model_names:
            raise ApiError(
                404,
                f"There is no model {name!r} here. {expected_one_of(self.settings.model_names)}",
                "model",
                "model_not_found",
            )

    def request(self, asked: Asked) -> Request:
        """Return the engine's request; raises ``ApiError`` for what is past a limit or the model can't do."""
        self._check_limits(asked)
        timeout = min(asked.body.timeout_s or self.settings.limits.max_timeout_s, self.settings.limits.max_timeout_s)
        try:
            params = OmniDiffusionSamplingParams(**{**self.settings.default_params, **self._params(asked)})
            return self.omni.omni.request(asked.prompt, params, deadline=time.monotonic() + timeout)
        except ConfigError as error:
            raise as_api_error(error) from error

    def submit(self, asked: Asked, http: HttpRequest, previews: int = 0) -> Ticket:
        """Check a request and put it in the queue."""
        request = self.request(asked)
        if previews and self.omni.omni.runner.model_of(request.arguments).is_indivisible:
            raise invalid(f"partial_images: {self.pipeline_name} runs in one call and has none", "partial_images")
        prompt = f": {asked.prompt!r}" if self.settings.log_prompts else ""
        logger.info("%s asks for %d of size %s%s", request_id(http), asked.count, asked.size or "auto", prompt)
        try:
            return self.omni.submit(request, previews)
        except Exception as error:
            raise as_api_error(error, request_id(http)) from error

    async def output(self, asked: Asked, http: HttpRequest) -> OmniRequestOutput:
        """Make the pictures; where the client closes the connection, the request ends at its next step."""
        ticket = self.submit(asked, http)
        try:
            return await unless_gone(http, ticket.output())
        except Exception as error:
            raise as_api_error(error, request_id(http)) from error
        finally:
            ticket.cancel()

    def usage(self, prompt: str, images: Sequence[Any]) -> Usage | None:
        """Return the tokens of a prompt and its pictures, ``None`` where the model has no tokenizer."""
        if self._tokenizer is None:
            return None
        text = len(self._tokenizer(prompt, truncation=False).input_ids)
        side = pixels_per_token(self.omni.omni.pipeline)
        tokens = sum(-(-image.width // side) * -(-image.height // side) for image in images)
        details = TokenDetails(image_tokens=0, text_tokens=text)
        return Usage(input_tokens=text, input_tokens_details=details, output_tokens=tokens, total_tokens=text + tokens)

    def _check_limits(self, asked: Asked) -> None:
        limits = self.settings.limits
        found = {
            "prompt": (len(asked.prompt), limits.max_prompt_chars, "characters"),
            "negative_prompt": (len(asked.body.negative_prompt or ""), limits.max_prompt_chars, "characters"),
            "n": (asked.count, limits.max_images, "pictures"),
            "num_inference_steps": (asked.body.num_inference_steps or 0, limits.max_steps, "steps"),
            "timeout_s": (asked.body.timeout_s or 0, limits.max_timeout_s, "seconds"),
        }
        for name, (value, most, unit) in found.items():
            if value > most:
                raise invalid(f"{name}: {value} {unit}, of which this server allows {most}", name, "limit_exceeded")

    def _params(self, asked: Asked) -> dict[str, Any]:
        """Return the sampling parameters that a request has."""
        body = asked.body
        extra = {**asked.extra, **self._allowed(body.extra_params or {})}
        if body.true_cfg_scale is not None:
            extra["true_cfg_scale"] = body.true_cfg_scale
        for name in extra:
            if name not in self.takes:
                raise invalid(f"{name}: {self.pipeline_name} does not take it", name, "unsupported_parameter")
        given = {name: value for name, value in body.model_dump().items() if name in _PARAMS and value is not None}
        return {**given, **self._sides(asked), "num_outputs_per_prompt": asked.count, "extra_args": extra}

    def _allowed(self, extra: Mapping[str, Any]) -> Mapping[str, Any]:
        for name in extra:
            if name not in self.settings.extra_params:
                allowed = ", ".join(sorted(self.settings.extra_params)) or "none"
                raise invalid(
                    f"extra_params: {name!r} is not among those that the operator allows, which are: {allowed}",
                    "extra_params",
                    "unsupported_parameter",
                )
        return extra

    def _sides(self, asked: Asked) -> dict[str, int]:
        """Return width and height in pixels, nothing for the model's own."""
        width, height = asked.body.width, asked.body.height
        if (width is None) != (height is None):
            raise invalid("width, height: give both or neither", "width" if width is None else "height")
        if asked.size is not None and width is not None:
            raise invalid("size: give it, or width and height, not both", "size")
        if asked.size not in {None, "auto"}:
            found = _SIZE.fullmatch(str(asked.size))
            if found is None:
                raise invalid(f"size: expected WIDTHxHEIGHT or auto, got {asked.size!r}", "size", "invalid_value")
            width, height = int(found[1]), int(found[2])
        if width is None or height is None:
            return {}
        most = self.settings.limits.max_pixels
        if width * height > most:
            raise invalid(
                f"size: {width}x{height} is {width * height} pixels, of which this server allows {most}",
                "size",
                "limit_exceeded",
            )
        return {"width": width, "height": height}


def arguments_of(pipeline: Any) -> frozenset[str]:
    """Return the names of the arguments that a pipeline takes."""
    return frozenset(inspect.signature(type(pipeline).__call__).parameters)


def check_settings(omni: Omni, settings: ServerSettings) -> None:
    """Raise ``ConfigError`` for settings that the model can't honour."""
    unknown = sorted(settings.extra_params - arguments_of(omni.pipeline))
    if unknown:
        raise ConfigError(f"allow_extra_param: {type(omni.pipeline).__name__} takes no {', '.join(unknown)}")
    omni.request("a prompt", OmniDiffusionSamplingParams(**settings.default_params))


def request_id(http: HttpRequest) -> str:
    """Return the id that the answer's header X-Request-Id has."""
    return str(http.scope.get("state", {}).get("request_id", ""))


async def gone(http: HttpRequest) -> None:
    """Wait until the client closes the connection; the body must have been read."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def unless_gone(http: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
    """Return what ``work`` returns; raises ``AbortedError`` where the client closes the connection before."""
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone(http))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise AbortedError("the client closed the connection")
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
