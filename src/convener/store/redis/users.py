"""`SlotStore` and `IndexStore`: what belongs to users, and the list of all conversations."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from itertools import pairwise

from convener.core.admission import MAX_WAITING, ReserveReply, Slot, Waiting
from convener.store.redis import replies
from convener.store.redis.keys import shard_of
from convener.store.redis.part import CHUNK, Part
from convener.store.redis.scripts import SCRIPTS


class RedisSlots(Part):
    """One user: slots and queued starts."""

    async def slots(self, user: str) -> Mapping[str, Slot]:
        """All slots."""
        key = self.keys.slots(user)
        flat = [value.decode() for value in await self.topology.execute(key, "HGETALL", key)]
        return {cid: Slot.decode(value) for cid, value in zip(flat[::2], flat[1::2], strict=True)}

    async def slot(self, user: str, cid: str) -> Slot | None:
        """The slot of one conversation."""
        key = self.keys.slots(user)
        value = await self.topology.execute(key, "HGET", key, cid)
        return None if value is None else Slot.decode(value.decode())

    async def reserve(self, user: str, cid: str, slot: Slot, *, raised_limit: int, read: Slot | None) -> ReserveReply:
        """RESERVE."""
        reply = await self.topology.call(
            SCRIPTS["reserve"],
            (self.keys.slots(user), self.keys.wait(user)),
            cid,
            slot.nonce,
            slot.incarnation,
            raised_limit,
            "" if read is None else read.encode(),
        )
        held = None if reply[1] is None else Slot.decode(reply[1].decode())
        return ReserveReply(reply[0].decode(), held, reply[2] if len(reply) > 2 else 0)

    async def unreserve(self, user: str, cid: str, nonce: str) -> Waiting | None:
        """UNRESERVE."""
        reply = await self.topology.call(
            SCRIPTS["unreserve"], (self.keys.slots(user), self.keys.wait(user)), cid, nonce
        )
        return replies.waiting(*reply) if reply else None

    async def enqueue(self, user: str, cid: str, incarnation: str, reason: str) -> bool:
        """ENQUEUE."""
        reply = await self.topology.call(
            SCRIPTS["enqueue"], (self.keys.wait(user),), cid, incarnation, reason, MAX_WAITING
        )
        return reply == 1

    async def dequeue(self, user: str, cid: str) -> bool:
        """DEQUEUE."""
        return await self.topology.call(SCRIPTS["dequeue"], (self.keys.wait(user),), cid) == 1

    async def waiting(self, user: str) -> Sequence[Waiting]:
        """Queued starts, oldest first."""
        key = self.keys.wait(user)
        flat = await self.topology.execute(key, "ZRANGE", key, 0, -1, "WITHSCORES")
        return [replies.waiting(member, score) for member, score in list(pairwise(flat))[::2]]


class RedisIndex(Part):
    """Lists of conversations: each user's by activity, all by id."""

    async def index(self, user: str, cid: str) -> None:
        """Enter into both lists."""
        mine, everyones = self.keys.conversations(user), self.keys.index(shard_of(cid))
        await asyncio.gather(
            self.topology.call(SCRIPTS["index"], (mine,), "", cid),
            self.topology.execute(everyones, "ZADD", everyones, 0, cid),
        )

    async def touch(self, user: str, cids: Sequence[str]) -> None:
        """Activity now."""
        key = self.keys.conversations(user)
        for first in range(0, len(cids), CHUNK):
            await self.topology.call(SCRIPTS["index"], (key,), "1", *cids[first : first + CHUNK])

    async def unindex(self, user: str, cid: str) -> None:
        """Remove from both lists."""
        mine, everyones = self.keys.conversations(user), self.keys.index(shard_of(cid))
        await asyncio.gather(
            self.topology.execute(mine, "ZREM", mine, cid),
            self.topology.execute(everyones, "ZREM", everyones, cid),
        )

    async def list_user(self, user: str, before: tuple[int, str] | None, limit: int) -> Sequence[tuple[str, int]]:
        """LIST_USER."""
        ms, cid = ("", "") if before is None else before
        flat = await self.topology.call(SCRIPTS["list_user"], (self.keys.conversations(user),), max(limit, 0), ms, cid)
        return [(flat[i].decode(), int(float(flat[i + 1]))) for i in range(0, len(flat), 2)]

    async def list_all(self, shard: int, after: str, limit: int) -> Sequence[str]:
        """A page of one shard."""
        key = self.keys.index(shard)
        low = f"({after}" if after else "-"
        found = await self.topology.execute(key, "ZRANGEBYLEX", key, low, "+", "LIMIT", 0, max(limit, 0))
        return [cid.decode() for cid in found]
