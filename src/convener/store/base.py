"""What a store must do. Narrow protocols that state obligations: what is atomic, what may be lost, who calls when.

Obligations of every method:

* One call is one atomic step with exactly the outcome of the function of the same name in `convener.core`; what it
  publishes is published inside that step, so nobody ever hears of what is not committed.
* Times are the store's own clock, in ms since 1970.
* `StoreUnavailable` means that the outcome is *unknown*: the step may have happened, may happen late, or never.
  `StoreFull` means that it did not happen. Every wait has a deadline.
* Calls of one caller that touch one conversation (or one user, or one node) take effect in the order in which they
  were made, as long as none of them fails. An owner may therefore chain appends without waiting.
* Every key belongs to one of the groups of `keys.py` and is deleted by what is named there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

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
from convener.core.retention import ArchivedOutcome, ArchivedRequest, ExpireOutcome


class ConversationStore(Protocol):
    """One conversation. Every step is the one of the same name in `convener.core.conversation` or `.intents`."""

    async def create(self, cid: str, user: str, metadata: str, generation: str) -> Created: ...

    async def send(
        self, cid: str, message: NewMessage, *, max_pending: int, reject_busy: bool = False
    ) -> SendReply: ...

    async def unsend(self, cid: str, message_id: str, position: int) -> UnsendOutcome: ...

    async def claim(self, cid: str, request: ClaimRequest) -> ClaimReply: ...

    async def resolve(self, cid: str, me: str, nonce: str, epoch: int) -> ResolveReply: ...

    async def append(self, cid: str, request: AppendRequest) -> AppendReply: ...

    async def repair(self, cid: str, request: RepairRequest) -> RepairOutcome:
        """REPAIR (`convener.core.repair.repair`)."""
        ...

    async def release(self, cid: str, owner: str, epoch: int, seq: int) -> ReleaseOutcome: ...

    async def disown(self, cid: str, owner: str, epoch: int) -> DisownOutcome: ...

    async def stop(self, cid: str, me: str, reason: str, buried: str) -> StopReply: ...

    async def interrupt(self, cid: str, turn: str) -> InterruptReply: ...

    async def answer(self, cid: str, ask_id: str, message: NewMessage) -> SendReply: ...

    async def resume(self, cid: str) -> ResumeOutcome: ...

    async def set_metadata(self, cid: str, metadata: str) -> Meta | None: ...

    async def erase(self, cid: str) -> EraseOutcome: ...

    async def head(self, cid: str) -> Meta | None:
        """The head, None if there is no conversation."""
        ...

    async def heads(self, cids: Sequence[str]) -> Sequence[Meta | None]:
        """Heads of several conversations, in order; each atomic by itself."""
        ...

    async def read(self, cid: str, after: Cursor, limit: int) -> Page | None:
        """At most `limit` entries after a place, with generation and tip, in one step.

        An exact cursor whose generation or entry is not this log's sets `resync` and reads from the beginning. A
        bare number reads the entries with a greater seq (none if it is beyond the tip). None without conversation.
        What was trimmed is not here: the page then says where the rest begins and which manifest the archive has, and
        `convener.store.archive` reads both as one.
        """
        ...

    async def inbox(self, cid: str) -> tuple[Meta, Sequence[InboxEntry]] | None:
        """Head and unread entries in one step: the owner goes by the store's cursor, not by its own number."""
        ...

    async def seen(self, cid: str, message_ids: Sequence[str]) -> Sequence[int | None]:
        """Positions under which these message ids are remembered."""
        ...

    async def all_seen(self, cid: str) -> Mapping[str, int]:
        """All remembered message ids with their positions, for the auditor."""
        ...

    async def state(self, cid: str) -> bytes | None:
        """The agent's durable state."""
        ...

    async def asks(self, cid: str) -> Mapping[str, str]:
        """The open questions: id → what their `OpenAsks` said (JSON text)."""
        ...

    async def add_pieces(self, cid: str, owner: str, epoch: int, position: int, pieces: Sequence[str]) -> PieceOutcome:
        """PIECES (`convener.core.intents.pieces`). Pieces need not outlive the process of a local store."""
        ...

    async def pieces(self, cid: str) -> Sequence[str]:
        """Pieces of the answer that is being written, in the order in which they were added."""
        ...

    async def set_alarm(self, cid: str, alarm_id: str, data: str) -> AlarmOutcome: ...

    async def fire(self, cid: str, alarm_id: str, *, max_pending: int) -> SendReply: ...

    async def alarms(self, cid: str) -> Mapping[str, str]:
        """The alarms that are set: id → data (JSON text)."""
        ...

    async def drop_alarm(self, cid: str, alarm_id: str) -> bool:
        """Remove an alarm. False if it is not set."""
        ...


class RetentionStore(Protocol):
    """What leaves the store (`convener.core.retention`)."""

    async def archived(self, cid: str, request: ArchivedRequest) -> ArchivedOutcome: ...

    async def expire(self, cid: str, before: int) -> ExpireOutcome: ...


class TimerStore(Protocol):
    """What is to happen when, over all conversations, in `TIMER_SHARDS` parts (`timer_shard`).

    What an entry stands for lies with its conversation, so entering both takes two steps. The entry of a question's
    deadline comes first, so that no crash leaves a question without one, and stays until the question was answered or
    its turn has ended: whoever finds no open question may be early (`models/asking.py`). The entry of an alarm comes
    first as well, so that no crash leaves one that never fires, and stays for a while if it finds no alarm. Early
    removal would lose what is to happen, a leftover does no harm.
    """

    async def set_timer(self, cid: str, timer_id: str, due: int) -> None:
        """Enter, or move. `due` is in ms since 1970."""
        ...

    async def clear_timer(self, cid: str, timer_id: str) -> bool: ...

    async def due_timers(self, shard: int, limit: int) -> Sequence[tuple[str, str, int]]:
        """At most `limit` of (conversation, timer, due) that are due by the store's clock, longest overdue first, ties
        by ``conversation|timer``. What cannot be done yet has to be moved, or it stands before what can.
        """
        ...


class SlotStore(Protocol):
    """One user: slots and queued starts (`convener.core.admission`)."""

    async def slots(self, user: str) -> Mapping[str, Slot]: ...

    async def slot(self, user: str, cid: str) -> Slot | None: ...

    async def reserve(self, user: str, cid: str, slot: Slot, *, raised_limit: int, read: Slot | None) -> ReserveReply:
        """RESERVE. On OK a queued start of the same conversation is removed. `user` is never empty."""
        ...

    async def unreserve(self, user: str, cid: str, nonce: str) -> Waiting | None:
        """UNRESERVE: free the slot if it has this nonce. Returns the longest waiting start, if there is one."""
        ...

    async def enqueue(self, user: str, cid: str, incarnation: str, reason: str) -> bool:
        """Enter the queue once per conversation (again: the entry's incarnation is replaced, its place kept).
        False if it is full (`MAX_WAITING`).
        """
        ...

    async def dequeue(self, user: str, cid: str) -> bool:
        """Leave the queue."""
        ...

    async def waiting(self, user: str) -> Sequence[Waiting]: ...


class MembershipStore(Protocol):
    """The nodes (`convener.core.membership`). Changes are announced on the `sync` channel as
    ``{"t":"members","ver":N}``.
    """

    async def join(self, incarnation: str, member: Member) -> RenewReply: ...

    async def renew(self, incarnation: str, info: str | None = None) -> RenewReply: ...

    async def reap(self, ttl_ms: int, by: str = "") -> Sequence[str]: ...

    async def bury(self, incarnation: str, ttl_ms: int, by: str = "") -> BuryOutcome: ...

    async def supersede(self, incarnation: str, by: str, deadline: int) -> SupersedeOutcome: ...

    async def leave(self, incarnation: str) -> None: ...

    async def rebury(self, incarnations: Sequence[str]) -> None: ...

    async def forget(self, incarnation: str, kept_ms: int) -> None: ...

    async def membership(self) -> Membership:
        """Everybody, in one step."""
        ...

    async def is_buried(self, incarnation: str) -> bool: ...


class NodeStore(Protocol):
    """What a node says of itself: records of its conversations and its clients. Written by the node (and, after its
    burial, removed by recovery).
    """

    async def put_record(self, incarnation: str, record: Record) -> None:
        """Write one record now: before the claim."""
        ...

    async def record(self, incarnation: str, cid: str) -> Record | None: ...

    async def drop_record(self, incarnation: str, cid: str, nonce: str | None) -> bool:
        """Remove the record if it has this nonce (None: whatever it has). Keyed by nonce, so that a late removal
        cannot hit the record of a later start.
        """
        ...

    async def flush(
        self,
        incarnation: str,
        version: int,
        records: Sequence[Record],
        joined: Mapping[str, str],
        left: Sequence[str],
    ) -> None:
        """Write changed records and clients, and the version they are as of, in one step. A record is only
        replaced, never made anew: whoever removed it meanwhile is right.
        """
        ...

    async def node_records(self, incarnation: str) -> tuple[int, Sequence[Record], Mapping[str, str]]:
        """(version, records, connection → conversation) of a node. Not one step; at least as new as `version`."""
        ...

    async def drop_node(self, incarnation: str) -> bool:
        """Remove what is left of a buried node if it has no records. False if it still has some."""
        ...


class IndexStore(Protocol):
    """Lists of conversations. Entered before creation, removed when the conversation is erased."""

    async def index(self, user: str, cid: str) -> None:
        """Enter `cid` into its user's list (activity now) and into the list of all."""
        ...

    async def touch(self, user: str, cids: Sequence[str]) -> None:
        """Activity now, for those that are in the list."""
        ...

    async def unindex(self, user: str, cid: str) -> None: ...

    async def list_user(self, user: str, before: tuple[int, str] | None, limit: int) -> Sequence[tuple[str, int]]:
        """(conversation, last activity in ms), newest first, ties by id descending, strictly after `before`."""
        ...

    async def list_all(self, shard: int, after: str, limit: int) -> Sequence[str]:
        """Ids in one of the 64 shards of the list of all, in order of id, greater than `after`."""
        ...


Handler = Callable[[bytes], None]
"""Takes one publication. Must neither block nor await nor raise: it hands on to a bounded queue or changes memory."""


class Bus(Protocol):
    """Publications: ordered per channel and connection, possibly lost. Loss is made known by `on_gap`."""

    async def subscribe(self, channel: str, handler: Handler, on_gap: Callable[[], None]) -> None:
        """Subscribe; returns when the confirmation has been *read*, so whatever is published later is heard.

        `on_gap` is called (on the event loop) whenever publications may have been missed: after a reconnect, an
        `sunsubscribe` by the server, a deaf period. One handler per channel.
        """
        ...

    async def unsubscribe(self, channel: str) -> None: ...

    async def publish(self, channel: str, payload: bytes) -> None:
        """Publish; may be lost without an error at the subscribers."""
        ...

    def heard(self) -> float:
        """Boot-time clock, in seconds, when a publication or a probe last arrived on *every* subscriber connection."""
        ...


class HeartbeatLink(Protocol):
    """Synchronous connections of the heartbeat's thread. Every method has a deadline below the renew interval and
    raises `StoreUnavailable` past it.
    """

    def renew(self, incarnation: str, info: str | None = None) -> RenewReply: ...

    def hold_live(self, incarnation: str) -> None:
        """Subscribe to the incarnation's `live` channel: the *existence* of the subscriber spares a late node."""
        ...

    def ping_live(self) -> None:
        """Show that the subscription still stands."""
        ...

    def close(self) -> None: ...


class TicketStore(Protocol):
    """Small secrets that any node may fetch once, soon."""

    async def keep_ticket(self, name: str, sealed: bytes, ttl: int) -> None:
        """Keep some bytes under a name that is new, for `ttl` ms.

        Raises:
            StoreFull: there are too many.
        """
        ...

    async def take_ticket(self, name: str) -> bytes | None:
        """What was kept under a name, for the first caller and in time; None for all others."""
        ...


@dataclass(frozen=True, slots=True)
class StoreInfo:
    """What the store says of itself; None is unknown (managed stores hide things)."""

    kind: str
    version: str | None = None
    memory_ratio: float | None = None
    eviction: str | None = None
    counts_subscribers: bool = True
    """Whether BURY can be asked: without, nobody is buried before the lease has ended."""


@dataclass(frozen=True, slots=True)
class Fallback:
    """A server is there again whose data may lack what it had acknowledged last.

    Attributes:
        place: the server, as `Store.place_of` names it.
        way: ``restart`` (another run of the same server), ``fail-over`` (a replica that followed it), ``replaced``
            (data of which it is not known that they were ever the same).
        missing: bytes of replication that it lacks for certain, at least; None if that cannot be told.
    """

    place: str
    way: Literal["restart", "fail-over", "replaced"]
    missing: int | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the replication of one server has come; None is unknown.

    Attributes:
        line: id of the line of replication.
        offset: bytes written to it.
        confirmed: bytes that at least one replica is known to have; None without replicas.
        replicas: how many are attached.
    """

    line: str | None = None
    offset: int | None = None
    confirmed: int | None = None
    replicas: int | None = None


class Durability(Protocol):
    """What may be lost of what was acknowledged, and how that is noticed."""

    def watch_fallbacks(self, told: Callable[[Fallback], None]) -> bool:
        """Call `told` on the event loop when a server is there again that may lack what was acknowledged, before
        anything is sent to it. False if that never happens here.
        """
        ...

    async def progress(self) -> Mapping[str, Progress]:
        """How far each server's replication has come; whatever was answered before this call is within `offset`."""
        ...

    def place_of(self, cid: str) -> str:
        """The server that has a conversation."""
        ...


class Store(
    ConversationStore,
    RetentionStore,
    TimerStore,
    SlotStore,
    MembershipStore,
    NodeStore,
    IndexStore,
    TicketStore,
    Bus,
    Durability,
    Protocol,
):
    """Everything above behind one object."""

    async def open(self) -> None:
        """Connect and probe.

        Raises:
            StoreUnavailable: it cannot be reached.
            ConfigurationError: it cannot be used (too old, an evicting policy, an ACL without the channels).
        """
        ...

    async def close(self) -> None:
        """Give everything back; calls that are under way end with `StoreUnavailable`."""
        ...

    def channel(self, kind: str, ident: str = "") -> str:
        """Name of a channel: kind ``c`` (a conversation), ``n`` (a node), ``sync`` (state and membership)."""
        ...

    async def info(self) -> StoreInfo: ...

    def heartbeat_link(self) -> HeartbeatLink:
        """A new link, not connected yet; used and closed by one thread."""
        ...
