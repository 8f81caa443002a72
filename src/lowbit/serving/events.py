"""Server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from lowbit.engine.async_engine import Event, Ticket

HEARTBEAT_S = 15.0
"""Seconds after which an idle stream sends a comment, so that proxies do not close it."""
DONE = b"data: [DONE]\n\n"


def event(data: Mapping[str, Any], name: str | None = None) -> bytes:
    """Return one event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data)}\n\n".encode()


async def with_heartbeats(ticket: Ticket) -> AsyncIterator[Event | None]:
    """Yield a request's events, and ``None`` whenever nothing has come for ``HEARTBEAT_S`` seconds."""
    iterator = aiter(ticket)
    pending: asyncio.Task[Event] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(_next(iterator))
            done, _ = await asyncio.wait({pending}, timeout=HEARTBEAT_S)
            if not done:
                yield None
                continue
            found, pending = pending, None
            try:
                yield found.result()
            except StopAsyncIteration:
                return
    finally:
        if pending is not None:
            pending.cancel()


async def _next(iterator: AsyncIterator[Event]) -> Event:
    return await anext(iterator)


class EventStream(StreamingResponse):
    """Sends events as they come, through proxies too, and ends the request with the connection.

    Where the client is gone before the first event, ``content`` never begins: its clean-up does not run, this one does.
    """

    def __init__(self, content: AsyncIterator[bytes], ticket: Ticket) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(content, media_type="text/event-stream", headers=headers)
        self.ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.ticket.cancel()
