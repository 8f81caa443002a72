"""From the bytes of a request to its checked fields. Untrusted: whatever they are, an error is a 4xx."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from lowbit.errors import expected_one_of
from lowbit.serving.errors import invalid
from lowbit.serving.fields import Refusal, without_refused

M = TypeVar("M", bound=BaseModel)


async def read_json(request: Request) -> dict[str, Any]:
    """Return the JSON object in the body; raises ``ApiError`` for anything else."""
    kind = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise invalid(f"Content-Type: expected application/json, got {kind!r}")
    return parse_json(await request.body())


def parse_json(content: bytes) -> dict[str, Any]:
    """Return the JSON object in ``content``.

    Raises:
        ApiError: it is none; a name occurs twice in an object; a number is NaN, infinite or of too many digits; half a
            surrogate pair stands alone in a text.
    """
    try:
        found = json.loads(content.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_number)
        if b"\\ud" in content.lower():
            json.dumps(found, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise invalid("The body is not valid JSON: nested too deeply") from error
    except ValueError as error:  # of syntax, UTF-8, and digits
        raise invalid(f"The body is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise invalid("The body is not a JSON object")
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise invalid(f"{twice!r} is given twice", twice)
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def checked(
    model: type[M],
    data: Mapping[str, Any],
    refused: Mapping[str, Refusal],
    ignored: Collection[str] = (),
    *,
    is_text: bool = False,
    prefix: tuple[str | int, ...] = (),
) -> M:
    """Return a request's fields, checked.

    Args:
        model: what they must be.
        data: the fields.
        refused: fields that the server does not act upon.
        ignored: fields that the operator lets clients send for nothing.
        is_text: values are text that stands for numbers and truth values, as in a form.
        prefix: where in the body ``data`` is.

    Raises:
        ApiError: the first field that is wrong or unknown.
    """
    fields = without_refused(data, refused, ignored)
    try:
        return model.model_validate(fields, strict=not is_text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(each) for each in (*prefix, *first["loc"]))
        if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
            known = sorted(model.model_fields)
            raise invalid(f"Unknown field: {where!r}. {expected_one_of(known)}", where, "unknown_parameter") from error
        if first["type"] == "missing":
            raise invalid(f"{where}: is required", where, "missing_required_parameter") from error
        raise invalid(f"{where}: {first['msg']}{_got(first.get('input'))}", where, "invalid_value") from error


def _got(value: Any) -> str:
    if isinstance(value, str | int | float | bool | None):
        text = repr(value)
        return f", got {text if len(text) <= 60 else text[:57] + '...'}"
    return f", got a {type(value).__name__}"
