"""Sockets to listen on, for the API and for whatever has a port of its own."""

from __future__ import annotations

import socket
import sys


class CannotListenError(Exception):
    """The address cannot be had; says which, and why not."""


def bind(host: str, port: int) -> socket.socket:
    """A TCP socket bound to the address, not listening yet.

    Raises:
        CannotListenError: there is no such address here, or somebody has it.
    """
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise CannotListenError(f"cannot listen on {host}: {reason(error)}") from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        if sys.platform != "win32":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise CannotListenError(f"cannot listen on {host} port {port}: {reason(error)}") from error
    return listener


def reason(error: Exception) -> str:
    """What the system says, to go on in a sentence."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text[:1].lower() + text[1:]
