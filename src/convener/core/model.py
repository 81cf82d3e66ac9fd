"""The data of one conversation as the store keeps it, and the effects that a transition may have on it.

The in-memory and the SQLite store apply these effects; the Lua scripts do the same inside Redis. One contract
suite holds the three to the same outcomes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

Status = Literal["running", "stopping", "stopped", "failed", "held"]
"""`failed`: given up after too many takeovers of one turn; `held`: a turn waits for somebody to say `resume`."""

Closing = Literal["", "stopped", "failed", "held"]
EntryKind = Literal["message", "interrupting", "alarm", "answer", "stop", "interrupt"]
ClaimReason = Literal["start", "wake", "takeover", "handoff", "restart", "interrupt", "answer", "alarm", "resume"]

MESSAGES: Final = frozenset({"message", "interrupting", "alarm"})
"""Kinds of inbox entries that a turn answers; an interrupting one ends the turns before it."""

REMEMBERED: Final = MESSAGES | {"answer"}
"""Kinds of inbox entries whose ids are remembered in `seen`, and which enter the log (I8)."""

RETRACTABLE: Final = frozenset({"message", "interrupting"})
"""Kinds of inbox entries that UNSEND takes back: with an alarm or an answer, what it came from is gone already."""

SEEN_WINDOW: Final = 256
"""How many of the latest message ids are remembered at least (I8); unanswered ones always are."""

PUBLISH_LIMIT: Final = 8192
"""Bytes of data in one publication; above it only numbers are published and the receiver reads the stream."""

MAX_UNREAD: Final = 1000
"""Unread inbox entries beyond which an intent is refused: intents are exempt from the limit on messages."""

MAX_ALARMS: Final = 1000
"""Alarms of one conversation that may be set at a time."""

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
        halted: turns up to this position are to be interrupted, if they have not ended.
        asks: how many questions of the open turn wait for an answer.
        archived, archived_epoch: the last entry that the archive has: everything up to it is there.
        manifest: name of the object that lists where.
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
    halted: int = 0
    asks: int = 0
    archived: int = 0
    archived_epoch: int = 0
    manifest: str = ""


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
        asks: ids of the open questions.
        alarms: how many alarms are set.
        alarm: data (JSON text) of the alarm in question, None if it is not set.
        places: which of the places in question, (epoch, seq), the log in the store has.
    """

    meta: Meta | None = None
    tip: tuple[int, int] = (0, 0)
    inbox: tuple[InboxEntry, ...] = ()
    seen: int | None = None
    last: int = 0
    asks: frozenset[str] = frozenset()
    alarms: int = 0
    alarm: str | None = None
    places: frozenset[tuple[int, int]] = frozenset()


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
class TrimLog:
    """Remove the entries up to and including `seq`; there is one above it."""

    seq: int


@dataclass(frozen=True, slots=True)
class AddInbox:
    """Append to the inbox; an id of a `REMEMBERED` kind is remembered in `seen`."""

    entry: InboxEntry


@dataclass(frozen=True, slots=True)
class DropInbox:
    """Remove one entry and forget its message id, if one is given."""

    position: int
    message_id: str


@dataclass(frozen=True, slots=True)
class Remember:
    """Remember a message id under a position; 0: it was repaired into the log."""

    message_id: str
    position: int


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
class OpenAsks:
    """Enter questions as open: id and what the node that takes the answer must know (JSON text)."""

    asks: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class CloseAsks:
    """Close one question, or all without an id."""

    ask_id: str = ""


@dataclass(frozen=True, slots=True)
class AddPieces:
    """Add pieces of the answer that is being written (JSON texts)."""

    pieces: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ClearPieces:
    """Remove all pieces."""


@dataclass(frozen=True, slots=True)
class AddAlarm:
    """Set an alarm; `data` is JSON text."""

    alarm_id: str
    data: str


@dataclass(frozen=True, slots=True)
class DropAlarm:
    """Remove an alarm."""

    alarm_id: str


@dataclass(frozen=True, slots=True)
class Erase:
    """Remove every key of the conversation."""


@dataclass(frozen=True, slots=True)
class Publish:
    """Tell the conversation's channel; always the last effect."""

    message: str


Effect = (
    SetMeta
    | AddLog
    | TrimLog
    | AddInbox
    | DropInbox
    | Remember
    | TrimInbox
    | TrimSeen
    | SetState
    | OpenAsks
    | CloseAsks
    | AddPieces
    | ClearPieces
    | AddAlarm
    | DropAlarm
    | Erase
    | Publish
)


# -- requests
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NewMessage:
    """An entry on its way into an inbox. `data` is JSON text."""

    message_id: str
    user: str
    data: str
    kind: EntryKind = "message"


@dataclass(frozen=True, slots=True)
class ClaimRequest:
    """Compare-and-set of the owner.

    Attributes:
        owner, epoch: what the head must have now.
        floor: an epoch that the new one must exceed.
        acted: the open turn did something besides waiting for a person, as far as its former node has said.
        generation: of the log, which must be that one; "" does not compare.
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
    acted: bool = False


@dataclass(frozen=True, slots=True)
class AppendRequest:
    """One batch of the owner.

    Attributes:
        expected: seq that the log must have now.
        cursor, done, base: new values; they never go back.
        events: JSON texts of log entries, numbered from ``expected + 1``.
        state: the agent's durable state, None to leave it.
        closing: the status that this batch leaves the conversation in, without an owner; "" to go on.
        halted: new value; it never goes back.
        asks: questions that this batch opens: id, and what a node must know to take the answer (JSON text).
        ends_turn: every open question is closed, and what was streamed is void: the turn is over.
        begins_turn: what was streamed is void: a new attempt begins.
        finishing: a later batch that ends the turn waits for this one: a full store takes it too.
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
    closing: Closing = ""
    halted: int = 0
    asks: tuple[tuple[str, str], ...] = ()
    ends_turn: bool = False
    begins_turn: bool = False
    finishing: bool = False


# -- replies
# ---------------------------------------------------------------------------------------------------

SendOutcome = Literal["OK", "DUP", "NOT_FOUND", "CLOSED", "FAILED", "HELD", "FULL", "BUSY", "ASK_CLOSED"]
AlarmOutcome = Literal["OK", "DUP", "NOT_FOUND", "CLOSED", "FULL"]
PieceOutcome = Literal["OK", "FENCED", "STALE"]
ClaimOutcome = Literal["OK", "CONFLICT", "CLOSED", "NOT_FOUND"]
ResolveOutcome = Literal["OWNED", "CANCELLED", "MOVED", "NOT_FOUND"]
AppendOutcome = Literal["OK", "GAP", "FENCED", "PENDING"]
ReleaseOutcome = Literal["OK", "PENDING", "FENCED"]
DisownOutcome = Literal["OK", "PENDING", "CONFLICT", "NOT_FOUND"]
InterruptOutcome = Literal["OK", "IDLE", "STALE", "FULL", "CLOSED", "FAILED", "HELD", "NOT_FOUND"]
StopOutcome = Literal["STOPPED", "STOPPING", "ALREADY", "NOT_FOUND"]
ResumeOutcome = Literal["OK", "RUNNING", "BUSY", "NOT_FOUND"]
EraseOutcome = Literal["OK", "REFUSED"]
UnsendOutcome = Literal["OK", "REFUSED"]


@dataclass(frozen=True, slots=True)
class SendReply:
    """Outcome of SEND, ANSWER and FIRE; `position`, `owner` and `epoch` mean something for OK and DUP."""

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
        first: seq of the first entry that the store has; what is before it has been trimmed.
        archived: the archive has everything up to this seq.
        manifest: name of the object that lists where; of the same instant as everything else here.
    """

    generation: str
    tip: tuple[int, int]
    entries: tuple[LogEntry, ...] = field(default=())
    resync: bool = False
    first: int = 1
    archived: int = 0
    manifest: str = ""
