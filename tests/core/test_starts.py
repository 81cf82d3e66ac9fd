"""Starting and releasing under a limit, in two groups of keys: slots and ownership together (I6, I12).

Each start, release or recovery is a process that reads, sends a command, and goes on with the reply. Between reading
and the command's effect anything may happen; a command may arrive late, more than once, or unheard. Nodes are buried
at any moment. In the end everybody is gone, and a new node has to be able to use the user's whole limit again.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from convener.core import conversation
from convener.core.admission import Slot, Waiting, reserve
from convener.core.audit import audit_nodes, audit_user
from convener.core.membership import Member, Membership
from convener.core.model import ClaimRequest, Meta
from tests.core.world import World

Command = Callable[[], Any]
Process = Generator[Command, Any, None]
"""Yields commands; is sent each reply, None for one that was not heard."""

NODES: tuple[str, ...] = ("a", "b", "c")
CIDS = ("c1", "c2", "c3")
LIMIT = 2
MAX_LATE = 6
fates = st.sampled_from(["now", "now", "now", "unheard", "late", "twice"])


@dataclass
class Running:
    """A process of one incarnation, with the command that it sends next."""

    me: str
    process: Process
    command: Command


class Starts(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.worlds = {cid: World() for cid in CIDS}
        self.slots: dict[str, Slot] = {}
        self.waiting: tuple[Waiting, ...] = ()
        self.records: dict[str, dict[str, str]] = {}
        self.lives = dict.fromkeys(NODES, 1)
        self.buried: set[str] = set()
        self.owned: dict[tuple[str, str], Meta] = {}
        self.running: list[Running] = []
        self.late: list[Command] = []
        self.nonces = 0

    def name(self, node: str) -> str:
        return f"{node}~{self.lives[node]}"

    def head(self, cid: str) -> Meta:
        return self.worlds[cid].head

    def is_live(self, owner: str) -> bool:
        return bool(owner) and owner not in self.buried

    # -- scheduling ----------------------------------------------------------------------------------------------

    def begin(self, me: str, process: Process) -> None:
        try:
            self.running.append(Running(me, process, next(process)))
        except StopIteration:
            pass

    def go_on(self, running: Running, reply: Any) -> None:
        try:
            running.command = running.process.send(reply)
        except StopIteration:
            self.running.remove(running)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), fate=fates)
    def run(self, data: st.DataObject, fate: str) -> None:
        running = self.running[data.draw(st.integers(0, len(self.running) - 1))]
        command = running.command
        if fate in {"late", "twice"} and len(self.late) < MAX_LATE:
            self.late.append(command)
        if fate == "late":
            self.go_on(running, None)
        else:
            reply = command()
            self.go_on(running, None if fate == "unheard" else reply)

    @precondition(lambda self: self.late)
    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        self.late.pop(data.draw(st.integers(0, len(self.late) - 1)))()

    @rule(node=st.sampled_from(NODES))
    def bury(self, node: str) -> None:
        """What it had sent may still arrive; it sends nothing more (the clock rule)."""
        if self.lives[node] < 3:
            me = self.name(node)
            self.buried.add(me)
            self.lives[node] += 1
            self.running = [r for r in self.running if r.me != me]
            self.owned = {key: m for key, m in self.owned.items() if key[0] != me}

    @rule(ms=st.sampled_from([1, 1_000]))
    def tick(self, ms: int) -> None:
        for world in self.worlds.values():
            world.now += ms

    @rule(node=st.sampled_from(NODES), cid=st.sampled_from(CIDS))
    def start_something(self, node: str, cid: str) -> None:
        me = self.name(node)
        if cid not in self.records.get(me, {}):
            self.begin(me, self.start(me, cid))

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def release_something(self, data: st.DataObject) -> None:
        me, cid = data.draw(st.sampled_from(sorted(self.owned)))
        self.begin(me, self.release(me, cid))

    @rule(node=st.sampled_from(NODES), data=st.data())
    def recover_somebody(self, node: str, data: st.DataObject) -> None:
        dead = sorted(name for name in self.buried if self.records.get(name))
        if dead:
            self.begin(self.name(node), self.recover(data.draw(st.sampled_from(dead))))

    # -- commands ------------------------------------------------------------------------------------------------

    def reserve(self, cid: str, slot: Slot, read: Slot | None) -> Command:
        def command() -> str:
            before, held = len(self.slots), self.slots.get(cid)
            reply = reserve(self.slots, self.waiting, cid, slot, LIMIT + 1, read)
            if held is not None and (held == read or held.nonce == slot.nonce):
                assert reply.outcome == "OK", "neither adopted nor recognised"
            if reply.outcome == "OK":
                self.slots[cid] = slot
            if reply.outcome == "LIMIT":
                assert before >= LIMIT, "refused for its own registration"
            assert len(self.slots) <= max(before, LIMIT), "raised above the limit"
            return reply.outcome

        return command

    def unreserve(self, cid: str, nonce: str) -> Command:
        def command() -> str:
            slot = self.slots.get(cid)
            if slot is not None and slot.nonce == nonce:
                del self.slots[cid]
            return "OK"

        return command

    def drop_record(self, name: str, cid: str, nonce: str) -> None:
        if self.records.get(name, {}).get(cid) == nonce:
            del self.records[name][cid]

    def claim(self, me: str, cid: str, nonce: str, head: Meta) -> Command:
        request = ClaimRequest(me, nonce, head.owner, head.epoch, "start")
        world = self.worlds[cid]
        return lambda: world.apply(conversation.claim(world.read(), request, world.now))

    def resolve(self, me: str, cid: str, nonce: str, epoch: int) -> Command:
        world = self.worlds[cid]
        return lambda: world.apply(conversation.resolve(world.read(), me, nonce, epoch))

    def disown(self, cid: str, head: Meta) -> Command:
        world = self.worlds[cid]
        return lambda: world.apply(conversation.disown(world.read(), head.owner, head.epoch))

    # -- processes -----------------------------------------------------------------------------------------------

    def repeat(self, command: Command) -> Generator[Command, Any, Any]:
        """The same command until its reply is heard."""
        reply = None
        while reply is None:
            reply = yield command
        return reply

    def start(self, me: str, cid: str) -> Process:
        self.nonces += 1
        nonce = f"n{self.nonces}"
        read = self.slots.get(cid)
        if self.is_live(self.head(cid).owner):
            return
        self.records.setdefault(me, {})[cid] = nonce
        if read is not None and read.incarnation != me and self.is_live(read.incarnation):
            # A live node's: a start under way, or, without a record, what is left of one.
            if not self.head(cid).owner and self.records.get(read.incarnation, {}).get(cid) != read.nonce:
                yield from self.repeat(self.unreserve(cid, read.nonce))
            self.drop_record(me, cid, nonce)
            return
        outcome = yield from self.repeat(self.reserve(cid, Slot(nonce, me), read))
        if outcome == "LIMIT":
            yield from self.examine()
            outcome = yield from self.repeat(self.reserve(cid, Slot(nonce, me), read))
        if outcome != "OK":
            self.drop_record(me, cid, nonce)
            return
        while not self.is_live(self.head(cid).owner):
            head = self.head(cid)
            reply = yield self.claim(me, cid, nonce, head)
            if reply is None:
                reply = yield from self.repeat(self.resolve(me, cid, nonce, head.epoch))
            if reply.outcome in {"OK", "OWNED"}:
                self.owned[me, cid] = reply.meta
                return
        yield from self.give_back(me, cid, nonce)

    def examine(self) -> Process:
        """Who meets the limit frees what nobody stands behind."""
        for cid, slot in list(self.slots.items()):
            recorded = self.records.get(slot.incarnation, {}).get(cid) is not None
            if not self.head(cid).owner and (slot.incarnation in self.buried or not recorded):
                yield from self.repeat(self.unreserve(cid, slot.nonce))

    def give_back(self, me: str, cid: str, nonce: str) -> Process:
        yield from self.repeat(self.unreserve(cid, nonce))
        self.drop_record(me, cid, nonce)

    def release(self, me: str, cid: str) -> Process:
        meta, world = self.owned.pop((me, cid)), self.worlds[cid]
        outcome = yield from self.repeat(
            lambda: world.apply(conversation.release(world.read(), me, meta.epoch, meta.seq))
        )
        assert outcome in {"OK", "FENCED"}
        yield from self.give_back(me, cid, meta.nonce)

    def recover(self, dead: str) -> Process:
        for cid, nonce in list(self.records[dead].items()):
            while not self.is_live(self.head(cid).owner):
                head = self.head(cid)
                outcome = yield self.disown(cid, head)
                if outcome == "OK":
                    break
            slot = self.slots.get(cid)
            if slot is not None and slot.incarnation in self.buried and not self.head(cid).owner:
                yield from self.repeat(self.unreserve(cid, slot.nonce))
            self.drop_record(dead, cid, nonce)

    # -- judgement -----------------------------------------------------------------------------------------------

    @invariant()
    def the_limit_holds_and_every_live_owner_has_its_slot(self) -> None:
        heads = {cid: self.head(cid) for cid in CIDS}
        assert audit_user("u", self.slots, LIMIT, heads, self.buried) == []
        assert sum(self.is_live(m.owner) for m in heads.values()) <= LIMIT

    @invariant()
    def live_nodes_know_what_names_them(self) -> None:
        """I12. Of the buried it holds until a late RESERVE arrives: then whoever meets the limit frees the slot."""
        live = {self.name(node): Member(0, 0, 0) for node in NODES}
        owners = {cid: m.owner for cid, m in ((c, self.head(c)) for c in CIDS) if self.is_live(m.owner)}
        records = {name: list(held) for name, held in self.records.items()}
        assert audit_nodes(Membership(live, dict.fromkeys(self.buried, 0)), records, owners, {}) == []

    def teardown(self) -> None:
        """Everybody dies, one node comes, and has the whole limit."""
        self.running, self.owned = [], {}
        for command in self.late:
            command()
        for node in NODES:
            self.buried.add(self.name(node))
        for dead in sorted(self.buried):
            if self.records.get(dead):
                self.finish(self.recover(dead))
        assert not any(self.records.values())
        for cid in CIDS[:LIMIT]:
            self.finish(self.start("new~1", cid))
            assert ("new~1", cid) in self.owned, f"{cid} cannot be started: {self.slots}"
        self.finish(self.start("new~1", CIDS[-1]))
        assert ("new~1", CIDS[-1]) not in self.owned
        self.the_limit_holds_and_every_live_owner_has_its_slot()

    @staticmethod
    def finish(process: Process) -> None:
        """Run a process to its end, everything heard."""
        try:
            command = next(process)
            while True:
                command = process.send(command())
        except StopIteration:
            pass


TestStarts = Starts.TestCase
TestStarts.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
