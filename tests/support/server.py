"""A real server on a free port, in a thread, and plain HTTP to talk to it."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import openai

from lowbit import Omni
from lowbit.serving.app import create_app
from lowbit.serving.server import Address, Server, bind
from lowbit.serving.service import Service
from lowbit.serving.settings import Limits, ServerSettings

KEY = "a-key"
QUICK = {"num_inference_steps": 2, "size": "32x32"}


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)

    @property
    def error(self) -> Any:
        return self.json["error"]


@dataclass(frozen=True)
class Running:
    server: Server
    service: Service
    port: int
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread
    clients: list[openai.OpenAI] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = KEY) -> openai.OpenAI:
        """Return a client of OpenAI's, which is closed with the server."""
        self.clients.append(openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120))
        return self.clients[-1]

    def send(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        """Send a request; ``body`` is bytes, or data that is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        given = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"} | (headers or {})
        try:
            connection.request(method, path, content, given)
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, names, response.read())
        finally:
            connection.close()

    def post(self, body: Any, path: str = "/v1/images/generations", **options: Any) -> Answer:
        return self.send("POST", path, body, **options)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.server.stop)


@contextmanager
def running(omni: Omni, shutdown_timeout_s: float = 0.0, **settings: Any) -> Iterator[Running]:
    """Serve a model until the context ends."""
    limits = Limits(**settings.pop("limits", {}))
    app = create_app(
        omni, ServerSettings(**{"model_names": ("embedded",), "api_keys": (KEY,), "limits": limits} | settings)
    )
    address = Address(port=0, shutdown_timeout_s=shutdown_timeout_s)
    sock = bind(address)
    server = Server(app, app.state.service, address)
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve_until_stopped(sock)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    until(lambda: server.started)
    found = Running(server, app.state.service, sock.getsockname()[1], loops[0], thread)
    try:
        yield found
    finally:
        for client in found.clients:
            client.close()
        if thread.is_alive():
            found.stop()
        thread.join(60)
        assert not thread.is_alive()


def until(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come to hold"
        time.sleep(0.005)
