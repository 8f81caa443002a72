"""Running the application on a socket, and shutting down without losing a request."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from lowbit.errors import ConfigError
from lowbit.serving.service import Service

logger = logging.getLogger(__name__)

_GRACE_S = 5.0
"""Seconds that connections have to send the answers of aborted requests."""


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where the server listens.

    Attributes:
        host: a name or an address.
        port: 0 takes a free one.
        shutdown_timeout_s: seconds that requests have to finish after SIGTERM or Ctrl-C.
        keep_alive_s: seconds that an idle connection stays open.
        ssl_certfile: of TLS; ``None`` serves plain HTTP.
        ssl_keyfile: of TLS.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    shutdown_timeout_s: float = 30.0
    keep_alive_s: int = 5
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None


def bind(address: Address) -> socket.socket:
    """Take the port; raises ``ConfigError`` where that is not possible."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with ExitStack() as stack:
            sock = stack.enter_context(socket.socket(family, kind, protocol))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(target)
            stack.pop_all()  # it stays open
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--host {address.host} --port {address.port}: can't listen there: {reason}") from error
    return sock


def url_of(sock: socket.socket, address: Address) -> str:
    """Return the URL at which this machine reaches the server."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(address.host, address.host)
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    return f"{'https' if address.ssl_certfile else 'http'}://{host}:{sock.getsockname()[1]}"


class Server(uvicorn.Server):
    """Uvicorn's server, which at SIGTERM or Ctrl-C gives requests time to finish; at the second it aborts them."""

    def __init__(self, app: Any, service: Service, address: Address) -> None:
        self.service, self.address = service, address
        self.is_aborting = self.is_interrupted = False
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                server_header=False,
                timeout_keep_alive=address.keep_alive_s,
                timeout_graceful_shutdown=int(address.shutdown_timeout_s + _GRACE_S) or 1,
                ssl_certfile=address.ssl_certfile,
                ssl_keyfile=address.ssl_keyfile,
                ws="none",
            )
        )

    def stop(self) -> None:
        """Take no more requests; the first call lets those there are finish, the second aborts them, the third ends."""
        self.force_exit = self.is_aborting
        self.is_aborting = self.should_exit
        timeout = 0.0 if self.should_exit else self.address.shutdown_timeout_s
        logger.info("shutting down: requests have %.0f s", timeout)
        self.service.omni.engine.close(timeout)
        self.should_exit = True

    def interrupt(self) -> None:
        """Stop because of Ctrl-C."""
        self.is_interrupted = True
        self.stop()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to ``serve``."""
        yield

    async def serve_until_stopped(self, sock: socket.socket) -> None:
        """Serve on a bound socket until a signal or ``stop``, then end the engine's thread."""
        loop = asyncio.get_running_loop()
        for each, handler in ((signal.SIGTERM, self.stop), (signal.SIGINT, self.interrupt)):
            try:
                loop.add_signal_handler(each, handler)
            except (ValueError, RuntimeError, NotImplementedError):  # not the main thread, or Windows
                logger.debug("no handler for %s here", each.name)
        try:
            await self.serve(sockets=[sock])
        finally:
            self.service.omni.engine.close()
            await asyncio.to_thread(self.service.omni.engine.join)


def run(app: Any, address: Address, sock: socket.socket) -> bool:
    """Serve an application of ``create_app`` until SIGTERM or Ctrl-C, and return whether it was Ctrl-C."""
    server = Server(app, app.state.service, address)
    asyncio.run(server.serve_until_stopped(sock))
    return server.is_interrupted
