"""The network and the people around the conversation of `test_ownership`: everybody who is not its owner."""

from __future__ import annotations

import json
from collections.abc import Callable

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine

from convener.core import conversation, intents
from convener.core.model import NewMessage
from convener.core.wire import turn_id
from tests.core.world import World

Reply = Callable[[], None]
Command = Callable[[], Reply]
"""Runs at the store; what it returns brings the reply to the node."""

NODES: tuple[str, ...] = ("a", "b", "c")
MAX_LATE = 8
MAX_PENDING = 4

fates = st.sampled_from(["now", "now", "now", "late", "unheard"])
nodes = st.sampled_from(NODES)
message_ids = st.sampled_from([f"m{i}" for i in range(10)])
# Some of them are ids that a client may choose as well.
alarm_ids = st.sampled_from(["m1", "m3", "m5", "x1"])


class People(RuleBasedStateMachine):
    """Commands arrive late, twice, or their replies are lost. What was promised is noted, and once promised, kept."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.late: list[Command] = []
        self.lives = dict.fromkeys(NODES, 1)
        self.buried: set[str] = set()
        self.promised: dict[str, int] = {}
        self.asked: list[str] = []
        self.answered: dict[str, str] = {}
        self.fired: set[str] = set()
        self.must_stay_stopped = False
        self.parked = False
        self.resumed = False
        self.counter: int = 0

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

    # -- messages ------------------------------------------------------------------------------------------------

    def send(self, data: st.DataObject) -> None:
        message_id, busy, fate = data.draw(message_ids), data.draw(st.integers(0, 4)) == 0, data.draw(fates)
        message = NewMessage(message_id, "u", "1", data.draw(st.sampled_from(["message", "interrupting"])))

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
        """A refused wake: the sender, who has not acknowledged it, takes the message back. Answers and alarms too, if
        the store lets it: what is promised must not be gone without its question or alarm.
        """
        message_id, fate = data.draw(st.sampled_from(sorted(self.promised) or ["m0"])), data.draw(fates)
        position = self.promised.get(message_id, 0)

        def command() -> Reply:
            w = self.world
            taken_in = self.in_the_log()
            if w.apply(conversation.unsend(w.read(message_id), message_id, position)) == "OK":
                assert self.promised.pop(message_id) == position
                assert message_id not in taken_in
                assert message_id not in self.fired
                assert message_id not in self.answered.values()
                assert not w.head.owner
            return lambda: None

        self.issue(command, fate)

    def stop(self, data: st.DataObject) -> None:
        if data.draw(st.integers(0, 2)):
            return  # Otherwise it would be stopped most of the time.
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
            before = w.head
            if w.apply(conversation.resume(w.read(), w.now)) == "OK":
                # Whoever resumes wakes it before it says so; until then it is open and nobody's.
                self.resumed = before.status != "stopped"
                self.must_stay_stopped = self.parked = False
            return lambda: None

        self.issue(command, fate)

    # -- questions, interrupts, alarms ---------------------------------------------------------------------------

    def reply(self, data: st.DataObject) -> None:
        """An answer, to any question that was ever asked: whoever answers may be late."""
        if not self.asked:
            return
        ask_id, fate = data.draw(st.sampled_from(self.asked)), data.draw(fates)
        self.counter += 1
        message_id = data.draw(st.sampled_from([f"r{self.counter}", *self.answered.values()]))
        body = f'{{"ask_id":"{ask_id}","data":1}}'

        def command() -> Reply:
            w = self.world
            was_open = ask_id in w.asks
            message = NewMessage(message_id, "u", body, "answer")
            reply = w.apply(intents.answer(w.read(message_id), ask_id, message, w.now))
            if reply.outcome == "OK":
                assert was_open
                assert ask_id not in self.answered, "a question was answered twice"
                assert message_id not in self.promised
                self.answered[ask_id] = message_id
                self.promised[message_id] = reply.position
            if reply.outcome == "DUP":
                assert self.promised[message_id] == reply.position
            return lambda: None

        self.issue(command, fate)

    def press(self, data: st.DataObject) -> None:
        turn, fate = data.draw(st.sampled_from(["", turn_id(self.world.head.done + 1)])), data.draw(fates)

        def command() -> Reply:
            self.world.apply(intents.interrupt(self.world.read(), turn, self.world.now))
            return lambda: None

        self.issue(command, fate)

    def set_alarm(self, data: st.DataObject) -> None:
        alarm_id, fate = data.draw(alarm_ids), data.draw(fates)

        def command() -> Reply:
            w = self.world
            w.apply(intents.set_alarm(w.read(alarm_id), alarm_id, "1"))
            return lambda: None

        self.issue(command, fate)

    def fire(self, data: st.DataObject) -> None:
        """A timer is due; all nodes may try."""
        alarm_id, fate = data.draw(alarm_ids), data.draw(fates)

        def command() -> Reply:
            w = self.world
            reply = w.apply(intents.fire(w.read(alarm_id), alarm_id, MAX_PENDING, w.now))
            if reply.outcome == "OK":
                assert alarm_id not in self.fired, "an alarm went off twice"
                assert alarm_id not in self.promised
                assert w.head.position - w.head.done <= MAX_PENDING
                self.fired.add(alarm_id)
                self.promised[alarm_id] = reply.position
            return lambda: None

        self.issue(command, fate)

    # -- what the log says ---------------------------------------------------------------------------------------

    def in_the_log(self) -> dict[str, int]:
        """Message ids of inputs in the log with their positions, of answers with 0."""
        found: dict[str, int] = {}
        for entry in self.world.log:
            value = json.loads(entry.event)
            if value["kind"] == "input":
                found[value["data"]["message_id"]] = int(value["turn"][1:])
            if value["kind"] == "answer":
                found[value["data"]["message_id"]] = 0
        return found
