"""Nodes whose versions do not go together: the one that comes later stays away."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from convener.core.membership import Member
from convener.errors import CallTimeout, ConfigurationError
from convener.manager import ClusteredConversationManager, calls
from convener.manager import members as members_module
from convener.manager.conversation import Conversation
from convener.manager.turn import Turn
from convener.manager.versions import check_protocols, spoken
from convener.testing.cluster import FunctionAgent, InProcessCluster
from convener.version import OLDEST_PROTOCOL, PROTOCOL
from tests.manager.conftest import MakeCluster

pytestmark = pytest.mark.anyio


async def echo(turn: Turn[Any]) -> None:
    await turn.reply(turn.data)


async def pong(_: Conversation, __: Any) -> str:
    return "pong"


def malformed(manager: ClusteredConversationManager) -> float:
    """Requests of other nodes that it could not take."""
    found = re.search(r'convener_malformed_total\{where="node"\} (\S+)', manager.metrics.render().decode())
    return float(found[1]) if found else 0.0


def member(**info: object) -> Member:
    return Member(deadline=1, ttl=1, renew=1, info=json.dumps(info))


def test_versions_that_go_together() -> None:
    assert OLDEST_PROTOCOL <= PROTOCOL
    same = {"a~1": member(name="a", version="1.0", protocol=4, oldest=3)}
    check_protocols({}, protocol=4, oldest=3)
    check_protocols(same, protocol=4, oldest=4)
    check_protocols(same, protocol=3, oldest=2)
    check_protocols(same, protocol=5, oldest=4)


def test_what_a_member_does_not_say_is_the_first_version() -> None:
    assert (spoken(member()).protocol, spoken(member()).oldest) == (1, 1)
    broken = Member(deadline=1, ttl=1, renew=1, info="[")
    assert (spoken(broken).protocol, spoken(broken).oldest) == (1, 1)
    check_protocols({"a~1": member(name="a", version="0.1.0", protocol=1)}, protocol=2, oldest=1)


def test_a_member_that_is_too_old_is_named() -> None:
    old = {"a~1": member(name="a", version="0.1.0", protocol=1), "b~1": member(name="b", protocol=3)}
    with pytest.raises(
        ConfigurationError, match=r"node a \(convener 0.1.0\) speaks protocol 1.*understands 2 and newer"
    ):
        check_protocols(old, protocol=3, oldest=2)


def test_a_cluster_that_has_gone_on_is_not_joined() -> None:
    new = {"a~1": member(name="a", version="9.0", protocol=9, oldest=8)}
    with pytest.raises(ConfigurationError, match=r"understands protocol 8 and newer.*too old for this cluster"):
        check_protocols(new, protocol=7, oldest=6)


async def incarnations(cluster: InProcessCluster) -> set[str]:
    return set((await cluster[0].engine.node.store.membership()).members)


async def test_a_node_that_does_not_go_with_the_cluster_never_joins(
    make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = await make_cluster(nodes=2)
    before = await incarnations(cluster)

    def of_another_age(found: dict[str, Member]) -> None:
        check_protocols(found, protocol=99, oldest=98)

    monkeypatch.setattr(members_module, "check_protocols", of_another_age)
    with pytest.raises(ConfigurationError, match="speaks protocol"):
        await cluster.add("late")
    assert await incarnations(cluster) == before


async def test_of_two_that_join_at_once_the_second_one_leaves(
    make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = await make_cluster(nodes=2)
    before = await incarnations(cluster)
    looks = 0

    def second_look(found: dict[str, Member]) -> None:
        nonlocal looks
        looks += 1
        if looks == 2:
            assert len(found) == 2
            raise ConfigurationError("it has joined meanwhile")

    monkeypatch.setattr(members_module, "check_protocols", second_look)
    with pytest.raises(ConfigurationError, match="meanwhile"):
        await cluster.add("late")
    assert await incarnations(cluster) == before


async def test_what_is_left_under_a_nodes_own_name_does_not_keep_it_away(
    make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = await make_cluster(nodes=1)
    seen: list[set[str]] = []

    def look(found: dict[str, Member]) -> None:
        seen.append({spoken(each).name for each in found.values()})

    monkeypatch.setattr(members_module, "check_protocols", look)
    await cluster.kill(0)
    await cluster.add("node-0")
    assert seen == [set(), set()]


async def test_messages_of_a_protocol_that_is_too_old_are_counted_and_skipped(
    make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = await make_cluster(FunctionAgent(echo, {"ping": pong}), nodes=2)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    assert await cluster[1].call("c", "ping", None) == "pong"
    assert malformed(cluster[0]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(calls, "OLDEST_PROTOCOL", PROTOCOL + 1)
        with pytest.raises(CallTimeout):
            await cluster[1].call("c", "ping", None, timeout=0.2)
    assert malformed(cluster[0]) > 0
    assert await cluster[1].call("c", "ping", None) == "pong"
