"""The data of one conversation as the store keeps it, and the effects that a transition may have on it.

The in-memory and the SQLite store apply these effects; the Lua scripts do the same inside Redis. One contract
suite holds the three to the same outcomes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

Status = Literal["running", "stopping", "stopped"]
EntryKind = Literal["message", "stop", "interrupt"]
ClaimReason = Literal["start", "wake", "takeover", "handoff", "restart"]

SEEN_WINDOW: Final = 256
"""How many of the latest message ids are remembered at least (I8); unanswered ones always are."""

PUBLISH_LIMIT: Final = 8192
"""Bytes of data in one publication; above it only numbers are published and the receiver reads the stream."""

MAX_UNREAD: Final = 1000
"""Unread inbox entries beyond which an intent is refused: intents are exempt from the limit on messages."""

STRIKES: Final = 3
STRIKE_WINDOW_MS: Final = 600_000


@dataclass(frozen=True, slots=True)
class Meta:
    """The conversation's head. All numbers start at 0, which means "none yet"; times are ms since 1970.

    Attributes:
        owner: incarnation of the owner, "" for nobody.
        epoch: fencing token of the latest ownership, or above it if it was raised.
        seq: number of the last log entry.
        batch: id of the last appended batch.
        cursor: inbox position up to which everything is in the log.
        position: last inbox position given out.
        done: highest position that is answered or given up.
        base: the seq before the first entry that a new owner must read.
        nonce: the owner's slot nonce.
        strikes: takeovers of the turn at position `struck` since `strike_at`.
    """

    user: str
    generation: str
    created: int
    updated: int
    metadata: str = "{}"
    owner: str = ""
    epoch: int = 0
    seq: int = 0
    batch: str = ""
    cursor: int = 0
    position: int = 0
    done: int = 0
    base: int = 0
    nonce: str = ""
    status: Status = "running"
    strikes: int = 0
    struck: int = 0
    strike_at: int = 0


@dataclass(frozen=True, slots=True)
class InboxEntry:
    """An accepted entry that nobody has taken in; `data` is JSON text, `ts` the store's clock in ms."""

    position: int
    message_id: str
    kind: EntryKind
    user: str
    ts: int
    data: str


@dataclass(frozen=True, slots=True)
class LogEntry:
    """A log entry: `event` is JSON text of ``{kind, turn, ts, data}`` and never changes once written (I4)."""

    epoch: int
    seq: int
    event: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Everything a transition may look at.

    Attributes:
        tip: (epoch, seq) of the last log entry, (0, 0) if there is none.
        inbox: unread entries by position.
        seen: position under which the message id in question was accepted; None if it is not remembered.
        last: highest position that the inbox and the remembered ids know of; only read if the head is gone.
    """

    meta: Meta | None = None
    tip: tuple[int, int] = (0, 0)
    inbox: tuple[InboxEntry, ...] = ()
    seen: int | None = None
    last: int = 0


# -- effects
# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SetMeta:
    """Replace the head."""

    meta: Meta


@dataclass(frozen=True, slots=True)
class AddLog:
    """Append entries."""

    entries: tuple[LogEntry, ...]


@dataclass(frozen=True, slots=True)
class AddInbox:
    """Append to the inbox; the id of a message (not of an intent) is remembered in `seen`."""

    entry: InboxEntry


@dataclass(frozen=True, slots=True)
class DropInbox:
    """Remove one entry and forget its message id."""

    position: int
    message_id: str


@dataclass(frozen=True, slots=True)
class TrimInbox:
    """Remove the entries up to and including `position`."""

    position: int


@dataclass(frozen=True, slots=True)
class TrimSeen:
    """Forget message ids with 0 < position <= `position`."""

    position: int


@dataclass(frozen=True, slots=True)
class SetState:
    """Replace the agent's durable state."""

    state: bytes


@dataclass(frozen=True, slots=True)
class Erase:
    """Remove every key of the conversation."""


@dataclass(frozen=True, slots=True)
class Publish:
    """Tell the conversation's channel; always the last effect."""

    message: str


Effect = SetMeta | AddLog | AddInbox | DropInbox | TrimInbox | TrimSeen | SetState | Erase | Publish


# -- requests
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NewMessage:
    """A message on its way into an inbox. `data` is JSON text."""

    message_id: str
    user: str
    data: str


@dataclass(frozen=True, slots=True)
class ClaimRequest:
    """Compare-and-set of the owner.

    Attributes:
        owner, epoch: what the head must have now.
        floor: an epoch that the new one must exceed.
        user, generation: the log's, if the head is gone and has to be rebuilt.
    """

    me: str
    nonce: str
    owner: str
    epoch: int
    reason: ClaimReason
    floor: int = 0
    user: str = ""
    generation: str = ""


@dataclass(frozen=True, slots=True)
class AppendRequest:
    """One batch of the owner.

    Attributes:
        expected: seq that the log must have now.
        cursor, done, base: new values; they never go back.
        events: JSON texts of log entries, numbered from ``expected + 1``.
        state: the agent's durable state, None to leave it.
        stopped: this batch ends the conversation: the owner is cleared, the status becomes `stopped`.
    """

    owner: str
    epoch: int
    expected: int
    batch: str
    cursor: int
    done: int
    base: int
    events: tuple[str, ...]
    state: bytes | None = None
    stopped: bool = False


# -- replies
# ---------------------------------------------------------------------------------------------------

SendOutcome = Literal["OK", "DUP", "NOT_FOUND", "CLOSED", "FULL", "BUSY"]
ClaimOutcome = Literal["OK", "CONFLICT", "CLOSED", "NOT_FOUND"]
ResolveOutcome = Literal["OWNED", "CANCELLED", "MOVED", "NOT_FOUND"]
AppendOutcome = Literal["OK", "GAP", "FENCED", "PENDING"]
ReleaseOutcome = Literal["OK", "PENDING", "FENCED"]
DisownOutcome = Literal["OK", "PENDING", "CONFLICT", "NOT_FOUND"]
InterruptOutcome = Literal["OK", "IDLE", "STALE", "FULL", "CLOSED", "NOT_FOUND"]
StopOutcome = Literal["STOPPED", "STOPPING", "ALREADY", "NOT_FOUND"]
ResumeOutcome = Literal["OK", "RUNNING", "BUSY", "NOT_FOUND"]
EraseOutcome = Literal["OK", "REFUSED"]
UnsendOutcome = Literal["OK", "REFUSED"]


@dataclass(frozen=True, slots=True)
class SendReply:
    """Outcome of SEND; `position`, `owner` and `epoch` mean something for OK and DUP."""

    outcome: SendOutcome
    position: int = 0
    owner: str = ""
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class ClaimReply:
    """Outcome of CLAIM.

    For OK, `meta` is the head after it and `inbox` what is unread; for CONFLICT and CLOSED `meta` is the head
    as it is. `opened` is the entry that was appended, None when the same claim is repeated.
    """

    outcome: ClaimOutcome
    meta: Meta | None = None
    inbox: tuple[InboxEntry, ...] = ()
    opened: LogEntry | None = None


@dataclass(frozen=True, slots=True)
class ResolveReply:
    """What became of a claim with unknown outcome."""

    outcome: ResolveOutcome
    meta: Meta | None = None
    inbox: tuple[InboxEntry, ...] = ()


@dataclass(frozen=True, slots=True)
class AppendReply:
    """Outcome of APPEND: last seq and last batch id of the log after it; `owner`, `epoch` for FENCED."""

    outcome: AppendOutcome
    seq: int = 0
    batch: str = ""
    owner: str = ""
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class InterruptReply:
    """Outcome of INTERRUPT; `position`, `owner` and `epoch` mean something for OK."""

    outcome: InterruptOutcome
    position: int = 0
    owner: str = ""
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class StopReply:
    """Outcome of STOP; `owner`, `nonce`, `user` as they were before it: who closes frees the slot."""

    outcome: StopOutcome
    owner: str = ""
    nonce: str = ""
    user: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Created:
    """The head, and whether it was made by this call."""

    meta: Meta
    created: bool


@dataclass(frozen=True, slots=True)
class Page:
    """A piece of the log.

    Attributes:
        resync: the place asked for is not in this log; `entries` then start at the beginning.
        generation: of the log.
        tip: (epoch, seq) of the last entry that the log has, which may be beyond this page.
    """

    generation: str
    tip: tuple[int, int]
    entries: tuple[LogEntry, ...] = field(default=())
    resync: bool = False
