"""Members, burials, the heartbeat's link."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

from convener.core.membership import Member
from convener.errors import StoreUnavailable
from convener.store.base import Store
from convener.testing.contract_checks.tools import until
from convener.testing.harness import Harness

LONG = Member(0, 60_000, 500, '{"address":"é"}')


async def check_join_and_renew(h: Harness) -> None:
    """Joining makes a member and a new version; renewing never does."""
    a, b = await h.connect(), await h.connect()
    before = (await a.membership()).version
    assert (await a.renew("a~1")).outcome == "DEAD"
    joined = await a.join("a~1", LONG)
    assert (joined.outcome, joined.version) == ("OK", before + 1)
    state = await b.membership()
    member = state.members["a~1"]
    assert (member.ttl, member.renew, member.info) == (60_000, 500, '{"address":"é"}')
    assert member.last_renewal() == state.pulse
    assert state.version == before + 1
    assert not await b.is_buried("a~1")
    renewed = await a.renew("a~1", '{"load":1}')
    assert (renewed.outcome, renewed.version) == ("OK", before + 2), "what it says anew of itself is told"
    assert (await a.renew("a~1", '{"load":1}')).version == before + 2
    assert (await b.membership()).members["a~1"].info == '{"load":1}'
    await a.renew("a~1")
    after = await b.membership()
    assert after.members["a~1"].info == '{"load":1}'
    assert after.members["a~1"].deadline >= member.deadline
    assert after.pulse >= state.pulse


async def check_the_buried_stay_buried(h: Harness) -> None:
    """I10: until they are forgotten."""
    s = await h.connect()
    await s.join("a~1", LONG)
    await s.leave("a~1")
    state = await s.membership()
    assert ("a~1" in state.members, "a~1" in state.dead) == (False, True)
    assert await s.is_buried("a~1")
    for again in (await s.renew("a~1"), await s.join("a~1", LONG)):
        assert (again.outcome, again.version) == ("DEAD", state.version)
    await s.leave("a~1")
    await s.leave("stranger~1")
    await s.forget("a~1", 60_000)
    assert await s.membership() == state
    assert not await s.is_buried("stranger~1")
    await s.forget("a~1", 0)
    assert dict((await s.membership()).dead) == {}


async def check_changes_are_announced(h: Harness) -> None:
    """On the `sync` channel, with the version; renewals are not, unless the node says something new of itself."""
    a, b = await h.connect(), await h.connect()
    heard: list[int] = []

    def handler(payload: bytes) -> None:
        message = json.loads(payload)
        if message["t"] == "members":
            heard.append(message["ver"])

    await b.subscribe(b.channel("sync"), handler, lambda: None)
    await a.join("a~1", LONG)
    await a.renew("a~1")
    await a.renew("a~1", '{"state":"draining"}')
    await a.renew("a~1", '{"state":"draining"}')
    await a.join("b~1", LONG)
    await a.leave("b~1")
    version = (await a.membership()).version

    async def last() -> Sequence[int]:
        return heard

    await until(last, lambda versions: len(versions) >= 4, "four changes were heard")
    assert heard == [version - 3, version - 2, version - 1, version]


async def check_reap_buries_lapsed_leases(h: Harness) -> None:
    """And nobody else's."""
    s = await h.connect()
    await s.join("a~1", LONG)
    await s.join("b~1", Member(0, 100, 20))
    await s.join("c~1", Member(0, 100, 20))

    async def reap() -> list[str]:
        await s.renew("a~1")
        await s.renew("c~1")
        return list(await s.reap(100))

    assert await until(reap, bool, "the lapsed lease was reaped") == ["b~1"]
    state = await s.membership()
    assert (set(state.members), set(state.dead)) == ({"a~1", "c~1"}, {"b~1"})


async def check_an_old_pulse_gives_grace(h: Harness) -> None:
    """Nobody is buried by whoever comes first after an outage."""
    s = await h.connect()
    await s.index("u", "clock")
    await s.create("clock", "u", "{}", "g")
    await s.join("a~1", Member(0, 100, 20))

    async def now() -> int:
        head = await s.set_metadata("clock", "{}")
        assert head is not None
        return head.updated

    pulse = (await s.membership()).pulse
    at = await until(now, lambda ms: ms > pulse + 2_000, "the pulse is old")
    assert list(await s.reap(30_000)) == []
    state = await s.membership()
    assert state.grace >= at + 30_000
    assert set(state.members) == {"a~1"}
    assert await s.bury("a~1", 30_000) == "GRACE"
    assert (await s.renew("a~1")).outcome == "OK"


async def bury(s: Store, name: str, *alive: str) -> str:
    """BURY, with everybody else alive."""
    for other in alive:
        await s.renew(other)
    return await s.bury(name, 60_000)


async def check_bury_takes_who_is_silent(h: Harness) -> None:
    """After two intervals and the slack, not before."""
    s = await h.connect()
    assert await s.bury("nobody~1", 60_000) == "GONE"
    await s.join("a~1", LONG)
    await s.join("b~1", Member(0, 60_000, 50))
    assert await bury(s, "b~1", "a~1") == "FRESH"
    outcome = await until(lambda: bury(s, "b~1", "a~1"), lambda o: o != "FRESH", "b~1 is silent for long enough")
    assert outcome == "OK"
    assert await s.is_buried("b~1")
    assert await s.bury("b~1", 60_000) == "GONE"


async def check_bury_spares_who_holds_its_channel(h: Harness) -> None:
    """A node that is late, but lives."""
    s = await h.connect()
    link = s.heartbeat_link()
    try:
        await s.join("a~1", LONG)
        await s.join("b~1", Member(0, 60_000, 20))
        await asyncio.to_thread(link.hold_live, "b~1")
        await asyncio.to_thread(link.ping_live)
        spared = await until(lambda: bury(s, "b~1", "a~1"), lambda o: o != "FRESH", "b~1 is silent for long enough")
        assert spared == "ALIVE"
    finally:
        await asyncio.to_thread(link.close)
    await until(lambda: bury(s, "b~1", "a~1"), lambda o: o == "OK", "b~1 is buried")


async def check_bury_stops_when_many_are_silent(h: Harness) -> None:
    """That looks like the store's own trouble."""
    s = await h.connect()
    for name, interval in (("a~1", 500), ("b~1", 20), ("c~1", 20)):
        await s.join(name, Member(0, 60_000, interval))

    # The last to join is the last to count as silent; b~1 does by then.
    assert await until(lambda: bury(s, "c~1", "a~1"), lambda o: o != "FRESH", "c~1 is silent") == "MANY"
    assert set((await s.membership()).members) == {"a~1", "b~1", "c~1"}
    await s.leave("c~1")
    assert await bury(s, "b~1", "a~1") == "OK"


async def check_the_link_renews_from_its_own_thread(h: Harness) -> None:
    """While the event loop does something else."""
    s = await h.connect()
    await s.join("a~1", Member(0, 60_000, 500))
    link = s.heartbeat_link()
    try:
        reply = await asyncio.to_thread(link.renew, "a~1", '{"x":1}')
        state = await s.membership()
        assert (reply.outcome, reply.version) == ("OK", state.version)
        assert state.members["a~1"].info == '{"x":1}'
        assert (await asyncio.to_thread(link.renew, "a~1")).outcome == "OK"
        assert (await s.membership()).members["a~1"].info == '{"x":1}'
        assert (await asyncio.to_thread(link.renew, "stranger~1")).outcome == "DEAD"
        try:
            await asyncio.to_thread(link.ping_live)
        except StoreUnavailable:
            pass
        else:
            raise AssertionError("a channel that is not held was found")
    finally:
        await asyncio.to_thread(link.close)


async def check_a_burial_is_explained(h: Harness) -> None:
    """Why, by whom, after how long a silence; until it is forgotten."""
    s = await h.connect()
    for name, ttl in (("a~1", 60_000), ("b~1", 60_000), ("c~1", 100), ("d~1", 60_000)):
        await s.join(name, Member(0, ttl, 20 if name == "b~1" else 500))

    async def lapsed() -> Sequence[str]:
        await s.renew("a~1")
        return await s.reap(60_000, "a~1")

    await until(lapsed, bool, "the lease has lapsed")
    await until(lambda: bury_by(s, "b~1", "a~1"), lambda o: o == "OK", "the silent one is buried")
    await s.leave("d~1")
    told = (await s.membership()).burials
    assert [(told[n].kind, told[n].by) for n in ("b~1", "c~1", "d~1")] == [
        ("silent", "a~1"),
        ("reaped", "a~1"),
        ("left", "d~1"),
    ]
    assert told["b~1"].silent > 2 * 20 + 250
    assert told["c~1"].silent >= 100
    await s.forget("b~1", 60_000)
    assert "b~1" in (await s.membership()).burials
    await s.forget("b~1", 0)
    assert set((await s.membership()).burials) == {"c~1", "d~1"}


async def bury_by(s: Store, name: str, by: str) -> str:
    """BURY by somebody who is alive."""
    await s.renew(by)
    return await s.bury(name, 60_000, by)


async def check_a_former_incarnation_is_superseded(h: Harness) -> None:
    """If it has not renewed since it was looked at; whoever else is silent, and whatever of it is still connected."""
    s = await h.connect()
    link = s.heartbeat_link()
    try:
        for name in ("a~1", "a~2", "b~1"):
            await s.join(name, LONG)
        await asyncio.to_thread(link.hold_live, "a~1")
        deadline = (await s.membership()).members["a~1"].deadline

        async def renewed() -> int:
            await s.renew("a~1")
            return (await s.membership()).members["a~1"].deadline

        seen = await until(renewed, lambda now: now != deadline, "it has renewed")
        assert await s.supersede("a~1", "a~2", deadline) == "FRESH"
        assert await s.supersede("a~1", "b~1", seen) == "OTHER"
        assert await s.supersede("a~1", "a~1", seen) == "OTHER"
        assert await s.supersede("a~0", "a~1", seen) == "GONE"
        version = (await s.membership()).version
        assert await s.supersede("a~1", "a~2", seen) == "OK"
        state = await s.membership()
        assert (set(state.members), state.version) == ({"a~2", "b~1"}, version + 1)
        assert (state.burials["a~1"].kind, state.burials["a~1"].by) == ("superseded", "a~2")
        assert (await s.renew("a~1")).outcome == "DEAD"
    finally:
        await asyncio.to_thread(link.close)


async def check_rebury(h: Harness) -> None:
    """Burials that were lost are written again, of members and of strangers; those that are there keep their time."""
    s = await h.connect()
    await s.join("a~1", Member(0, 10_000, 500, "{}"))
    await s.join("b~1", Member(0, 10_000, 500, "{}"))
    await s.leave("b~1")
    before = await s.membership()
    await s.rebury(["b~1"])
    assert await s.membership() == before
    await s.rebury(["a~1", "b~1", "c~1"])
    after = await s.membership()
    assert (set(after.members), set(after.dead)) == (set(), {"a~1", "b~1", "c~1"})
    assert (after.dead["b~1"], after.version) == (before.dead["b~1"], before.version + 1)
    assert (await s.renew("a~1")).outcome == "DEAD"
    assert (await s.join("c~1", Member(0, 10_000, 500, "{}"))).outcome == "DEAD"
