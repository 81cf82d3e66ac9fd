"""The windows of a turn, and how conversations are held in them until their node is killed.

What a node tells the store passes a proxy of the test. From the first command of a held conversation on that must not
take effect (or whose effect the node must not hear of), every write of that conversation is answered by an error that
means "the store is away": the node keeps what it has and tries again, for as long as it lives. Other conversations of
the same connection notice nothing, so one kill catches many conversations, each in its own window.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

from convener.store.redis.scripts import SCRIPTS
from tests.support.proxy import packed

Op = list[Any]
Step = tuple[str, int]

NAMES: Final = ("look", "fetch", "book")
WORDS: Final = ("so ", "Grüße ", "then ", "→ ", "🙂 ", "and more ", "一二三 ", "\n")


class Window(Enum):
    """A stretch of a turn. The value is its kind, and which of several places of that kind it is."""

    BEFORE_INPUT = ("before the input event", "the write that carries it does not arrive")
    AFTER_INPUT = ("after the input event", "its owner does not hear that it is written")
    IN_STEP = ("inside a step", "its function is under way")
    BEFORE_RECORD = ("inside a step", "its function is done, the record does not arrive")
    AFTER_RECORD = ("between steps", "its owner does not hear that the step is recorded")
    BETWEEN_STEPS = ("between steps", "the agent does something else")
    PIECES_LOST = ("while streaming", "a write of pieces does not arrive")
    PIECES_UNHEARD = ("while streaming", "its owner does not hear that pieces are written")
    BEFORE_FINAL = ("before the final append", "it does not arrive")
    AFTER_FINAL = ("after the final append", "its owner does not hear that it is written")

    @property
    def kind(self) -> str:
        """What it is a place of."""
        return self.value[0]


KINDS: Final = tuple(dict.fromkeys(window.kind for window in Window))


@dataclass(frozen=True)
class Script:
    """What the agent does in one turn: operations ("steps", names…), ("note",), ("stream", pieces…)."""

    ops: tuple[Op, ...]

    @staticmethod
    def draw(rng: random.Random) -> Script:
        """At least two operations with steps, and pieces."""
        ops: list[Op] = [["steps", rng.choice(NAMES)] for _ in range(rng.randint(2, 3))]
        if rng.random() < 0.5:
            ops[rng.randrange(len(ops))] += [rng.choice(NAMES)]
        for _ in range(rng.randint(1, 2)):
            pieces = ["".join(rng.choices(WORDS, k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
            ops.insert(rng.randint(0, len(ops)), ["stream", *pieces])
        for _ in range(rng.randint(0, 2)):
            ops.insert(rng.randint(0, len(ops)), ["note"])
        return Script(tuple(ops))

    def steps(self, upto: int | None = None) -> list[Step]:
        """(name, number) of the steps, in order, of all operations or of those before place `upto`."""
        found: list[Step] = []
        for what, *names in self.ops[:upto]:
            for name in names if what == "steps" else ():
                found.append((name, 1 + sum(name == other for other, _ in found)))
        return found

    @property
    def pieces(self) -> list[str]:
        """Everything that is streamed."""
        return [piece for what, *pieces in self.ops if what == "stream" for piece in pieces]

    @property
    def breaks(self) -> list[int]:
        """Places of operations with steps before (or in) them and after them."""
        return [p for p in range(len(self.ops)) if self.steps(p + 1) and len(self.steps(p + 1)) < len(self.steps())]

    def text(self, port: int) -> str:
        """As the message to the agent; the recorder listens at `port`."""
        return json.dumps({"port": port, "ops": self.ops})


@dataclass(eq=False)
class Plan:
    """Where one turn is to be held.

    Attributes:
        at: (name, number) of the step, place of the operation, or number of the write of pieces.
        node: who is held there; None: nobody yet.
        doomed: the node is being killed: nothing lets it go any more.
    """

    cid: str
    turn: str
    script: Script
    window: Window
    at: Any = None
    node: int | None = None
    doomed: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def __str__(self) -> str:
        place = "" if self.at is None else f" {self.at}"
        return f"{self.cid} {self.turn}: {self.window.kind}{place} ({self.window.value[1]})"


def draw_place(rng: random.Random, window: Window, script: Script, recorded: Sequence[Step]) -> Any:
    """Where in the turn, given what is recorded of it; False if the window cannot be met any more."""
    open_steps = [step for step in script.steps() if step not in recorded]
    if window in (Window.IN_STEP, Window.BEFORE_RECORD):
        return rng.choice(open_steps) if open_steps else False
    if window is Window.AFTER_RECORD:
        # Not the last one: that would be after the steps, not between them.
        between = [step for step in open_steps if step != script.steps()[-1]]
        return rng.choice(between) if between else False
    if window is Window.BETWEEN_STEPS:
        return rng.choice(script.breaks) if script.breaks else False
    if window in (Window.PIECES_LOST, Window.PIECES_UNHEARD):
        return rng.randint(1, len(script.pieces))
    return None


# -- what a node tells the store ---------------------------------------------------------------------------------------

_WRITES: Final = ("append", "append_final", "pieces")
_BY_SHA: Final = {SCRIPTS[name].sha.encode(): name for name in _WRITES}
_BY_TEXT: Final = {SCRIPTS[name].source.encode(): name for name in _WRITES}

AWAY: Final = packed("EVAL", "return redis.error_reply('LOADING held by the test')", "0")
NO_REPLY: Final = packed("CLIENT", "REPLY", "SKIP")


@dataclass(frozen=True)
class Write:
    """A write of a conversation's owner: the log entries or the pieces that it carries."""

    cid: str
    entries: tuple[dict[str, Any], ...] = ()
    pieces: tuple[dict[str, Any], ...] = ()

    @staticmethod
    def read(command: Sequence[bytes]) -> Write | None:
        """None if the command is something else."""
        if len(command) < 4:
            return None
        name = _BY_SHA.get(command[1]) or _BY_TEXT.get(command[1])
        if name is None:
            return None
        cid = command[3].decode().rpartition("}")[0].rpartition(":")[2]
        if name == "pieces":
            return Write(cid, pieces=tuple(json.loads(part) for part in command if part.startswith(b'{"turn":')))
        return Write(cid, entries=tuple(json.loads(part) for part in command if part.startswith(b'{"kind":')))

    def has(self, turn: str, kind: str) -> bool:
        """Whether an entry of that kind and turn is in it."""
        return any(entry["turn"] == turn and entry["kind"] == kind for entry in self.entries)

    def records(self, turn: str, step: Any) -> bool:
        """Whether the record of that step is in it."""
        return any(
            (entry["turn"], entry["kind"]) == (turn, "step")
            and (entry["data"]["name"], entry["data"]["number"]) == step
            for entry in self.entries
        )


class Director:
    """Holds conversations in the windows that are planned for them.

    Attributes:
        plans: conversation → what is planned; taken away when it is over.
        history: what happened, for a failure's report.
    """

    def __init__(self) -> None:
        self.plans: dict[str, Plan] = {}
        self.history: list[str] = []
        self._flowed: defaultdict[tuple[str, str, int], int] = defaultdict(int)
        self._writes: defaultdict[tuple[str, str, int], int] = defaultdict(int)
        self._more = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    def note(self, what: object) -> None:
        """Remember what happened."""
        self.history.append(str(what))

    def plan(self, plan: Plan) -> None:
        """Hold that turn there, from now on."""
        self.plans[plan.cid] = plan
        self.note(f"planned: {plan}")

    def drop(self, cid: str) -> Plan | None:
        """Hold it no longer."""
        plan = self.plans.pop(cid, None)
        if plan is not None:
            plan.over.set()
        return plan

    def _hold(self, plan: Plan, node: int) -> None:
        plan.node = node
        self.note(f"held at n{node}: {plan}")

    # -- at the proxies --------------------------------------------------------------------------------------------

    def rewrite(self, node: int, command: list[bytes]) -> bytes:
        """What the store is told instead of a command of that node."""
        as_it_is = packed(*command)
        write = Write.read(command)
        if write is None:
            return as_it_is
        plan = self.plans.get(write.cid)
        if plan is not None and plan.node == node:
            return AWAY
        lost = unheard = False
        if plan is not None and plan.node is None:
            lost, unheard = self._meets(plan, write)
            if lost or unheard:
                self._hold(plan, node)
        if lost:
            return AWAY
        self._count(write)
        return NO_REPLY + as_it_is + AWAY if unheard else as_it_is

    def _meets(self, plan: Plan, write: Write) -> tuple[bool, bool]:
        """Whether this write must not arrive, or its reply."""
        window, turn = plan.window, plan.turn
        if window in (Window.BEFORE_INPUT, Window.AFTER_INPUT):
            met = write.has(turn, "input")
        elif window in (Window.BEFORE_RECORD, Window.AFTER_RECORD):
            met = write.records(turn, plan.at)
        elif window in (Window.BEFORE_FINAL, Window.AFTER_FINAL):
            met = write.has(turn, "turn_done")
        elif window in (Window.PIECES_LOST, Window.PIECES_UNHEARD) and write.pieces:
            piece = write.pieces[0]
            met = piece["turn"] == turn and self._writes[write.cid, turn, piece["attempt"]] + 1 == plan.at
        else:
            met = False
        loses = window in (Window.BEFORE_INPUT, Window.BEFORE_RECORD, Window.PIECES_LOST, Window.BEFORE_FINAL)
        return met and loses, met and not loses

    def _count(self, write: Write) -> None:
        for piece in write.pieces:
            key = (write.cid, piece["turn"], piece["attempt"])
            self._flowed[key] = max(self._flowed[key], piece["offset"] + len(piece["data"]))
        if write.pieces:
            self._writes[write.cid, write.pieces[0]["turn"], write.pieces[0]["attempt"]] += 1
            task = asyncio.get_running_loop().create_task(self._tell())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _tell(self) -> None:
        async with self._more:
            self._more.notify_all()

    # -- at the recorder -------------------------------------------------------------------------------------------

    async def flowed(self, cid: str, turn: str, attempt: int, offset: int) -> None:
        """Return when so many characters of the attempt's answer are on their way to the store."""
        async with self._more:
            await self._more.wait_for(lambda: self._flowed[cid, turn, attempt] >= offset)

    def stop_at(self, node: int, cid: str, turn: str, window: Window, at: object) -> Plan | None:
        """The plan by which an agent is held that is there now; it goes on when the plan is over."""
        plan = self.plans.get(cid)
        if plan is None or plan.node is not None or (plan.turn, plan.window, plan.at) != (turn, window, at):
            return None
        self._hold(plan, node)
        return plan

    def gave_up(self, plan: Plan) -> None:
        """Whoever was held is not there any more. Without a kill the turn was begun again: hold that one."""
        if not plan.doomed and not plan.over.is_set():
            plan.node = None
            self.note(f"got away: {plan}")
