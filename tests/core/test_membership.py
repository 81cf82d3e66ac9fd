"""Each rule of the membership. Plain functions without arguments: `test_guards` runs them again."""

from __future__ import annotations

from dataclasses import replace

from convener.core.membership import (
    BURY_SLACK_MS,
    PULSE_LIMIT_MS,
    Burial,
    Member,
    Membership,
    RenewReply,
    bury,
    forget,
    inherit,
    join,
    leave,
    reap,
    rebury,
    renew,
    supersede,
)

TTL, RENEW = 10_000, 500
T0 = 1_000_000
STALE = 2 * RENEW + BURY_SLACK_MS + 1


def member(at: int = T0) -> Member:
    return Member(at + TTL, TTL, RENEW)


def cluster(*names: str, now: int = T0) -> Membership:
    state = Membership()
    for name in names:
        reply, state = join(state, name, Member(0, TTL, RENEW), now)
        assert reply.outcome == "OK"
    return state


def beating(state: Membership, *names: str, now: int, step: int = 500) -> Membership:
    """Let `names` renew every `step` ms up to `now`: the pulse stays young."""
    at = state.pulse
    while at < now:
        at = min(at + step, now)
        for name in names:
            _, state = renew(state, name, None, at)
    return state


def test_join_makes_a_member() -> None:
    reply, state = join(Membership(), "a~1", Member(0, TTL, RENEW, "{}"), T0)
    assert reply == RenewReply("OK", 1)
    assert state == Membership({"a~1": Member(T0 + TTL, TTL, RENEW, "{}")}, {}, 1, T0, 0)


def test_every_change_of_who_belongs_has_a_version_of_its_own() -> None:
    state = cluster("a~1", "b~1")
    assert state.version == 2
    state = leave(state, "b~1", T0)
    assert state.version == 3
    _, state = renew(state, "a~1", None, T0)
    assert state.version == 3


def test_renew_extends_the_lease_and_the_pulse() -> None:
    state = cluster("a~1")
    reply, state = renew(state, "a~1", '{"load":1}', T0 + 500)
    assert reply == RenewReply("OK", 2)
    assert state.members["a~1"] == Member(T0 + 500 + TTL, TTL, RENEW, '{"load":1}')
    assert state.pulse == T0 + 500
    _, state = renew(state, "a~1", None, T0 + 600)
    assert state.members["a~1"].info == '{"load":1}'


def test_renew_never_makes_a_member() -> None:
    state = cluster("a~1")
    assert renew(state, "b~1", None, T0) == (RenewReply("DEAD", 1), state)


def test_a_lapsed_lease_that_nobody_buried_may_be_renewed() -> None:
    state = cluster("a~1")
    reply, state = renew(state, "a~1", None, T0 + 5 * TTL)
    assert reply.outcome == "OK"
    assert state.members["a~1"].deadline == T0 + 6 * TTL


def test_the_buried_stay_buried() -> None:
    state = leave(cluster("a~1"), "a~1", T0 + 1)
    assert (dict(state.members), dict(state.dead)) == ({}, {"a~1": T0 + 1})
    assert renew(state, "a~1", None, T0 + 2) == (RenewReply("DEAD", 2), state)
    assert join(state, "a~1", Member(0, TTL, RENEW), T0 + 2) == (RenewReply("DEAD", 2), state)
    assert leave(state, "a~1", T0 + 2) == state


def test_reap_buries_exactly_those_whose_lease_has_passed() -> None:
    now = T0 + TTL
    state = beating(cluster("a~1", "b~1", "c~1"), "a~1", now=now - 1)
    assert reap(state, TTL, now - 1) == ((), state)
    state = beating(state, "a~1", now=now)
    names, after = reap(state, TTL, now)
    assert names == ("b~1", "c~1")
    assert dict(after.dead) == {"b~1": now, "c~1": now}
    assert list(after.members) == ["a~1"]
    assert after.version == state.version + 1


def test_reap_of_nobody_changes_nothing() -> None:
    state = cluster("a~1")
    assert reap(state, TTL, T0 + 1) == ((), state)


def test_an_old_pulse_gives_everybody_grace() -> None:
    """The store was away: silence proves nothing."""
    state = cluster("a~1", "b~1")
    now = T0 + TTL + 1
    names, state = reap(state, TTL, now)
    assert (names, state.grace) == ((), now + TTL)
    # The healthy come back, the dead do not, and are buried when the grace is over.
    state = beating(replace(state, pulse=now), "a~1", now=now + TTL - 1)
    assert reap(state, TTL, now + TTL - 1)[0] == ()
    state = beating(state, "a~1", now=now + TTL)
    assert reap(state, TTL, now + TTL)[0] == ("b~1",)


def test_a_pulse_of_exactly_the_limit_is_young() -> None:
    state = cluster("a~1")
    assert reap(state, TTL, T0 + PULSE_LIMIT_MS)[1].grace == 0
    now = T0 + PULSE_LIMIT_MS + 1
    assert reap(state, TTL, now)[1].grace == now + TTL


def test_the_first_pulse_ever_is_not_an_old_one() -> None:
    assert cluster("a~1").grace == 0
    assert reap(Membership(), TTL, T0) == ((), Membership())


def test_whoever_comes_first_after_an_outage_notices() -> None:
    state = cluster("a~1", "b~1")
    now = T0 + 60_000
    assert renew(state, "a~1", None, now)[1].grace == now + TTL
    assert join(state, "c~1", Member(0, TTL, RENEW), now)[1].grace == now + TTL
    assert bury(state, "a~1", 0, TTL, now)[1].grace == now + TTL
    assert reap(state, TTL, now)[1].grace == now + TTL


def test_grace_is_not_shortened_by_who_has_a_shorter_lease() -> None:
    _, state = join(cluster("a~1"), "b~1", Member(0, 100_000, RENEW), T0)
    state = replace(state, grace=T0 + 90_000)
    assert reap(state, TTL, T0 + 5_000)[1].grace == T0 + 90_000


def test_what_was_written_before_the_clock_was_set_back_begins_now() -> None:
    state = cluster("a~1", "b~1")
    _, state = join(state, "slow~1", Member(0, 3 * TTL, RENEW), T0)
    now = T0 - 3_600_000
    state = replace(state, grace=T0 + TTL)
    names, after = reap(state, TTL, now)
    assert names == ()
    assert {name: m.deadline - now for name, m in after.members.items()} == {
        "a~1": TTL,
        "b~1": TTL,
        "slow~1": 3 * TTL,
    }
    assert (after.grace, after.version, after.dead) == (now + 3 * TTL, state.version, {})
    # The healthy renew; who was gone before is buried like anybody else.
    later = now + 3 * TTL
    after = beating(replace(after, pulse=now), "a~1", "slow~1", now=later)
    assert reap(after, TTL, later)[0] == ("b~1",)


def test_a_lease_of_its_full_length_is_left_as_it_is() -> None:
    state = replace(cluster("a~1"), grace=T0 + TTL)
    assert reap(state, TTL, T0) == ((), state)
    assert reap(state, TTL // 2, T0) == ((), state)
    assert reap(state, TTL * 2, T0) == ((), state)
    assert reap(state, TTL // 2, T0 - 1)[1].members["a~1"].deadline == T0 - 1 + TTL
    # A longer lease of the caller's own says nothing of what lies within it.
    assert reap(state, TTL * 2, T0 - TTL)[1].members["a~1"].deadline == T0 + TTL
    assert reap(state, TTL * 2, T0 - TTL - 1)[1].members["a~1"].deadline == T0 - 1


def test_bury_a_silent_member() -> None:
    state = beating(cluster("a~1", "b~1"), "a~1", now=T0 + STALE)
    outcome, after = bury(state, "b~1", 0, TTL, T0 + STALE)
    assert outcome == "OK"
    assert dict(after.dead) == {"b~1": T0 + STALE}
    assert list(after.members) == ["a~1"]
    assert after.version == state.version + 1


def test_bury_waits_for_two_intervals_and_the_slack() -> None:
    state = beating(cluster("a~1", "b~1"), "a~1", now=T0 + STALE - 1)
    assert bury(state, "b~1", 0, TTL, T0 + STALE - 1) == ("FRESH", state)


def test_bury_goes_by_the_interval_of_the_buried() -> None:
    _, state = join(cluster("a~1"), "slow~1", Member(0, 60_000, 5_000), T0)
    state = beating(state, "a~1", now=T0 + 10_250)
    assert bury(state, "slow~1", 0, TTL, T0 + 10_250)[0] == "FRESH"
    state = beating(state, "a~1", now=T0 + 10_251)
    assert bury(state, "slow~1", 0, TTL, T0 + 10_251)[0] == "OK"


def test_bury_spares_who_holds_its_channel() -> None:
    state = beating(cluster("a~1", "b~1"), "a~1", now=T0 + STALE)
    assert bury(state, "b~1", 1, TTL, T0 + STALE) == ("ALIVE", state)


def test_bury_spares_everybody_in_a_grace_period() -> None:
    state = beating(cluster("a~1", "b~1"), "a~1", now=T0 + STALE)
    state = replace(state, grace=T0 + STALE + 1)
    assert bury(state, "b~1", 0, TTL, T0 + STALE) == ("GRACE", state)
    assert bury(replace(state, grace=T0 + STALE), "b~1", 0, TTL, T0 + STALE)[0] == "OK"


def test_bury_of_the_buried() -> None:
    state = cluster("a~1")
    assert bury(state, "b~1", 0, TTL, T0) == ("GONE", state)


def test_bury_stops_when_many_are_silent() -> None:
    """More than one, and more than a third: that looks like the store or the network, not like dead nodes."""
    for size, silent, outcome in ((2, 1, "OK"), (5, 1, "OK"), (5, 2, "MANY"), (6, 2, "OK"), (6, 3, "MANY")):
        names = [f"n{i}~1" for i in range(size)]
        state = beating(cluster(*names), *names[silent:], now=T0 + STALE)
        assert bury(state, names[0], 0, TTL, T0 + STALE)[0] == outcome, (size, silent)


def test_leave_of_a_stranger_changes_nothing() -> None:
    state = cluster("a~1")
    assert leave(state, "b~1", T0) == state


def test_forget_a_burial_when_it_is_old_enough() -> None:
    state = leave(cluster("a~1", "b~1"), "a~1", T0)
    state = leave(state, "b~1", T0 + 5)
    assert forget(state, "a~1", 100, T0 + 99) == state
    assert dict(forget(state, "a~1", 100, T0 + 100).dead) == {"b~1": T0 + 5}
    assert forget(state, "x~1", 0, T0 + 100) == state


def test_what_a_node_says_anew_of_itself_is_a_new_version() -> None:
    _, state = join(Membership(), "a~1", Member(0, 1000, 100, "{}"), 1)
    reply, same = renew(state, "a~1", "{}", 2)
    assert reply == RenewReply("OK", state.version)
    assert same.version == state.version
    reply, told = renew(same, "a~1", '{"state":"draining"}', 3)
    assert reply == RenewReply("OK", state.version + 1)
    assert told.version == state.version + 1


def test_a_cluster_that_was_ended_and_is_started_again_owes_nobody_grace() -> None:
    state = leave(cluster("a~1"), "a~1", T0 + 1)
    assert state.members == {}
    _, state = join(state, "a~2", Member(0, TTL, RENEW), T0 + 3_600_000)
    assert state.grace == 0


def test_a_burial_says_why_by_whom_and_after_how_long() -> None:
    state = beating(cluster("a~1", "b~1", "c~1", "d~1"), "a~1", "c~1", "d~1", now=T0 + STALE)
    _, state = bury(state, "b~1", 0, TTL, T0 + STALE, "a~1")
    later = T0 + STALE + TTL
    state = beating(state, "a~1", "c~1", now=later)
    _, state = reap(state, TTL, later, "c~1")
    state = leave(state, "a~1", later + 5)
    assert dict(state.burials) == {
        "b~1": Burial("silent", "a~1", STALE),
        "d~1": Burial("reaped", "c~1", TTL),
        "a~1": Burial("left", "a~1", 5),
    }
    assert state.burials.keys() == state.dead.keys()


def test_supersede_the_former_incarnation() -> None:
    state = cluster("a~1", "a~2", "b~1")
    seen = state.members["a~1"].deadline
    # All are silent, nobody has renewed for long: only the former one's own renewals count.
    state = replace(state, grace=T0 + 90_000)
    outcome, after = supersede(state, "a~1", "a~2", seen, T0 + 60_000)
    assert (outcome, set(after.members), after.version) == ("OK", {"a~2", "b~1"}, state.version + 1)
    assert dict(after.dead) == {"a~1": T0 + 60_000}
    assert after.burials["a~1"] == Burial("superseded", "a~2", 60_000)
    assert supersede(after, "a~1", "a~2", seen, T0) == ("GONE", after)


def test_who_renews_is_not_superseded() -> None:
    state = cluster("a~1", "a~2")
    seen = state.members["a~1"].deadline
    state = beating(state, "a~1", now=T0 + 1)
    assert supersede(state, "a~1", "a~2", seen, T0 + 60_000) == ("FRESH", state)
    # The store's clock was set back meanwhile.
    state = beating(state, "a~1", now=T0 - 1)
    assert supersede(state, "a~1", "a~2", seen, T0 + 60_000) == ("FRESH", state)


def test_nobody_supersedes_another_node_or_itself() -> None:
    state = cluster("a~1", "b~1", "a~b~1")
    seen = state.members["a~1"].deadline
    for name, by in (("a~1", "b~1"), ("a~1", "a~1"), ("a~b~1", "a~1"), ("a~1", "a~b~1")):
        assert supersede(state, name, by, seen, T0 + 60_000) == ("OTHER", state)


def test_inherit_buries_everybody() -> None:
    state = leave(cluster("a~1", "b~1"), "b~1", T0 + 1)
    after = inherit(state, T0 + 5)
    assert (dict(after.members), dict(after.dead)) == ({}, {"a~1": T0 + 5, "b~1": T0 + 1})
    assert dict(after.burials) == {"a~1": Burial("superseded"), "b~1": Burial("left", "b~1", 1)}
    assert inherit(after, T0 + 9) == after


def test_forget_what_old_nodes_have_left_of_burials() -> None:
    state = leave(leave(cluster("a~1", "b~1", "c~1"), "a~1", T0), "b~1", T0)
    old = {name: at for name, at in state.dead.items() if name != "a~1"}
    state = leave(replace(state, dead=old), "c~1", T0)
    assert state.burials.keys() == {"a~1", "b~1", "c~1"}
    assert forget(state, "b~1", 0, T0).burials.keys() == {"c~1"}


def test_rebury_writes_what_was_lost() -> None:
    state = rebury(cluster("a~1", "b~1"), ["a~1", "c~1"], T0 + 1)
    assert (set(state.members), dict(state.dead)) == ({"b~1"}, {"a~1": T0 + 1, "c~1": T0 + 1})
    assert state.version == cluster("a~1", "b~1").version + 1
    assert rebury(state, ["a~1", "c~1"], T0 + 2) == state
    assert rebury(state, [], T0 + 2) == state
    assert rebury(state, ["a~1", "b~1"], T0 + 3).dead == {"a~1": T0 + 1, "b~1": T0 + 3, "c~1": T0 + 1}
