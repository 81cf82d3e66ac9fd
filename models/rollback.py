"""A store that falls back: what it does to dense inbox numbers, to repair, and to what clients were shown (I8, I9).

`Inbox`: one owner that survives, messages with ids, a store whose replica may lag, and one fail-over that brings the
replica's state back. SEND gives the next dense position and remembers the id in `seen`. The owner takes entries in
(log entry with the position in it, cursor, trim); after the fail-over it appends from memory what the log lost. It may
also crash; the next owner knows only what the store has. Wanted: neither an id nor a position twice in the log; a
message accepted after the fail-over, or still in the memory of an owner that survived, is in the log when nothing is
left to do.

`View`: one node that forwards log entries to its clients and now and then misses a publication without noticing.
Wanted: what was shown is the log, as it is, up to some entry.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from models.explore import Run, Step, system, world

Ids = frozenset[str]
NONE: Final[Ids] = frozenset()


@dataclass(frozen=True)
class InboxGuards:
    """The rules, and how much happens."""

    by_store_cursor: bool = True
    """After a reconnect the owner reads on from the store's cursor, not from its own number."""
    repair_renumbers: bool = True
    """Repair gives what stays in the inbox new positions, above all that the owner has ever taken in; only so may it
    move the cursor there."""
    repair_moves_cursor: bool = True
    """Repair moves the cursor to where the owner was, and removes what is below it."""
    repair_settles_seen: bool = True
    """Repair marks the ids as taken in (position 0), and removes an inbox entry with the same id."""
    taken_by_seen: bool = True
    """An entry (position, id) is taken in only if `seen[id]` is that position."""
    messages: int = 2
    crashes: int = 0


class Store(NamedTuple):
    """One conversation in the store. `seen` is sorted by id."""

    log: tuple[tuple[int, str], ...] = ()
    position: int = 0
    cursor: int = 0
    inbox: tuple[tuple[int, str], ...] = ()
    seen: tuple[tuple[str, int], ...] = ()

    def remembering(self, ids: dict[str, int]) -> Store:
        """The same with other positions in `seen`."""
        return self._replace(seen=tuple(sorted({**dict(self.seen), **ids}.items())))

    @property
    def ids(self) -> tuple[str, ...]:
        """The messages in the log."""
        return tuple(message for _, message in self.log)


class InboxState(NamedTuple):
    """Store and replica, and the owner: its memory of the log, the last position that it took, what it has heard.

    `accepted` are the acknowledged ids, `owed` those that must be in the log although history was rolled back.
    """

    store: Store = Store()
    replica: Store = Store()
    failed_over: bool = False
    memory: tuple[tuple[int, str], ...] = ()
    taken: int = 0
    heard: frozenset[int] = frozenset()
    verified: bool = True
    owed: Ids = NONE
    accepted: Ids = NONE
    crashes: int = 0


class Inbox:
    """Numbers, repair, and positions."""

    def __init__(self, guards: InboxGuards) -> None:
        self.guards = guards

    def initial(self) -> InboxState:
        """An empty conversation with an owner."""
        return InboxState()

    def steps(self, state: InboxState) -> Iterator[Step[InboxState]]:
        """See `Model`."""
        yield from self._clients(state)
        yield from self._faults(state)
        if not state.verified:
            yield self._repaired(state) if len(state.store.log) < len(state.memory) else self._reread(state)
        elif state.heard:
            yield self._hears(state)

    def _clients(self, state: InboxState) -> Iterator[Step[InboxState]]:
        for message in "ab"[: self.guards.messages]:
            forgotten = state.failed_over and message not in state.owed
            if message in state.accepted and not forgotten:
                continue
            if message == "b" and "a" not in state.accepted:
                continue
            accepted = state._replace(accepted=state.accepted | {message})
            if message in dict(state.store.seen):
                yield world(f"SEND {message}: DUP", accepted)
                continue
            position = state.store.position + 1
            store = state.store._replace(position=position, inbox=(*state.store.inbox, (position, message)))
            yield world(
                f"SEND {message}: position {position}",
                accepted._replace(
                    store=store.remembering({message: position}),
                    heard=state.heard | {position},
                    owed=state.owed | {message} if state.failed_over else state.owed,
                ),
            )

    def _faults(self, state: InboxState) -> Iterator[Step[InboxState]]:
        store = state.store
        if state.replica != store and not state.failed_over:
            yield world("the replica catches up", state._replace(replica=store))
            yield world(
                "FAIL-OVER",
                state._replace(
                    store=state.replica,
                    failed_over=True,
                    verified=False,
                    heard=frozenset(),
                    owed=frozenset(message for _, message in state.memory),
                ),
            )
        if state.crashes < self.guards.crashes:
            # Gone with the owner's memory: what neither log nor inbox has.
            known = frozenset(message for _, message in (*store.log, *store.inbox))
            gone = frozenset(message for _, message in state.memory) - known
            yield world(
                "the owner crashes, another claims",
                state._replace(
                    crashes=state.crashes + 1,
                    memory=store.log,
                    taken=store.cursor,
                    verified=True,
                    heard=frozenset(position for position, _ in store.inbox),
                    owed=state.owed - gone,
                ),
            )

    def _repaired(self, state: InboxState) -> Step[InboxState]:
        """APPEND met a gap: the store's log has lost what the owner still knows."""
        guards, store = self.guards, state.store
        lost = [message for _, message in state.memory[len(store.log) :]]
        repaired = store._replace(log=state.memory)
        if guards.repair_settles_seen:
            repaired = repaired._replace(inbox=tuple(entry for entry in repaired.inbox if entry[1] not in lost))
            repaired = repaired.remembering(dict.fromkeys(lost, 0))
        if guards.repair_renumbers:
            top = max(state.taken, repaired.cursor)
            if any(position <= top for position, _ in repaired.inbox):
                inbox = tuple((top + i, message) for i, (_, message) in enumerate(repaired.inbox, start=1))
                repaired = repaired._replace(inbox=inbox).remembering({message: at for at, message in inbox})
            last = repaired.inbox[-1][0] if repaired.inbox else 0
            repaired = repaired._replace(position=max(repaired.position, top, last))
        if guards.repair_moves_cursor:
            inbox = tuple(entry for entry in repaired.inbox if entry[0] > state.taken)
            repaired = repaired._replace(cursor=state.taken, inbox=inbox)
        return system(f"the owner repairs {', '.join(lost)}", state._replace(store=repaired))

    def _reread(self, state: InboxState) -> Step[InboxState]:
        verified = state._replace(verified=True)
        if self.guards.by_store_cursor:
            verified = verified._replace(taken=state.store.cursor)
        return system("the owner reads the inbox after the reconnect", self._take(verified))

    def _hears(self, state: InboxState) -> Step[InboxState]:
        position = min(state.heard)
        after = state._replace(heard=state.heard - {position})
        if position <= state.taken:
            return system(f"the owner: position {position} is old", after)
        return system(f"the owner takes in from position {position}", self._take(after))

    def _take(self, state: InboxState) -> InboxState:
        """Take in what follows the owner's own number."""
        store, memory = state.store, state.memory
        entries = [entry for entry in store.inbox if entry[0] > state.taken]
        if not entries:
            return state
        for position, message in entries:
            if self.guards.taken_by_seen:
                fresh = dict(store.seen).get(message) == position
            else:
                fresh = message not in [known for _, known in memory]
            new = ((position, message),) if fresh else ()
            left = tuple(entry for entry in store.inbox if entry[0] > position)
            store = store._replace(log=store.log + new, cursor=position, inbox=left)
            memory += new
        return state._replace(store=store, memory=memory, taken=store.cursor)

    def violation(self, state: InboxState, quiet: bool) -> str | None:
        """See `Model`."""
        store = state.store
        if len(set(store.ids)) < len(store.log):
            return f"I8: an id is twice in the log {store.log}"
        if len({position for position, _ in store.log}) < len(store.log):
            return f"I8: a position is twice in the log {store.log}"
        missing = sorted(message for message in state.owed & state.accepted if message not in store.ids)
        if quiet and missing:
            return f"I8: {missing} accepted, and never in the log {store.log} (cursor {store.cursor})"
        return None


class Entry(NamedTuple):
    """A log entry; an `open` entry names the exact (epoch, seq) before it."""

    epoch: int
    seq: int
    previous: tuple[int, int] | None = None

    @property
    def place(self) -> tuple[int, int]:
        """(epoch, seq)."""
        return self.epoch, self.seq


class ViewState(NamedTuple):
    """The log, its replica, the highest epoch ever used, and what clients of one node were shown."""

    log: tuple[Entry, ...] = ()
    replica: tuple[Entry, ...] = ()
    epoch: int = 0
    failed_over: bool = False
    shown: tuple[Entry, ...] = ()
    claims: int = 0


class View:
    """The emit rule.

    Args:
        chained: an entry follows if its epoch is mine and its number the next, or if it is an `open` entry that names
            my exact place; else every next number follows.
    """

    ENTRIES: Final = 6
    CLAIMS: Final = 3

    def __init__(self, *, chained: bool) -> None:
        self.chained = chained

    def initial(self) -> ViewState:
        """An empty log."""
        return ViewState()

    def steps(self, state: ViewState) -> Iterator[Step[ViewState]]:
        """See `Model`."""
        log = state.log
        if state.replica != log and not state.failed_over:
            yield world("the replica catches up", state._replace(replica=log))
            fallen = state._replace(log=state.replica, failed_over=True)
            yield world(f"FAIL-OVER to length {len(state.replica)}", fallen)
        if len(log) >= self.ENTRIES:
            return
        for entry in self._next(state):
            after = state._replace(
                log=(*log, entry),
                epoch=max(state.epoch, entry.epoch),
                claims=state.claims + (1 if entry.previous else 0),
            )
            what = f"{'open' if entry.previous else 'entry'} {entry.epoch}-{entry.seq}"
            yield world(f"{what}, its publication is missed", after)
            yield world(what, after._replace(shown=self._shown(state.shown, entry, after.log)))

    def _next(self, state: ViewState) -> Iterator[Entry]:
        seq = len(state.log) + 1
        if state.log:
            yield Entry(state.log[-1].epoch, seq)
        if state.claims < self.CLAIMS:
            yield Entry(state.epoch + 1, seq, state.log[-1].place if state.log else (0, 0))

    def _shown(self, shown: tuple[Entry, ...], entry: Entry, log: Sequence[Entry]) -> tuple[Entry, ...]:
        place = shown[-1].place if shown else (0, 0)
        follows = entry.seq == place[1] + 1
        if self.chained:
            follows = follows and (entry.previous == place if entry.previous else entry.epoch == place[0])
        elif entry.seq <= place[1]:
            return shown
        if follows:
            return (*shown, entry)
        if place == (0, 0) or place in [known.place for known in log]:
            return (*shown, *(known for known in log if known.seq > place[1]))
        return tuple(log)  # resync

    def violation(self, state: ViewState, quiet: bool) -> str | None:
        """See `Model`."""
        log, shown = state.log, state.shown
        if log and shown and shown[-1] == log[-1] and shown != log:
            return f"I9: clients were shown {[e.place for e in shown]}, the log is {[e.place for e in log]}"
        return None


RUNS: Final = (
    Run("full", "the owner survives a fail-over that loses writes", lambda: Inbox(InboxGuards())),
    Run("full-crash", "the owner may crash as well", lambda: Inbox(InboxGuards(crashes=1))),
    Run("full-view", "entries follow by epoch and number, or by what an open entry names", lambda: View(chained=True)),
    Run(
        "ids-from-the-log",
        "an owner that knew all ids of the log would need `seen` as a hint only",
        lambda: Inbox(InboxGuards(repair_settles_seen=False, taken_by_seen=False, crashes=1)),
    ),
    Run(
        "repair-as-it-is",
        "repair may leave the cursor where it is: nothing is lost, but the head says that answered messages wait",
        lambda: Inbox(InboxGuards(repair_moves_cursor=False)),
    ),
    Run(
        "own-number",
        "the owner reads on from its own number, and repair leaves numbers and cursor alone",
        lambda: Inbox(InboxGuards(by_store_cursor=False, repair_renumbers=False, repair_moves_cursor=False)),
        breaks="I8",
        length=7,
    ),
    Run(
        "repair-moves-cursor",
        "repair writes the cursor that the owner had, and leaves the numbers in the inbox alone",
        lambda: Inbox(InboxGuards(repair_renumbers=False)),
        breaks="I8",
        length=7,
    ),
    Run(
        "repair-leaves-numbers",
        "repair leaves cursor and numbers alone, and a message gets the number of a repaired one",
        lambda: Inbox(InboxGuards(repair_renumbers=False, repair_moves_cursor=False)),
        breaks="I8",
        length=6,
    ),
    Run(
        "repair-leaves-seen",
        "repair leaves `seen` and the inbox alone",
        lambda: Inbox(InboxGuards(repair_settles_seen=False)),
        breaks="I8",
        length=6,
    ),
    Run(
        "view-next-number",
        "whatever has the next number is shown",
        lambda: View(chained=False),
        breaks="I9",
        length=4,
    ),
)
