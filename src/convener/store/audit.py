"""The auditor of a live store: reads what `convener.core.audit` judges.

A cluster goes on while it is looked at. What belongs to one conversation is read so that it fits together:
head and inbox in one step, then the log up to the head's seq. What spans several keys may be caught between
two steps, so what looks wrong is read once more, a moment later, and only what is still wrong in the very
same way is reported.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from convener.core.audit import (
    ConversationFacts,
    Violation,
    audit_conversation,
    audit_nodes,
    audit_user,
)
from convener.core.cursor import Cursor
from convener.core.membership import Membership
from convener.core.model import LogEntry, Meta
from convener.core.view import Place
from convener.store.archive import LogReader
from convener.store.base import Store

SHARDS: Final = 64
PAGE: Final = 1000
"""Entries and ids read at once."""
ABREAST: Final = 32
"""Conversations read at once."""
PAUSE_S: Final = 1.0
"""Seconds between the two looks: longer than any step of the protocol takes."""


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What an audit found.

    Attributes:
        violations: what was wrong on both looks.
        checked: entries, ids, slots and records that were compared.
        conversations: how many were read.
        nodes: how many nodes, members and buried.
    """

    violations: tuple[Violation, ...]
    checked: int
    conversations: int
    nodes: int


Limit = int | Callable[[str], Awaitable[int]]
"""One limit for all, or a function that tells a user's own."""


async def audit(
    store: Store,
    cids: Sequence[str] | None = None,
    *,
    limit: Limit = 0,
    pause: float = PAUSE_S,
    logs: LogReader | None = None,
) -> AuditReport:
    """Check the invariants on what a store holds.

    Args:
        store: open.
        cids: conversations to check; None for all. Those that do not exist are left out.
        limit: conversations that a user may run at once, or a function that tells it; 0: how many there are is not
            judged.
        pause: seconds between the two looks.
        logs: reads logs of which a part is in an archive; default from the store alone.

    Raises:
        StoreUnavailable: it could not be read.
    """
    first = _Look(store, limit, logs)
    await first.at(await every_conversation(store) if cids is None else list(dict.fromkeys(cids)))
    findings = first.findings
    if findings:
        await asyncio.sleep(pause)
        second = _Look(store, limit, logs)
        await second.at(sorted({cid for concerned in findings.values() for cid in concerned}))
        findings = {finding: who for finding, who in findings.items() if finding in second.findings}
    return AuditReport(tuple(findings), first.checked, len(first.heads), first.nodes)


async def every_conversation(store: Store) -> list[str]:
    """Ids of all conversations, shard by shard."""
    found: list[str] = []
    for shard in range(SHARDS):
        after = ""
        while page := await store.list_all(shard, after, PAGE):
            found += page
            after = page[-1]
    return found


class _Look:
    """One look. `findings`: what is wrong, with the conversations to read again to be sure."""

    def __init__(self, store: Store, limit: Limit, logs: LogReader | None) -> None:
        self._store = store
        self._logs = logs or LogReader(store)
        self._limit = limit
        self.findings: dict[Violation, Sequence[str]] = {}
        self.heads: dict[str, Meta] = {}
        self.checked = 0
        self.nodes = 0

    async def at(self, cids: Sequence[str]) -> None:
        for start in range(0, len(cids), ABREAST):
            await asyncio.gather(*(self._conversation(cid) for cid in cids[start : start + ABREAST]))
        membership = await self._store.membership()
        records = await self._records(membership)
        self.nodes = len(records)
        self._found(audit_nodes(membership, records, {}, {}), [])
        by_user: dict[str, dict[str, Meta]] = {}
        for cid, head in self.heads.items():
            by_user.setdefault(head.user, {})[cid] = head
        for user, heads in by_user.items():
            await self._user(user, heads, membership, records)

    def _found(self, violations: Iterable[Violation], concerned: Sequence[str]) -> None:
        for violation in violations:
            self.findings[violation] = concerned

    async def _conversation(self, cid: str) -> None:
        read = await self._store.inbox(cid)
        if read is None:
            return
        head, inbox = read
        log = await self._log(cid, head)
        if log is None:
            return
        entries, since = log
        # Read last: an id may be remembered of which the head did not know yet, but none is missing.
        seen = {m: p for m, p in (await self._store.all_seen(cid)).items() if p <= head.position}
        asks: Collection[str] | None = await self._store.asks(cid)
        if (asks or head.asks) and await self._store.head(cid) != head:
            # Asked or answered between the two reads: they do not belong together.
            asks = None
        waiting = await self._store.waiting(head.user) if head.user and not head.owner else ()
        queued = any(entry.conversation_id == cid for entry in waiting)
        self.heads[cid] = head
        self.checked += len(entries) + len(inbox) + len(seen) + len(asks or ()) + 1
        facts = ConversationFacts(cid, head, entries, inbox, seen, queued, asks, since)
        self._found(audit_conversation(facts), [cid])

    async def _log(self, cid: str, head: Meta) -> tuple[list[LogEntry], int] | None:
        """The log as of `head`, and its first number; None if the conversation was erased meanwhile."""
        entries: list[LogEntry] = []
        since = 0
        while not entries or entries[-1].seq < head.seq:
            after = entries[-1].seq if entries else 0
            page = await self._logs.read(cid, Cursor(place=Place(0, after)), PAGE)
            if page is None or page.generation != head.generation:
                return None
            if page.resync:
                # Its beginning was deleted meanwhile, with what was read last.
                entries, since = [], 0
            if not page.entries:
                break
            since = since or (page.first if page.manifest else 1)
            entries += page.entries
        return [entry for entry in entries if entry.seq <= head.seq], since or 1

    async def _records(self, membership: Membership) -> dict[str, set[str]]:
        names = [*membership.members, *membership.dead]
        hashes = await asyncio.gather(*(self._store.node_records(name) for name in names))
        found = {
            name: {record.conversation_id for record in held} for name, (_, held, _) in zip(names, hashes, strict=True)
        }
        self.checked += sum(len(cids) for cids in found.values())
        return found

    async def _user(
        self, user: str, heads: dict[str, Meta], membership: Membership, records: dict[str, set[str]]
    ) -> None:
        concerned = list(heads)
        owners = {cid: head.owner for cid, head in heads.items()}
        if not user:
            # Users without an id have no slots and share no limit.
            self._found(audit_nodes(membership, records, owners, {}), concerned)
            return
        slots = await self._store.slots(user)
        self.checked += len(slots)
        limit = self._limit if isinstance(self._limit, int) else await self._limit(user)
        self._found(audit_user(user, slots, limit, heads, membership.dead), concerned)
        self._found(audit_nodes(membership, records, owners, {user: slots}), concerned)
