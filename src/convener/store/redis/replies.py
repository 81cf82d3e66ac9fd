"""What the scripts answer, as the core's data. The order of META_FIELDS is that of FIELDS in
``lua/lib/head.lua``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Final, cast

from convener.core.admission import Waiting
from convener.core.directory import Record
from convener.core.membership import Burial, Member, Membership, RenewReply
from convener.core.model import InboxEntry, LogEntry, Meta, SendReply
from convener.core.wire import json_text

META_FIELDS: Final = (
    "owner", "epoch", "seq", "batch", "cursor", "position", "done", "base", "status", "nonce", "updated",
    "strikes", "struck", "strike_at", "user", "generation", "created", "metadata", "halted", "asks",
    "archived", "archived_epoch", "manifest",
)  # fmt: skip


def meta(values: Sequence[bytes | None] | None) -> Meta | None:
    """The head, out of the values of `META_FIELDS`; None if there is none. Generation is always there."""
    if values is None or values[15] is None:
        return None
    field = dict(zip(META_FIELDS, (value or b"" for value in values), strict=True))
    return Meta(
        user=field["user"].decode(),
        generation=field["generation"].decode(),
        created=int(field["created"] or 0),
        updated=int(field["updated"] or 0),
        metadata=field["metadata"].decode(),
        owner=field["owner"].decode(),
        epoch=int(field["epoch"] or 0),
        seq=int(field["seq"] or 0),
        batch=field["batch"].decode(),
        cursor=int(field["cursor"] or 0),
        position=int(field["position"] or 0),
        done=int(field["done"] or 0),
        base=int(field["base"] or 0),
        nonce=field["nonce"].decode(),
        status=cast("Any", field["status"].decode()),
        strikes=int(field["strikes"] or 0),
        struck=int(field["struck"] or 0),
        strike_at=int(field["strike_at"] or 0),
        halted=int(field["halted"] or 0),
        asks=int(field["asks"] or 0),
        archived=int(field["archived"] or 0),
        archived_epoch=int(field["archived_epoch"] or 0),
        manifest=field["manifest"].decode(),
    )


def known_meta(values: Sequence[bytes | None]) -> Meta:
    """As `meta`, where the script has made sure that there is one."""
    head = meta(values)
    assert head is not None
    return head


def inbox(entries: Sequence[Any] | None) -> tuple[InboxEntry, ...]:
    """Entries of an inbox stream, out of XRANGE."""
    return tuple(_inbox_entry(identity, values) for identity, values in entries or ())


def _inbox_entry(identity: bytes, values: Sequence[bytes]) -> InboxEntry:
    fields = dict(zip(values[::2], values[1::2], strict=True))
    return InboxEntry(
        position=int(identity.partition(b"-")[0]),
        message_id=fields[b"id"].decode(),
        kind=cast("Any", fields[b"kind"].decode()),
        user=fields[b"user"].decode(),
        ts=int(fields[b"ts"]),
        data=fields[b"data"].decode(),
    )


def log(entries: Iterable[Any]) -> tuple[LogEntry, ...]:
    """Entries of a log stream, out of XRANGE."""
    out: list[LogEntry] = []
    for identity, values in entries:
        epoch, _, seq = identity.partition(b"-")
        out.append(LogEntry(int(epoch), int(seq), values[1].decode()))
    return tuple(out)


def send(reply: Sequence[Any]) -> SendReply:
    """{outcome} or {outcome, position, owner, epoch}: what SEND, ANSWER and FIRE answer."""
    outcome = reply[0].decode()
    if len(reply) == 1:
        return SendReply(outcome)
    return SendReply(outcome, int(reply[1]), reply[2].decode(), int(reply[3]))


def renew_reply(reply: Any) -> RenewReply:
    """{outcome, version}."""
    return RenewReply(reply[0].decode(), int(reply[1]))


def waiting(member: bytes, score: bytes) -> Waiting:
    """An entry of a user's queue. The fraction of the score only orders."""
    cid, incarnation, reason = member.decode().split("|", 2)
    return Waiting(cid, incarnation, reason, int(float(score)))


def membership(reply: Sequence[Any]) -> Membership:
    """The reply of MEMBERS."""
    lease, info, dead, version, pulse, grace, why = reply
    rows = dict(zip(info[::2], info[1::2], strict=True))
    members: dict[str, Member] = {}
    for name, deadline in zip(lease[::2], lease[1::2], strict=True):
        ttl, renew, text = rows.get(name, b"0|0|{}").decode().split("|", 2)
        members[name.decode()] = Member(int(float(deadline)), int(ttl), int(renew), text)
    buried = {n.decode(): int(float(at)) for n, at in zip(dead[::2], dead[1::2], strict=True)}
    burials: dict[str, Burial] = {}
    for name, row in zip(why[::2], why[1::2], strict=True):
        kind, by, silent = row.decode().split("|")
        burials[name.decode()] = Burial(kind, by, int(silent))
    return Membership(members, buried, int(version), int(pulse), int(grace), burials)


def record_text(record: Record) -> str:
    """A record as it is stored; the conversation's id is the field's name."""
    return json_text(
        {
            "user": record.user,
            "status": record.status,
            "epoch": record.epoch,
            "nonce": record.nonce,
            "since": record.since,
            "version": record.version,
        }
    )


def record(cid: str, text: bytes) -> Record:
    """Inverse of `record_text`."""
    value: dict[str, Any] = json.loads(text)
    return Record(
        conversation_id=cid,
        user=value["user"],
        status=value["status"],
        epoch=value["epoch"],
        nonce=value["nonce"],
        since=value["since"],
        version=value["version"],
    )
