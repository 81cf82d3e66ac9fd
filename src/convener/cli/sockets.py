"""Addresses to listen on."""

from __future__ import annotations

import socket

from convener import listening
from convener.cli.failures import CommandFailed
from convener.listening import CannotListenError


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address; uvicorn listens on it when the application has started.

    Bound before that start: a node whose port is taken must not have joined the cluster first. Not listening
    before it: a client or health check should be refused at once rather than hang.

    Raises:
        CommandFailed: says which address, and why not.
    """
    try:
        return listening.bind(host, port)
    except CannotListenError as error:
        raise CommandFailed(str(error)) from error


def url_of(listener: socket.socket) -> str:
    """``http://address:port`` of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
