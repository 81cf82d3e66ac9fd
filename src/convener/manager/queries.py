"""Questions to the directory and to a head, answered in the words of the managers. From memory, all of them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import msgspec

from convener.core.conversation import is_settled
from convener.core.directory import Directory, LoopStatus, Record
from convener.core.model import Meta
from convener.ids import check_id, node_of
from convener.manager.base import AgentLoopInfo
from convener.manager.context import NodeContext


def checked_user(user: str | None) -> str | None:
    """A user's id if it is well formed; "" is nobody's, None anybody's. Raises `InvalidRequest`."""
    return check_id(user, "user_id") if user else user


def listed(directory: Directory, user: str | None, ids: Collection[str] | None) -> list[tuple[str, Record]]:
    """Loaded conversations with their nodes. An empty filter means nothing, None means everything."""
    wanted = None if ids is None else set(ids)
    return [
        (node, record)
        for node, record in directory.listed()
        if (user is None or record.user == user) and (wanted is None or record.conversation_id in wanted)
    ]


def connections(directory: Directory, user: str | None, ids: Collection[str] | None) -> dict[str, str]:
    """Connection → conversation of the cluster's clients, by conversation and its user."""
    wanted = None if ids is None else set(ids)
    out: dict[str, str] = {}
    for _, connection, cid in directory.connections():
        if wanted is not None and cid not in wanted:
            continue
        found = directory.find(cid)
        if user is None or (found is not None and found[1].user == user):
            out[connection] = cid
    return out


def info_of_record(directory: Directory, node: str, record: Record) -> AgentLoopInfo:
    """A loaded conversation as the directory knows it."""
    return AgentLoopInfo(
        conversation_id=record.conversation_id,
        user_id=record.user,
        status=record.status,
        busy=record.status == "running",
        node=node_of(node),
        epoch=record.epoch,
        connections=directory.connection_count(record.conversation_id),
    )


def info_of_head(node: NodeContext, cid: str, meta: Meta) -> AgentLoopInfo:
    """A conversation as its head has it."""
    return AgentLoopInfo(
        conversation_id=cid,
        user_id=meta.user,
        status=status_of_head(node, meta),
        busy=bool(meta.owner) and meta.position > meta.done and not meta.asks,
        node=node_of(meta.owner),
        epoch=meta.epoch,
        last_seq=meta.seq,
        connections=node.directory.connection_count(cid),
        metadata=msgspec.json.decode(meta.metadata, type=dict[str, Any]),
        created_at=meta.created,
        updated_at=meta.updated,
    )


def status_of_head(node: NodeContext, meta: Meta) -> LoopStatus:
    """The head says more than the directory, which is a moment behind."""
    if meta.status in ("stopped", "failed"):
        return "stopped" if meta.status == "stopped" else "failed"
    if meta.status == "held":
        return "waiting"
    if not meta.owner:
        if meta.epoch == 0 or not is_settled(meta):
            return "starting"
        return "waiting" if meta.asks else "hibernated"
    if meta.owner in node.buried:
        return "recovering"
    return "waiting" if meta.asks else "running" if meta.position > meta.done else "idle"
