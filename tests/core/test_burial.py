"""Leases, burials and clocks: no buried node still believes that it may act (I7), and burial is for ever (I10).

All clocks run at rates that differ by up to 10 %. Renewals take any time to arrive, replies too, and any of them may
get lost; the store may be away. Whoever looks for the dead does so at the worst moment, and nothing spares anybody:
no `live` channel is held.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from convener.core.lease import LeaseTerms
from convener.core.membership import (
    BURY_SLACK_MS,
    Member,
    Membership,
    bury,
    forget,
    join,
    leave,
    reap,
    renew,
    supersede,
)

TTL_MS, RENEW_MS = 10_000, 500
NODES: tuple[str, ...] = ("a", "b", "c", "d")
rates = st.sampled_from([0.95, 1.0, 1.05])
nodes = st.sampled_from(NODES)
ACTIONS = (
    *("wait", "wait", "wait", "beat", "beat", "beat", "beat", "send", "arrive", "arrive"),
    *("bury", "bury", "bury", "reap", "reap", "supersede", "supersede", "leave", "forget"),
)
"""What happens, in about the right proportions."""


@dataclass
class Node:
    """One incarnation. `until`: what its lease allows, on its own clock in seconds."""

    name: str
    rate: float
    until: float = float("-inf")
    ended: bool = False
    joined: bool = False


@dataclass
class InFlight:
    """A JOIN or RENEW on its way, with the clock of its sender when it was sent."""

    node: Node
    joins: bool
    sent: float


@dataclass
class Truth:
    """What no node knows."""

    ms: float = 0.0
    ever_buried: set[str] = field(default_factory=set[str])


class Burial(RuleBasedStateMachine):
    @initialize(fast=st.booleans(), store_rate=rates, again=rates, rates=st.tuples(rates, rates, rates, rates))
    def begin(self, fast: bool, store_rate: float, again: float, rates: tuple[float, ...]) -> None:
        self.terms = LeaseTerms(ttl=TTL_MS / 1000, renew=RENEW_MS / 1000, fast_burial=fast)
        self.store_rate = store_rate
        # The clock of a process that was started again, and what it has seen of its former incarnation, and when.
        self.again_rate = again
        self.looked: dict[str, tuple[int, float]] = {}
        self.truth = Truth()
        self.state = Membership()
        self.lives = 0
        self.nodes = {name: Node(f"{name}~1", rate) for name, rate in zip(NODES, rates, strict=True)}
        self.former: list[Node] = []
        self.in_flight: list[InFlight] = []
        self.version = 0

    def now(self) -> int:
        """The store's clock."""
        return 1_000_000 + int(self.truth.ms * self.store_rate)

    def clock(self, node: Node) -> float:
        """A node's boot-time clock in seconds."""
        return self.truth.ms * node.rate / 1000

    def acts(self, node: Node) -> bool:
        return not node.ended and self.clock(node) < node.until

    @rule(actions=st.lists(st.sampled_from(ACTIONS), min_size=5, max_size=5), data=st.data())
    def do(self, actions: list[str], data: st.DataObject) -> None:
        for action in actions:
            getattr(self, action)(data)
            self.check()

    # -- time and messages ---------------------------------------------------------------------------------------

    def wait(self, data: st.DataObject) -> None:
        self.truth.ms += data.draw(st.sampled_from([1, 50, 240, 251, 500, 1_000, 2_001, 8_000]))

    def send(self, data: st.DataObject) -> None:
        """A heartbeat: JOIN at first, then RENEW."""
        sender = self.nodes[data.draw(nodes)]
        if len(self.in_flight) < 12:
            self.in_flight.append(InFlight(sender, not sender.joined, self.clock(sender)))

    def beat(self, data: st.DataObject) -> None:
        """A heartbeat without delays, which is what they mostly are."""
        self.beat_of(data.draw(nodes))

    def beat_of(self, node: str) -> None:
        sender = self.nodes[node]
        self.apply(InFlight(sender, not sender.joined, self.clock(sender)), heard=True)

    def arrive(self, data: st.DataObject) -> None:
        if not self.in_flight:
            return
        heard, again = data.draw(st.booleans()), data.draw(st.booleans())
        index = data.draw(st.integers(0, len(self.in_flight) - 1))
        self.apply(self.in_flight[index] if again else self.in_flight.pop(index), heard)

    def apply(self, message: InFlight, heard: bool) -> None:
        node, before = message.node, self.state
        if message.joins:
            reply, self.state = join(before, node.name, Member(0, TTL_MS, RENEW_MS), self.now())
        else:
            reply, self.state = renew(before, node.name, None, self.now())
            assert self.state.members.keys() == before.members.keys(), "a renewal made a member"
        if node.name in self.truth.ever_buried:
            assert reply.outcome == "DEAD", "the dead was renewed"
        assert reply.version == self.state.version
        if not heard or node.ended:
            return
        if reply.outcome == "OK":
            node.joined = True
            node.until = max(node.until, self.terms.deadline(message.sent))
        elif node.joined:
            self.end(node)

    def end(self, node: Node) -> None:
        """Everything of the incarnation is over; the node comes back as another."""
        node.ended = True
        self.former.append(node)
        self.lives += 1
        short = node.name.partition("~")[0]
        self.nodes[short] = Node(f"{short}~{self.lives + 1}", node.rate)

    # -- burying -------------------------------------------------------------------------------------------------

    def reap(self, data: st.DataObject) -> None:
        self.reap_now()

    def reap_now(self) -> None:
        before, grace = self.state, self.state.grace
        names, self.state = reap(before, TTL_MS, self.now())
        assert self.state.grace >= grace
        for name in names:
            assert before.members[name].deadline <= self.now()
        self.note(set(names))

    def bury(self, data: st.DataObject) -> None:
        if not self.terms.fast_burial:
            return
        name = self.nodes[data.draw(nodes)].name
        outcome, self.state = bury(self.state, name, 0, TTL_MS, self.now())
        if outcome == "OK":
            self.note({name})

    def supersede(self, data: st.DataObject) -> None:
        """Look at a former incarnation; if it was looked at long enough ago, bury it."""
        name = self.nodes[data.draw(nodes)].name
        member, clock = self.state.members.get(name), self.truth.ms * self.again_rate / 1000
        if member is None:
            return
        seen = self.looked.get(name)
        if seen is None:
            self.looked[name] = (member.deadline, clock)
            return
        acting = (2 * RENEW_MS + BURY_SLACK_MS) / 1000 if self.terms.fast_burial else TTL_MS / 1000
        if clock - seen[1] <= acting:
            return
        del self.looked[name]
        outcome, self.state = supersede(self.state, name, f"{name.partition('~')[0]}~again", seen[0], self.now())
        if outcome == "OK":
            self.note({name})

    def leave(self, data: st.DataObject) -> None:
        """A clean exit: first it stops acting, then it buries itself."""
        leaving = self.nodes[data.draw(nodes)]
        self.end(leaving)
        was = leaving.name in self.state.members
        self.state = leave(self.state, leaving.name, self.now())
        if was:
            self.note({leaving.name})

    def forget(self, data: st.DataObject) -> None:
        """Only burials old enough: not one here is."""
        names = sorted(self.state.dead)
        if names:
            before = self.state
            self.state = forget(before, data.draw(st.sampled_from(names)), 24 * 3_600_000, self.now())
            assert self.state == before

    def note(self, names: set[str]) -> None:
        self.truth.ever_buried |= names
        assert names <= set(self.state.dead)

    # -- judgement -----------------------------------------------------------------------------------------------

    @invariant()
    def check(self) -> None:
        self.the_buried_do_not_act()
        self.the_buried_stay_buried()
        self.every_change_has_a_version()

    def the_buried_do_not_act(self) -> None:
        for node in [*self.nodes.values(), *self.former]:
            if node.name in self.state.dead:
                assert not self.acts(node), f"{node.name} is buried and acts at {self.truth.ms} ms"

    def the_buried_stay_buried(self) -> None:
        assert self.truth.ever_buried == set(self.state.dead)
        assert not set(self.state.members) & set(self.state.dead)

    def every_change_has_a_version(self) -> None:
        assert self.state.version >= self.version
        self.version = self.state.version

    def teardown(self) -> None:
        """One node lives on; everybody else is buried in the end, and it is not."""
        self.beat_of("a")
        if not self.nodes["a"].joined:
            self.beat_of("a")
        survivor = self.nodes["a"]
        for _ in range(60):
            self.truth.ms += RENEW_MS
            self.beat_of("a")
            self.reap_now()
        assert set(self.state.members) <= {survivor.name}
        assert self.nodes["a"] is survivor
        assert self.acts(survivor)


TestBurial = Burial.TestCase
TestBurial.settings = settings(max_examples=100, stateful_step_count=25, deadline=None)
