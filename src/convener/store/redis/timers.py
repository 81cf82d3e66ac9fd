"""What goes with a conversation besides its log: questions, pieces, alarms; and `TimerStore`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from convener.core.model import AlarmOutcome, PieceOutcome, SendReply
from convener.store.redis import replies
from convener.store.redis.part import CHUNK, Part
from convener.store.redis.scripts import SCRIPTS
from convener.store.tables import timer_shard


class RedisTimers(Part):
    """Questions, pieces, alarms, timers."""

    async def asks(self, cid: str) -> Mapping[str, str]:
        """The open questions."""
        return await self._hash(self.keys.asks(cid))

    async def alarms(self, cid: str) -> Mapping[str, str]:
        """The alarms that are set."""
        return await self._hash(self.keys.alarms(cid))

    async def _hash(self, key: str) -> Mapping[str, str]:
        flat = await self.topology.execute(key, "HGETALL", key)
        return {name.decode(): value.decode() for name, value in zip(flat[::2], flat[1::2], strict=True)}

    async def add_pieces(self, cid: str, owner: str, epoch: int, position: int, pieces: Sequence[str]) -> PieceOutcome:
        """PIECES. More than `CHUNK` are several steps: each piece stands for itself."""
        keys = (self.keys.meta(cid), self.keys.tail(cid))
        channel = self.keys.channel(cid)
        while True:
            now, pieces = pieces[:CHUNK], pieces[CHUNK:]
            reply = await self.topology.call(SCRIPTS["pieces"], keys, channel, owner, epoch, position, *now)
            outcome: PieceOutcome = reply.decode()
            if outcome != "OK" or not pieces:
                return outcome

    async def pieces(self, cid: str) -> Sequence[str]:
        """Pieces of the answer that is being written."""
        key = self.keys.tail(cid)
        return [values[1].decode() for _, values in await self.topology.execute(key, "XRANGE", key, "-", "+")]

    async def set_alarm(self, cid: str, alarm_id: str, data: str) -> AlarmOutcome:
        """SET_ALARM."""
        keys = (self.keys.meta(cid), self.keys.seen(cid), self.keys.alarms(cid))
        return (await self.topology.call(SCRIPTS["set_alarm"], keys, alarm_id, data)).decode()

    async def fire(self, cid: str, alarm_id: str, *, max_pending: int) -> SendReply:
        """FIRE."""
        k = self.keys
        keys = (k.meta(cid), k.inbox(cid), k.seen(cid), k.alarms(cid))
        return replies.send(await self.topology.call(SCRIPTS["fire"], keys, k.channel(cid), alarm_id, max_pending))

    async def drop_alarm(self, cid: str, alarm_id: str) -> bool:
        """Remove an alarm."""
        key = self.keys.alarms(cid)
        return await self.topology.execute(key, "HDEL", key, alarm_id) == 1

    async def set_timer(self, cid: str, timer_id: str, due: int) -> None:
        """Enter, or move."""
        key = self.keys.due(timer_shard(cid))
        await self.topology.execute(key, "ZADD", key, due, f"{cid}|{timer_id}")

    async def clear_timer(self, cid: str, timer_id: str) -> bool:
        """Remove."""
        key = self.keys.due(timer_shard(cid))
        return await self.topology.execute(key, "ZREM", key, f"{cid}|{timer_id}") == 1

    async def due_timers(self, shard: int, limit: int) -> Sequence[tuple[str, str, int]]:
        """DUE."""
        flat = await self.topology.call(SCRIPTS["due"], (self.keys.due(shard),), max(limit, 0))
        due: list[tuple[str, str, int]] = []
        for member, at in zip(flat[::2], flat[1::2], strict=True):
            cid, timer_id = member.decode().split("|", 1)
            due.append((cid, timer_id, int(float(at))))
        return due
