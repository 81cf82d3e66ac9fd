"""One conversation as plain data, for tests of the pure core: reads what a transition asks for, applies effects."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from convener.core import conversation, intents
from convener.core.audit import ConversationFacts, Violation, audit_conversation
from convener.core.model import (
    MESSAGES,
    REMEMBERED,
    AddAlarm,
    AddInbox,
    AddLog,
    AddPieces,
    AppendReply,
    AppendRequest,
    ClaimReply,
    ClaimRequest,
    ClearPieces,
    CloseAsks,
    Closing,
    Conversation,
    DropAlarm,
    DropInbox,
    Effect,
    Erase,
    InboxEntry,
    InterruptReply,
    LogEntry,
    Meta,
    NewMessage,
    OpenAsks,
    Publish,
    Remember,
    SendReply,
    SetMeta,
    SetState,
    StopReply,
    TrimInbox,
    TrimLog,
    TrimSeen,
)
from convener.core.wire import answer_event, event, input_event, turn_id

T = TypeVar("T")

GOOD = {"OK", "STOPPED", "STOPPING", "OWNED", "CANCELLED", "ALREADY"}


class World:
    """The store's side of one conversation."""

    def __init__(self, user: str = "u") -> None:
        self.meta: Meta | None = Meta(user=user, generation="g", created=1, updated=1)
        self.log: list[LogEntry] = []
        self.inbox: list[InboxEntry] = []
        self.seen: dict[str, int] = {}
        self.state: bytes | None = None
        self.asks: dict[str, str] = {}
        self.pieces: list[str] = []
        self.alarms: dict[str, str] = {}
        self.published: list[str] = []
        self.now = 1_000

    @property
    def head(self) -> Meta:
        assert self.meta is not None
        return self.meta

    def read(self, message_id: str = "") -> Conversation:
        """What a transition may look at."""
        tip = (self.log[-1].epoch, self.log[-1].seq) if self.log else (0, 0)
        return Conversation(
            self.meta,
            tip,
            tuple(self.inbox),
            self.seen.get(message_id),
            asks=frozenset(self.asks),
            alarms=len(self.alarms),
            alarm=self.alarms.get(message_id),
        )

    def apply(self, result: tuple[T, tuple[Effect, ...]]) -> T:
        """Apply the effects; a publication has to come last, and alone."""
        reply, effects = result
        said = [e for e in effects if isinstance(e, Publish)]
        assert said == [] or (len(said) == 1 and effects[-1] is said[0])
        for effect in effects:
            self._apply(effect)
        return reply

    def _apply(self, effect: Effect) -> None:
        match effect:
            case SetMeta(meta):
                self.meta = meta
            case AddLog(entries):
                self.log += entries
            case TrimLog(seq):
                self.log = [e for e in self.log if e.seq > seq]
            case AddInbox(entry):
                self.inbox.append(entry)
                if entry.kind in REMEMBERED:
                    assert entry.message_id not in self.seen
                    self.seen[entry.message_id] = entry.position
            case DropInbox(position, message_id):
                self.inbox = [e for e in self.inbox if e.position != position]
                if message_id:
                    del self.seen[message_id]
            case Remember(message_id, position):
                self.seen[message_id] = position
            case TrimInbox(position):
                self.inbox = [e for e in self.inbox if e.position > position]
            case TrimSeen(position):
                self.seen = {m: p for m, p in self.seen.items() if not 0 < p <= position}
            case SetState(state):
                self.state = state
            case OpenAsks(asks):
                self.asks |= dict(asks)
            case CloseAsks(ask_id):
                self.asks = {a: d for a, d in self.asks.items() if ask_id not in ("", a)}
            case AddPieces(pieces):
                self.pieces += pieces
            case ClearPieces():
                self.pieces = []
            case AddAlarm(alarm_id, data):
                self.alarms[alarm_id] = data
            case DropAlarm(alarm_id):
                self.alarms.pop(alarm_id, None)
            case Erase():
                self.meta, self.log, self.inbox, self.seen, self.state = None, [], [], {}, None
                self.asks, self.pieces, self.alarms = {}, [], {}
            case Publish(message):
                self.published.append(message)

    # -- the steps, with what they usually get -------------------------------------------------------------------

    def send(self, message_id: str, *, max_pending: int = 100, reject_busy: bool = False) -> SendReply:
        message = NewMessage(message_id, "u", '"hi"')
        state = self.read(message_id)
        return self.apply(conversation.send(state, message, max_pending, reject_busy, self.now))

    def claim(self, me: str, nonce: str = "n", **changes: Any) -> ClaimReply:
        """Claim from whoever the head names now; `changes` are fields of the request."""
        head = self.meta or Meta("u", "g", 1, 1)
        request = ClaimRequest(me, nonce, head.owner, head.epoch, "start")
        return self.apply(conversation.claim(self.read(), replace(request, **changes), self.now))

    def append(self, *events: str, **changes: Any) -> AppendReply:
        """Append as the owner, with nothing else changed but `changes`, fields of the request."""
        m = self.head
        request = AppendRequest(m.owner, m.epoch, m.seq, "b", m.cursor, m.done, m.base, events)
        return self.apply(conversation.append(self.read(), replace(request, **changes), self.now))

    def take_in(self) -> AppendReply:
        """Append every unread message as an input, and every unread answer."""
        taken = [e for e in self.inbox if e.kind in REMEMBERED]
        cursor = max([self.head.cursor, *(e.position for e in taken)])
        return self.append(*map(taken_in, taken), cursor=cursor)

    def answer(self, position: int) -> AppendReply:
        """End a turn."""
        return self.append(event("turn_done", turn_id(position), self.now, "{}"), done=position, ends_turn=True)

    def ask(self, *ask_ids: str) -> AppendReply:
        """Ask questions, each in the turn that its id names."""
        events = [event("ask", ask_id.split(".")[0], 1, f'{{"ask_id":"{ask_id}"}}') for ask_id in ask_ids]
        return self.append(*events, asks=tuple((ask_id, f'{{"of":"{ask_id}"}}') for ask_id in ask_ids))

    def reply(self, ask_id: str, message_id: str = "r1") -> SendReply:
        """Answer a question."""
        message = NewMessage(message_id, "u", f'{{"ask_id":"{ask_id}","data":"yes"}}', "answer")
        return self.apply(intents.answer(self.read(message_id), ask_id, message, self.now))

    def press(self, turn: str = "") -> InterruptReply:
        return self.apply(intents.interrupt(self.read(), turn, self.now))

    def park(self, closing: Closing) -> AppendReply:
        """Leave the conversation to whoever says `resume`."""
        return self.append(closing=closing)

    def resume(self) -> str:
        return self.apply(conversation.resume(self.read(), self.now))

    def stream(self, *texts: str, position: int = 1, owner: str | None = None, epoch: int | None = None) -> str:
        """Add pieces, as the owner."""
        owner, epoch = self.head.owner if owner is None else owner, self.head.epoch if epoch is None else epoch
        return self.apply(intents.pieces(self.read(), owner, epoch, position, texts))

    def fire(self, alarm_id: str, *, max_pending: int = 100) -> SendReply:
        return self.apply(intents.fire(self.read(alarm_id), alarm_id, max_pending, self.now))

    def set_alarm(self, alarm_id: str, data: str = "1") -> str:
        return self.apply(intents.set_alarm(self.read(alarm_id), alarm_id, data))

    def stop(self, me: str = "a~1", reason: str = "why", buried: str = "") -> StopReply:
        return self.apply(conversation.stop(self.read(), me, reason, buried, self.now))

    def release(self) -> str:
        m = self.head
        return self.apply(conversation.release(self.read(), m.owner, m.epoch, m.seq))

    # -- judgement -----------------------------------------------------------------------------------------------

    def facts(self, queued: bool = False) -> ConversationFacts:
        return ConversationFacts("c", self.head, self.log, self.inbox, self.seen, queued, set(self.asks))

    def violations(self, queued: bool = False) -> list[Violation]:
        return audit_conversation(self.facts(queued))


def taken_in(entry: InboxEntry) -> str:
    """The log event of an entry that enters the log."""
    return input_event(entry) if entry.kind in MESSAGES else answer_event(entry)


def owned(me: str = "a~1", messages: int = 0) -> World:
    """A conversation that `me` owns, with `messages` messages m1, m2, … taken in and not answered."""
    world = World()
    assert world.claim(me).outcome == "OK"
    for i in range(messages):
        world.send(f"m{i + 1}")
    if messages:
        assert world.take_in().outcome == "OK"
    return world
