"""`RetentionStore` over tables."""

from __future__ import annotations

from convener.core import retention
from convener.core.model import Conversation
from convener.core.retention import ArchivedOutcome, ArchivedRequest, ExpireOutcome
from convener.store.local_effects import apply
from convener.store.local_parts import Part
from convener.store.tables import Tables


class LocalRetention(Part):
    """`RetentionStore`."""

    async def archived(self, cid: str, request: ArchivedRequest) -> ArchivedOutcome:
        def step(t: Tables) -> ArchivedOutcome:
            meta = t.meta(cid)
            places = {place for place in (request.upto, request.keep) if meta and t.epoch_at(cid, place[1]) == place[0]}
            state = Conversation(meta, places=frozenset(places))
            return apply(t, cid, retention.archived(state, request))

        return await self.run(step)

    async def expire(self, cid: str, before: int) -> ExpireOutcome:
        def step(t: Tables) -> ExpireOutcome:
            return apply(t, cid, retention.expire(Conversation(t.meta(cid), alarms=len(t.alarms(cid))), before))

        return await self.run(step)
