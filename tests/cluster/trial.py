"""Rounds of kills: conversations held in windows of their turns, their node killed, everything judged afterwards."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from typing import Any, Final

from socketio.exceptions import SocketIOError

from tests.cluster.clients import Client, Clients, RejectedError
from tests.cluster.histories import check_history, recorded_steps
from tests.cluster.pieces import Listener, check_deltas
from tests.cluster.recorder import Recorder
from tests.cluster.talking import Api
from tests.cluster.windows import KINDS, Director, Plan, Script, Window, draw_place
from tests.support.cluster import Cluster
from tests.support.processes import convener
from tests.support.waiting import wait_until

CONVERSATIONS: Final = 36
PER_USER: Final = 2
HEIRS: Final = 0.7
KILLS_PER_TURN: Final = 2
"""A third takeover of one turn would give it up."""

HEARD: Final = {Window.AFTER_INPUT: "input", Window.AFTER_RECORD: "step", Window.AFTER_FINAL: "turn_done"}
"""What the log has, though its owner does not know."""


class Deck:
    """Windows in random order, each kind equally often; kinds that were hit often enough are left out."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._cards: list[Window] = []

    def draw(self, script: Script, events: list[dict[str, Any]], turn: str) -> tuple[Window, Any] | None:
        """A window that the turn, of which the log has `events`, still has before it, and the place in it."""
        recorded = list(recorded_steps(events, turn))
        begun = any(event["turn"] == turn for event in events)
        for _ in range(2):
            for window in self._cards:
                if begun and window in (Window.BEFORE_INPUT, Window.AFTER_INPUT):
                    continue
                place = draw_place(self._rng, window, script, recorded)
                if place is not False:
                    self._cards.remove(window)
                    return window, place
            self._refill()
        return None

    def _refill(self) -> None:
        for kind in KINDS:
            places = [window for window in Window if window.kind == kind]
            self._cards += self._rng.sample(places * 2, 2)
        self._rng.shuffle(self._cards)


class Trial:
    """Conversations, their clients, and what was done to their nodes."""

    def __init__(
        self, seed: str, cluster: Cluster, director: Director, recorder: Recorder, clients: Clients, api: Api
    ) -> None:
        assert cluster.stored is not None
        self._cluster = cluster
        self._stored = cluster.stored
        self._director = director
        self._recorder = recorder
        self._clients = clients
        self._api = api
        self._rng = random.Random(seed)
        self._elsewhere = random.Random(seed)  # asked at times that no seed decides
        self._deck = Deck(self._rng)
        self._cids = [f"c{number:02}" for number in range(CONVERSATIONS)]
        self._scripts: defaultdict[str, list[Script]] = defaultdict(list)
        self._watchers: dict[str, list[Client]] = {}
        self._listener: Listener | None = None
        self._kills = Counter[tuple[str, str]]()
        self._judged = Counter[str]()
        self.hits = Counter[Window]()
        self.rounds = 0
        self.heirs = 0

    def close(self) -> None:
        """Listen no more."""
        if self._listener is not None:
            self._listener.close()

    def hits_of(self, kind: str) -> int:
        """How often a kind of window was hit."""
        return sum(count for window, count in self.hits.items() if window.kind == kind)

    def summary(self) -> str:
        """The numbers."""
        lines = [f"{self.hits[window]:4} {window.kind}: {window.value[1]}" for window in Window]
        turns = sum(map(len, self._scripts.values()))
        calls = len(self._recorder.calls)
        steps = sum(len(script.steps()) for scripts in self._scripts.values() for script in scripts)
        again = sum(count > 1 for count in self._kills.values())
        lines.append(
            f"{self.rounds} kills of a node, {self.heirs} of one that was taking over; "
            f"{turns} turns ({again} hit twice), {steps} steps in {calls} calls"
        )
        return "\n".join(lines)

    # -- the beginning ---------------------------------------------------------------------------------------------

    def _somewhere(self) -> str:
        """A node, as a load balancer chooses one."""
        return self._cluster.url(self._elsewhere.choice(self._cluster.live()))

    @staticmethod
    def user(cid: str) -> str:
        """Whose conversation it is."""
        return f"u{int(cid[1:]) // PER_USER}"

    async def begin(self) -> None:
        """Start conversations on all nodes, each with two clients anywhere."""
        assert self._cluster.server is not None
        self._listener = Listener(self._cluster.server, self._cids)
        for number, cid in enumerate(self._cids):
            await self._api.start(self._cluster.url(number % len(self._cluster.nodes)), cid, self.user(cid))
            self._watchers[cid] = [
                await self._clients.join(self._somewhere, cid, comes_back=True, user_id=self.user(cid))
                for _ in range(2)
            ]

    # -- a round ---------------------------------------------------------------------------------------------------

    async def round(self) -> None:
        """Hold the conversations of one node, kill it, wait until everybody goes on, judge."""
        self.rounds += 1
        owners = {cid: self._cluster.owner(cid) for cid in self._cids}
        victim = self._rng.choice(sorted({owner for owner in owners.values() if owner is not None}))
        mine = [cid for cid, owner in owners.items() if owner == victim]
        self._director.note(f"round {self.rounds}: n{victim}, which owns {len(mine)}")
        for cid in self._cids:
            if owners[cid] != victim:
                self._director.drop(cid)
        await asyncio.gather(*(self._busy(cid, held=cid in mine) for cid in self._cids))
        await wait_until(lambda: all(map(self._is_held, mine)), "every conversation of the node is in its window", 40)
        caught = [plan for plan in self._director.plans.values() if plan.node == victim]
        logs = {plan.cid: self._events_in_store(plan.cid) for plan in caught}
        for plan in caught:
            plan.doomed = True
            self._check_place(plan, logs[plan.cid])
        await asyncio.to_thread(self._cluster.kill, victim)
        self._director.note(f"killed n{victim}")
        # Sometimes whoever takes over goes down as well, in the middle of that.
        heir = all(not self._kills[plan.cid, plan.turn] for plan in caught) and self._rng.random() < HEIRS
        for plan in caught:
            self._after_kill(plan, logs[plan.cid], again=not heir)
        killed = [victim, await self._kill_heir(victim, mine)] if heir else [victim]
        restarts = asyncio.gather(*(asyncio.to_thread(self._cluster.restart, node) for node in killed))
        await asyncio.gather(*(self._send_again(plan.cid) for plan in caught))
        await wait_until(lambda: all(map(self._is_at_rest, self._cids)), "everything is answered, or held again", 60)
        await restarts
        await self.judge()

    async def _kill_heir(self, victim: int, cids: list[str]) -> int:
        """Kill the first node that takes one of these conversations over."""

        def heirs() -> list[int]:
            owners = [self._cluster.owner(cid) for cid in cids]
            return [owner for owner in owners if owner not in (None, victim)]

        heir = (await wait_until(heirs, "somebody takes a conversation over"))[0]
        await asyncio.to_thread(self._cluster.kill, heir)
        for cid in cids:
            self._kills[cid, f"t{int(self._stored.head(cid)['done']) + 1}"] += 1
        self.heirs += 1
        self._director.note(f"killed n{heir}, which was taking over")
        return heir

    async def _busy(self, cid: str, held: bool) -> None:
        """Let there be something to do, and somebody who waits for it in a window."""
        if cid in self._director.plans:
            return
        rng = self._rng
        if not held and rng.random() < 0.5:
            return
        scripts = [Script.draw(rng) for _ in range(rng.choice((1, 1, 1, 2)))]
        if held:
            chosen = rng.randrange(len(scripts))
            turn = f"t{len(self._scripts[cid]) + chosen + 1}"
            card = self._deck.draw(scripts[chosen], [], turn)
            assert card is not None
            self._director.plan(Plan(cid, turn, scripts[chosen], *card))
        by_socket = [rng.random() < 0.3 for _ in scripts]
        # Everything is drawn before anything is awaited: what happens in which order is not from the seed.
        for script, socket in zip(scripts, by_socket, strict=True):
            await self._send(cid, script, socket)

    async def _send(self, cid: str, script: Script, by_socket: bool) -> None:
        self._scripts[cid].append(script)
        position = len(self._scripts[cid])
        ident, text = f"{cid}.{position}", script.text(self._recorder.port)
        client = self._elsewhere.choice(self._watchers[cid])
        answer: dict[str, Any] | None = None
        if by_socket and client.sio.connected:
            self._api.sent[cid][ident] = text
            try:
                answer = await client.say(text, ident)
            except (RejectedError, SocketIOError) as error:
                self._director.note(f"{ident} is sent again: {error!r}")
        if answer is None:
            answer = await self._api.deliver(cid, text, ident)
        assert answer["position"] == position, answer

    async def _send_again(self, cid: str) -> None:
        """Send the last message once more, as a client does that has not heard of its acceptance; any client may."""
        if self._rng.random() < 0.5:
            position = len(self._scripts[cid])
            ident = f"{cid}.{position}"
            answer = await self._api.deliver(cid, self._api.sent[cid][ident], ident)
            assert (answer["position"], answer["duplicate"]) == (position, True), answer

    def _is_held(self, cid: str) -> bool:
        plan = self._director.plans[cid]
        if plan.node is None:
            return False
        if plan.window is Window.PIECES_UNHEARD:
            return plan.at <= len(self._stored.pieces(cid))
        if plan.window not in HEARD:
            return True
        events = self._events_in_store(cid)
        if plan.window is Window.AFTER_RECORD:
            return plan.at in recorded_steps(events, plan.turn)
        return any((e["turn"], e["kind"]) == (plan.turn, HEARD[plan.window]) for e in events)

    def _is_at_rest(self, cid: str) -> bool:
        """Whether all is answered by somebody alive, or the conversation is held."""
        plan, head = self._director.plans.get(cid), self._stored.head(cid)
        if plan is not None and not plan.doomed and plan.node is not None:
            return True
        answered = int(head["done"]) == int(head["position"]) == len(self._scripts[cid])
        return answered and (not head["owner"] or head["owner"] in self._stored.members())

    def _events_in_store(self, cid: str) -> list[dict[str, Any]]:
        return [{"kind": e.kind, "turn": e.turn, "data": e.data} for e in self._stored.log(cid)]

    # -- the kill --------------------------------------------------------------------------------------------------

    def _check_place(self, plan: Plan, events: list[dict[str, Any]]) -> None:
        """The log, the pieces and the recorder say that it is where it is to be killed."""
        kinds = [event["kind"] for event in events if event["turn"] == plan.turn]
        steps = set(recorded_steps(events, plan.turn))
        calls = [(c.name, c.number) for c in self._recorder.calls if (c.cid, c.turn) == (plan.cid, plan.turn)]
        unread, pieces = self._stored.unread(plan.cid), len(self._stored.pieces(plan.cid))
        there = "input" in kinds and "turn_done" not in kinds
        match plan.window:
            case Window.BEFORE_INPUT:
                there = not kinds and unread > 0
            case Window.AFTER_INPUT:
                there &= not steps
            case Window.IN_STEP | Window.BEFORE_RECORD:
                there &= plan.at not in steps and plan.at in calls
            case Window.AFTER_RECORD:
                there &= plan.at in steps
            case Window.BETWEEN_STEPS:
                there &= set(plan.script.steps(plan.at + 1)) <= steps
            case Window.PIECES_LOST:
                there &= pieces == plan.at - 1
            case Window.PIECES_UNHEARD:
                there &= pieces == plan.at
            case Window.BEFORE_FINAL:
                there &= steps == set(plan.script.steps())
            case Window.AFTER_FINAL:
                there = kinds.count("turn_done") == 1
        assert there, f"{plan}: {kinds}, {steps} recorded, {calls} called, {unread} unread, {pieces} writes of pieces"

    def _after_kill(self, plan: Plan, events: list[dict[str, Any]], *, again: bool) -> None:
        """Count it; perhaps (`again`) whoever takes over is to be killed in the same turn."""
        self.hits[plan.window] += 1
        self._kills[plan.cid, plan.turn] += 1
        self._director.drop(plan.cid)
        ended = any((event["turn"], event["kind"]) == (plan.turn, "turn_done") for event in events)
        if not again or ended or self._kills[plan.cid, plan.turn] >= KILLS_PER_TURN or self._rng.random() < 0.6:
            return
        card = self._deck.draw(plan.script, events, plan.turn)
        if card is not None:
            self._director.plan(Plan(plan.cid, plan.turn, plan.script, *card))

    # -- the judgement ---------------------------------------------------------------------------------------------

    async def judge(self) -> None:
        """Every conversation that is not held: its log, what was done outside, its state, what its clients saw."""
        for cid in self._cids:
            if cid not in self._director.plans and int(self._stored.head(cid)["seq"]) > self._judged[cid]:
                await self._judge(cid)

    async def _judge(self, cid: str) -> None:
        events = await self._api.events(cid, self._somewhere())
        sent, scripts = self._api.sent[cid], self._scripts[cid]
        try:
            check_history(events, sent, scripts, [call for call in self._recorder.calls if call.cid == cid])
            assert self._stored.state(cid) == ({"turns": len(scripts)} if scripts else None), cid
            assert self._stored.unread(cid) == 0
            assert self._stored.pieces(cid) == []
            await self._check_pieces(cid, events[-1]["seq"])
            for client in self._watchers[cid]:
                await client.wait_seq(events[-1]["seq"])
                assert client.events == events, client.name
                assert client.named("resync") == []
                check_deltas(client.shown)
        except AssertionError as error:
            error.add_note(f"in conversation {cid}")
            raise
        self._judged[cid] = events[-1]["seq"]

    async def _check_pieces(self, cid: str, seq: int) -> None:
        """Every answer was written piece by piece, and whole, before it was done."""
        listener = self._listener
        assert listener is not None
        await wait_until(lambda: listener.has_heard(cid, seq), f"entry {seq} of {cid} was published")
        texts = {f"t{number}": "".join(script.pieces) for number, script in enumerate(self._scripts[cid], 1)}
        assert listener.answers[cid].texts == texts

    async def end(self) -> None:
        """Hold nobody any more; judge everything, from every side."""
        for cid in self._cids:
            self._director.drop(cid)
        await wait_until(lambda: all(map(self._is_at_rest, self._cids)), "everything is answered", 60)
        for cid in self._cids:
            newcomer = await self._clients.join(self._somewhere, cid, comes_back=True, user_id=self.user(cid))
            self._watchers[cid].append(newcomer)
        self._judged.clear()
        await self.judge()
        await asyncio.to_thread(self._cluster.settle)
        await asyncio.to_thread(self._cluster.agree)
        keys = self._stored.keys()
        left = [key for key in keys if key.endswith((":tail", ":asks", ":alarms", ":due"))]
        assert left == []
        for user in {self.user(cid) for cid in self._cids}:
            owners = {cid: self._stored.head(cid)["owner"] for cid in self._cids if self.user(cid) == user}
            assert self._stored.slots(user) == {cid: owner for cid, owner in owners.items() if owner}, user
        await self._audit()
        await asyncio.to_thread(self._cluster.erase_everything)

    async def _audit(self) -> None:
        """As an operator does it."""
        url = self._cluster.url(self._rng.choice(self._cluster.live()))
        with convener("audit", "--all", "--url", url, directory=self._cluster.nodes[0].directory) as command:
            code = await asyncio.to_thread(command.wait, 60)
            assert (code, command.errors) == (0, []), command.errors + command.output
            assert command.output[0].startswith("no violations; "), command.output
            assert f" on {len(self._cids)} conversations " in command.output[0]
