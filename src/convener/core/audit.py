"""The auditor: which invariants does this data break, and where exactly?

Pure functions over what was read from a store (`convener.store.audit` reads it). They take nothing on trust:
a log is judged by its own entries, the head by the log, the inbox by both. Every finding names ids, seqs and
positions.

A position without an entry is not a finding by itself. Intents use one up, and UNSEND may take a message back
from between others. What tells a message that was lost from one that was taken back is `seen`: UNSEND forgets
the id in the same step, and nothing else forgets one that young. Answers have positions and are remembered like
messages; in the log they are found by their message id and by their question.

A conversation that is `failed` or `held` may have anything unread or unanswered until somebody says `resume`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

from convener.core.admission import Slot
from convener.core.membership import Membership
from convener.core.model import MESSAGES, REMEMBERED, SEEN_WINDOW, InboxEntry, LogEntry, Meta
from convener.core.replay import SETTLING
from convener.core.wire import turn_position


@dataclass(frozen=True, slots=True)
class Violation:
    """One finding: the broken invariant (``format``: it cannot be read), the place, the facts."""

    invariant: str
    where: str
    detail: str

    def __str__(self) -> str:
        return f"{self.invariant} {self.where}: {self.detail}"


@dataclass(frozen=True, slots=True)
class ConversationFacts:
    """One conversation, as of one instant.

    Attributes:
        log: all entries from `since` up to `meta.seq`, oldest first.
        inbox: unread entries by position.
        seen: remembered message ids with their positions.
        queued: its start waits in the user's queue.
        asks: ids of the open questions; None if they were not read.
        since: number of the first entry that is kept; what came before it was deleted for its age.
    """

    cid: str
    meta: Meta
    log: Sequence[LogEntry] = ()
    inbox: Sequence[InboxEntry] = ()
    seen: Mapping[str, int] = field(default_factory=dict[str, int])
    queued: bool = False
    asks: Collection[str] | None = None
    since: int = 1


@dataclass(frozen=True, slots=True)
class Event:
    """A log entry, taken apart."""

    epoch: int
    seq: int
    kind: str
    turn: str
    data: object

    @property
    def at(self) -> str:
        """The entry's place, for people."""
        return f"({self.epoch}, {self.seq})"

    def member(self, name: str) -> object:
        """A member of `data`, None if there is none."""
        data = self.data
        return cast("dict[str, object]", data).get(name) if isinstance(data, dict) else None


def parse_event(entry: LogEntry) -> Event | None:
    """Take an entry apart; None if it does not have the form of one."""
    try:
        value: Any = json.loads(entry.event)
        kind, turn, data = value["kind"], value["turn"], value["data"]
    except (ValueError, KeyError, TypeError):
        return None
    if not isinstance(kind, str) or not isinstance(turn, str):
        return None
    return Event(entry.epoch, entry.seq, kind, turn, data)


def audit_conversation(facts: ConversationFacts) -> list[Violation]:
    """I1, I2, I3, I8, I13 and I15 of one conversation."""
    events: list[Event] = []
    findings: list[tuple[str, str]] = []
    for entry in facts.log:
        event = parse_event(entry)
        if event is None:
            findings.append(("format", f"entry ({entry.epoch}, {entry.seq}) is not an event"))
        else:
            events.append(event)
    findings += _order(facts.log, facts.since)
    findings += _epochs(events, facts.since)
    findings += _head(facts)
    inputs, questions = _Inputs(events, facts.since), _Questions(events, facts.since)
    findings += inputs.findings
    findings += questions.findings
    findings += _settled(facts.meta, events, inputs)
    findings += _inbox(facts, inputs, questions)
    findings += _remembered(facts, inputs, questions)
    findings += _unanswered(facts)
    findings += _open_questions(facts, questions)
    findings += _stopped(facts.meta, events)
    return [Violation(invariant, f"conversation {facts.cid}", detail) for invariant, detail in findings]


def _order(log: Sequence[LogEntry], since: int) -> Iterator[tuple[str, str]]:
    """I1 and I3, from the numbers alone."""
    epoch, seq = 0, since - 1
    for entry in log:
        if entry.seq != seq + 1:
            yield "I1", f"after seq {seq} comes entry ({entry.epoch}, {entry.seq})"
        if entry.epoch < epoch:
            yield "I3", f"entry ({entry.epoch}, {entry.seq}) was added after epoch {epoch} had begun"
        epoch, seq = max(epoch, entry.epoch), entry.seq


def _epochs(events: Sequence[Event], since: int) -> Iterator[tuple[str, str]]:
    """I2, and that each `open` names the entry before it."""
    opened: dict[int, Event] = {}
    before: Event | None = None
    if since > 1 and events:
        # What its epoch began with, and what came before, is not there any more.
        before = opened[events[0].epoch] = events[0]
        events = events[1:]
    for event in events:
        first = opened.get(event.epoch)
        if event.kind == "open" and first is not None:
            yield "I2", f"epoch {event.epoch} is opened twice, at seq {first.seq} and at seq {event.seq}"
        elif event.kind == "open":
            opened[event.epoch] = event
            place = [before.epoch, before.seq] if before else [0, 0]
            if event.member("prev") != place:
                named = event.member("prev")
                yield "I1", f"the open entry {event.at} says that it follows {named}, but it follows {place}"
        elif first is None:
            opened[event.epoch] = event
            yield "I2", f"epoch {event.epoch} begins with {event.kind} at seq {event.seq}, not with open"
        before = event


def _head(facts: ConversationFacts) -> Iterator[tuple[str, str]]:
    """What the head says of the log and of the positions."""
    meta = facts.meta
    epoch, seq = (facts.log[-1].epoch, facts.log[-1].seq) if facts.log else (0, 0)
    if meta.seq != seq:
        yield "I1", f"the head says that the last seq is {meta.seq}, the log ends at {seq}"
    if meta.epoch < epoch:
        yield "I3", f"the head is at epoch {meta.epoch}, the log already at {epoch}"
    if not meta.done <= meta.cursor <= meta.position:
        yield "I8", f"done {meta.done}, cursor {meta.cursor}, position {meta.position} are not in order"


class _Inputs:
    """The messages in the log: by position, and by id."""

    def __init__(self, events: Iterable[Event], since: int) -> None:
        self.by_position: dict[int, Event] = {}
        self.by_id: dict[str, Event] = {}
        self.findings: list[tuple[str, str]] = []
        latest = 0
        for event in events:
            if event.kind != "input":
                continue
            position, message_id = turn_position(event.turn), event.member("message_id")
            if not position or not isinstance(message_id, str):
                self.findings.append(("format", f"the input {event.at} has no turn or no message id"))
                continue
            self._add(event, position, message_id, latest)
            latest = max(latest, position)
        self.first = 0 if since == 1 else min(self.by_position, default=sys.maxsize)
        """Of positions below it the log may not know any more: they are dense, but its beginning was deleted."""

    def _add(self, event: Event, position: int, message_id: str, latest: int) -> None:
        if (same := self.by_position.get(position)) is not None:
            problem = f"position {position} is in the log twice, at seq {same.seq} and at seq {event.seq}"
            self.findings.append(("I8", problem))
        elif position < latest:
            problem = f"position {position} comes after position {latest}, at seq {event.seq}"
            self.findings.append(("I8", problem))
        earlier = self.by_id.get(message_id)
        # Further apart than the window, the id had been forgotten and was accepted anew.
        if earlier is not None and position - turn_position(earlier.turn) <= SEEN_WINDOW:
            problem = f"message {message_id} is in the log twice, at seq {earlier.seq} and at seq {event.seq}"
            self.findings.append(("I8", problem))
        self.by_position.setdefault(position, event)
        self.by_id[message_id] = event

    def has(self, message_id: str, position: int) -> bool:
        """Whether the log has this message at this position."""
        event = self.by_position.get(position)
        return event is not None and event.member("message_id") == message_id


class _Questions:
    """The questions in the log and their answers, by the question's id; each is asked once and answered once."""

    def __init__(self, events: Iterable[Event], since: int) -> None:
        self._since = since
        self.asked: dict[str, Event] = {}
        self.answered: dict[str, Event] = {}
        self.findings: list[tuple[str, str]] = []
        self._messages: set[str] = set()
        for event in events:
            if event.kind not in ("ask", "answer"):
                continue
            ask_id = event.member("ask_id")
            if isinstance(ask_id, str):
                self._add(event, ask_id)
            else:
                self.findings.append(("format", f"the {event.kind} {event.at} names no question"))

    def _add(self, event: Event, ask_id: str) -> None:
        known, verb = (self.asked, "asked") if event.kind == "ask" else (self.answered, "answered")
        if (same := known.setdefault(ask_id, event)) is not event:
            problem = f"question {ask_id} is {verb} twice, at seq {same.seq} and at seq {event.seq}"
            self.findings.append(("I8", problem))
        if event.kind == "answer":
            if ask_id not in self.asked and self._since == 1:
                self.findings.append(("I8", f"the answer {event.at} is to question {ask_id}, which was not asked"))
            # Nobody's id: the answer that a deadline gives is remembered under the question's own, after a slash.
            message_id = event.member("message_id")
            self._messages.add(message_id if isinstance(message_id, str) else ask_id)

    def has(self, message_id: str) -> bool:
        """Whether the log has the answer with this message id."""
        return message_id in self._messages or message_id.rpartition("/")[2] in self._messages


def _settles(event: Event) -> set[int]:
    """Positions that a settling entry settles: its turn's, and those that it names."""
    named, own = event.member("settles"), turn_position(event.turn)
    positions = {own} if own else set[int]()
    if isinstance(named, list):
        positions |= {p for p in cast("list[object]", named) if isinstance(p, int)}
    return positions


def _settled(meta: Meta, events: Sequence[Event], inputs: _Inputs) -> Iterator[tuple[str, str]]:
    """I8: each message is settled once at most, and once if it counts as done."""
    settled: dict[int, Event] = {}
    given_up = 0
    for event in events:
        if event.kind == "stopped":
            given_up = event.seq
        if event.kind not in SETTLING:
            continue
        for position in sorted(_settles(event)):
            if position < inputs.first:
                continue
            if position not in inputs.by_position:
                yield "I8", f"{event.kind} {event.at} settles position {position}, which is not in the log"
            elif inputs.by_position[position].seq > event.seq:
                yield "I8", f"{event.kind} {event.at} settles position {position} before it was taken in"
            if (first := settled.setdefault(position, event)) is not event:
                yield "I8", f"position {position} is settled twice, at seq {first.seq} and at seq {event.seq}"
            if position > meta.done:
                yield "I8", f"position {position} is settled at seq {event.seq}, but done is {meta.done}"
    for position, event in inputs.by_position.items():
        if position <= meta.done and position not in settled and event.seq > given_up:
            named = f"message {event.member('message_id')} at position {position} (seq {event.seq})"
            yield "I8", f"{named} counts as done, but no entry settles it"


def _inbox(facts: ConversationFacts, inputs: _Inputs, questions: _Questions) -> Iterator[tuple[str, str]]:
    """I8: the inbox has what follows the cursor, each once, none of it in the log, all of it remembered."""
    meta, previous = facts.meta, 0
    for entry in facts.inbox:
        name = f"inbox entry {entry.position} ({entry.kind} {entry.message_id})"
        if not max(meta.cursor, previous) < entry.position <= meta.position:
            bounds = f"cursor {meta.cursor}, position {meta.position}"
            yield "I8", f"{name} is out of place: after {previous}, with {bounds}"
        previous = entry.position
        if entry.kind not in REMEMBERED:
            continue
        if entry.kind in MESSAGES and entry.position in inputs.by_position:
            yield "I8", f"{name} is in the log already, at seq {inputs.by_position[entry.position].seq}"
        if entry.kind == "answer" and questions.has(entry.message_id):
            yield "I8", f"{name} is in the log already"
        if facts.seen.get(entry.message_id) != entry.position:
            yield "I8", f"{name} is remembered at {facts.seen.get(entry.message_id)}, not at its position"
    if meta.position > meta.cursor and previous < meta.position:
        yield "I8", f"the last accepted entry, at position {meta.position}, is not in the inbox"


def _remembered(facts: ConversationFacts, inputs: _Inputs, questions: _Questions) -> Iterator[tuple[str, str]]:
    """I8: whatever was accepted is in the log or in the inbox."""
    waiting = {(entry.message_id, entry.position) for entry in facts.inbox}
    for message_id, position in facts.seen.items():
        if position > facts.meta.position:
            yield "I8", f"message {message_id} is remembered at position {position}, beyond the last one"
            continue
        known = (message_id, position) in waiting or inputs.has(message_id, position) or questions.has(message_id)
        if position >= max(inputs.first, 1) and not known:
            yield "I8", f"message {message_id} was accepted at position {position}, but is nowhere"


def _unanswered(facts: ConversationFacts) -> Iterator[tuple[str, str]]:
    """I13 and I11: nobody owns it, so nothing may be open unless a person is waited for, and nothing unread.

    A start that is queued excuses both: an answer that came, or a `resume`, may have to wait for a slot.
    """
    meta = facts.meta
    if meta.owner or meta.status != "running" or facts.queued:
        return
    if meta.done < meta.cursor == meta.position and not meta.asks:
        yield "I13", f"nobody owns it, but positions {meta.done + 1} to {meta.cursor} are unanswered"
    if meta.cursor < meta.position:
        unread = f"positions {meta.cursor + 1} to {meta.position} are unread"
        yield "I11", f"nobody owns it and no start is queued, but {unread}"


def _open_questions(facts: ConversationFacts, questions: _Questions) -> Iterator[tuple[str, str]]:
    """I13, I8: the open questions are those that a turn without an end has asked and nobody has answered."""
    if facts.asks is None:
        return
    meta, on_the_way = facts.meta, {_ask_id(entry) for entry in facts.inbox if entry.kind == "answer"}
    if len(facts.asks) != meta.asks:
        yield "I13", f"the head says that {meta.asks} questions are open, but there are {sorted(facts.asks)}"
    for ask_id in sorted(facts.asks):
        name = f"question {ask_id} is open"
        asked, answered = questions.asked.get(ask_id), questions.answered.get(ask_id)
        if asked is None and facts.since > 1:
            continue
        if asked is None:
            yield "I13", f"{name}, but the log does not have it"
        elif answered is not None:
            yield "I8", f"{name}, but was answered at seq {answered.seq}"
        elif turn_position(asked.turn) <= meta.done:
            yield "I13", f"{name}, but turn {asked.turn} has ended"
    for ask_id, asked in questions.asked.items():
        is_closed = ask_id not in facts.asks and ask_id not in questions.answered
        if is_closed and turn_position(asked.turn) > meta.done and ask_id not in on_the_way:
            yield "I8", f"question {ask_id} of turn {asked.turn} is closed, but its answer is nowhere"


def _ask_id(entry: InboxEntry) -> str | None:
    """The question of an unread answer, None if it cannot be read."""
    try:
        ask_id: Any = json.loads(entry.data)["ask_id"]
    except (ValueError, KeyError, TypeError):
        return None
    return ask_id if isinstance(ask_id, str) else None


def _stopped(meta: Meta, events: Sequence[Event]) -> Iterator[tuple[str, str]]:
    """I15: a stop is the last word until the user resumes, and gets finished."""
    for before, event in pairwise(events):
        if before.kind == "stopped" and event.epoch == before.epoch:
            yield "I15", f"{event.kind} {event.at} follows the stopped entry of its own epoch"
    last = events[-1] if events else None
    if meta.status == "stopped" and (last is None or last.kind != "stopped"):
        yield "I15", f"it is stopped, but its last entry is {f'{last.kind} {last.at}' if last else 'missing'}"
    if meta.owner and last is not None and last.kind == "stopped":
        yield "I15", f"{meta.owner} owns it, but its last entry is stopped {last.at}"
    if meta.owner and meta.status in ("stopped", "failed", "held"):
        yield "I15", f"it is {meta.status}, but {meta.owner} owns it"
    if meta.status == "stopping" and not meta.owner:
        yield "I15", "it is stopping and nobody owns it, so nobody finishes the stop"


def audit_user(
    user: str, slots: Mapping[str, Slot], limit: int, heads: Mapping[str, Meta], buried: Collection[str]
) -> list[Violation]:
    """I6 of one user.

    Args:
        user: not empty; users without an id have no slots.
        slots: the user's slots by conversation.
        limit: conversations that the user may run at once; 0 for no limit.
        heads: heads of the user's conversations.
        buried: the buried incarnations.
    """
    where = f"user {user}"
    found: list[Violation] = []
    if limit and len(slots) > limit:
        found.append(Violation("I6", where, f"{len(slots)} slots with a limit of {limit}: {sorted(slots)}"))
    for cid, meta in heads.items():
        if not meta.owner or meta.owner in buried:
            continue
        slot = slots.get(cid)
        if slot is None:
            found.append(Violation("I6", where, f"{meta.owner} owns conversation {cid} without a slot"))
        elif slot != Slot(meta.nonce, meta.owner):
            owner = f"{meta.owner} owns conversation {cid} under nonce {meta.nonce}"
            found.append(Violation("I6", where, f"{owner}, but the slot is {slot.encode()}"))
    return found


def audit_nodes(
    membership: Membership,
    records: Mapping[str, Collection[str]],
    owners: Mapping[str, str],
    slots: Mapping[str, Mapping[str, Slot]],
) -> list[Violation]:
    """I10 and I12: whom the membership knows, and what every node's hash has to contain.

    Args:
        membership: members and buried.
        records: conversations in each node's hash.
        owners: the owner of each conversation, "" for nobody.
        slots: slots by conversation, by user.
    """
    found = [
        Violation("I10", f"node {name}", "it is buried, and a member all the same")
        for name in membership.members
        if name in membership.dead
    ]
    named = [(owner, cid, f"it owns conversation {cid}") for cid, owner in owners.items() if owner]
    for user, held in slots.items():
        for cid, slot in held.items():
            named.append((slot.incarnation, cid, f"the slot of conversation {cid} of user {user} names it"))
    for name, cid, why in named:
        if name not in membership.members and name not in membership.dead:
            found.append(Violation("I12", f"node {name}", f"{why}, but it is neither a member nor buried"))
        if cid not in records.get(name, ()):
            found.append(Violation("I12", f"node {name}", f"{why}, but its hash has no record of that"))
    return found
