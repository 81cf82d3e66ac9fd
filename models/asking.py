"""Questions: a turn that waits for a person, with the conversation in memory or not, and a deadline (I8, I11, I13).

Two nodes, one conversation with one open turn that asks one question with a deadline. A person answers at either node,
perhaps again after a node went down; each node looks after the deadline. The question is opened by an append of the
owner, the deadline's timer lies elsewhere in the store, so the two are separate steps, and a node may crash between any
two steps. A second message may come at any time; a conversation that waits may leave memory.

Wanted: at most one answer is taken, none for a turn that has ended; and when nothing is left for the system to do,
whatever was acknowledged is in the log, a turn that has its answer has ended, and a question whose deadline has passed
is answered.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from models.explore import Run, Step, put, system, world


@dataclass(frozen=True)
class Guards:
    """The rules, and how much happens."""

    first_counts: bool = True
    """ANSWER takes an answer only while the question is open, and closes it in the same step."""
    ends_close: bool = True
    """The append that ends a turn closes its questions."""
    release_compares: bool = True
    """RELEASE of a conversation that waits is refused while anything is unread."""
    disown_compares: bool = True
    """So is DISOWN."""
    wakes_before_ack: bool = True
    """An answer is acknowledged when there is an owner, not before."""
    dup_wakes: bool = True
    """An answer that was accepted before is followed by the same wake."""
    expiry_wakes: bool = True
    """Who expires a question wakes the conversation before it removes the timer."""
    timer_first: bool = True
    """The timer is entered before the question, so that no crash leaves a question without one."""
    keeps_timer: bool = True
    """A timer that finds no open question stays until the question was answered or its turn has ended."""
    crashes: int = 1
    messages: int = 1
    releases: int = 1


Answer = Literal["person", "deadline", "message"]
"""What lies in the inbox; a message stands for everything that is no answer."""

Phase = Literal["fresh", "timed", "untimed", "asked"]
"""How far the owner is with its question; `timed`: the timer is entered; `untimed`: asked, and the timer is not."""


class Node(NamedTuple):
    """A node: the epoch under which it owns the conversation (0: it does not), and what it is about to do."""

    alive: bool = True
    epoch: int = 0
    phase: Phase = "fresh"
    expired: bool = False


class State(NamedTuple):
    """Everything.

    Attributes:
        unread: the inbox.
        taken: answers in the log.
        at: the node at which the person's answer was accepted and is not acknowledged yet.
        lost: that node went down; the person may try again.
    """

    crashes: int
    messages: int
    releases: int
    nodes: tuple[Node, ...] = (Node(epoch=1), Node())
    owner: int | None = 0
    epoch: int = 1
    asked: bool = False
    open: bool = False
    timer: bool = False
    due: bool = False
    unread: tuple[Answer, ...] = ()
    taken: tuple[Answer, ...] = ()
    ended: bool = False
    tried: bool = False
    at: int | None = None
    lost: bool = False
    acknowledged: bool = False
    broken: str | None = None

    def with_node(self, i: int, node: Node) -> State:
        """The same with another node."""
        return self._replace(nodes=put(self.nodes, i, node))

    def owned_by(self, i: int) -> bool:
        """Whether node `i` owns the conversation, under the epoch that it believes in."""
        return self.owner == i and self.epoch == self.nodes[i].epoch

    def answerable(self) -> bool:
        """Whether somebody lives who owns it; a buried owner is known at once."""
        return self.owner is not None and self.nodes[self.owner].alive

    def claimed(self, i: int) -> State:
        """Node `i` becomes the owner, and finds in the log whether the question was asked."""
        phase: Phase = "asked" if self.asked else "fresh"
        node = self.nodes[i]._replace(epoch=self.epoch + 1, phase=phase)
        return self.with_node(i, node)._replace(owner=i, epoch=self.epoch + 1)


class Asking:
    """One question, and everybody who may answer it."""

    def __init__(self, guards: Guards) -> None:
        self.guards = guards

    def initial(self) -> State:
        """Node 0 runs the turn; nothing was asked."""
        return State(self.guards.crashes, self.guards.messages, self.guards.releases)

    def steps(self, state: State) -> Iterator[Step[State]]:
        """See `Model`."""
        if not state.due:
            yield world("the deadline passes", state._replace(due=True))
        for i, node in enumerate(state.nodes):
            if not node.alive:
                continue
            if state.crashes and all(n.alive for n in state.nodes):
                lost = state.lost or state.at == i
                at = None if state.at == i else state.at
                dead = state.with_node(i, Node(alive=False))
                yield world(f"{i} crashes", dead._replace(crashes=state.crashes - 1, at=at, lost=lost))
            if node.epoch:
                yield from self._owns(state, i)
            yield from self._recovers(state, i)
            yield from self._expires(state, i)
            yield from self._people(state, i)

    # -- the owner -----------------------------------------------------------------------------------------------

    def _owns(self, state: State, i: int) -> Iterator[Step[State]]:
        node = state.nodes[i]
        if not state.owned_by(i):
            yield system(f"{i} finds itself fenced", state.with_node(i, node._replace(epoch=0)))
            return
        if not state.ended:
            yield from self._asks(state, i)
        if state.unread:
            answers = tuple(entry for entry in state.unread if entry != "message")
            yield system(f"{i} takes in {state.unread}", state._replace(unread=(), taken=state.taken + answers))
        if node.phase == "asked" and not state.ended:
            closed = state._replace(ended=True, open=state.open and not self.guards.ends_close)
            if state.taken:
                yield system(f"{i} ends the turn with its answer", closed)
            else:
                yield world(f"{i} ends the turn without an answer: it is interrupted", closed)
        waits = state.open and (not state.unread or not self.guards.release_compares)
        if state.releases and node.phase == "asked" and (waits or (state.ended and not state.unread)):
            gone = state.with_node(i, node._replace(epoch=0))
            yield world(f"{i} releases", gone._replace(owner=None, releases=state.releases - 1))

    def _asks(self, state: State, i: int) -> Iterator[Step[State]]:
        node, first = state.nodes[i], self.guards.timer_first
        match node.phase:
            case "fresh" if first:
                yield system(f"{i} enters the timer", self._phase(state, i, "timed")._replace(timer=True))
            case "fresh" | "timed":
                asked = self._phase(state, i, "asked" if first else "untimed")
                yield system(f"{i} asks", asked._replace(asked=True, open=True))
            case "untimed":
                yield system(f"{i} enters the timer", self._phase(state, i, "asked")._replace(timer=True))
            case "asked":
                return

    @staticmethod
    def _phase(state: State, i: int, phase: Phase) -> State:
        return state.with_node(i, state.nodes[i]._replace(phase=phase))

    def _recovers(self, state: State, i: int) -> Iterator[Step[State]]:
        """The owner is dead: what waits and has nothing unread is disowned, everything else is taken over."""
        if state.owner is None or state.nodes[state.owner].alive:
            return
        waits = state.open and (not state.unread or not self.guards.disown_compares)
        if waits or (state.ended and not state.unread):
            yield system(f"{i} disowns it", state._replace(owner=None, epoch=state.epoch + 1))
        else:
            yield system(f"{i} takes it over", state.claimed(i))

    # -- answers -------------------------------------------------------------------------------------------------

    def _accepted(self, state: State, answer: Answer) -> State:
        """ANSWER: one step of the store."""
        broken = "I8: an answer was accepted for a turn that has ended" if state.ended else state.broken
        return state._replace(unread=(*state.unread, answer), open=False, broken=broken)

    def _takes(self, state: State) -> bool:
        return state.open or (state.asked and not state.ended and not self.guards.first_counts)

    def _expires(self, state: State, i: int) -> Iterator[Step[State]]:
        """Node `i` looks at the timer that is due: ANSWER, then the wake, then the timer goes."""
        node = state.nodes[i]
        if not (state.timer and state.due):
            return
        answered = "deadline" in state.unread + state.taken
        if not node.expired:
            if self._takes(state) and not answered:
                expired = self._accepted(state, "deadline").with_node(i, node._replace(expired=True))
                yield system(f"{i} expires the question", expired)
            elif answered:
                # The same id again: DUP, and the same wake.
                yield system(f"{i} expires it again", state.with_node(i, node._replace(expired=True)))
            elif state.ended or "person" in state.unread + state.taken or not self.guards.keeps_timer:
                yield system(f"{i} finds no open question and removes the timer", state._replace(timer=False))
        elif state.answerable() or not self.guards.expiry_wakes:
            done = state.with_node(i, node._replace(expired=False))
            yield system(f"{i} removes the timer", done._replace(timer=False))
        elif state.owner is None:
            yield system(f"{i} wakes it for the deadline", state.claimed(i))

    def _people(self, state: State, i: int) -> Iterator[Step[State]]:
        if state.asked and not state.tried and self._takes(state):
            answered = self._accepted(state, "person")._replace(tried=True, at=i)
            yield world(f"a person answers at {i}", answered)
        if state.lost:
            again = state._replace(lost=False)
            if self.guards.dup_wakes:
                yield world(f"the person answers again at {i}: DUP", again._replace(at=i))
            else:
                yield world(f"the person answers again at {i}: DUP", again._replace(acknowledged=True))
        if state.at == i:
            done = state._replace(at=None, acknowledged=True)
            if state.answerable() or not self.guards.wakes_before_ack:
                yield system(f"{i} acknowledges the answer", done)
            elif state.owner is None:
                yield system(f"{i} wakes it for the answer", state.claimed(i))
        if state.messages and state.answerable():
            sent = state._replace(messages=state.messages - 1, unread=(*state.unread, "message"))
            yield world(f"a message is sent at {i}", sent)

    # -- what must not be ----------------------------------------------------------------------------------------

    def violation(self, state: State, quiet: bool) -> str | None:
        """See `Model`."""
        answers = [entry for entry in (*state.unread, *state.taken) if entry != "message"]
        if state.broken:
            return state.broken
        if len(answers) > 1:
            return f"I8: two answers were accepted: {answers}"
        if not quiet:
            return None
        if state.acknowledged and not state.taken and not state.ended:
            return "I11: an answer is acknowledged, and nothing will take it in"
        if "message" in state.unread:
            return "I13: a message is unread, and nobody owns the conversation"
        if state.due and state.asked and not state.ended and not state.taken and not state.lost:
            return "the deadline has passed, and nothing will answer the question"
        return None


RUNS: Final = (
    Run("full", "all guards", lambda: Asking(Guards())),
    Run("full-more", "it leaves memory three times, two messages", lambda: Asking(Guards(messages=2, releases=3))),
    Run(
        "answer-ignores-open",
        "ANSWER takes an answer whether or not the question is open",
        lambda: Asking(Guards(crashes=0, first_counts=False)),
        breaks="I8",
        length=5,
    ),
    Run(
        "end-leaves-questions",
        "the end of a turn leaves its questions open",
        lambda: Asking(Guards(crashes=0, ends_close=False)),
        breaks="I8",
        length=4,
    ),
    Run(
        "release-over-unread",
        "who waits for a person may leave although something is unread",
        lambda: Asking(Guards(crashes=0, release_compares=False)),
        breaks="I13",
        length=4,
    ),
    Run(
        "disown-over-unread",
        "recovery disowns what waits for a person although something is unread",
        lambda: Asking(Guards(disown_compares=False)),
        breaks="I13",
        length=5,
    ),
    Run(
        "ack-before-wake",
        "an answer is acknowledged before anybody owns the conversation",
        lambda: Asking(Guards(wakes_before_ack=False)),
        breaks="I11",
        length=5,
    ),
    Run(
        "dup-does-not-wake",
        "an answer that was accepted before is acknowledged as it is",
        lambda: Asking(Guards(dup_wakes=False)),
        breaks="I11",
        length=6,
    ),
    Run(
        "expiry-does-not-wake",
        "who expires a question removes the timer and leaves the conversation asleep",
        lambda: Asking(Guards(expiry_wakes=False)),
        breaks="the deadline",
        length=6,
    ),
    Run(
        "question-before-timer",
        "the timer is entered after the question",
        lambda: Asking(Guards(timer_first=False)),
        breaks="the deadline",
        length=4,
    ),
    Run(
        "timer-removed-early",
        "a timer that finds no open question is removed, though the question may still be on its way",
        lambda: Asking(Guards(crashes=0, keeps_timer=False)),
        breaks="the deadline",
        length=4,
    ),
)
