"""Errors in the shape and with the status codes of OpenAI's API."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response

from lowbit.engine.async_engine import ClosedError, QueueFullError
from lowbit.errors import AbortedError, ConfigError, DeadlineError, is_input_check, is_out_of_memory

logger = logging.getLogger(__name__)

# Word in lowbit's messages -> field of the API.
FIELDS: Mapping[str, str] = {
    **{
        name: name
        for name in [
            "prompt",
            "negative_prompt",
            "num_inference_steps",
            "guidance_scale",
            "true_cfg_scale",
            "seed",
            "strength",
            "image",
            "mask",
        ]
    },
    **dict.fromkeys(("size", "sizes", "height", "width"), "size"),
    "num_outputs_per_prompt": "n",
    "extra_args": "extra_params",
    "mask_image": "mask",
}
_CLOSED = 499
"""The client closed the connection: nginx's code, which no client sees."""


@dataclass(eq=False)
class ApiError(Exception):
    """An answer other than a result.

    Attributes:
        status: of HTTP.
        message: one line.
        param: the field at fault, ``None`` for none.
        code: for programs, ``None`` for none.
        kind: OpenAI's ``type``.
        headers: of the response.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    kind: str = "invalid_request_error"
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """Return the JSON body."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """Return the response. Non-ASCII text is escaped: a request may hold what UTF-8 cannot encode."""
        return Response(json.dumps(self.body()), self.status, dict(self.headers), "application/json")


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return a 400."""
    return ApiError(400, message, param, code)


def unavailable(message: str, code: str, retry_after_s: int = 1) -> ApiError:
    """Return a 503."""
    return ApiError(503, message, None, code, "server_error", {"Retry-After": str(retry_after_s)})


def _full(error: QueueFullError) -> ApiError:
    retry = {"Retry-After": str(error.retry_after_s)}
    return ApiError(429, f"The queue is full: {error}", None, "queue_full", "rate_limit_error", retry)


def _wrong(error: BaseException) -> ApiError:
    return invalid(" ".join(str(error).split()), param_of(str(error)))


# Error -> its answer; the first kind that fits.
_ANSWERS: Sequence[tuple[type[BaseException], Callable[[Any], ApiError]]] = (
    (ApiError, lambda error: error),
    (QueueFullError, _full),
    (DeadlineError, lambda error: ApiError(504, str(error), "timeout_s", "timeout", "timeout_error")),
    (ClosedError, lambda error: unavailable(f"The server is shutting down: {error}", "shutting_down")),
    (AbortedError, lambda error: ApiError(_CLOSED, str(error), None, "aborted")),
    (ConfigError, _wrong),
)


def as_api_error(error: BaseException, request_id: str = "") -> ApiError:
    """Return the answer to a request that an error ended; logs an error that is not the client's."""
    for kind, answer in _ANSWERS:
        if isinstance(error, kind):
            return answer(error)
    if is_input_check(error):
        return _wrong(error)
    logger.error("%s failed", request_id or "a request", exc_info=error)
    if is_out_of_memory(error):
        return unavailable("Out of memory: ask for a smaller size or fewer pictures", "out_of_memory")
    where = f" The server's log shows it under {request_id}" if request_id else ""
    return ApiError(500, f"The server failed on this request.{where}", None, "internal_error", "server_error")


def param_of(message: str) -> str | None:
    """Return the field that a message of lowbit's names, ``None`` if it names none."""
    words = re.findall(r"[a-z_]+", message)
    return next((FIELDS[word] for word in words if word in FIELDS), None)
