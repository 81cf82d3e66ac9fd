"""The auditor on users and nodes: limits, slots, records, burials."""

from __future__ import annotations

from convener.core.admission import Slot
from convener.core.audit import Violation, audit_nodes, audit_user
from convener.core.membership import Member, Membership
from convener.core.model import Meta


def head(owner: str, nonce: str = "n1") -> Meta:
    return Meta("u", "g", 1, 1, owner=owner, nonce=nonce)


def test_a_user_within_the_limit() -> None:
    slots = {"c1": Slot("n1", "a~1"), "c2": Slot("x", "a~1")}
    heads = {"c1": head("a~1"), "c2": head("", ""), "c3": head("dead~1")}
    assert audit_user("u", slots, 2, heads, {"dead~1"}) == []
    assert audit_user("u", slots, 0, heads, {"dead~1"}) == []


def test_a_user_over_the_limit() -> None:
    slots = {f"c{i}": Slot("n", "a~1") for i in (2, 1, 3)}
    assert audit_user("u", slots, 2, {}, set()) == [
        Violation("I6", "user u", "3 slots with a limit of 2: ['c1', 'c2', 'c3']")
    ]


def test_an_owner_without_its_slot() -> None:
    assert audit_user("u", {}, 3, {"c1": head("a~1")}, set()) == [
        Violation("I6", "user u", "a~1 owns conversation c1 without a slot")
    ]
    for slot in (Slot("n2", "a~1"), Slot("n1", "b~1")):
        assert audit_user("u", {"c1": slot}, 3, {"c1": head("a~1")}, set()) == [
            Violation(
                "I6",
                "user u",
                f"a~1 owns conversation c1 under nonce n1, but the slot is {slot.nonce}|{slot.incarnation}",
            )
        ]


MEMBERS = Membership({"a~1": Member(9, 9, 1)}, {"dead~1": 5})


def test_nodes_that_know_what_names_them() -> None:
    owners = {"c1": "a~1", "c2": "dead~1", "c3": ""}
    slots = {"u": {"c1": Slot("n", "a~1"), "c4": Slot("n", "a~1")}}
    records = {"a~1": {"c1", "c4", "c9"}, "dead~1": {"c2"}}
    assert audit_nodes(MEMBERS, records, owners, slots) == []


def test_a_node_that_does_not_know_what_names_it() -> None:
    slots = {"u": {"c4": Slot("n", "a~1")}}
    missing = "but its hash has no record of that"
    assert audit_nodes(MEMBERS, {"a~1": ["c9"]}, {"c1": "a~1", "c2": "dead~1"}, slots) == [
        Violation("I12", "node a~1", f"it owns conversation c1, {missing}"),
        Violation("I12", "node dead~1", f"it owns conversation c2, {missing}"),
        Violation("I12", "node a~1", f"the slot of conversation c4 of user u names it, {missing}"),
    ]


def test_an_owner_that_nobody_will_ever_bury() -> None:
    assert audit_nodes(MEMBERS, {"x~1": ["c1"]}, {"c1": "x~1"}, {}) == [
        Violation("I12", "node x~1", "it owns conversation c1, but it is neither a member nor buried")
    ]


def test_a_buried_member() -> None:
    both = Membership({"a~1": Member(9, 9, 1)}, {"a~1": 5})
    assert audit_nodes(both, {}, {}, {}) == [Violation("I10", "node a~1", "it is buried, and a member all the same")]
