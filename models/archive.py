"""Retention: entries on their way into the archive, between owners after one another, crashes, and a reader (I4, I9).

Two nodes own one conversation by turns; either may be buried while it only pauses, and goes on afterwards as if nothing
had happened. An owner uploads a segment, then a manifest, then makes that one count by ARCHIVED, which trims the log;
now and then it clears away what does not count. Between any two of these it may crash. A reader is told which manifest
counts, reads what that lists, and then the rest in the store.

Entries of the log never change here (that is what the other models are about), so an entry is its number.

Wanted: at any time every entry is in the store, or in a segment that is there and that the manifest which counts lists;
and the reader never sees a hole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from models.explore import Run, Step, put, system, world


@dataclass(frozen=True)
class Guards:
    """The rules, and how much happens."""

    fenced: bool = True
    """ARCHIVED compares owner and epoch."""
    own_names: bool = True
    """A segment's name has the epoch of its writer, and what is there is not overwritten."""
    trims_with_mark: bool = True
    """The log is trimmed in the step that makes the manifest count, not before."""
    lists_before_check: bool = True
    """Who clears away looks first at what is there, and then whether it still owns the conversation."""
    earlier_epochs: bool = True
    """Only what an earlier epoch has written is cleared away."""
    looks_again: bool = True
    """A reader for whom the store has been trimmed too far begins again."""
    entries: int = 3
    moves: int = 1
    crashes: int = 1


class Ref(NamedTuple):
    """A segment as a manifest lists it."""

    first: int
    last: int
    writer: int


class Manifest(NamedTuple):
    """A manifest; no two of one writer list the same."""

    writer: int
    refs: tuple[Ref, ...]

    @property
    def last(self) -> int:
        """The last entry that it lists."""
        return self.refs[-1].last


class Node(NamedTuple):
    """A node: the epoch under which it believes to own the conversation (0: it does not), and what it is about to do.

    Attributes:
        segment, manifest: what it has uploaded and will make count.
        rubbish: what it is about to delete.
        checked: it has seen that it owns the conversation, and will now look at what is there.
    """

    epoch: int = 0
    segment: Ref | None = None
    manifest: Manifest | None = None
    rubbish: frozenset[Ref | Manifest] | None = None
    checked: bool = False


class State(NamedTuple):
    """Everything. The store has entries `first` to `length`; `counts` is the manifest that the head names.

    Attributes:
        segments: by what they hold; `(first, writer)` is the name.
        told: the manifest that the reader was told of; `upto`: what it has read of the archive.
    """

    moves: int
    crashes: int
    nodes: tuple[Node, ...] = (Node(epoch=1), Node())
    owner: int | None = 0
    epoch: int = 1
    length: int = 1
    first: int = 1
    counts: Manifest | None = None
    segments: frozenset[Ref] = frozenset()
    manifests: frozenset[Manifest] = frozenset()
    told: Manifest | None = None
    upto: int = 0
    broken: str | None = None

    def with_node(self, i: int, node: Node) -> State:
        """The same with another node."""
        return self._replace(nodes=put(self.nodes, i, node))

    @property
    def mark(self) -> int:
        """The archive has everything up to this entry."""
        return 0 if self.counts is None else self.counts.last


class Archive:
    """One conversation and its archive."""

    def __init__(self, guards: Guards) -> None:
        self.guards = guards

    def initial(self) -> State:
        """Node 0 owns it; nothing is archived."""
        return State(self.guards.moves, self.guards.crashes)

    def steps(self, state: State) -> Iterator[Step[State]]:
        """See `Model`."""
        if state.moves and state.owner is not None:
            buried = state._replace(owner=None, moves=state.moves - 1)
            yield world(f"{state.owner} is buried; it only pauses", buried)
        for i, node in enumerate(state.nodes):
            if state.owner is None and not node.epoch:
                epoch = state.epoch + 1
                claimed = state.with_node(i, Node(epoch))._replace(owner=i, epoch=epoch, length=state.length + 1)
                yield system(f"{i} claims it", claimed)
            if not node.epoch:
                continue
            if state.crashes:
                dead = state.with_node(i, Node())._replace(crashes=state.crashes - 1)
                owner = None if state.owner == i else state.owner
                yield world(f"{i} crashes", dead._replace(owner=owner))
            if self._owns(state, i) and state.length < self.guards.entries:
                yield world(f"{i} appends", state._replace(length=state.length + 1))
            # One after the other: a node never does both at once.
            if node.rubbish is None and not node.checked:
                yield from self._archives(state, i)
            if node.segment is None and node.manifest is None:
                yield from self._clears(state, i)
        yield from self._reads(state)

    def _owns(self, state: State, i: int) -> bool:
        return state.owner == i and state.epoch == state.nodes[i].epoch

    # -- who archives --------------------------------------------------------------------------------------------

    def _archives(self, state: State, i: int) -> Iterator[Step[State]]:
        node = state.nodes[i]
        if node.manifest is not None:
            yield from self._archived(state, i, node.manifest)
        elif node.segment is not None:
            refs = () if state.counts is None else state.counts.refs
            if refs and refs[-1].last + 1 != node.segment.first:
                yield system(f"{i} sees that it was overtaken", state.with_node(i, Node()))
                return
            manifest = Manifest(node.epoch, (*refs, node.segment))
            after = state._replace(manifests=state.manifests | {manifest})
            if not self.guards.trims_with_mark:
                after = after._replace(first=max(state.first, manifest.last))
            yield system(f"{i} uploads a manifest", after.with_node(i, node._replace(segment=None, manifest=manifest)))
        elif state.mark < state.length:
            writer = node.epoch if self.guards.own_names else 0
            ref = Ref(state.mark + 1, state.length, writer)
            same = {r for r in state.segments if (r.first, r.writer) == (ref.first, ref.writer)}
            after = state._replace(segments=state.segments - same | {ref})
            if self.guards.own_names and same:
                # What is there counts, if the log has it, and is not overwritten.
                ref, after = next(iter(same)), state
            yield world(f"{i} uploads {ref.first} to {ref.last}", after.with_node(i, node._replace(segment=ref)))

    def _archived(self, state: State, i: int, manifest: Manifest) -> Iterator[Step[State]]:
        node = state.nodes[i]._replace(manifest=None)
        if not (self._owns(state, i) or not self.guards.fenced):
            yield system(f"ARCHIVED of {i} is fenced", state.with_node(i, Node()))
        elif manifest.last < state.mark:
            yield system(f"ARCHIVED of {i} is stale", state.with_node(i, Node()))
        else:
            # The last entry stays.
            first = max(state.first, min(manifest.last + 1, state.length))
            yield system(f"{i} makes it count", state.with_node(i, node)._replace(counts=manifest, first=first))

    def _clears(self, state: State, i: int) -> Iterator[Step[State]]:
        """What the manifest that counts does not list: looked at, checked, deleted."""
        node = state.nodes[i]
        if node.rubbish is not None and not node.checked and self.guards.lists_before_check:
            if self._owns(state, i):
                spared: set[Ref | Manifest] = set() if state.counts is None else {state.counts, *state.counts.refs}
                doomed = node._replace(rubbish=node.rubbish - spared, checked=True)
                yield system(f"{i} sees that it owns it", state.with_node(i, doomed))
            else:
                yield system(f"{i} sees that it was fenced", state.with_node(i, Node()))
        elif node.rubbish is not None:
            left = state._replace(segments=state.segments - node.rubbish, manifests=state.manifests - node.rubbish)
            yield system(f"{i} deletes", left.with_node(i, node._replace(rubbish=None, checked=False)))
        elif node.checked or self.guards.lists_before_check:
            there: set[Ref | Manifest] = {*state.segments, *state.manifests}
            if not self.guards.lists_before_check:
                there -= set() if state.counts is None else {state.counts, *state.counts.refs}
            if self.guards.earlier_epochs:
                there = {found for found in there if found.writer < node.epoch}
            if there:
                yield world(f"{i} looks at what is there", state.with_node(i, node._replace(rubbish=frozenset(there))))
        elif self._owns(state, i):
            yield world(f"{i} sees that it owns it", state.with_node(i, node._replace(checked=True)))

    # -- who reads -----------------------------------------------------------------------------------------------

    def _reads(self, state: State) -> Iterator[Step[State]]:
        if state.told is None:
            if state.counts is not None and state.first > 1:
                yield world("a reader is told what counts", state._replace(told=state.counts, upto=0))
        elif not state.upto:
            if state.told in state.manifests and set(state.told.refs) <= state.segments:
                yield system("it reads the archive", state._replace(upto=state.told.last))
            else:
                yield system("what it was told has gone: again", state._replace(told=None))
        elif state.first <= state.upto + 1:
            yield system("it reads the rest", state._replace(told=None, upto=0))
        elif self.guards.looks_again:
            yield system("the store was trimmed: again", state._replace(told=None, upto=0))
        else:
            yield system("it reads the rest", state._replace(told=None, upto=0, broken="I9: the reader sees a hole"))

    # -- what must not be ----------------------------------------------------------------------------------------

    def violation(self, state: State, quiet: bool) -> str | None:
        """See `Model`."""
        if state.broken or state.first == 1:
            return state.broken
        if state.counts is None or state.counts not in state.manifests:
            return "I4: entries are gone: no manifest lists them"
        if not set(state.counts.refs) <= state.segments or state.mark < state.first - 1:
            return "I4: entries are gone: a segment that is listed is not there"
        return None


RUNS: Final = (
    Run("full", "all guards", lambda: Archive(Guards())),
    Run("full-longer", "a longer log, no crash", lambda: Archive(Guards(entries=4, crashes=0))),
    Run(
        "not-fenced",
        "ARCHIVED compares neither owner nor epoch",
        lambda: Archive(Guards(crashes=0, fenced=False)),
        breaks="I4",
        length=8,
    ),
    Run(
        "names-without-epoch",
        "segments are named by their first number alone, and the last upload wins",
        lambda: Archive(Guards(crashes=0, own_names=False)),
        breaks="I4",
        length=7,
    ),
    Run(
        "trimmed-before",
        "the log is trimmed when the manifest is there, before it counts",
        lambda: Archive(Guards(crashes=0, moves=0, trims_with_mark=False)),
        breaks="I4",
        length=3,
    ),
    Run(
        "check-before-list",
        "who clears away looks first whether it owns the conversation, and then at what is there",
        lambda: Archive(Guards(crashes=0, lists_before_check=False, earlier_epochs=False)),
        breaks="I4",
        length=8,
    ),
    Run(
        "reader-goes-on",
        "a reader goes on in the store wherever that begins now",
        lambda: Archive(Guards(crashes=0, moves=0, looks_again=False)),
        breaks="I9",
        length=11,
    ),
)
