"""What an error of the server means to the caller."""

from __future__ import annotations

from typing import Final

from convener.errors import ConfigurationError, ConvenerError, StoreFull, StoreUnavailable


class StoreCommandError(StoreUnavailable):
    """The server answered with an error that is expected of no command.

    A defect, or foreign data under our keys. A script may have stopped half-way, so the outcome is unknown.
    """


class AccessRefused(StoreUnavailable):
    """The server does not accept the credentials, or they do not allow the command."""


AUTH_CODES: Final = ("WRONGPASS", "NOAUTH", "NOPERM")
_AWAY: Final = {
    "READONLY": "the server is a replica",
    "LOADING": "the server is loading its data",
    "MASTERDOWN": "the server is a replica without its primary",
    "CLUSTERDOWN": "the cluster is down",
    "TRYAGAIN": "a hash slot is being moved",
    "NOREPLICAS": "too few replicas are connected",
    "MISCONF": "the server cannot save to disk",
    "BUSY": "the server is running a long script",
    "UNKILLABLE": "the server is running a long script",
    "MOVED": "the hash slot is elsewhere",
    "ASK": "the hash slot is being moved",
}


def from_reply(text: str, what: str) -> ConvenerError:
    """The error to raise for the server's error reply `text` to the command or script `what`."""
    code = text.partition(" ")[0]
    if code == "OOM":
        return StoreFull(f"{what}: the store is full")
    if code in _AWAY:
        return StoreUnavailable(f"{what}: {_AWAY[code]}")
    if code in AUTH_CODES or "ACL failure" in text:
        return AccessRefused(f"{what}: the store refuses it: {text}")
    return StoreCommandError(f"{what}: {text}")


def as_configuration(text: str, where: str) -> ConfigurationError:
    """The same refusal at start, where only the operator can help."""
    return ConfigurationError(f"redis_url: {where}: {text}")
