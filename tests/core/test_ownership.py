"""One conversation, several nodes that die, pause and come back, and commands that arrive late, twice or unheard.

The machine plays the nodes: they are honest (they do what the protocol says with what they know) and unlucky. After
each step the auditor judges what the store holds (I1, I2, I3, I8, I13, I15), and the machine itself checks what the
data cannot show: who wrote (I2), which tokens were handed out (I5), what was promised (I8), what a stop forbids, that
who released had nothing unanswered or waited for a person (I13), that an interrupt which was taken in is obeyed by
whoever owns the turn in the end. In the end all luck returns, and the system has to settle by itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule

from convener.core import conversation, intents
from convener.core.model import (
    MESSAGES,
    REMEMBERED,
    AppendReply,
    AppendRequest,
    ClaimRequest,
    Closing,
    InboxEntry,
    Meta,
)
from convener.core.wire import event, stopped_event, turn_id
from tests.core.ownership_people import NODES, Command, People, Reply, fates, nodes
from tests.core.world import taken_in

ACTIONS = (
    *("send", "send", "send", "claim", "claim", "claim", "take_in", "take_in", "take_in", "answer", "answer", "answer"),
    *("deliver", "deliver", "deliver", "deliver", "release", "retry", "retry", "resolve", "finish_stop", "finish_stop"),
    *("bury", "bury", "disown", "unsend", "stop", "resume", "tick"),
    *("ask", "wait", "wait", "reply", "reply", "press", "stream", "park", "set_alarm", "fire"),
)
"""What happens, in about the right proportions: of rules that are drawn evenly, most would do nothing."""


@dataclass
class Owned:
    """What a node knows of a conversation that it believes to own."""

    epoch: int
    seq: int
    cursor: int
    done: int
    halted: int
    open: list[int] = field(default_factory=list[int])
    pending: list[AppendRequest] = field(default_factory=list[AppendRequest])

    def finished(self) -> int:
        """Up to where everything is done: intents between the messages are done with them."""
        return self.open[0] - 1 if self.open else self.cursor


@dataclass
class Attempt:
    """A claim on its way."""

    nonce: str
    epoch: int


class Ownership(People):
    def __init__(self) -> None:
        super().__init__()
        self.owned: dict[str, Owned] = {}
        self.attempts: dict[str, Attempt] = {}
        self.given_up: set[str] = set()
        self.tokens: dict[int, str] = {}
        self.halted: set[int] = set()

    @rule(actions=st.lists(st.sampled_from(ACTIONS), min_size=5, max_size=5), data=st.data())
    def do(self, actions: list[str], data: st.DataObject) -> None:
        """Several at once: a plan of single steps is mostly too short for what takes a dozen of them."""
        for action in actions:
            getattr(self, action)(data)
            self.check()

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
            before = w.head
            reply = w.apply(conversation.claim(w.read(), request, w.now))
            if reply.opened is not None:
                assert request.nonce not in self.given_up, "a claim that was settled as lost came true"
                assert reply.opened.epoch not in self.tokens, "an epoch was handed out twice"
                assert not self.must_stay_stopped, "a stopped conversation was started"
                assert not self.parked, "a conversation that waits for resume was started"
                assert not before.asks or w.head.strikes == before.strikes, "waiting for a person was counted"
                self.tokens[reply.opened.epoch] = me
                self.resumed = False
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
        unanswered = [p for p in self.in_the_log().values() if head.done < p <= head.cursor]
        self.owned[me] = Owned(head.epoch, head.seq, head.cursor, head.done, head.halted, sorted(unanswered))

    def resolve(self, data: st.DataObject) -> None:
        """A claim with unknown outcome is settled before anything else."""
        if self.attempts:
            me = data.draw(st.sampled_from(sorted(self.attempts)))
            attempt, w = self.attempts[me], self.world
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

    def append(
        self,
        me: str,
        events: list[str],
        fate: str,
        closing: Closing = "",
        asks: tuple[tuple[str, str], ...] = (),
        ends: bool = False,
    ) -> None:
        """Write events together with what the node knows by now."""
        own = self.owned[me]
        self.counter += 1
        expected, state = own.seq, b"s" if ends else None
        own.done = max(own.done, own.finished()) if closing != "stopped" else own.done
        request = AppendRequest(
            *(me, own.epoch, expected, f"b{self.counter}", own.cursor, own.done, 0, tuple(events)),
            *(state, closing, own.halted, asks, ends),
        )
        # The next batch counts on this one, which may be still on its way.
        own.seq = expected + len(events)
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
                self.asked += [ask_id for ask_id, _ in request.asks]
                self.parked = request.closing in ("failed", "held")
                if request.halted > max(before.halted, w.head.done):
                    self.halted.add(request.halted)
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
        self.take(me, [e for e in self.world.inbox if e.position > self.owned[me].cursor][:count], fate)

    def take(self, me: str, unread: list[InboxEntry], fate: str) -> None:
        """Take entries in, up to a stop: messages and answers enter the log, interrupts the head."""
        own = self.owned[me]
        stop = next((i for i, e in enumerate(unread) if e.kind == "stop"), len(unread))
        if not (taken := unread[:stop]):
            return
        for entry in taken:
            own.open += [entry.position] if entry.kind in MESSAGES else []
            if entry.kind == "interrupt" and own.open and json.loads(entry.data) in ("", turn_id(own.open[0])):
                own.halted = max(own.halted, own.open[0])
        own.cursor = taken[-1].position
        self.append(me, [taken_in(e) for e in taken if e.kind in REMEMBERED], fate)

    def answer(self, data: st.DataObject) -> None:
        """The turn ends, whatever it has asked and whoever was waited for."""
        me = self.one_of(data)
        if me is not None and self.owned[me].open:
            self.end(me, data.draw(fates))

    def end(self, me: str, fate: str, kind: str = "turn_done", closing: Closing = "") -> None:
        own = self.owned[me]
        position = own.open.pop(0)
        kind = "turn_interrupted" if position <= own.halted else kind
        ended = [event("reply", turn_id(position), 1, "1"), event(kind, turn_id(position), 1, "{}")]
        self.append(me, ended, fate, closing, ends=True)

    def ask(self, data: st.DataObject, me: str | None = None) -> None:
        """The turn asks a person."""
        me = me or self.one_of(data)
        if me not in self.owned or not self.owned[me].open:
            return
        turn = turn_id(self.owned[me].open[0])
        ask_id = f"{turn}.{self.counter}"
        asked = event("ask", turn, 1, f'{{"ask_id":"{ask_id}"}}')
        self.append(me, [asked], data.draw(fates), asks=((ask_id, "{}"),))

    def wait(self, data: st.DataObject) -> None:
        """The turn asks a person, and as nothing else is to be done the conversation leaves memory."""
        me = self.one_of(data)
        if me is None or not self.owned[me].open or self.owned[me].pending:
            return
        self.take(me, [e for e in self.world.inbox if e.position > self.owned[me].cursor], "now")
        self.ask(data, me)
        self.release(data, me)

    def stream(self, data: st.DataObject) -> None:
        me = self.one_of(data)
        if me is None or not self.owned[me].open:
            return
        own, fate = self.owned[me], data.draw(fates)
        position = own.open[0]

        def command() -> Reply:
            w = self.world
            before = w.head
            if w.apply(intents.pieces(w.read(), me, own.epoch, position, (str(position),))) == "OK":
                assert before.owner == me, "a piece of somebody who is not the owner"
                assert position > before.done
            return lambda: None

        self.issue(command, fate)

    def park(self, data: st.DataObject) -> None:
        """Leave it to whoever says `resume`: with the turn given up, or as it is."""
        me = self.one_of(data)
        if me is None or not self.owned[me].open:
            return
        closing: Closing = data.draw(st.sampled_from(["failed", "held"]))
        if closing == "failed":
            self.end(me, data.draw(fates), "turn_failed", closing)
        else:
            self.append(me, [], data.draw(fates), closing)

    def finish_stop(self, data: st.DataObject) -> None:
        me = self.one_of(data)
        if me is not None:
            self.close(me, data.draw(fates))

    def close(self, me: str, fate: str) -> None:
        own = self.owned[me]
        unread = [e for e in self.world.inbox if e.position > own.cursor]
        stop: InboxEntry | None = next((e for e in unread if e.kind == "stop"), None)
        if stop is not None:
            own.cursor = stop.position
            last = [*(taken_in(e) for e in unread if e.kind in REMEMBERED), stopped_event("why", 1)]
            self.append(me, last, fate, closing="stopped")

    def release(self, data: st.DataObject, me: str | None = None) -> None:
        """Until the outcome is known the node does not act as the owner."""
        me = me or self.one_of(data)
        if me not in self.owned or self.owned[me].pending:
            return
        fate = data.draw(fates)
        own = self.owned.pop(me)

        def command() -> Reply:
            w = self.world
            before = w.head
            outcome = w.apply(conversation.release(w.read(), me, own.epoch, own.seq))
            if outcome == "OK":
                assert self.may_be_left(before), "released with something unanswered"
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
                assert not before.owner or self.may_be_left(before)
            return lambda: None

        self.issue(command, fate)

    def may_be_left(self, head: Meta) -> bool:
        """I13, from the log and the inbox: the head's own count of questions is not trusted."""
        if head.position == head.done:
            return True
        unread = [e for e in self.world.inbox if e.position > head.cursor]
        open_questions = [a for a in self.asked if a not in self.answered and int(a[1:].split(".")[0]) > head.done]
        return not unread and bool(open_questions)

    # -- judgement -----------------------------------------------------------------------------------------------

    @invariant()
    def check(self) -> None:
        self.the_auditor_finds_nothing()
        self.nothing_promised_is_lost()
        self.a_live_owner_has_the_token_of_the_last_entry()
        self.what_was_to_be_interrupted_is_not_finished()
        self.pieces_are_of_turns_that_have_not_ended()

    def the_auditor_finds_nothing(self) -> None:
        found = {violation.invariant for violation in self.world.violations()}
        # Unread messages of an unowned conversation are the business of whoever sent them, what was left open and is
        # not parked any more is the business of whoever has resumed it.
        assert found <= ({"I11", "I13"} if self.resumed else {"I11"}), self.world.violations()

    def nothing_promised_is_lost(self) -> None:
        waiting = {e.message_id: e.position for e in self.world.inbox if e.kind in REMEMBERED}
        taken = self.in_the_log()
        for message_id, position in self.promised.items():
            assert waiting.get(message_id, taken.get(message_id)) in (position, 0)

    def a_live_owner_has_the_token_of_the_last_entry(self) -> None:
        head = self.world.head
        if head.owner and head.owner not in self.buried:
            assert self.world.log[-1].epoch == head.epoch

    def what_was_to_be_interrupted_is_not_finished(self) -> None:
        for entry in self.world.log if self.halted else []:
            value = json.loads(entry.event)
            if value["kind"] in ("turn_done", "turn_failed"):
                assert int(value["turn"][1:]) not in self.halted, "an interrupt was lost"

    def pieces_are_of_turns_that_have_not_ended(self) -> None:
        head = self.world.head
        assert all(int(text) > head.done for text in self.world.pieces)

    def teardown(self) -> None:
        """No more bad luck: everybody who has ever lived is buried, a new node recovers."""
        w = self.world
        for node in NODES:
            self.buried.add(self.name(node))
        if w.head.status == "stopping":
            assert w.stop("r~1", buried=w.head.owner).outcome == "STOPPED"
        if w.head.status in ("failed", "held"):
            assert w.resume() == "OK"
        if w.head.status == "running":
            assert w.claim("r~1", "last", reason="takeover").outcome == "OK"
            self.tokens[w.head.epoch] = "r~1"
            self.know("r~1", w.head)
            self.take("r~1", list(w.inbox), "now")
            while self.owned["r~1"].open:
                self.end("r~1", "now")
            assert w.release() == "OK", "something is left that nobody can settle"
        assert set(self.promised) <= set(self.in_the_log())
        assert (w.asks, w.pieces, w.head.asks) == ({}, [], 0)
        assert w.violations() == []
        self.what_was_to_be_interrupted_is_not_finished()


TestOwnership = Ownership.TestCase
TestOwnership.settings = settings(max_examples=100, stateful_step_count=25, deadline=None)
