"""The answer to "why is this conversation where it is?", for checking and for OpenAPI."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, Field

from convener.gateway.schemas import rfc3339
from convener.manager import why as manager
from convener.manager.waits import WaitKind


class Burial(BaseModel):
    """How a node came to be buried."""

    at: datetime
    kind: Literal["reaped", "silent", "left", "superseded", ""] = Field(
        description="Its lease had ended; it was silent and its process gone; it ended properly; it was started again. "
        "Empty if a node of an earlier version has buried it."
    )
    by: str = Field(description="Name of the node that did it, empty if unknown.")
    silent: float = Field(description="Seconds since its last renewal.")


class Ownership(BaseModel):
    """One epoch of a conversation."""

    epoch: int
    seq: int = Field(description="Number of its `open` entry in the log.")
    since: datetime
    until: datetime | None = Field(description="When the next one began; null for the latest.")
    node: str
    incarnation: str
    reason: str = Field(description="As in the `open` entry: start, wake, takeover, handoff, restart, …")
    former: str = Field(description="Incarnation that owned it before, empty if unknown.")
    buried: Burial | None = Field(description="How that one was buried; null if it was not.")
    text: str = Field(description="Why this ownership began, for people.")


class Owner(BaseModel):
    """Who owns a conversation."""

    node: str
    incarnation: str
    since: datetime | None
    state: Literal["live", "draining", "silent", "buried", "unknown"]
    last_renewal: datetime | None = Field(description="Of its lease, by the store's clock.")
    lease_until: datetime | None
    text: str


class Awaited(BaseModel):
    """What has to happen before a conversation goes on."""

    kind: WaitKind
    text: str
    since: datetime | None


class WhyAnswer(BaseModel):
    """Why a conversation is where it is."""

    conversation_id: str
    user_id: str
    status: str
    epoch: int
    owner: Owner | None = Field(description="Null for nobody.")
    waits: list[Awaited] = Field(description="Never empty; what comes first is first.")
    ownerships: list[Ownership] = Field(description="Oldest first.")
    first_seq: int = Field(description="Where the part of the log begins that was looked at; 1 for all of it.")


def answer(found: manager.Why) -> dict[str, Any]:
    """`WhyAnswer` of what the manager knows."""
    owner = None if found.owner is None else asdict(found.owner)
    return {
        **asdict(found),
        "owner": owner and {**owner, **_times(owner, "since", "last_renewal", "lease_until")},
        "waits": [{**asdict(wait), "since": rfc3339(wait.since)} for wait in found.waits],
        "ownerships": [_ownership(ownership) for ownership in found.ownerships],
    }


def _ownership(ownership: manager.Ownership) -> dict[str, Any]:
    told, buried = asdict(ownership), ownership.buried
    if buried is not None:
        told["buried"] = {**told["buried"], "at": rfc3339(buried.at), "silent": buried.silent / 1000}
    return {**told, **_times(told, "since", "until")}


def _times(told: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: rfc3339(told[name]) for name in names}
