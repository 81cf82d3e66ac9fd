"""Stubs: what leaves the store because the archive has it, or because nobody has used it for long."""

from __future__ import annotations

from convener.core.retention import ArchivedOutcome, ArchivedRequest, ExpireOutcome
from convener.store.redis.part import Part
from convener.store.redis.scripts import SCRIPTS


class RedisRetention(Part):
    """ARCHIVED and EXPIRE."""

    async def archived(self, cid: str, request: ArchivedRequest) -> ArchivedOutcome:
        """ARCHIVED."""
        keys = (self.keys.meta(cid), self.keys.log(cid))
        places = (*request.upto, *request.keep)
        call = self.topology.call(SCRIPTS["archived"], keys, request.owner, request.epoch, *places, request.manifest)
        return (await call).decode()

    async def expire(self, cid: str, before: int) -> ExpireOutcome:
        """EXPIRE."""
        return (await self.topology.call(SCRIPTS["expire"], self.keys.whole(cid), before)).decode()
