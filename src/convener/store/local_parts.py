"""The obligations of `store.base` over tables, part by part: read what the transition needs, apply its effects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from convener.core import admission, conversation, intents, membership
from convener.core import repair as repairs
from convener.core.admission import ReserveReply, Slot, Waiting
from convener.core.cursor import Cursor
from convener.core.directory import Record
from convener.core.membership import BuryOutcome, Member, Membership, RenewReply, SupersedeOutcome
from convener.core.model import (
    AlarmOutcome,
    AppendReply,
    AppendRequest,
    ClaimReply,
    ClaimRequest,
    Conversation,
    Created,
    DisownOutcome,
    EraseOutcome,
    InboxEntry,
    InterruptReply,
    Meta,
    NewMessage,
    Page,
    PieceOutcome,
    ReleaseOutcome,
    ResolveReply,
    ResumeOutcome,
    SendReply,
    StopReply,
    UnsendOutcome,
)
from convener.core.repair import RepairOutcome, RepairRequest
from convener.core.view import START
from convener.errors import StoreUnavailable
from convener.store.local_effects import apply
from convener.store.tables import Engine, Step, Tables, channel_name

T = TypeVar("T")


def _page(t: Tables, cid: str, after: Cursor, limit: int) -> Page | None:
    meta = t.meta(cid)
    if meta is None:
        return None
    place, resync = after.place, False
    if after.is_exact:
        known = place == START or t.epoch_at(cid, place.seq) == place.epoch
        resync = after.generation != meta.generation or not known
    entries = t.log(cid, 0 if resync else place.seq, max(limit, 0))
    held, tip = t.log(cid, 0, 1), t.tip(cid)
    first = held[0].seq if held else tip[1] + 1
    return Page(meta.generation, tip, entries, resync, first, meta.archived, meta.manifest)


def _asking(t: Tables, cid: str) -> Conversation:
    return Conversation(t.meta(cid), asks=frozenset(t.asks(cid)))


def _alarmed(t: Tables, cid: str, alarm_id: str) -> Conversation:
    alarms = t.alarms(cid)
    return Conversation(t.meta(cid), seen=t.seen(cid, alarm_id), alarms=len(alarms), alarm=alarms.get(alarm_id))


class Part:
    """What the parts of a store share: the engine, and whether this store is open."""

    _engine: Engine
    _open: bool

    async def run(self, step: Step[T]) -> T:
        """Run a step of one's own, atomically.

        Raises:
            StoreUnavailable: the store is not open.
        """
        if not self._open:
            raise StoreUnavailable("the store is not open")
        return await self._engine.run(step)


class LocalConversations(Part):
    """`ConversationStore`."""

    async def create(self, cid: str, user: str, metadata: str, generation: str) -> Created:
        def step(t: Tables) -> Created:
            state = Conversation(t.meta(cid))
            return apply(t, cid, conversation.create(state, user, metadata, generation, t.now))

        return await self.run(step)

    async def send(self, cid: str, message: NewMessage, *, max_pending: int, reject_busy: bool = False) -> SendReply:
        def step(t: Tables) -> SendReply:
            state = Conversation(t.meta(cid), seen=t.seen(cid, message.message_id))
            return apply(t, cid, conversation.send(state, message, max_pending, reject_busy, t.now))

        return await self.run(step)

    async def unsend(self, cid: str, message_id: str, position: int) -> UnsendOutcome:
        def step(t: Tables) -> UnsendOutcome:
            state = Conversation(t.meta(cid), inbox=t.inbox(cid), seen=t.seen(cid, message_id))
            return apply(t, cid, conversation.unsend(state, message_id, position))

        return await self.run(step)

    async def claim(self, cid: str, request: ClaimRequest) -> ClaimReply:
        def step(t: Tables) -> ClaimReply:
            state = Conversation(t.meta(cid), t.tip(cid), t.inbox(cid))
            return apply(t, cid, conversation.claim(state, request, t.now))

        return await self.run(step)

    async def resolve(self, cid: str, me: str, nonce: str, epoch: int) -> ResolveReply:
        def step(t: Tables) -> ResolveReply:
            state = Conversation(t.meta(cid), inbox=t.inbox(cid))
            return apply(t, cid, conversation.resolve(state, me, nonce, epoch))

        return await self.run(step)

    async def append(self, cid: str, request: AppendRequest) -> AppendReply:
        def step(t: Tables) -> AppendReply:
            return apply(t, cid, conversation.append(_asking(t, cid), request, t.now))

        return await self.run(step)

    async def repair(self, cid: str, request: RepairRequest) -> RepairOutcome:
        def step(t: Tables) -> RepairOutcome:
            state = Conversation(t.meta(cid), t.tip(cid), t.inbox(cid), asks=frozenset(t.asks(cid)))
            return apply(t, cid, repairs.repair(state, request, t.now))

        return await self.run(step)

    async def release(self, cid: str, owner: str, epoch: int, seq: int) -> ReleaseOutcome:
        def step(t: Tables) -> ReleaseOutcome:
            return apply(t, cid, conversation.release(Conversation(t.meta(cid)), owner, epoch, seq))

        return await self.run(step)

    async def disown(self, cid: str, owner: str, epoch: int) -> DisownOutcome:
        def step(t: Tables) -> DisownOutcome:
            return apply(t, cid, conversation.disown(Conversation(t.meta(cid)), owner, epoch))

        return await self.run(step)

    async def stop(self, cid: str, me: str, reason: str, buried: str) -> StopReply:
        def step(t: Tables) -> StopReply:
            state = Conversation(t.meta(cid), t.tip(cid), t.inbox(cid))
            return apply(t, cid, conversation.stop(state, me, reason, buried, t.now))

        return await self.run(step)

    async def interrupt(self, cid: str, turn: str) -> InterruptReply:
        def step(t: Tables) -> InterruptReply:
            return apply(t, cid, intents.interrupt(Conversation(t.meta(cid)), turn, t.now))

        return await self.run(step)

    async def answer(self, cid: str, ask_id: str, message: NewMessage) -> SendReply:
        def step(t: Tables) -> SendReply:
            state = replace(_asking(t, cid), seen=t.seen(cid, message.message_id))
            return apply(t, cid, intents.answer(state, ask_id, message, t.now))

        return await self.run(step)

    async def add_pieces(self, cid: str, owner: str, epoch: int, position: int, pieces: Sequence[str]) -> PieceOutcome:
        def step(t: Tables) -> PieceOutcome:
            state = Conversation(t.meta(cid))
            return apply(t, cid, intents.pieces(state, owner, epoch, position, tuple(pieces)))

        return await self.run(step)

    async def set_alarm(self, cid: str, alarm_id: str, data: str) -> AlarmOutcome:
        def step(t: Tables) -> AlarmOutcome:
            return apply(t, cid, intents.set_alarm(_alarmed(t, cid, alarm_id), alarm_id, data))

        return await self.run(step)

    async def fire(self, cid: str, alarm_id: str, *, max_pending: int) -> SendReply:
        def step(t: Tables) -> SendReply:
            return apply(t, cid, intents.fire(_alarmed(t, cid, alarm_id), alarm_id, max_pending, t.now))

        return await self.run(step)

    async def resume(self, cid: str) -> ResumeOutcome:
        def step(t: Tables) -> ResumeOutcome:
            return apply(t, cid, conversation.resume(Conversation(t.meta(cid)), t.now))

        return await self.run(step)

    async def set_metadata(self, cid: str, metadata: str) -> Meta | None:
        def step(t: Tables) -> Meta | None:
            return apply(t, cid, conversation.set_metadata(Conversation(t.meta(cid)), metadata, t.now))

        return await self.run(step)

    async def erase(self, cid: str) -> EraseOutcome:
        def step(t: Tables) -> EraseOutcome:
            return apply(t, cid, conversation.erase(Conversation(t.meta(cid))))

        return await self.run(step)

    async def head(self, cid: str) -> Meta | None:
        return await self.run(lambda t: t.meta(cid))

    async def heads(self, cids: Sequence[str]) -> Sequence[Meta | None]:
        return await self.run(lambda t: [t.meta(cid) for cid in cids])

    async def read(self, cid: str, after: Cursor, limit: int) -> Page | None:
        return await self.run(lambda t: _page(t, cid, after, limit))

    async def inbox(self, cid: str) -> tuple[Meta, Sequence[InboxEntry]] | None:
        def step(t: Tables) -> tuple[Meta, Sequence[InboxEntry]] | None:
            meta = t.meta(cid)
            return None if meta is None else (meta, t.inbox(cid))

        return await self.run(step)

    async def seen(self, cid: str, message_ids: Sequence[str]) -> Sequence[int | None]:
        return await self.run(lambda t: [t.seen(cid, message_id) for message_id in message_ids])

    async def all_seen(self, cid: str) -> Mapping[str, int]:
        return await self.run(lambda t: t.all_seen(cid))

    async def state(self, cid: str) -> bytes | None:
        return await self.run(lambda t: t.state(cid))

    async def asks(self, cid: str) -> Mapping[str, str]:
        return await self.run(lambda t: t.asks(cid))

    async def pieces(self, cid: str) -> Sequence[str]:
        return await self.run(lambda t: t.pieces(cid))

    async def alarms(self, cid: str) -> Mapping[str, str]:
        return await self.run(lambda t: t.alarms(cid))

    async def drop_alarm(self, cid: str, alarm_id: str) -> bool:
        return await self.run(lambda t: t.drop_alarm(cid, alarm_id))


class LocalTimers(Part):
    """`TimerStore`."""

    async def set_timer(self, cid: str, timer_id: str, due: int) -> None:
        await self.run(lambda t: t.set_timer(cid, timer_id, due))

    async def clear_timer(self, cid: str, timer_id: str) -> bool:
        return await self.run(lambda t: t.clear_timer(cid, timer_id))

    async def due_timers(self, shard: int, limit: int) -> Sequence[tuple[str, str, int]]:
        return await self.run(lambda t: t.due_timers(shard, t.now, limit))


class LocalSlots(Part):
    """`SlotStore`."""

    async def slots(self, user: str) -> Mapping[str, Slot]:
        return await self.run(lambda t: dict(t.slots(user)))

    async def slot(self, user: str, cid: str) -> Slot | None:
        return await self.run(lambda t: t.slot(user, cid))

    async def reserve(self, user: str, cid: str, slot: Slot, *, raised_limit: int, read: Slot | None) -> ReserveReply:
        def step(t: Tables) -> ReserveReply:
            reply = admission.reserve(t.slots(user), t.waiting(user), cid, slot, raised_limit, read)
            if reply.outcome == "OK":
                t.put_slot(user, cid, slot)
                t.drop_waiting(user, cid)
            return reply

        return await self.run(step)

    async def unreserve(self, user: str, cid: str, nonce: str) -> Waiting | None:
        def step(t: Tables) -> Waiting | None:
            slot = t.slot(user, cid)
            if slot is not None and slot.nonce == nonce:
                t.drop_slot(user, cid)
            return next(iter(t.waiting(user)), None)

        return await self.run(step)

    async def enqueue(self, user: str, cid: str, incarnation: str, reason: str) -> bool:
        def step(t: Tables) -> bool:
            queue = t.waiting(user)
            held = next((w for w in queue if w.conversation_id == cid), None)
            if held is None and len(queue) >= admission.MAX_WAITING:
                return False
            since = t.now if held is None else held.since
            t.put_waiting(user, Waiting(cid, incarnation, reason, since))
            return True

        return await self.run(step)

    async def dequeue(self, user: str, cid: str) -> bool:
        return await self.run(lambda t: t.drop_waiting(user, cid))

    async def waiting(self, user: str) -> Sequence[Waiting]:
        return await self.run(lambda t: t.waiting(user))


def _put_membership(t: Tables, state: Membership) -> None:
    """Write the membership; a new version is announced."""
    changed = state.version != t.membership().version
    t.set_membership(state)
    if changed:
        t.publish(channel_name("sync"), f'{{"t":"members","ver":{state.version}}}')


def renew(t: Tables, incarnation: str, info: str | None) -> RenewReply:
    """RENEW, as a step."""
    reply, state = membership.renew(t.membership(), incarnation, info, t.now)
    _put_membership(t, state)
    return reply


class LocalMembership(Part):
    """`MembershipStore`."""

    async def join(self, incarnation: str, member: Member) -> RenewReply:
        def step(t: Tables) -> RenewReply:
            reply, state = membership.join(t.membership(), incarnation, member, t.now)
            _put_membership(t, state)
            return reply

        return await self.run(step)

    async def renew(self, incarnation: str, info: str | None = None) -> RenewReply:
        return await self.run(lambda t: renew(t, incarnation, info))

    async def reap(self, ttl_ms: int, by: str = "") -> Sequence[str]:
        def step(t: Tables) -> Sequence[str]:
            names, state = membership.reap(t.membership(), ttl_ms, t.now, by)
            _put_membership(t, state)
            return names

        return await self.run(step)

    async def bury(self, incarnation: str, ttl_ms: int, by: str = "") -> BuryOutcome:
        def step(t: Tables) -> BuryOutcome:
            outcome, state = membership.bury(t.membership(), incarnation, t.live(incarnation), ttl_ms, t.now, by)
            _put_membership(t, state)
            return outcome

        return await self.run(step)

    async def supersede(self, incarnation: str, by: str, deadline: int) -> SupersedeOutcome:
        def step(t: Tables) -> SupersedeOutcome:
            outcome, state = membership.supersede(t.membership(), incarnation, by, deadline, t.now)
            _put_membership(t, state)
            return outcome

        return await self.run(step)

    async def leave(self, incarnation: str) -> None:
        await self.run(lambda t: _put_membership(t, membership.leave(t.membership(), incarnation, t.now)))

    async def rebury(self, incarnations: Sequence[str]) -> None:
        await self.run(lambda t: _put_membership(t, membership.rebury(t.membership(), incarnations, t.now)))

    async def forget(self, incarnation: str, kept_ms: int) -> None:
        def step(t: Tables) -> None:
            _put_membership(t, membership.forget(t.membership(), incarnation, kept_ms, t.now))

        await self.run(step)

    async def membership(self) -> Membership:
        return await self.run(lambda t: t.membership())

    async def is_buried(self, incarnation: str) -> bool:
        return await self.run(lambda t: incarnation in t.membership().dead)


class LocalNodes(Part):
    """`NodeStore`."""

    async def put_record(self, incarnation: str, record: Record) -> None:
        await self.run(lambda t: t.put_record(incarnation, record))

    async def record(self, incarnation: str, cid: str) -> Record | None:
        return await self.run(lambda t: t.record(incarnation, cid))

    async def drop_record(self, incarnation: str, cid: str, nonce: str | None) -> bool:
        def step(t: Tables) -> bool:
            record = t.record(incarnation, cid)
            if record is None or nonce not in (None, record.nonce):
                return False
            t.drop_record(incarnation, cid)
            return True

        return await self.run(step)

    async def flush(
        self,
        incarnation: str,
        version: int,
        records: Sequence[Record],
        joined: Mapping[str, str],
        left: Sequence[str],
    ) -> None:
        def step(t: Tables) -> None:
            for record in records:
                if t.record(incarnation, record.conversation_id) is not None:
                    t.put_record(incarnation, record)
            for connection, cid in joined.items():
                t.connect(incarnation, connection, cid)
            for connection in left:
                t.disconnect(incarnation, connection)
            t.set_node_version(incarnation, version)

        await self.run(step)

    async def node_records(self, incarnation: str) -> tuple[int, Sequence[Record], Mapping[str, str]]:
        return await self.run(
            lambda t: (t.node_version(incarnation), t.records(incarnation), dict(t.connections(incarnation)))
        )

    async def drop_node(self, incarnation: str) -> bool:
        def step(t: Tables) -> bool:
            if t.records(incarnation):
                return False
            t.drop_node(incarnation)
            return True

        return await self.run(step)


class LocalIndex(Part):
    """`IndexStore`."""

    async def index(self, user: str, cid: str) -> None:
        await self.run(lambda t: t.index(user, cid, t.now))

    async def touch(self, user: str, cids: Sequence[str]) -> None:
        def step(t: Tables) -> None:
            for cid in cids:
                t.touch(user, cid, t.now)

        await self.run(step)

    async def unindex(self, user: str, cid: str) -> None:
        await self.run(lambda t: t.unindex(user, cid))

    async def list_user(self, user: str, before: tuple[int, str] | None, limit: int) -> Sequence[tuple[str, int]]:
        return await self.run(lambda t: t.list_user(user, before, limit))

    async def list_all(self, shard: int, after: str, limit: int) -> Sequence[str]:
        return await self.run(lambda t: t.list_all(shard, after, limit))
