"""POST /v1/images/generations and /v1/images/edits."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lowbit.engine.async_engine import Failed, Preview, Ticket
from lowbit.outputs import OmniRequestOutput
from lowbit.serving import events, pictures
from lowbit.serving.body import checked, read_json
from lowbit.serving.errors import ApiError, as_api_error, invalid
from lowbit.serving.fields import IMAGES
from lowbit.serving.form import read_form
from lowbit.serving.schemas import EditRequest, ImageData, ImageRequest, ImagesAnswer
from lowbit.serving.service import Asked, Service, request_id

_IMAGE_NAMES = ("image", "image[]")
_FILE_NAMES = (*_IMAGE_NAMES, "mask")


async def generations(service: Service, http: Request) -> Response:
    """Answer POST /v1/images/generations."""
    data = await read_json(http)
    body = checked(ImageRequest, data, IMAGES, service.settings.ignored_fields)
    return await _answer(service, http, body, {}, "image_generation")


async def edits(service: Service, http: Request) -> Response:
    """Answer POST /v1/images/edits."""
    service.refuse_edits("image")
    fields, files = await read_form(http, _FILE_NAMES)
    body = checked(EditRequest, fields, IMAGES, service.settings.ignored_fields, is_text=True)
    images = [part.content for part in files if part.name in _IMAGE_NAMES]
    masks = [part.content for part in files if part.name == "mask"]
    if not images:
        raise invalid("image: is required", "image", "missing_required_parameter")
    if len(masks) > 1:
        raise invalid("mask: expected one", "mask", "limit_exceeded")
    service.check_pictures(len(images), "image")
    extra = await asyncio.to_thread(_decoded, service, images, masks)
    if body.strength is not None:
        extra["strength"] = body.strength
    return await _answer(service, http, body, extra, "image_edit")


def _decoded(service: Service, images: Sequence[bytes], masks: Sequence[bytes]) -> dict[str, Any]:
    """Return the pipeline's arguments for the pictures that a request brings."""
    limits = service.settings.limits
    found = [pictures.decode(content, "image", limits) for content in images]
    extra: dict[str, Any] = {"image": found[0] if len(found) == 1 else found}
    if masks:
        if "mask_image" not in service.takes:
            raise invalid(f"mask: {service.pipeline_name} takes none", "mask", "unsupported_parameter")
        extra["mask_image"] = mask_of(pictures.decode(masks[0], "mask", limits))
    return extra


def mask_of(picture: Any) -> Any:
    """Return a mask as diffusers takes it, white where to paint, of one as OpenAI does, transparent there."""
    if picture.mode != "RGBA":
        return picture.convert("L")
    return picture.getchannel("A").point(lambda alpha: 255 - alpha)


async def _answer(service: Service, http: Request, body: ImageRequest, extra: dict[str, Any], kind: str) -> Response:
    service.check_model(body.model)
    _check_output(body)
    asked = Asked(prompt=body.prompt, count=body.n or 1, size=body.size, body=body, extra=extra)
    asked = await asyncio.to_thread(service.fitted, asked)
    if body.stream:
        ticket = service.submit(asked, http, body.partial_images or 0)
        return events.EventStream(_events(service, http, body, ticket, kind), ticket)
    output = await service.output(asked, http)
    files = await asyncio.to_thread(_files, body, output.images)
    if body.response_format == "file":
        return _file(body, files)
    answer = _images_answer(service, http, body, output, files)
    return JSONResponse(answer.model_dump(exclude_none=True))


def _check_output(body: ImageRequest) -> None:
    if body.output_compression is not None and (body.output_format or "png") == "png":
        raise invalid("output_compression: png is lossless; set output_format to jpeg or webp", "output_compression")
    if body.partial_images is not None and not body.stream:
        raise invalid("partial_images: needs stream", "partial_images")
    if body.stream and body.response_format not in {None, "b64_json"}:
        raise invalid("response_format: a stream holds b64_json", "response_format")


def _files(body: ImageRequest, images: Sequence[Any]) -> list[bytes]:
    return [pictures.encode(image, body.output_format or "png", body.output_compression) for image in images]


def _file(body: ImageRequest, files: Sequence[bytes]) -> Response:
    """Return the picture itself, of several a zip."""
    output_format = body.output_format or "png"
    if len(files) == 1:
        content, media_type, name = files[0], pictures.MEDIA_TYPES[output_format], f"image.{output_format}"
    else:
        content, media_type, name = pictures.zipped(files, output_format), "application/zip", "images.zip"
    return Response(content, headers={"Content-Disposition": f'attachment; filename="{name}"'}, media_type=media_type)


def _images_answer(
    service: Service, http: Request, body: ImageRequest, output: OmniRequestOutput, files: Sequence[bytes]
) -> ImagesAnswer:
    data = [_image_data(service, http, body, *each) for each in zip(files, output.seeds, strict=True)]
    return ImagesAnswer(
        created=int(time.time()),
        data=data,
        output_format=body.output_format or "png",
        size=size_of(output.images[0]),
        usage=service.usage(output.prompt, output.images),
        safety_identifier=body.safety_identifier or body.user or None,
        metrics=output.metrics if body.return_stage_metrics else None,
    )


def _image_data(service: Service, http: Request, body: ImageRequest, content: bytes, seed: int) -> ImageData:
    if body.response_format != "url":
        return ImageData(b64_json=base64.b64encode(content).decode(), seed=seed)
    name = service.store.put(content, body.output_format or "png")
    base = service.settings.public_url or str(http.base_url)
    return ImageData(url=f"{base.rstrip('/')}/files/{name}", seed=seed)


def size_of(image: Any) -> str:
    """Return a picture's size as WIDTHxHEIGHT."""
    return f"{image.width}x{image.height}"


async def _events(
    service: Service, http: Request, body: ImageRequest, ticket: Ticket, kind: str
) -> AsyncIterator[bytes]:
    """Yield a stream's events: previews, then a completed picture each, or an error."""
    try:
        async for found in events.with_heartbeats(ticket):
            if found is None:
                yield b": waiting\n\n"
            elif isinstance(found, Preview):
                for event in await _picture_events(body, found.images, f"{kind}.partial_image"):
                    yield events.event({**event, "partial_image_index": found.index}, event["type"])
            elif isinstance(found, Failed):
                raise found.error
            else:
                output = found.output
                usage = service.usage(output.prompt, output.images)
                for event, seed in zip(
                    await _picture_events(body, output.images, f"{kind}.completed"), output.seeds, strict=True
                ):
                    spent = {} if usage is None else {"usage": usage.model_dump()}
                    yield events.event({**event, "seed": seed, **spent}, event["type"])
    except Exception as error:
        refusal = as_api_error(error, request_id(http))
        service.metrics.errors.labels(refusal.code or "").inc()
        yield events.event({"type": "error", **refusal.body()}, "error")


async def _picture_events(body: ImageRequest, images: Sequence[Any], kind: str) -> list[dict[str, Any]]:
    files = await asyncio.to_thread(_files, body, images)
    return [
        {
            "type": kind,
            "b64_json": base64.b64encode(content).decode(),
            "created_at": int(time.time()),
            "size": size_of(image),
            "quality": "auto",
            "background": "opaque",
            "output_format": body.output_format or "png",
            "image_index": index,
        }
        for index, (content, image) in enumerate(zip(files, images, strict=True))
    ]


def stored(service: Service, name: str) -> Response:
    """Answer GET /files/{name}."""
    found = service.store.get(name)
    if found is None:
        raise ApiError(404, "There is no such file, or its time is over", None, "not_found")
    headers = {"Cache-Control": "private, no-store", "X-Content-Type-Options": "nosniff"}
    return Response(found.content, headers=headers, media_type=found.media_type)
