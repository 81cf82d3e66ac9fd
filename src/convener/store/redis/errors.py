"""What an error of the server means to the caller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from convener.errors import ConfigurationError, ConvenerError, StoreFull, StoreUnavailable


class StoreCommandError(StoreUnavailable):
    """The server answered with an error that is expected of no command.

    A defect, or foreign data under our keys. A script may have stopped half-way, so the outcome is unknown.
    """


class AccessRefused(StoreUnavailable):
    """The server does not accept the credentials, or they do not allow the command."""


class NotRun(StoreUnavailable):
    """The server refused before anything ran: it has not the hash slot, or not the duty.

    Attributes:
        refusal: the server's words.
    """

    def __init__(self, refusal: str, what: str = "a command") -> None:
        super().__init__(f"{what}: {_AWAY.get(refusal.partition(' ')[0], refusal)}; it did not run")
        self.refusal = refusal


@dataclass(frozen=True, slots=True)
class Redirect:
    """Where a server says that a hash slot is. `asking`: for one command, while the slot moves."""

    slot: int
    host: str
    port: int
    asking: bool


def redirect(refusal: str, host: str) -> Redirect | None:
    """What ``MOVED`` and ``ASK`` say, None for anything else.

    Args:
        host: of the server that said it, for one that does not know its own name.
    """
    words = refusal.split(" ")
    if len(words) != 3 or words[0] not in ("MOVED", "ASK"):
        return None
    there, _, port = words[2].rpartition(":")
    if not words[1].isdigit() or not port.isdigit():
        return None
    return Redirect(int(words[1]), known_host(there, host), int(port), words[0] == "ASK")


def known_host(said: str, host: str) -> str:
    """The host that a server names, or its own where it names none."""
    return host if said in ("", "?") else said


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


REPLICA_CODES: Final = frozenset({"READONLY", "LOADING", "MASTERDOWN"})
"""Whoever answers so is no primary, or not yet; nothing ran."""

CLUSTER_CODES: Final = REPLICA_CODES | {"MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN"}
"""The same in a cluster."""


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
