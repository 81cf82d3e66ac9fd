"""`ConversationStore` in Lua: each method is the stub of one script, in and out."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Final

from convener.core.cursor import Cursor
from convener.core.model import (
    AppendReply,
    AppendRequest,
    ClaimReply,
    ClaimRequest,
    Created,
    DisownOutcome,
    EraseOutcome,
    InboxEntry,
    InterruptReply,
    LogEntry,
    Meta,
    NewMessage,
    Page,
    ReleaseOutcome,
    ResolveReply,
    ResumeOutcome,
    SendReply,
    StopReply,
    UnsendOutcome,
)
from convener.core.repair import RepairOutcome, RepairRequest
from convener.core.wire import json_text, turn_position
from convener.store.redis import replies
from convener.store.redis.part import CHUNK, Part
from convener.store.redis.scripts import SCRIPTS

_APPEND: Final = SCRIPTS["append"]
_APPEND_FINAL: Final = SCRIPTS["append_final"]
_SEND: Final = SCRIPTS["send"]
_READ: Final = SCRIPTS["read"]


def _ends_turn(request: AppendRequest) -> bool:
    """The batch that ends a turn is taken by a full store too: what was begun must be able to end."""
    return request.closing != "" or request.ends_turn or request.finishing


class RedisConversations(Part):
    """One conversation: head, log, inbox, state."""

    async def create(self, cid: str, user: str, metadata: str, generation: str) -> Created:
        """CREATE."""
        reply = await self.topology.call(SCRIPTS["create"], (self.keys.meta(cid),), user, metadata, generation)
        return Created(replies.known_meta(reply[1]), created=reply[0] == 1)

    async def send(self, cid: str, message: NewMessage, *, max_pending: int, reject_busy: bool = False) -> SendReply:
        """SEND."""
        keys = self.keys
        reply = await self.topology.call(
            _SEND,
            (keys.meta(cid), keys.inbox(cid), keys.seen(cid)),
            keys.channel(cid),
            message.message_id,
            message.user,
            message.data,
            max_pending,
            "1" if reject_busy else "",
            message.kind,
        )
        return replies.send(reply)

    async def unsend(self, cid: str, message_id: str, position: int) -> UnsendOutcome:
        """UNSEND."""
        keys = self.keys
        reply = await self.topology.call(
            SCRIPTS["unsend"], (keys.meta(cid), keys.inbox(cid), keys.seen(cid)), message_id, position
        )
        return reply.decode()

    async def claim(self, cid: str, request: ClaimRequest) -> ClaimReply:
        """CLAIM."""
        keys = self.keys
        reply = await self.topology.call(
            SCRIPTS["claim"],
            (keys.meta(cid), keys.log(cid), keys.inbox(cid), keys.seen(cid), keys.asks(cid)),
            keys.channel(cid),
            request.me,
            request.nonce,
            request.owner,
            request.epoch,
            request.reason,
            request.floor,
            request.user,
            request.generation,
            "1" if request.acted else "",
        )
        outcome = reply[0].decode()
        head = replies.meta(reply[1]) if len(reply) > 1 else None
        unread = replies.inbox(reply[2]) if len(reply) > 2 else ()
        opened = LogEntry(int(reply[3][0]), int(reply[3][1]), reply[3][2].decode()) if len(reply) > 3 else None
        return ClaimReply(outcome, head, unread, opened)

    async def resolve(self, cid: str, me: str, nonce: str, epoch: int) -> ResolveReply:
        """RESOLVE."""
        reply = await self.topology.call(
            SCRIPTS["resolve"], (self.keys.meta(cid), self.keys.inbox(cid)), me, nonce, epoch
        )
        head = replies.meta(reply[1]) if len(reply) > 1 else None
        unread = replies.inbox(reply[2]) if len(reply) > 2 else ()
        return ResolveReply(reply[0].decode(), head, unread)

    async def append(self, cid: str, request: AppendRequest) -> AppendReply:
        """APPEND."""
        keys = self.keys
        reply = await self.topology.call(
            _APPEND_FINAL if _ends_turn(request) else _APPEND,
            (
                keys.meta(cid),
                keys.log(cid),
                keys.inbox(cid),
                keys.seen(cid),
                keys.state(cid),
                keys.tail(cid),
                keys.asks(cid),
            ),
            keys.channel(cid),
            request.owner,
            request.epoch,
            request.expected,
            request.batch,
            request.cursor,
            request.done,
            request.base,
            request.halted,
            request.closing,
            "ends" if request.ends_turn else "begins" if request.begins_turn else "",
            "" if request.state is None else "1",
            request.state or b"",
            len(request.asks),
            *(part for ask in request.asks for part in ask),
            *request.events,
        )
        if isinstance(reply, int):
            return AppendReply("OK", reply, request.batch)
        outcome, seq, batch = reply[0].decode(), int(reply[1]), reply[2].decode()
        if len(reply) == 3:
            return AppendReply(outcome, seq, batch)
        return AppendReply(outcome, seq, batch, reply[3].decode(), int(reply[4]))

    async def repair(self, cid: str, request: RepairRequest) -> RepairOutcome:
        """REPAIR."""
        k, r = self.keys, request
        reply = await self.topology.call(
            SCRIPTS["repair"],
            (k.meta(cid), k.log(cid), k.inbox(cid), k.seen(cid), k.state(cid), k.tail(cid), k.asks(cid)),
            *(k.channel(cid), r.owner, r.epoch, r.nonce, r.user, r.generation, r.created, r.metadata, *r.after),
            *(r.batch, r.cursor, r.done, r.base, r.halted, "" if r.state is None else "1", r.state or b""),
            *("1" if r.closes else "", len(r.settled), len(r.answered), len(r.asks)),
            *r.settled,
            *r.answered,
            *(part for ask in r.asks for part in ask),
            *r.events,
        )
        return reply.decode()

    async def release(self, cid: str, owner: str, epoch: int, seq: int) -> ReleaseOutcome:
        """RELEASE."""
        keys = self.keys
        reply = await self.topology.call(SCRIPTS["release"], (keys.meta(cid),), keys.channel(cid), owner, epoch, seq)
        return reply.decode()

    async def disown(self, cid: str, owner: str, epoch: int) -> DisownOutcome:
        """DISOWN."""
        keys = self.keys
        reply = await self.topology.call(SCRIPTS["disown"], (keys.meta(cid),), keys.channel(cid), owner, epoch)
        return reply.decode()

    async def interrupt(self, cid: str, turn: str) -> InterruptReply:
        """INTERRUPT."""
        keys = self.keys
        reply = await self.topology.call(
            SCRIPTS["interrupt"],
            (keys.meta(cid), keys.inbox(cid)),
            keys.channel(cid),
            json_text(turn),
            turn_position(turn),
        )
        outcome = reply[0].decode()
        if len(reply) == 1:
            return InterruptReply(outcome)
        return InterruptReply(outcome, reply[1], reply[2].decode(), int(reply[3]))

    async def answer(self, cid: str, ask_id: str, message: NewMessage) -> SendReply:
        """ANSWER."""
        keys = self.keys
        reply = await self.topology.call(
            SCRIPTS["answer"],
            (keys.meta(cid), keys.inbox(cid), keys.seen(cid), keys.asks(cid)),
            keys.channel(cid),
            ask_id,
            message.message_id,
            message.user,
            message.data,
        )
        return replies.send(reply)

    async def stop(self, cid: str, me: str, reason: str, buried: str) -> StopReply:
        """STOP."""
        keys = self.keys
        reply = await self.topology.call(
            SCRIPTS["stop"],
            (keys.meta(cid), keys.log(cid), keys.inbox(cid), keys.tail(cid), keys.asks(cid)),
            keys.channel(cid),
            me,
            json_text(reason),
            buried,
        )
        outcome = reply[0].decode()
        if len(reply) == 1:
            return StopReply(outcome)
        owner, nonce, user = (value.decode() for value in reply[1:])
        return StopReply(outcome, owner, nonce, user, reason)

    async def resume(self, cid: str) -> ResumeOutcome:
        """RESUME."""
        return (await self.topology.call(SCRIPTS["resume"], (self.keys.meta(cid),), self.keys.channel(cid))).decode()

    async def set_metadata(self, cid: str, metadata: str) -> Meta | None:
        """PATCH."""
        return replies.meta(await self.topology.call(SCRIPTS["patch"], (self.keys.meta(cid),), metadata))

    async def erase(self, cid: str) -> EraseOutcome:
        """ERASE."""
        return (await self.topology.call(SCRIPTS["erase"], self.keys.whole(cid))).decode()

    async def head(self, cid: str) -> Meta | None:
        """The head."""
        key = self.keys.meta(cid)
        return replies.meta(await self.topology.execute(key, "HMGET", key, *replies.META_FIELDS))

    async def heads(self, cids: Sequence[str]) -> Sequence[Meta | None]:
        """Heads of several conversations, pipelined in portions that leave room for other commands."""
        found: list[Meta | None] = []
        for first in range(0, len(cids), CHUNK):
            found += await asyncio.gather(*(self.head(cid) for cid in cids[first : first + CHUNK]))
        return found

    async def read(self, cid: str, after: Cursor, limit: int) -> Page | None:
        """READ."""
        keys, place = self.keys, after.place
        reply = await self.topology.call(
            _READ,
            (keys.meta(cid), keys.log(cid)),
            after.generation,
            place.epoch,
            place.seq,
            max(limit, 0),
        )
        if reply is None:
            return None
        generation, epoch, seq, resync, entries, first, archived, manifest = reply
        tip = (epoch, seq)
        return Page(generation.decode(), tip, replies.log(entries), resync == 1, first, archived, manifest.decode())

    async def inbox(self, cid: str) -> tuple[Meta, Sequence[InboxEntry]] | None:
        """INBOX."""
        reply = await self.topology.call(SCRIPTS["inbox"], (self.keys.meta(cid), self.keys.inbox(cid)))
        return None if reply is None else (replies.known_meta(reply[0]), replies.inbox(reply[1]))

    async def seen(self, cid: str, message_ids: Sequence[str]) -> Sequence[int | None]:
        """Positions under which these message ids are remembered."""
        key = self.keys.seen(cid)
        chunks = [message_ids[i : i + CHUNK] for i in range(0, len(message_ids), CHUNK)]
        found = await asyncio.gather(*(self.topology.execute(key, "ZMSCORE", key, *ids) for ids in chunks))
        return [None if score is None else int(float(score)) for scores in found for score in scores]

    async def all_seen(self, cid: str) -> Mapping[str, int]:
        """All remembered message ids."""
        key = self.keys.seen(cid)
        flat = await self.topology.execute(key, "ZRANGE", key, 0, -1, "WITHSCORES")
        return {name.decode(): int(float(score)) for name, score in zip(flat[::2], flat[1::2], strict=True)}

    async def state(self, cid: str) -> bytes | None:
        """The agent's durable state."""
        key = self.keys.state(cid)
        return await self.topology.execute(key, "GET", key)
