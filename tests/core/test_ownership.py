"""One conversation, several nodes that die, pause and come back, and commands that arrive late, twice or unheard.

The machine plays the nodes: they are honest (they do what the protocol says with what they know) and unlucky. After
each step the auditor judges what the store holds (I1, I2, I3, I8, I13, I15), and the machine itself checks what the
data cannot show: who wrote (I2), which tokens were handed out (I5), what was promised (I8), what a stop forbids.
In the end all luck returns, and the system has to settle by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from convener.core import conversation
from convener.core.model import AppendReply, AppendRequest, ClaimRequest, Closing, InboxEntry, Meta, NewMessage
from convener.core.wire import event, input_event, stopped_event, turn_id, turn_position
from tests.core.world import World

Reply = Callable[[], None]
Command = Callable[[], Reply]
"""Runs at the store; what it returns brings the reply to the node."""

NODES: tuple[str, ...] = ("a", "b", "c")
MAX_LATE = 8
MAX_PENDING = 4

ACTIONS = (
    *("send", "send", "send", "claim", "claim", "claim", "take_in", "take_in", "take_in", "answer", "answer", "answer"),
    *("deliver", "deliver", "deliver", "deliver", "release", "retry", "retry", "resolve", "finish_stop", "finish_stop"),
    *("bury", "bury", "disown", "unsend", "stop", "resume", "tick"),
)
"""What happens, in about the right proportions: of rules that are drawn evenly, most would do nothing."""

fates = st.sampled_from(["now", "now", "now", "late", "unheard"])
nodes = st.sampled_from(NODES)
message_ids = st.sampled_from([f"m{i}" for i in range(6)])


@dataclass
class Owned:
    """What a node knows of a conversation that it believes to own."""

    epoch: int
    seq: int
    cursor: int
    done: int
    open: list[int] = field(default_factory=list[int])
    pending: list[AppendRequest] = field(default_factory=list[AppendRequest])


@dataclass
class Attempt:
    """A claim on its way."""

    nonce: str
    epoch: int


class Ownership(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.late: list[Command] = []
        self.lives = dict.fromkeys(NODES, 1)
        self.buried: set[str] = set()
        self.owned: dict[str, Owned] = {}
        self.attempts: dict[str, Attempt] = {}
        self.given_up: set[str] = set()
        self.tokens: dict[int, str] = {}
        self.promised: dict[str, int] = {}
        self.must_stay_stopped = False
        self.counter = 0

    @rule(actions=st.lists(st.sampled_from(ACTIONS), min_size=5, max_size=5), data=st.data())
    def do(self, actions: list[str], data: st.DataObject) -> None:
        """Several at once: a plan of single steps is mostly too short for what takes a dozen of them."""
        for action in actions:
            getattr(self, action)(data)
            self.check()

    # -- the network ---------------------------------------------------------------------------------------------

    def issue(self, command: Command, fate: str) -> None:
        if fate == "late" and len(self.late) < MAX_LATE:
            self.late.append(command)
        elif fate == "now":
            command()()
        else:
            command()

    def deliver(self, data: st.DataObject) -> None:
        """A late command arrives; perhaps it will arrive once more."""
        if not self.late:
            return
        again, heard = data.draw(st.booleans()), data.draw(st.booleans())
        index = data.draw(st.integers(0, len(self.late) - 1))
        command = self.late[index] if again else self.late.pop(index)
        reply = command()
        if heard:
            reply()

    def tick(self, data: st.DataObject) -> None:
        self.world.now += data.draw(st.sampled_from([1, 50, 700_000]))

    def bury(self, data: st.DataObject) -> None:
        """Dead or only paused: what the old incarnation knows it may still act upon."""
        node = data.draw(nodes)
        if self.lives[node] < 4:
            self.buried.add(self.name(node))
            self.lives[node] += 1

    def name(self, node: str) -> str:
        return f"{node}~{self.lives[node]}"

    # -- clients -------------------------------------------------------------------------------------------------

    def send(self, data: st.DataObject) -> None:
        message_id, busy, fate = data.draw(message_ids), data.draw(st.integers(0, 4)) == 0, data.draw(fates)
        message = NewMessage(message_id, "u", "1")

        def command() -> Reply:
            w = self.world
            before = w.head
            reply = w.apply(conversation.send(w.read(message_id), message, MAX_PENDING, busy, w.now))
            if reply.outcome == "OK":
                assert message_id not in self.promised
                assert before.status == "running"
                assert w.head.position - w.head.done <= MAX_PENDING
                self.promised[message_id] = reply.position
            if reply.outcome == "DUP":
                assert self.promised[message_id] == reply.position
            return lambda: None

        self.issue(command, fate)

    def unsend(self, data: st.DataObject) -> None:
        """A refused wake: the sender, who has not acknowledged it, takes the message back."""
        message_id, fate = data.draw(message_ids), data.draw(fates)
        position = self.promised.get(message_id, 0)

        def command() -> Reply:
            w = self.world
            taken_in = self.inputs()
            if w.apply(conversation.unsend(w.read(message_id), message_id, position)) == "OK":
                assert self.promised.pop(message_id) == position
                assert message_id not in taken_in
                assert not w.head.owner
            return lambda: None

        self.issue(command, fate)

    def stop(self, data: st.DataObject) -> None:
        reason, fate = data.draw(st.sampled_from(["why", "again"])), data.draw(fates)
        owner = self.world.head.owner
        buried = owner if owner in self.buried else ""

        def command() -> Reply:
            w = self.world
            reply = w.apply(conversation.stop(w.read(), "r~1", reason, buried, w.now))
            assert reply.outcome != "NOT_FOUND"
            if reply.outcome == "STOPPED":
                assert not reply.owner or reply.owner in self.buried
            self.must_stay_stopped = True
            return lambda: None

        self.issue(command, fate)

    def resume(self, data: st.DataObject) -> None:
        fate = data.draw(fates)

        def command() -> Reply:
            w = self.world
            if w.apply(conversation.resume(w.read(), w.now)) == "OK":
                self.must_stay_stopped = False
            return lambda: None

        self.issue(command, fate)

    # -- owning --------------------------------------------------------------------------------------------------

    def claim(self, data: st.DataObject) -> None:
        node, fate = data.draw(nodes), data.draw(fates)
        me, head = self.name(node), self.world.head
        if head.owner and head.owner not in self.buried:
            return
        self.counter += 1
        attempt = Attempt(f"n{self.counter}", head.epoch)
        self.attempts[me] = attempt
        reason = "takeover" if head.owner else "start"
        request = ClaimRequest(me, attempt.nonce, head.owner, head.epoch, reason)

        def command() -> Reply:
            w = self.world
            reply = w.apply(conversation.claim(w.read(), request, w.now))
            if reply.opened is not None:
                assert request.nonce not in self.given_up, "a claim that was settled as lost came true"
                assert reply.opened.epoch not in self.tokens, "an epoch was handed out twice"
                assert not self.must_stay_stopped, "a stopped conversation was started"
                self.tokens[reply.opened.epoch] = me
            return lambda: self.claimed(me, attempt, reply.outcome, reply.meta)

        self.issue(command, fate)

    def claimed(self, me: str, attempt: Attempt, outcome: str, meta: Meta | None) -> None:
        if self.attempts.get(me) is not attempt:
            return
        del self.attempts[me]
        if outcome in {"OK", "OWNED"}:
            assert meta is not None
            assert (meta.owner, meta.nonce) == (me, attempt.nonce)
            self.know(me, meta)
        else:
            self.given_up.add(attempt.nonce)

    def know(self, me: str, head: Meta) -> None:
        """What an owner learns from the head and the log."""
        unanswered = [p for p in self.inputs().values() if head.done < p <= head.cursor]
        self.owned[me] = Owned(head.epoch, head.seq, head.cursor, head.done, sorted(unanswered))

    def resolve(self, data: st.DataObject) -> None:
        """A claim with unknown outcome is settled before anything else."""
        me = self.name(data.draw(nodes))
        attempt = self.attempts.get(me)
        if attempt is not None:
            w = self.world
            reply = w.apply(conversation.resolve(w.read(), me, attempt.nonce, attempt.epoch))
            self.claimed(me, attempt, reply.outcome, reply.meta)

    def retry(self, data: st.DataObject) -> None:
        """What has not been heard of is sent again, unchanged and in order; it is never replaced."""
        me = self.one_of(data)
        if me is not None:
            own = self.owned[me]
            for request in list(own.pending):
                if self.owned.get(me) is own and request in own.pending:
                    self.issue(self.appending(me, own, request), data.draw(fates))

    def one_of(self, data: st.DataObject) -> str | None:
        """One that believes to be the owner, if there is any."""
        return data.draw(st.sampled_from(sorted(self.owned))) if self.owned else None

    # -- what an owner does --------------------------------------------------------------------------------------

    def append(self, me: str, events: list[str], cursor: int, done: int, fate: str, closing: Closing = "") -> None:
        own = self.owned[me]
        self.counter += 1
        expected, state = own.seq, b"s" if done else None
        request = AppendRequest(
            me, own.epoch, expected, f"b{self.counter}", cursor, done, 0, tuple(events), state, closing
        )
        # The next batch counts on this one, which may be still on its way.
        own.seq, own.cursor, own.done = expected + len(events), cursor, done
        own.pending.append(request)
        self.issue(self.appending(me, own, request), fate)

    def appending(self, me: str, own: Owned, request: AppendRequest) -> Command:
        def command() -> Reply:
            w = self.world
            before = w.head
            reply = w.apply(conversation.append(w.read(), request, w.now))
            if reply.outcome == "OK":
                assert before.owner == me, "an entry of somebody who is not the owner"
                assert self.tokens[request.epoch] == me, "an entry under the token of another"
            return lambda: self.appended(me, own, request, reply)

        return command

    def appended(self, me: str, own: Owned, request: AppendRequest, reply: AppendReply) -> None:
        if self.owned.get(me) is not own:
            return
        if reply.outcome in {"FENCED", "PENDING"} or (request.closing and reply.outcome == "OK"):
            del self.owned[me]
            return
        # All batches up to the one with the returned id are written.
        written = [r.batch for r in own.pending].index(reply.batch) + 1 if self.knows(own, reply.batch) else 0
        del own.pending[:written]

    def knows(self, own: Owned, batch: str) -> bool:
        return any(r.batch == batch for r in own.pending)

    def take_in(self, data: st.DataObject) -> None:
        me = self.one_of(data)
        if me is None:
            return
        count, fate = data.draw(st.integers(1, 3)), data.draw(fates)
        own = self.owned[me]
        unread = [e for e in self.world.inbox if e.position > own.cursor and e.kind == "message"][:count]
        if unread:
            own.open += [e.position for e in unread]
            self.append(me, [input_event(e) for e in unread], unread[-1].position, own.done, fate)

    def answer(self, data: st.DataObject) -> None:
        me = self.one_of(data)
        if me is None:
            return
        fate = data.draw(fates)
        own = self.owned[me]
        if own.open:
            position = own.open.pop(0)
            ended = [event("reply", turn_id(position), 1, "1"), event("turn_done", turn_id(position), 1, "{}")]
            self.append(me, ended, own.cursor, position, fate)

    def finish_stop(self, data: st.DataObject) -> None:
        me = self.one_of(data)
        if me is not None:
            self.close(me, data.draw(fates))

    def close(self, me: str, fate: str) -> None:
        own = self.owned[me]
        unread = [e for e in self.world.inbox if e.position > own.cursor]
        stop: InboxEntry | None = next((e for e in unread if e.kind == "stop"), None)
        if stop is not None:
            inputs = [input_event(e) for e in unread if e.kind == "message"]
            last = [*inputs, stopped_event("why", 1)]
            self.append(me, last, stop.position, own.done, fate, closing="stopped")

    def release(self, data: st.DataObject) -> None:
        """Until the outcome is known the node does not act as the owner."""
        me = self.one_of(data)
        if me is None:
            return
        if self.owned[me].pending:
            return
        fate = data.draw(fates)
        own = self.owned.pop(me)

        def command() -> Reply:
            w = self.world
            before = w.head
            outcome = w.apply(conversation.release(w.read(), me, own.epoch, own.seq))
            if outcome == "OK":
                assert before.position == before.done, "released with something unanswered"
                assert before.status == "running"
                assert (before.owner, before.epoch, before.seq) == (me, own.epoch, own.seq)
            return lambda: self.owned.update({me: own}) if outcome == "PENDING" else None

        self.issue(command, fate)

    def disown(self, data: st.DataObject) -> None:
        """Recovery, on whatever it read: a buried owner, or nobody."""
        fate = data.draw(fates)
        head = self.world.head
        if head.owner and head.owner not in self.buried:
            return

        def command() -> Reply:
            w = self.world
            before = w.head
            if w.apply(conversation.disown(w.read(), head.owner, head.epoch)) == "OK":
                assert before.owner in {"", *self.buried}
                assert not before.owner or before.position == before.done
            return lambda: None

        self.issue(command, fate)

    # -- judgement -----------------------------------------------------------------------------------------------

    def inputs(self) -> dict[str, int]:
        """Message ids in the log, with their positions."""
        found: dict[str, int] = {}
        for item in self.world.facts().log:
            parsed = conversation_event(item.event)
            if parsed is not None:
                found[parsed[0]] = parsed[1]
        return found

    @invariant()
    def check(self) -> None:
        self.the_auditor_finds_nothing()
        self.nothing_promised_is_lost()
        self.a_live_owner_has_the_token_of_the_last_entry()

    def the_auditor_finds_nothing(self) -> None:
        # Unread messages of an unowned conversation are the business of whoever sent them.
        assert self.world.violations(queued=True) == []

    def nothing_promised_is_lost(self) -> None:
        waiting = {e.message_id: e.position for e in self.world.inbox if e.kind == "message"}
        taken_in = self.inputs()
        for message_id, position in self.promised.items():
            assert waiting.get(message_id, taken_in.get(message_id)) == position

    def a_live_owner_has_the_token_of_the_last_entry(self) -> None:
        head = self.world.head
        if head.owner and head.owner not in self.buried:
            assert self.world.log[-1].epoch == head.epoch

    def teardown(self) -> None:
        """No more bad luck: everybody who has ever lived is buried, a new node recovers."""
        w = self.world
        for node in NODES:
            self.buried.add(self.name(node))
        if w.head.status == "stopping":
            assert w.stop("r~1", buried=w.head.owner).outcome == "STOPPED"
        if w.head.status == "running":
            assert w.claim("r~1", "last", reason="takeover").outcome == "OK"
            self.tokens[w.head.epoch] = "r~1"
            self.know("r~1", w.head)
            own = self.owned["r~1"]
            unread = [e for e in w.inbox if e.kind == "message"]
            own.open += [e.position for e in unread]
            if unread:
                self.append("r~1", [input_event(e) for e in unread], unread[-1].position, own.done, "now")
            while own.open:
                position = own.open.pop(0)
                ended = [event("turn_done", turn_id(position), 1, "{}")]
                self.append("r~1", ended, own.cursor, position, "now")
            assert w.release() == "OK", "something is left that nobody can settle"
        assert set(self.promised) <= set(self.inputs())
        assert w.violations() == []


def conversation_event(text: str) -> tuple[str, int] | None:
    """(message id, position) of an input."""
    if '"kind":"input"' not in text:
        return None
    message_id = text.split('"message_id":"', 1)[1].split('"', 1)[0]
    return message_id, turn_position(text.split('"turn":"', 1)[1].split('"', 1)[0])


TestOwnership = Ownership.TestCase
TestOwnership.settings = settings(max_examples=100, stateful_step_count=25, deadline=None)
