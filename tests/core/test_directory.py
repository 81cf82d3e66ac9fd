"""The directory: batches, gaps, whole-node reads, and that all nodes end up with the same picture (I14)."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from convener.core.directory import LISTED, Batch, Directory, LoopStatus, NodeView, Record


def record(cid: str, epoch: int = 1, status: LoopStatus = "running", version: int = 1) -> Record:
    return Record(cid, "u", status, epoch, "n", 0, version)


def known(*nodes: str) -> Directory:
    directory = Directory()
    for node in nodes:
        directory.replace(node, 0, [], {})
    return directory


def test_batches_in_order_are_applied() -> None:
    d = known("a")
    assert d.apply(Batch("a", 1, (record("c1"), record("c2")), (), {"s1": "c1"}))
    assert d.apply(Batch("a", 2, (record("c2", status="idle"),), ("c1",), {"s2": "c2"}, ("s1",)))
    assert list(d.listed()) == [("a", record("c2", status="idle"))]
    assert list(d.connections()) == [("a", "s2", "c2")]
    assert (d.connection_count("c1"), d.connection_count("c2")) == (0, 1)


def test_a_gap_or_an_unknown_node_asks_for_reading() -> None:
    d = known("a")
    assert not d.apply(Batch("b", 1, (record("c1"),)))
    assert not d.apply(Batch("a", 2, (record("c1"),)))
    assert (d.find("c1"), d.nodes["a"].version) == (None, 0)


def test_a_gap_in_this_nodes_own_batches_is_none() -> None:
    """What failed to be published is still held here."""
    d = known("a")
    assert d.apply(Batch("a", 3, (record("c1"),)), own=True)
    assert (d.find("c1"), d.nodes["a"].version) == (("a", record("c1")), 3)
    assert not d.apply(Batch("b", 1), own=True)


def test_indexes_do_not_grow() -> None:
    """A directory lives as long as its node: what is over may leave nothing behind."""
    d = known("a")
    for i in range(50):
        d.apply(Batch("a", 2 * i + 1, (record(f"c{i}"),), (), {f"s{i}": f"c{i}"}))
        d.apply(Batch("a", 2 * i + 2, (), (f"c{i}",), {}, (f"s{i}",)))
    assert list(vars(d).values()) == [{"a": NodeView(100)}, {}, {}, []]


def test_an_old_batch_is_ignored() -> None:
    d = known("a")
    d.apply(Batch("a", 1, (record("c1"),)))
    assert d.apply(Batch("a", 1, (), ("c1",)))
    assert d.find("c1") == ("a", record("c1"))


def test_replace_takes_over_what_was_read() -> None:
    d = known("a")
    d.apply(Batch("a", 1, (record("c1"),), (), {"s1": "c1"}))
    d.replace("a", 3, [record("c2")], {"s2": "c2"})
    assert d.nodes == {"a": NodeView(3, {"c2": record("c2")}, {"s2": "c2"})}
    assert (d.find("c1"), d.connection_count("c1"), d.connection_count("c2")) == (None, 0, 1)
    d.replace("a", 2, [record("c1")], {})
    assert d.nodes["a"].version == 3


def test_replace_may_lower_an_epoch() -> None:
    """What was read is the truth; only a single record that comes late is not."""
    d = known("a")
    d.apply(Batch("a", 1, (record("c1", epoch=9),)))
    d.put("a", record("c1", epoch=8))
    assert d.find("c1") == ("a", record("c1", epoch=9))
    d.replace("a", 2, [record("c1", epoch=8)], {})
    assert d.find("c1") == ("a", record("c1", epoch=8))


def test_the_higher_epoch_wins() -> None:
    d = known("a", "b")
    d.put("a", record("c1", epoch=5))
    d.put("b", record("c1", epoch=6, status="starting"))
    assert d.find("c1") == ("b", record("c1", epoch=6, status="starting"))
    assert list(d.listed()) == []
    d.drop("b", "c1")
    assert d.find("c1") == ("a", record("c1", epoch=5))


def test_in_one_epoch_what_is_listed_wins_then_the_name() -> None:
    for order in ("ab", "ba"):
        d = known(*order)
        for node in order:
            d.put(node, record("c1", status="starting" if node == "b" else "running"))
        assert d.find("c1") == ("a", record("c1"))
        d.put("b", record("c1"))
        assert d.find("c1") == ("b", record("c1"))


def test_forget_drops_everything_of_a_node() -> None:
    d = known("a", "b")
    d.apply(Batch("a", 1, (record("c1"),), (), {"s1": "c1"}))
    d.apply(Batch("b", 1, (), (), {"s2": "c1"}))
    d.forget("a")
    d.forget("nobody")
    assert (d.find("c1"), list(d.nodes), d.connection_count("c1")) == (None, ["b"], 1)
    assert not d.apply(Batch("a", 2))


def test_single_changes_need_no_version() -> None:
    d = Directory()
    d.drop("a", "c1")
    d.put("a", record("c1"))
    assert d.find("c1") == ("a", record("c1"))
    d.drop("a", "c1")
    d.drop("a", "c1")
    assert d.find("c1") is None


def test_watchers_hear_of_whatever_may_have_changed() -> None:
    heard: list[tuple[str, str]] = []

    def since() -> set[tuple[str, str]]:
        told = set(heard)
        heard.clear()
        return told

    d = known("a")
    d.watchers.append(lambda user, cid: heard.append((user, cid)))
    d.apply(Batch("a", 1, (record("c1"), record("c2")), (), {"s1": "c1"}))
    assert since() == {("u", "c1"), ("u", "c2")}
    d.apply(Batch("a", 2, (), ("c1", "unknown")))
    assert since() == {("u", "c1")}
    d.replace("a", 3, [record("c3")], {})
    assert since() == {("u", "c2"), ("u", "c3")}
    d.put("b", record("c3", epoch=2))
    d.drop("a", "c3")
    d.drop("a", "c3")
    assert heard == [("u", "c3")] * 2
    since()
    d.put("b", record("c3", epoch=1))
    assert since() == set(), "an older epoch changes nothing"
    d.forget("b")
    d.announce("v", "c4")
    assert since() == {("u", "c3"), ("v", "c4")}


def test_a_connection_is_in_one_conversation() -> None:
    d = known("a")
    d.apply(Batch("a", 1, (), (), {"s1": "c1"}))
    d.apply(Batch("a", 2, (), (), {"s1": "c2"}))
    assert (d.connection_count("c1"), d.connection_count("c2")) == (0, 1)
    d.apply(Batch("a", 3, (), (), {}, ("s1", "unknown")))
    assert list(d.connections()) == []


STATUSES: list[LoopStatus] = ["starting", "running", "idle", "hibernated", "stopped"]
cids = st.sampled_from(["c1", "c2", "c3"])
nodes = st.sampled_from(["a", "b"])
sockets = st.sampled_from(["s1", "s2", "s3"])


class Syncing(RuleBasedStateMachine):
    """Two nodes that change, publish into a lossy channel, and one directory that listens."""

    def __init__(self) -> None:
        super().__init__()
        self.truth = {"a": NodeView(), "b": NodeView()}
        self.changed: dict[str, Batch] = {}
        self.wire: list[Batch] = []
        self.directory = Directory()
        self.unread: set[str] = set(self.truth)

    @rule(node=nodes, cid=cids, epoch=st.integers(1, 3), status=st.sampled_from(STATUSES))
    def change(self, node: str, cid: str, epoch: int, status: LoopStatus) -> None:
        held = self.truth[node].records.get(cid)
        # A node's own records of one conversation only ever get newer.
        epoch = max(epoch, held.epoch if held else 0)
        self.flush(node, Batch(node, 0, (record(cid, epoch, status),)))

    @rule(node=nodes, cid=cids)
    def remove(self, node: str, cid: str) -> None:
        self.flush(node, Batch(node, 0, (), (cid,)))

    @rule(node=nodes, cid=cids, socket=sockets)
    def connect(self, node: str, cid: str, socket: str) -> None:
        self.flush(node, Batch(node, 0, (), (), {socket: cid}))

    @rule(node=nodes, socket=sockets)
    def disconnect(self, node: str, socket: str) -> None:
        self.flush(node, Batch(node, 0, (), (), {}, (socket,)))

    def flush(self, node: str, change: Batch) -> None:
        """Write the hash, then publish, under the next version."""
        view = self.truth[node]
        view.version += 1
        for r in change.records:
            view.records[r.conversation_id] = r
        for cid in change.removed:
            view.records.pop(cid, None)
        view.connections |= change.joined
        for socket in change.left:
            view.connections.pop(socket, None)
        self.wire.append(Batch(node, view.version, change.records, change.removed, change.joined, change.left))

    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        if self.wire:
            del self.wire[data.draw(st.integers(0, len(self.wire) - 1))]

    @rule()
    def hear(self) -> None:
        if self.wire:
            batch = self.wire.pop(0)
            if not self.directory.apply(batch):
                self.unread.add(batch.node)

    @rule(node=nodes)
    def read(self, node: str) -> None:
        view = self.truth[node]
        self.directory.replace(node, view.version, list(view.records.values()), view.connections)
        self.unread.discard(node)

    @rule(node=nodes)
    def bury(self, node: str) -> None:
        """It comes back as another incarnation, which begins with an empty hash; here under the same name."""
        self.directory.forget(node)
        self.truth[node] = NodeView()
        self.wire = [b for b in self.wire if b.node != node]
        self.unread.add(node)

    @invariant()
    def the_indexes_agree_with_the_views(self) -> None:
        d = self.directory
        for cid in ("c1", "c2", "c3"):
            held = {n: v.records[cid] for n, v in d.nodes.items() if cid in v.records}
            found = d.find(cid)
            assert (found is None) == (not held)
            if found is not None:
                assert held[found[0]] == found[1]
                assert found[1].epoch == max(r.epoch for r in held.values())
            clients = [c for _, _, c in d.connections() if c == cid]
            assert d.connection_count(cid) == len(clients)
        listed = list(d.listed())
        assert len({r.conversation_id for _, r in listed}) == len(listed)
        assert all(r.status in LISTED for _, r in listed)

    def teardown(self) -> None:
        """When nothing changes, one round of notifications makes the picture whole."""
        for node in ("a", "b"):
            self.flush(node, Batch(node, 0))
        while self.wire:
            self.hear()
        for node in sorted(self.unread):
            self.read(node)
        assert self.directory.nodes == self.truth


TestSyncing = Syncing.TestCase
TestSyncing.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
