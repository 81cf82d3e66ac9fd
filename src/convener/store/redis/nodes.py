"""`MembershipStore` and `NodeStore`: who is there, and what each says of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from convener.core.directory import Record
from convener.core.membership import BuryOutcome, Member, Membership, RenewReply, SupersedeOutcome
from convener.store.redis import replies
from convener.store.redis.keys import VERSION_FIELD
from convener.store.redis.part import CHUNK, Part
from convener.store.redis.scripts import SCRIPTS


class RedisMembership(Part):
    """The nodes. All keys are one group, so each step is one script."""

    async def join(self, incarnation: str, member: Member) -> RenewReply:
        """JOIN."""
        k = self.keys
        reply = await self.topology.call(
            SCRIPTS["join"], k.membership, k.sync, incarnation, member.ttl, member.renew, member.info
        )
        return replies.renew_reply(reply)

    async def renew(self, incarnation: str, info: str | None = None) -> RenewReply:
        """RENEW."""
        reply = await self.topology.call(
            SCRIPTS["renew"],
            self.keys.membership,
            incarnation,
            "0" if info is None else "1",
            info or "",
            self.keys.sync,
        )
        return replies.renew_reply(reply)

    async def reap(self, ttl_ms: int, by: str = "") -> Sequence[str]:
        """REAP."""
        names = await self.topology.call(SCRIPTS["reap"], self.keys.membership, self.keys.sync, ttl_ms, by)
        return tuple(name.decode() for name in names)

    async def bury(self, incarnation: str, ttl_ms: int, by: str = "") -> BuryOutcome:
        """BURY."""
        k = self.keys
        reply = await self.topology.call(
            SCRIPTS["bury"], k.membership, k.sync, incarnation, k.live(incarnation), ttl_ms, by
        )
        return reply.decode()

    async def supersede(self, incarnation: str, by: str, deadline: int) -> SupersedeOutcome:
        """SUPERSEDE."""
        keys, sync = self.keys.membership, self.keys.sync
        reply = await self.topology.call(SCRIPTS["supersede"], keys, sync, incarnation, by, deadline)
        return reply.decode()

    async def leave(self, incarnation: str) -> None:
        """LEAVE."""
        await self.topology.call(SCRIPTS["leave"], self.keys.membership, self.keys.sync, incarnation)

    async def rebury(self, incarnations: Sequence[str]) -> None:
        """REBURY."""
        for first in range(0, len(incarnations), CHUNK):
            names = incarnations[first : first + CHUNK]
            await self.topology.call(SCRIPTS["rebury"], self.keys.membership, self.keys.sync, *names)

    async def forget(self, incarnation: str, kept_ms: int) -> None:
        """FORGET."""
        await self.topology.call(SCRIPTS["forget"], (self.keys.dead, self.keys.why), incarnation, kept_ms)

    async def membership(self) -> Membership:
        """MEMBERS."""
        return replies.membership(await self.topology.call(SCRIPTS["members"], self.keys.membership))

    async def is_buried(self, incarnation: str) -> bool:
        """Whether it is among the buried."""
        key = self.keys.dead
        return await self.topology.execute(key, "ZSCORE", key, incarnation) is not None


class RedisNodes(Part):
    """Records and clients of a node."""

    async def put_record(self, incarnation: str, record: Record) -> None:
        """Write one record."""
        key = self.keys.records(incarnation)
        await self.topology.execute(key, "HSET", key, record.conversation_id, replies.record_text(record))

    async def record(self, incarnation: str, cid: str) -> Record | None:
        """Read one record."""
        key = self.keys.records(incarnation)
        text = await self.topology.execute(key, "HGET", key, cid)
        return None if text is None else replies.record(cid, text)

    async def drop_record(self, incarnation: str, cid: str, nonce: str | None) -> bool:
        """DROP_RECORD."""
        key = self.keys.records(incarnation)
        if nonce is None:
            return await self.topology.execute(key, "HDEL", key, cid) == 1
        return await self.topology.call(SCRIPTS["drop_record"], (key,), cid, nonce) == 1

    async def flush(
        self,
        incarnation: str,
        version: int,
        records: Sequence[Record],
        joined: Mapping[str, str],
        left: Sequence[str],
    ) -> None:
        """FLUSH. More than `CHUNK` changes are several steps, the version in the last: it never runs ahead."""
        keys = (self.keys.records(incarnation), self.keys.connections(incarnation))
        clients = list(joined.items())
        while len(records) + len(clients) + len(left) > CHUNK:
            now_records, records = records[:CHUNK], records[CHUNK:]
            room = CHUNK - len(now_records)
            now_clients, clients = clients[:room], clients[room:]
            room -= len(now_clients)
            now_left, left = left[:room], left[room:]
            await self._flush(keys, "", now_records, now_clients, now_left)
        await self._flush(keys, str(version), records, clients, left)

    async def _flush(
        self,
        keys: tuple[str, str],
        version: str,
        records: Sequence[Record],
        joined: Sequence[tuple[str, str]],
        left: Sequence[str],
    ) -> None:
        changes: list[str] = []
        for record in records:
            changes += (record.conversation_id, replies.record_text(record))
        for pair in joined:
            changes += pair
        await self.topology.call(SCRIPTS["flush"], keys, version, len(records), len(joined), *changes, *left)

    async def node_records(self, incarnation: str) -> tuple[int, Sequence[Record], Mapping[str, str]]:
        """Version first, then the hashes: what is read is at least as new."""
        key = self.keys.records(incarnation)
        version = await self.topology.execute(key, "HGET", key, VERSION_FIELD)
        fields = await self._scan(key)
        fields.pop(VERSION_FIELD, None)
        clients = await self._scan(self.keys.connections(incarnation))
        return (
            int(version or 0),
            [replies.record(cid, text) for cid, text in fields.items()],
            {connection: cid.decode() for connection, cid in clients.items()},
        )

    async def _scan(self, key: str) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        cursor: bytes | int = 0
        while True:
            cursor, flat = await self.topology.execute(key, "HSCAN", key, cursor, "COUNT", CHUNK)
            found.update((flat[i].decode(), flat[i + 1]) for i in range(0, len(flat), 2))
            if cursor == b"0":
                return found

    async def drop_node(self, incarnation: str) -> bool:
        """DROP_NODE."""
        keys = (self.keys.records(incarnation), self.keys.connections(incarnation))
        return await self.topology.call(SCRIPTS["drop_node"], keys) == 1
