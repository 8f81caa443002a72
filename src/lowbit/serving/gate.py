"""What every request passes: its id, its key, its body's size, its line in the log."""

from __future__ import annotations

import hmac
import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lowbit.serving.errors import ApiError, as_api_error
from lowbit.serving.metrics import Metrics
from lowbit.serving.settings import ServerSettings

logger = logging.getLogger("lowbit.serving.access")

OPEN_PATHS = ("/health", "/ready")
"""Need no key."""
FILES = "/files/"
"""Begins the paths of pictures: their names are keys."""


@dataclass
class _Answer:
    """What is known of an answer so far."""

    request_id: str
    status: int = 0
    began: float = field(default_factory=time.perf_counter)


class Gate:
    """Pure ASGI, so that streams and disconnects pass through."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self.max_body = int(settings.limits.max_body_mb * 1e6)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = _Answer(f"req_{secrets.token_hex(12)}")
        scope.setdefault("state", {})["request_id"] = answer.request_id

        async def sender(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", answer.request_id.encode())]
            await send(message)

        refusal = self._refusal(scope)
        try:
            if refusal is not None:
                self.metrics.errors.labels(refusal.code or "").inc()
                await refusal.response()(scope, receive, sender)
            else:
                await self.app(scope, _limited(receive, self.max_body), sender)
        except Exception as error:
            if answer.status:  # too late for another answer
                raise
            await as_api_error(error, answer.request_id).response()(scope, receive, sender)
        finally:
            self._note(scope, answer)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        path = scope["path"]
        is_open = path in OPEN_PATHS or path.startswith(FILES)
        if self.settings.api_keys and not is_open and not _has_key(headers, self.settings.api_keys):
            given = "is wrong" if b"authorization" in headers else "is missing"
            return ApiError(
                401,
                f"The API key {given}: expected the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and len(length) < 20 and int(length) <= self.max_body:
            return None
        return _too_large(self.max_body)

    def _note(self, scope: Scope, answer: _Answer) -> None:
        route: Any = scope.get("route")
        path = getattr(route, "path", None) or ("other" if answer.status != 401 else "any")
        self.metrics.requests.labels(path, str(answer.status or 499)).inc()
        logger.info(
            "%s %s %s %d %.3f s",
            answer.request_id,
            scope["method"],
            path if path != "other" else ascii(scope["path"][:100]),
            answer.status or 499,
            time.perf_counter() - answer.began,
        )


def _has_key(headers: dict[bytes, bytes], keys: Sequence[str]) -> bool:
    """Whether the request brings one of the keys; takes the same time whichever it is."""
    scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
    found = [hmac.compare_digest(given.strip(), key.encode()) for key in keys]
    return scheme.lower() == b"bearer" and any(found)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The body is larger than {limit} bytes, which is the limit", code="body_too_large")


def _limited(receive: Receive, limit: int) -> Receive:
    """Return ``receive`` that raises where a body without a length goes past the limit."""
    taken = 0

    async def limited() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > limit:
            raise _too_large(limit)
        return message

    return limited
