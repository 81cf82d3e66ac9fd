"""Waking up: SEND, the publication, CLAIM, RELEASE, recovery, handoff (I11, I7).

Three nodes, one conversation, a few messages. A message is appended to the inbox and published on the conversation's
channel in one step; the sender then looks at the owner that SEND returned, and either acknowledges or wakes the
conversation. The world has budgets: a node crashes, a subscriber's connection drops (what was published meanwhile is
gone), a CLAIM or a RELEASE arrives late, an owner hands over. A node learns of a burial some time after it happened;
most counterexamples need that. Clients owe nothing: one that was acknowledged never calls again, one that was not may
give up.

Wanted: never do two nodes hold an ownership that they may act on; and when nothing is left for the system to do, every
acknowledged message is answered.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from models.explore import Run, Step, put, system, world
from models.wake_state import (
    NONE,
    OPEN,
    Asking,
    At,
    Claim,
    Disown,
    HandedOver,
    HandOver,
    LateClaim,
    LateRelease,
    Leaving,
    Left,
    Node,
    Read,
    ReadInbox,
    Record,
    Recover,
    State,
    Subscribe,
    Waits,
)


@dataclass(frozen=True)
class Guards:
    """The rules, and how much happens."""

    subscribes_first: bool = True
    """The channel is subscribed before CLAIM."""
    rereads: bool = True
    """After a new subscription the owner reads the inbox."""
    dup_wakes: bool = True
    """DUP returns the owner and is followed by the same wake as OK."""
    wakes_before_ack: bool = True
    """A message is acknowledged when there is an owner, not before."""
    claims_itself: bool = True
    """The sender's node claims; else it asks a better-placed one and acknowledges."""
    disowns: bool = True
    """Recovery clears the owner of what it leaves; refused if anything is unread or unanswered."""
    sees_unanswered: bool = True
    """Recovery looks at inputs without an answer, not only at the inbox."""
    fences_unowned: bool = True
    """Recovery of a record without an owner raises the epoch before it drops the record."""
    retries_buried: bool = True
    """A CLAIM that lost begins again, instead of waiting for a winner that may be buried."""
    release_compares_log: bool = True
    """RELEASE compares the length of the log."""
    release_is_final: bool = True
    """From sending RELEASE until its outcome is known the sender does not act."""
    accepted: bool = True
    """The target of a handoff has its record and its subscription before the owner changes."""
    keeps_record: bool = True
    """The source of a handoff drops its record only after it saw, in the store, that the target is not buried."""
    nodes: int = 3
    messages: int = 2
    crashes: int = 1
    drops: int = 0
    late: int = 0
    handoffs: int = 0


class Wake:
    """One conversation that must never sleep through a message."""

    def __init__(self, guards: Guards) -> None:
        self.guards = guards

    def initial(self) -> State:
        """Node 0 owns the conversation; nothing was sent."""
        g = self.guards
        nodes = (Node(epoch=1, subscribed=True), *(Node() for _ in range(g.nodes - 1)))
        left = Left(g.crashes, g.drops, g.late, g.handoffs)
        return State(left, nodes, (None,) * g.messages, (0,) * g.messages)

    def steps(self, state: State) -> Iterator[Step[State]]:
        """See `Model`."""
        for i, node in enumerate(state.nodes):
            if not node.alive:
                if i not in state.buried:
                    yield system(f"{i} is buried", state._replace(buried=state.buried | {i}))
                continue
            yield from self._membership(state, i)
            yield from self._faults(state, i)
            yield from self._listens(state, i)
            if node.epoch and not isinstance(node.job, Leaving):
                yield from self._owns(state, i)
            if node.job is None:
                for dead in sorted(node.knows & state.records):
                    yield system(f"{i} looks at the record of {dead}", state.doing(i, Recover(dead)))
            elif isinstance(node.job, Recover | Disown):
                yield from self._recovers(state, i, node.job)
            elif isinstance(node.job, Asking | HandOver | HandedOver):
                yield self._hands_over(state, i, node.job)
            else:
                yield from self._starts(state, i)
        yield from self._clients(state)
        yield from self._late(state)

    # -- nodes and faults ----------------------------------------------------------------------------------------

    def _membership(self, state: State, i: int) -> Iterator[Step[State]]:
        node = state.nodes[i]
        for dead in state.buried - node.knows:
            learned = state.with_node(i, node._replace(knows=node.knows | {dead}))
            yield system(f"{i} learns of the burial of {dead}", learned)

    def _faults(self, state: State, i: int) -> Iterator[Step[State]]:
        node, left = state.nodes[i], state.left
        if left.crashes and sum(n.alive for n in state.nodes) > 1:
            fates = tuple("lost" if isinstance(f, At | Waits) and f.node == i else f for f in state.fates)
            dead = node._replace(alive=False, epoch=0, subscribed=False, queue=NONE, job=None)
            left = left._replace(crashes=left.crashes - 1)
            crashed = state.with_node(i, dead)._replace(left=left, fates=fates)
            yield world(f"{i} crashes", crashed)
            if left.late and isinstance(node.job, Claim):
                command = LateClaim(i, node.job.owner, node.job.epoch)
                late = crashed._replace(network=state.network | {command}, left=left._replace(late=left.late - 1))
                yield world(f"{i} crashes, its CLAIM is still on its way", late)
        if state.left.drops and node.subscribed:
            deaf = state.with_node(i, node._replace(subscribed=False, queue=NONE))
            left = state.left._replace(drops=state.left.drops - 1)
            yield world(f"the subscriber of {i} drops", deaf._replace(left=left))

    def _late(self, state: State) -> Iterator[Step[State]]:
        for command in state.network:
            after = state._replace(network=state.network - {command})
            i = command.node
            if isinstance(command, LateClaim):
                claimed = after.claimed(i, command.owner, command.epoch)
                yield system(f"a late CLAIM of {i} {'lands' if claimed else 'is refused'}", claimed or after)
                continue
            lands = (
                (state.owner, state.epoch) == (i, command.epoch)
                # Unread is what lies above the cursor that RELEASE names; what was taken in is trimmed.
                and state.last <= max(command.cursor, state.cursor)
                and (state.offset == command.offset or not self.guards.release_compares_log)
            )
            if lands:
                after = after._replace(owner=None)
            node = state.nodes[i]
            if isinstance(node.job, Leaving):
                after = after.with_node(i, node._replace(job=None, epoch=0 if lands else node.epoch))
            yield system(f"a late RELEASE of {i} {'lands' if lands else 'is refused'}", after)

    # -- the owner -------------------------------------------------------------------------------------------------

    def _listens(self, state: State, i: int) -> Iterator[Step[State]]:
        """Node `i` reads what was published, and renews a subscription that it has lost."""
        node, rereads = state.nodes[i], self.guards.rereads
        if (node.epoch or i in state.records) and not node.subscribed and node.job is None:
            again = node._replace(subscribed=True)
            if rereads and state.owner == i and not node.epoch:
                again = again._replace(epoch=state.epoch)
            after = state.with_node(i, again)
            yield system(f"{i} subscribes again", after.taken_in(i) if rereads and again.epoch else after)
        if not node.queue:
            return
        number = min(node.queue)
        read = node._replace(queue=node.queue - {number})
        after = state.with_node(i, read)
        if number == OPEN:
            if state.owner != i or node.epoch:
                yield system(f"{i} skips an open entry", after)
            elif node.job is None:
                named = state.with_node(i, read._replace(epoch=state.epoch))
                yield system(f"{i} sees itself named owner and reads the inbox", named.taken_in(i))
        elif not node.epoch:
            if not isinstance(node.job, Claim | ReadInbox):
                yield system(f"{i} ignores position {number}", after)
        elif not isinstance(node.job, Leaving):
            yield system(f"{i} takes position {number} in", after.taken_in(i) if number > state.cursor else after)

    def _owns(self, state: State, i: int) -> Iterator[Step[State]]:
        node, left = state.nodes[i], state.left
        if not state.owned_by(i):
            yield system(f"{i} finds itself fenced", state.with_node(i, node._replace(epoch=0)))
            return
        for position in sorted(state.open_turns):
            done = state._replace(done=state.done | {position}, offset=state.offset + 1)
            yield system(f"{i} answers {position}", done)
        if node.job is not None:
            return
        if not state.open_turns:
            if state.last <= state.cursor:
                asleep = state.with_node(i, node._replace(epoch=0, subscribed=False, queue=NONE))
                yield world(f"{i} hibernates", asleep.without_record(i)._replace(owner=None))
            if left.late:
                command = LateRelease(i, node.epoch, state.cursor, state.offset)
                after = state.doing(i, Leaving()) if self.guards.release_is_final else state
                after = after._replace(network=state.network | {command}, left=left._replace(late=left.late - 1))
                yield world(f"{i} sends RELEASE and hears no answer", after)
        if left.handoffs:
            for target in range(self.guards.nodes):
                if target != i and target not in node.knows:
                    job = Asking(target) if self.guards.accepted else HandOver(target)
                    begun = state.doing(i, job)._replace(left=left._replace(handoffs=left.handoffs - 1))
                    yield world(f"{i} hands over to {target}", begun)

    def _hands_over(self, state: State, i: int, job: Asking | HandOver | HandedOver) -> Step[State]:
        node, target = state.nodes[i], job.target
        if isinstance(job, HandedOver):
            if self.guards.keeps_record and target in state.buried:
                learned = node._replace(job=Read(), knows=node.knows | {target})
                return system(f"{i} sees that {target} is buried", state.with_node(i, learned))
            return system(f"{i} drops its record", state.doing(i, None).without_record(i))
        if not node.epoch or not state.owned_by(i):
            return system(f"{i} handoff: fenced", state.with_node(i, node._replace(job=None, epoch=0)))
        if isinstance(job, Asking):
            if not state.nodes[target].alive:
                return system(f"{i} handoff: no answer from {target}", state.doing(i, None))
            ready = state.with_node(target, state.nodes[target]._replace(subscribed=True))
            ready = ready.doing(i, HandOver(target))._replace(records=state.records | {target})
            return system(f"{target} accepts: record, subscription", ready)
        given = state.claimed(target, state.owner, state.epoch)
        assert given is not None
        given = given.with_node(i, given.nodes[i]._replace(epoch=0, job=HandedOver(target)))
        return system(f"{i} makes {target} the owner", given)

    # -- starting and recovering -----------------------------------------------------------------------------------

    def _starts(self, state: State, i: int) -> Iterator[Step[State]]:
        node = state.nodes[i]
        match node.job:
            case Read():
                if state.owner == i and not node.epoch:
                    found = state.finished(i, node._replace(epoch=state.epoch, subscribed=True))
                    yield system(f"{i} reads that it is the owner, and the inbox", found.taken_in(i))
                elif state.owner is not None and state.owner not in node.knows:
                    yield system(f"{i} reads: owned by {state.owner}", state.finished(i, node))
                else:
                    read = state.doing(i, Record(state.owner, state.epoch))
                    yield system(f"{i} reads owner {state.owner}, epoch {state.epoch}", read)
            case Record(owner, epoch):
                subscribed = node.subscribed or self.guards.subscribes_first
                ready = node._replace(job=Claim(owner, epoch), subscribed=subscribed)
                after = state.with_node(i, ready)._replace(records=state.records | {i})
                yield system(f"{i} writes its record{' and subscribes' * subscribed}", after)
            case Claim(owner, epoch):
                claimed = state.claimed(i, owner, epoch)
                if claimed is not None:
                    owning = claimed.nodes[i]._replace(epoch=claimed.epoch, job=ReadInbox())
                    yield system(f"{i} claims epoch {claimed.epoch}", claimed.with_node(i, owning))
                elif self.guards.retries_buried:
                    yield system(f"{i} CLAIM: conflict, again", state.doing(i, Read()))
                else:
                    yield system(f"{i} CLAIM: conflict, it waits for the winner", state.finished(i, node))
            case ReadInbox():
                after = state.taken_in(i)
                if self.guards.subscribes_first:
                    yield system(f"{i} reads the inbox", after.finished(i, after.nodes[i]))
                else:
                    yield system(f"{i} reads the inbox", after.doing(i, Subscribe()))
            case Subscribe():
                yield system(f"{i} subscribes", state.finished(i, node._replace(subscribed=True)))
            case _:
                return

    def _recovers(self, state: State, i: int, job: Recover | Disown) -> Iterator[Step[State]]:
        node, guards = state.nodes[i], self.guards
        unanswered = guards.sees_unanswered and bool(state.open_turns)
        if isinstance(job, Disown):
            unchanged = (state.owner, state.epoch) == (job.owner, job.epoch)
            if unchanged and state.last <= state.cursor and not unanswered:
                disowned = state._replace(owner=None, epoch=state.epoch + 1).without_record(job.dead)
                yield system(f"{i} disowns it", disowned.doing(i, None))
            else:
                yield system(f"{i} DISOWN is refused", state.doing(i, None))
            return
        dropped = state.without_record(job.dead).doing(i, None)
        if state.owner is not None and state.owner in node.knows:
            if state.last > state.cursor or unanswered:
                yield system(f"{i} recovers it", state.doing(i, Record(state.owner, state.epoch)))
            elif guards.disowns:
                yield system(f"{i} reads: idle", state.doing(i, Disown(job.dead, state.owner, state.epoch)))
            else:
                yield system(f"{i} leaves it as it is", dropped)
        elif state.owner is None and guards.fences_unowned:
            yield system(f"{i} raises the epoch of what nobody owns", dropped._replace(epoch=state.epoch + 1))
        elif state.owner is None or state.owner not in state.buried:
            yield system(f"{i} drops the record of {job.dead}", dropped)
        # Else somebody owns it who is buried, and this node has not heard of that yet: it waits.

    # -- clients ---------------------------------------------------------------------------------------------------

    def _clients(self, state: State) -> Iterator[Step[State]]:
        for message, fate in enumerate(state.fates):
            if fate is None or fate == "lost":
                for i, node in enumerate(state.nodes):
                    if node.alive:
                        yield self._sends(state, message, i)
                if fate is None and message == 0:
                    return  # messages are alike: they are sent in order
            elif isinstance(fate, At):
                yield from self._answers_sender(state, message, fate)

    def _sends(self, state: State, message: int, i: int) -> Step[State]:
        position = state.positions[message]
        if position:
            fate = At(i, state.owner) if self.guards.dup_wakes else "acknowledged"
            again = state.with_fate(message, fate)
            return world(f"position {position} is sent again at {i}: DUP, owner {state.owner}", again)
        position = state.last + 1
        sent = state._replace(last=position, positions=put(state.positions, message, position)).published(position)
        sent = sent.with_fate(message, At(i, state.owner))
        return world(f"SEND at {i}: position {position}, owner {state.owner}", sent)

    def _answers_sender(self, state: State, message: int, fate: At) -> Iterator[Step[State]]:
        """The node at which a message was sent decides whether it may be acknowledged."""
        i, node, guards = fate.node, state.nodes[fate.node], self.guards
        position, done = state.positions[message], state.with_fate(message, "acknowledged")
        if fate.owner is not None and fate.owner not in node.knows:
            yield system(f"{i} acknowledges {position}", done)
        elif not guards.wakes_before_ack:
            yield system(f"{i} acknowledges {position}, then wakes", done if node.job else done.doing(i, Read()))
        elif not guards.claims_itself:
            for j, other in enumerate(state.nodes):
                if j != i:
                    hears = other.alive and other.job is None
                    yield system(f"{i} asks {j} and acknowledges {position}", done.doing(j, Read()) if hears else done)
        elif node.job is None or isinstance(node.job, Read | Record | Claim):
            waits = state.with_fate(message, Waits(i)).doing(i, node.job or Read())
            yield system(f"{i} wakes it for {position}", waits)

    # -- what must not be ------------------------------------------------------------------------------------------

    def violation(self, state: State, quiet: bool) -> str | None:
        """See `Model`."""
        acting = [i for i, n in enumerate(state.nodes) if n.alive and n.epoch and not isinstance(n.job, Leaving)]
        if len(acting) > 1:
            return f"I7: nodes {acting} both act (the owner is {state.owner})"
        if quiet:
            for fate, position in zip(state.fates, state.positions, strict=True):
                if fate == "acknowledged" and position not in state.done:
                    return f"I11: position {position} is acknowledged, nothing will answer it (owner {state.owner})"
        return None


RUNS: Final = (
    Run("full-crash", "two messages, a crash", lambda: Wake(Guards()), slow=True),
    Run("full-two-crashes", "two crashes", lambda: Wake(Guards(crashes=2, messages=1)), slow=True),
    Run("full-drop", "a subscriber drops", lambda: Wake(Guards(crashes=0, drops=1))),
    Run("full-drop-crash", "a subscriber drops, a crash", lambda: Wake(Guards(drops=1, messages=1)), slow=True),
    Run("full-late", "a command lands late, a crash", lambda: Wake(Guards(late=1, messages=1)), slow=True),
    Run("full-late-2", "a command lands late, two messages", lambda: Wake(Guards(crashes=0, late=1))),
    Run("full-handoff", "a handoff, two crashes", lambda: Wake(Guards(crashes=2, handoffs=1, messages=1)), slow=True),
    Run(
        "full-handoff-drop",
        "a handoff, a subscriber drops, a crash",
        lambda: Wake(Guards(drops=1, handoffs=1, messages=1)),
        slow=True,
    ),
    Run(
        "claim-then-subscribe",
        "the channel is subscribed after CLAIM",
        lambda: Wake(Guards(crashes=0, subscribes_first=False)),
        breaks="I11",
        length=11,
    ),
    Run(
        "no-reread",
        "a new subscription goes on with what is published from then on",
        lambda: Wake(Guards(crashes=0, drops=1, rereads=False)),
        breaks="I11",
        length=4,
    ),
    Run(
        "dup-does-not-wake",
        "a duplicate is acknowledged as it is",
        lambda: Wake(Guards(dup_wakes=False)),
        breaks="I11",
        length=7,
    ),
    Run(
        "ack-before-wake",
        "a message is acknowledged before anybody owns the conversation",
        lambda: Wake(Guards(wakes_before_ack=False)),
        breaks="I11",
        length=7,
    ),
    Run(
        "asking-is-enough",
        "a message is acknowledged when another node was asked to claim",
        lambda: Wake(Guards(claims_itself=False)),
        breaks="I11",
        length=7,
    ),
    Run(
        "no-disown",
        "recovery leaves the owner of an idle conversation as it is",
        lambda: Wake(Guards(disowns=False)),
        breaks="I11",
        length=8,
    ),
    Run(
        "inbox-only",
        "recovery looks at the inbox alone",
        lambda: Wake(Guards(sees_unanswered=False)),
        breaks="I11",
        length=10,
    ),
    Run(
        "late-claim-of-the-buried",
        "recovery drops the record of what nobody owns without raising the epoch",
        lambda: Wake(Guards(late=1, fences_unowned=False)),
        breaks="I11",
        length=14,
        slow=True,
    ),
    Run(
        "conflict-is-final",
        "a CLAIM that lost waits for the winner",
        lambda: Wake(Guards(late=1, retries_buried=False)),
        breaks="I11",
        length=13,
        slow=True,
    ),
    Run(
        "release-by-cursor",
        "RELEASE compares the cursor alone, and its sender goes on acting",
        lambda: Wake(Guards(crashes=0, late=1, release_compares_log=False, release_is_final=False)),
        breaks="I11",
        length=6,
    ),
    Run(
        "release-not-final",
        "a sender of RELEASE goes on acting until it knows the outcome",
        lambda: Wake(Guards(crashes=0, late=1, release_is_final=False)),
        breaks="I7",
        length=7,
    ),
    Run(
        "handoff-not-accepted",
        "the owner changes before the target has subscribed",
        lambda: Wake(Guards(crashes=0, handoffs=1, accepted=False, messages=1)),
        breaks="I11",
        length=7,
    ),
    Run(
        "record-dropped-early",
        "the source of a handoff drops its record without looking whether the target lives",
        lambda: Wake(Guards(handoffs=1, keeps_record=False, messages=1)),
        breaks="I11",
        length=14,
        slow=True,
    ),
)
