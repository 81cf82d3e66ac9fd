"""The emit rule, case by case and against a log that is rolled back and written anew (I9)."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from convener.core.model import LogEntry
from convener.core.view import START, Place, accept, judge, opens_after
from convener.core.wire import event, open_event


def entry(epoch: int, seq: int) -> LogEntry:
    return LogEntry(epoch, seq, event("reply", "t1", 1, "1"))


def opened(epoch: int, seq: int, previous: tuple[int, int]) -> LogEntry:
    return LogEntry(epoch, seq, open_event("a~1", "start", previous, 1))


def test_the_next_entry_of_the_epoch_is_emitted() -> None:
    assert judge(Place(5, 7), entry(5, 8)) == "emit"


def test_what_was_shown_is_dropped() -> None:
    for old in (entry(5, 7), entry(5, 1), entry(4, 7), entry(4, 3), opened(5, 1, (0, 0))):
        assert judge(Place(5, 7), old) == "drop"


def test_an_open_that_follows_exactly_is_emitted() -> None:
    assert judge(Place(5, 7), opened(9, 8, (5, 7))) == "emit"
    assert judge(START, opened(9, 1, (0, 0))) == "emit"


def test_everything_else_makes_the_node_read() -> None:
    for unsure in (
        entry(5, 9),  # a hole
        entry(9, 8),  # a new epoch without its open entry
        entry(4, 8),  # an old epoch, further on than this view
        opened(9, 8, (5, 6)),  # a history that parted before this place
        opened(9, 8, (6, 7)),
        opened(9, 3, (5, 2)),  # the same numbers again, after a rollback
    ):
        assert judge(Place(5, 7), unsure) == "read"


def test_opens_after_reads_only_open_entries() -> None:
    assert opens_after(open_event("a~1", "start", (3, 4), 1)) == Place(3, 4)
    assert opens_after(event("input", "t1", 1, '{"prev":[3,4]}')) is None
    for broken in ('{"kind":"open"', '{"kind":"open"}', '{"kind":"open","data":1}', '{"kind":"open","data":[]}'):
        assert opens_after(broken) is None
    for data in ("{}", '{"prev":1}', '{"prev":[1]}', '{"prev":[1,2,3]}', "null"):
        assert opens_after(event("open", "", 1, data)) is None


def test_accept_goes_along_a_batch() -> None:
    batch = [entry(5, 7), entry(5, 8), opened(9, 9, (5, 8)), entry(9, 10)]
    assert accept(Place(5, 7), batch) == (tuple(batch[1:]), Place(9, 10), False)


def test_accept_stops_where_something_is_missing() -> None:
    assert accept(Place(5, 7), [entry(5, 8), entry(5, 10)]) == ((entry(5, 8),), Place(5, 8), True)
    assert accept(Place(5, 7), []) == ((), Place(5, 7), False)


class Viewing(RuleBasedStateMachine):
    """One log that may lose its end, any number of lost, late and repeated publications, one viewer.

    The viewer emits what `accept` lets through, and reads when told to: from its place if the log still has that
    entry, else from the beginning, which clears what it has shown (`resync`).
    """

    @initialize()
    def begin(self) -> None:
        self.log: list[LogEntry] = []
        self.epoch = 0
        self.published: list[list[LogEntry]] = []
        self.shown: list[LogEntry] = []
        self.place = START
        self.must_read = False
        self.contents = 0

    def _publish(self, entries: list[LogEntry]) -> None:
        self.log += entries
        self.published.append(entries)

    @rule()
    def claim(self) -> None:
        tip = (self.log[-1].epoch, self.log[-1].seq) if self.log else (0, 0)
        self.epoch += 1
        self._publish([opened(self.epoch, tip[1] + 1, tip)])

    @rule(count=st.integers(1, 3))
    def append(self, count: int) -> None:
        if self.log and self.log[-1].epoch == self.epoch:
            seq = self.log[-1].seq
            self.contents += 1
            text = event("reply", f"t{self.contents}", 1, "1")
            self._publish([LogEntry(self.epoch, seq + 1 + i, text) for i in range(count)])

    @rule(lost=st.integers(1, 4))
    def fail_over(self, lost: int) -> None:
        """The end of the log is lost. Whatever writes next claims first: the owner's appends meet a gap."""
        if self.log:
            del self.log[-lost:]
            self.epoch += 1
            self.claim()

    @rule(data=st.data())
    def hear(self, data: st.DataObject) -> None:
        if not self.published:
            return
        # From before a fail-over too: publications of a lost history may be on their way. They were published in
        # the order of writing, and a connection keeps it, so nothing older than what was heard comes after it.
        batch = self.published[data.draw(st.integers(0, len(self.published) - 1))]
        if self.must_read:
            return
        emitted, self.place, self.must_read = accept(self.place, batch)
        self.shown += emitted

    @rule()
    def read(self) -> None:
        """What a node does when it must, and now and then."""
        exact = self.place == START or any((e.epoch, e.seq) == (self.place.epoch, self.place.seq) for e in self.log)
        if not exact:
            self.shown, self.place = [], START
        rest = [e for e in self.log if e.seq > self.place.seq]
        self.shown += rest
        if rest:
            self.place = Place(rest[-1].epoch, rest[-1].seq)
        self.must_read = False

    @invariant()
    def every_entry_once_and_in_order(self) -> None:
        places = [(e.epoch, e.seq) for e in self.shown]
        assert [seq for _, seq in places] == list(range(1, len(places) + 1))
        assert places == sorted(places)

    @invariant()
    def what_is_shown_is_one_history(self) -> None:
        """A prefix of the log, or of one that was lost: then the next entry that is written shows it."""
        written = {(e.epoch, e.seq): e for batch in self.published for e in batch}
        for before, after in zip(self.shown, self.shown[1:], strict=False):
            assert written[after.epoch, after.seq] == after
            if after.epoch != before.epoch:
                assert opens_after(after.event) == Place(before.epoch, before.seq)

    def teardown(self) -> None:
        if not hasattr(self, "log"):
            return
        # Whatever was heard or lost: the next entry, once heard, leads to the log as it is.
        self.claim()
        _, place, must_read = accept(self.place, self.published[-1])
        if must_read or self.must_read:
            self.read()
        else:
            self.shown += self.published[-1] if place != self.place else []
        assert self.shown == self.log


TestViewing = Viewing.TestCase
TestViewing.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
