"""POST /v1/chat/completions: a picture in the message."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lowbit.engine.async_engine import Failed, Preview, Ticket
from lowbit.outputs import OmniRequestOutput
from lowbit.serving import events, pictures
from lowbit.serving.body import checked, read_json
from lowbit.serving.errors import as_api_error, invalid
from lowbit.serving.fields import CHAT
from lowbit.serving.schemas import ChatRequest, TextPart, Usage, UserMessage
from lowbit.serving.service import Asked, Service, request_id


async def completions(service: Service, http: Request) -> Response:
    """Answer POST /v1/chat/completions."""
    body = checked(ChatRequest, _flat(await read_json(http)), CHAT, service.settings.ignored_fields)
    service.check_model(body.model)
    _check(body)
    message = _prompt_message(body)
    prompt, urls = _parts(message)
    extra: dict[str, Any] = {}
    if urls:
        where = f"messages.{len(body.messages) - 1}.content"
        service.refuse_edits(where)
        service.check_pictures(len(urls), where)
        extra["image"] = await asyncio.to_thread(_decoded, service, urls)
    if body.strength is not None:
        extra["strength"] = body.strength
    asked = Asked(prompt=prompt, count=body.num_outputs_per_prompt or 1, size=body.size, body=body, extra=extra)
    asked = await asyncio.to_thread(service.fitted, asked)
    head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": service.model}
    if body.stream:
        ticket = service.submit(asked, http)
        return events.EventStream(_chunks(service, http, body, ticket, head), ticket)
    output = await service.output(asked, http)
    return JSONResponse(await _completion(service, body, output, head))


def _decoded(service: Service, urls: Sequence[str]) -> Any:
    images = [pictures.decode_data_url(url, "image_url", service.settings.limits) for url in urls]
    return images[0] if len(images) == 1 else images


def _flat(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request with the fields of ``extra_body`` beside the others, as OpenAI's clients send them."""
    extra = data.get("extra_body")
    if extra is None:
        return {name: value for name, value in data.items() if name != "extra_body"}
    if not isinstance(extra, dict):
        raise invalid("extra_body: expected an object", "extra_body", "invalid_value")
    twice = next((name for name in extra if name in data), None)
    if twice is not None:
        raise invalid(f"{twice}: is given in extra_body and beside it", twice)
    return {**{name: value for name, value in data.items() if name != "extra_body"}, **extra}


def _check(body: ChatRequest) -> None:
    if body.modalities is not None and "image" not in body.modalities:
        raise invalid("modalities: the model makes pictures: expected image among them", "modalities")
    if body.output_compression is not None and (body.output_format or "png") == "png":
        raise invalid("output_compression: png is lossless; set output_format to jpeg or webp", "output_compression")
    unknown = [name for name in body.stream_options or {} if name != "include_usage"]
    if unknown or (body.stream_options and not body.stream):
        raise invalid("stream_options: takes include_usage, and needs stream", "stream_options")


def _prompt_message(body: ChatRequest) -> UserMessage:
    """Return the last message, which must be the user's."""
    index = len(body.messages) - 1
    if body.messages[index].get("role") != "user":
        raise invalid(f"messages.{index}.role: the last message must be the user's", f"messages.{index}.role")
    message = dict(body.messages[index])
    if isinstance(message.get("content"), str):
        message["content"] = [{"type": "text", "text": message["content"]}]
    return checked(UserMessage, message, {}, prefix=("messages", index))


def _parts(message: UserMessage) -> tuple[str, list[str]]:
    """Return a message's text and the URLs of its pictures."""
    texts = [part.text for part in message.content if isinstance(part, TextPart)]
    return "\n".join(texts), [part.image_url.url for part in message.content if not isinstance(part, TextPart)]


def _warnings(body: ChatRequest) -> list[str]:
    """Return what was not read: a diffusion model keeps no conversation."""
    count = len(body.messages) - 1
    if not count:
        return []
    return [f"messages before the last ({count}) were not read: a diffusion model draws the last message alone"]


async def _content(body: ChatRequest, images: Sequence[Any]) -> list[dict[str, Any]]:
    """Return a message's content: a part for each picture."""
    output_format = body.output_format or "png"

    def encoded() -> list[str]:
        files = (pictures.encode(image, output_format, body.output_compression) for image in images)
        return [pictures.data_url(content, output_format) for content in files]

    urls = await asyncio.to_thread(encoded)
    return [{"type": "image_url", "image_url": {"url": url}} for url in urls]


def _counts(usage: Usage | None) -> dict[str, int] | None:
    if usage is None:
        return None
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.total_tokens,
    }


async def _completion(
    service: Service, body: ChatRequest, output: OmniRequestOutput, head: Mapping[str, Any]
) -> dict[str, Any]:
    message = {"role": "assistant", "content": await _content(body, output.images)}
    answer = {
        **head,
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
        "usage": _counts(service.usage(output.prompt, output.images)),
        "seeds": list(output.seeds),
    }
    if body.return_stage_metrics:
        answer["metrics"] = output.metrics
    if _warnings(body):
        answer["warnings"] = _warnings(body)
    return answer


async def _chunks(
    service: Service, http: Request, body: ChatRequest, ticket: Ticket, head: Mapping[str, Any]
) -> AsyncIterator[bytes]:
    """Yield a stream's chunks: the role, the pictures, the end, or an error."""
    try:
        yield _chunk(head, {"role": "assistant", "content": ""})
        async for found in events.with_heartbeats(ticket):
            if found is None:
                yield b": waiting\n\n"
            elif isinstance(found, Failed):
                raise found.error
            elif not isinstance(found, Preview):
                output = found.output
                yield _chunk(head, {"content": await _content(body, output.images)}, warnings=_warnings(body))
                yield _chunk(head, {}, "stop")
                if (body.stream_options or {}).get("include_usage"):
                    usage = _counts(service.usage(output.prompt, output.images))
                    yield events.event({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage})
        yield events.DONE
    except Exception as error:
        refusal = as_api_error(error, request_id(http))
        service.metrics.errors.labels(refusal.code or "").inc()
        yield events.event(refusal.body())


def _chunk(
    head: Mapping[str, Any], delta: Mapping[str, Any], reason: str | None = None, warnings: Sequence[str] = ()
) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    more = {"warnings": list(warnings)} if warnings else {}
    return events.event({**head, "object": "chat.completion.chunk", "choices": [choice], **more})
