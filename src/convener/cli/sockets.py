"""Addresses to listen on."""

from __future__ import annotations

import socket
import sys

from convener.cli.failures import CommandFailed


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address; uvicorn listens on it when the application has started.

    Bound before that start: a node whose port is taken must not have joined the cluster first. Not listening
    before it: a client or health check should be refused at once rather than hang.

    Raises:
        CommandFailed: says which address, and why not.
    """
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise CommandFailed(f"cannot listen on {host}: {reason(error)}") from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        if sys.platform != "win32":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise CommandFailed(f"cannot listen on {host} port {port}: {reason(error)}") from error
    return listener


def url_of(listener: socket.socket) -> str:
    """``http://address:port`` of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def reason(error: Exception) -> str:
    """What the system says, to go on in a sentence."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text[:1].lower() + text[1:]
