"""Health and metrics on a port of their own, out of reach of those who talk to conversations."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, Generator

import structlog
import uvicorn
from starlette.types import ASGIApp

from convener.errors import ConfigurationError
from convener.listening import CannotListenError, bind, reason

log = structlog.get_logger(__name__)

_END: float = 5.0
"""Seconds that requests under way get when the node ends."""


class _Server(uvicorn.Server):
    """uvicorn inside an application that somebody else serves: signals are theirs."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


def _listen(host: str, port: int) -> socket.socket:
    try:
        listener = bind(host, port)
    except CannotListenError as error:
        raise ConfigurationError(f"ops_port: {error}") from error
    try:
        # Two nodes may bind one port at the same moment; only one of them then gets to listen.
        listener.listen()
    except OSError as error:
        listener.close()
        raise ConfigurationError(f"ops_port: cannot listen on {host} port {port}: {reason(error)}") from error
    return listener


@contextlib.asynccontextmanager
async def ops_port(app: ASGIApp, host: str, port: int | None) -> AsyncGenerator[None]:
    """Serve `app` on a port, in this event loop, until the context is left; without a port do nothing.

    In this loop on purpose: /livez is there to say that the loop turns.

    Raises:
        ConfigurationError: the port cannot be listened on; two workers of one command cannot share one.
    """
    if port is None:
        yield
        return
    listener = _listen(host, port)
    config = uvicorn.Config(
        app, lifespan="off", ws="none", log_config=None, access_log=False, server_header=False, timeout_keep_alive=5
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]), name="ops-port")
    log.info("health and metrics are served", host=host, port=port)
    try:
        yield
    finally:
        server.should_exit = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END):
                await asyncio.shield(serving)
        if not serving.done():
            server.force_exit = True
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
        listener.close()
