"""`TicketStore`: each ticket is a key of its own, which expires."""

from __future__ import annotations

from convener.store.redis.part import Part


class RedisTickets(Part):
    """Small secrets that are fetched once."""

    async def keep_ticket(self, name: str, sealed: bytes, ttl: int) -> None:
        """Keep bytes for `ttl` ms."""
        key = self.keys.ticket(name)
        await self.topology.execute(key, "SET", key, sealed, "PX", ttl)

    async def take_ticket(self, name: str) -> bytes | None:
        """Fetch and delete, in one command: of two callers one gets it."""
        key = self.keys.ticket(name)
        return await self.topology.execute(key, "GETDEL", key)
