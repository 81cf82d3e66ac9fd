"""The agent's durable state: a dict or a model, saved with its turn or not at all, older versions migrated."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
from collections.abc import Callable
from typing import Any

import msgspec
import pydantic
import pytest

from convener.core.model import AppendRequest
from convener.errors import ConfigurationError, InvalidRequest, PayloadTooLarge
from convener.manager.traits import Codec, DictCodec, ModelCodec, Traits
from convener.manager.turn import Turn
from convener.testing.cluster import QUICK, InProcessCluster
from tests.manager.conftest import MakeCluster
from tests.manager.people import TraitedAgent, asked, hibernated, log_of, replies_of, settled, store_of
from tests.manager.stepped import Stepped

pytestmark = pytest.mark.anyio

MOMENT = datetime.datetime(2030, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)


class StructBasket(msgspec.Struct):
    count: int = 0
    items: dict[int, set[str]] = msgspec.field(default_factory=dict[int, set[str]])
    at: datetime.datetime | None = None


@dataclasses.dataclass
class DataBasket:
    count: int = 0
    items: dict[int, set[str]] = dataclasses.field(default_factory=dict[int, set[str]])
    at: datetime.datetime | None = None


class PydanticBasket(pydantic.BaseModel):
    # Strict: what JSON has no type for must come back all the same.
    model_config = pydantic.ConfigDict(strict=True)

    count: int = 0
    items: dict[int, set[str]] = pydantic.Field(default_factory=dict[int, set[str]])
    at: datetime.datetime | None = None


MODELS = [StructBasket, DataBasket, PydanticBasket]
models = pytest.mark.parametrize("model", MODELS)


async def count(turn: Turn[Any]) -> None:
    """Counts its messages in a typed state; "fail" raises, "spoil" leaves what cannot be saved, "ask" asks."""
    state = turn.state
    state.count += 1
    state.items.setdefault(state.count, set()).add(turn.text)
    state.at = MOMENT
    if turn.text == "spoil":
        turn.state = {"count": 99}
    if turn.text == "ask":
        await turn.ask("ok?")
    await turn.reply(state.count)
    if turn.text == "fail":
        raise RuntimeError("no good")


def agent(codec: Codec, answer: Any = count) -> TraitedAgent:
    return TraitedAgent(answer, Traits(codec=codec))


async def say(cluster: InProcessCluster, *texts: str) -> None:
    for text in texts:
        await cluster[0].send_event_to_conversation("c", {"text": text})
    await settled(cluster, "c")


def saves(cid: str, request: AppendRequest) -> bool:
    """Which appends write the state."""
    return request.state is not None


async def saved(cluster: InProcessCluster) -> Any:
    raw = await store_of(cluster).state("c")
    return None if raw is None else msgspec.json.decode(raw)


async def failures(cluster: InProcessCluster) -> list[str]:
    return [e["data"]["code"] for e in await log_of(cluster, "c") if e["kind"] == "turn_failed"]


@models
async def test_a_model_goes_from_turn_to_turn_and_from_node_to_node(make_cluster: MakeCluster, model: Any) -> None:
    cluster = await make_cluster(agent(ModelCodec(model, 3)), nodes=2)
    await cluster[1].maybe_start_agent_loop("c", user_id="u")
    await say(cluster, "one", "two")
    await cluster.kill(1)
    await say(cluster, "three")
    assert await replies_of(cluster, "c") == [1, 2, 3]
    items = {"1": ["one"], "2": ["two"], "3": ["three"]}
    state = {"count": 3, "items": items, "at": "2030-01-02T03:04:05Z"}
    assert await saved(cluster) == {"$version": 3, "$state": state}


@models
async def test_a_turn_that_fails_leaves_the_state(make_cluster: MakeCluster, model: Any) -> None:
    cluster = await make_cluster(agent(ModelCodec(model)), nodes=1)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    await say(cluster, "one", "fail", "spoil", "two")
    assert await replies_of(cluster, "c") == [1, 2]
    assert await failures(cluster) == ["agent_error", "invalid_request"]
    held = await saved(cluster)
    assert held["$state"]["items"] == {"1": ["one"], "2": ["two"]}


async def test_an_interrupted_turn_leaves_the_state(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(agent(ModelCodec(StructBasket)))
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"text": "ask"})
    await asked(cluster, "c")
    assert await cluster[1].interrupt("c") == "interrupted"
    assert await saved(cluster) is None
    await say(cluster, "one")
    assert await replies_of(cluster, "c") == [1]


async def test_it_is_saved_with_the_end_of_the_turn_in_one_step(make_cluster: MakeCluster) -> None:
    stepped = Stepped(make_cluster)
    cluster = await stepped.start(agent(ModelCodec(StructBasket)))
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    saving = stepped.stores[0].hold("append", saves)
    await cluster[0].send_event_to_conversation("c", {"text": "one"})
    await asyncio.wait_for(saving.reached.wait(), 20)
    request = saving.arguments[1]
    assert [msgspec.json.decode(e)["kind"] for e in request.events] == ["reply", "turn_done"]
    assert (request.ends_turn, request.done) == (True, 1)
    await cluster.kill(0)
    await settled(cluster, "c")
    assert await replies_of(cluster, "c") == [1]
    assert (await saved(cluster))["$state"]["count"] == 1


async def test_it_is_saved_once_when_the_reply_is_lost(make_cluster: MakeCluster) -> None:
    stepped = Stepped(make_cluster)
    cluster = await stepped.start(agent(ModelCodec(StructBasket)), nodes=1)
    stepped.stores[0].lose_reply("append", saves)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    await say(cluster, "one", "two")
    assert await replies_of(cluster, "c") == [1, 2]


async def test_a_turn_that_waits_finds_the_state_as_it_was(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(agent(ModelCodec(StructBasket)))
    await cluster[0].maybe_start_agent_loop("c", user_id="u", initial_user_msg={"text": "ask"})
    await asked(cluster, "c")
    await hibernated(cluster, "c")
    await cluster[1].answer("c", "t1.1", "yes")
    await settled(cluster, "c")
    assert await replies_of(cluster, "c") == [1]
    assert (await saved(cluster))["$state"]["count"] == 1


async def test_what_an_agent_does_to_its_state_later_reaches_nobody(make_cluster: MakeCluster) -> None:
    kept: list[Any] = []

    async def keep(turn: Turn[StructBasket]) -> None:
        for old in kept:
            old.count = 99
        kept.append(turn.state)
        await count(turn)

    cluster = await make_cluster(agent(ModelCodec(StructBasket), keep), nodes=1)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    await say(cluster, "one", "two", "three")
    assert await replies_of(cluster, "c") == [1, 2, 3]


async def test_nothing_is_written_that_has_not_changed(make_cluster: MakeCluster) -> None:
    async def look(turn: Turn[Any]) -> None:
        await turn.reply(turn.state.count)

    cluster = await make_cluster(agent(ModelCodec(StructBasket), look), nodes=1)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    await say(cluster, "one")
    assert await saved(cluster) is None


# -- versions


async def over_time(
    make_cluster: MakeCluster, before: Codec, after: Codec
) -> tuple[InProcessCluster, Callable[[Codec], Any]]:
    """A cluster whose conversation `c` was written to once under one form of the state and goes on under another; and
    a function that goes on under a further one.
    """
    acting = agent(before)
    cluster = await make_cluster(acting)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    await say(cluster, "one")

    async def go_on(codec: Codec) -> None:
        await hibernated(cluster, "c")
        acting.traits = Traits(codec=codec)
        for manager in cluster:
            manager.engine.node.traits = acting.traits

    await go_on(after)
    return cluster, go_on


class Older(msgspec.Struct):
    n: int = 0

    @property
    def count(self) -> int:
        return self.n

    @count.setter
    def count(self, value: int) -> None:
        self.n = value

    @property
    def items(self) -> dict[int, set[str]]:
        return {}


@models
async def test_an_older_version_is_migrated(make_cluster: MakeCluster, model: Any) -> None:
    seen: list[tuple[int, dict[str, Any]]] = []

    def migrate(version: int, data: dict[str, Any]) -> dict[str, Any]:
        seen.append((version, data))
        return {"count": data["n"], "items": {7: {"migrated"}}, "at": MOMENT}

    async def plain(turn: Turn[Older]) -> None:
        turn.state.n += 1

    acting = agent(ModelCodec(Older, 1), plain)
    cluster = await make_cluster(acting)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    await say(cluster, "one", "two")
    assert await saved(cluster) == {"$version": 1, "$state": {"n": 2}}
    await hibernated(cluster, "c")
    other = agent(ModelCodec(model, 2, migrate))
    for manager in cluster:
        manager.engine.node.traits, manager.engine.node.agent = other.traits, other
    await say(cluster, "three", "four")
    assert await replies_of(cluster, "c") == [3, 4]
    held = await saved(cluster)
    assert (held["$version"], held["$state"]["count"]) == (2, 4)
    assert held["$state"]["items"] == {"3": ["three"], "4": ["four"], "7": ["migrated"]}
    assert seen[0] == (1, {"n": 2})
    assert len(seen) == 1, "what was saved in the new form is not migrated again"


async def test_a_plain_object_is_version_0(make_cluster: MakeCluster) -> None:
    async def plain(turn: Turn) -> None:
        turn.state["total"] = 5

    versions: list[int] = []

    def migrate(version: int, data: dict[str, Any]) -> dict[str, Any]:
        versions.append(version)
        return {"count": data["total"]}

    cluster = await make_cluster(agent(DictCodec(), plain))
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    await say(cluster, "one")
    assert await saved(cluster) == {"total": 5}
    await hibernated(cluster, "c")
    typed = agent(ModelCodec(StructBasket, 1, migrate))
    for manager in cluster:
        manager.engine.node.traits, manager.engine.node.agent = typed.traits, typed
    await say(cluster, "two")
    assert await replies_of(cluster, "c") == [6]
    assert versions == [0]


BAD: list[Any] = [
    pytest.param(ModelCodec(StructBasket, 1), id="an older version of the agent"),
    pytest.param(ModelCodec(StructBasket, 3), id="a newer one that cannot migrate"),
    pytest.param(ModelCodec(StructBasket, 3, lambda version, data: data["no such field"]), id="a migration that fails"),
    pytest.param(ModelCodec(StructBasket, 3, lambda version, data: {"count": "x"}), id="one whose data does not fit"),
    pytest.param(ModelCodec(StructBasket, 3, lambda version, data: {"count": object()}), id="one that is no JSON"),
    pytest.param(DictCodec(), id="an agent without a model"),
]


@pytest.mark.parametrize("bad", BAD)
async def test_a_state_that_cannot_be_read_is_refused_and_kept(make_cluster: MakeCluster, bad: Codec) -> None:
    good = ModelCodec(StructBasket, 2)
    cluster, go_on = await over_time(make_cluster, good, bad)
    before = await store_of(cluster).state("c")
    await say(cluster, "two", "three")
    assert await failures(cluster) == ["bad_state", "bad_state"]
    assert await store_of(cluster).state("c") == before
    await go_on(good)
    await say(cluster, "four")
    assert await replies_of(cluster, "c") == [1, 2]
    assert (await saved(cluster))["$state"]["items"] == {"1": ["one"], "2": ["four"]}


async def test_a_migration_that_fails_once_costs_one_turn(make_cluster: MakeCluster) -> None:
    tries: list[int] = []

    def migrate(version: int, data: dict[str, Any]) -> dict[str, Any]:
        tries.append(version)
        if len(tries) == 1:
            raise ConnectionError("not now")
        return data

    cluster, _ = await over_time(make_cluster, ModelCodec(StructBasket, 1), ModelCodec(StructBasket, 2, migrate))
    await say(cluster, "two", "three")
    assert await failures(cluster) == ["bad_state"]
    assert await replies_of(cluster, "c") == [1, 2]


# -- what cannot be saved


class Unserialisable(pydantic.BaseModel):
    count: int = 0
    items: dict[int, set[str]] = {}
    at: Any = None
    thing: Any = None


@pytest.mark.parametrize("thing", [object(), lambda: 1, "x" * (2 << 20)], ids=["an object", "a function", "too much"])
@pytest.mark.parametrize("codec", [ModelCodec(Unserialisable), DictCodec()], ids=["a model", "a dict"])
async def test_what_cannot_be_saved_fails_its_turn_only(make_cluster: MakeCluster, thing: Any, codec: Codec) -> None:
    async def spoil(turn: Turn[Any]) -> None:
        if turn.text == "bad":
            if isinstance(codec, DictCodec):
                turn.state["thing"] = thing
            else:
                turn.state.thing = thing
        await turn.reply(turn.text)

    cluster = await make_cluster(agent(codec, spoil), nodes=1)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    await say(cluster, "one", "bad", "two")
    assert await replies_of(cluster, "c") == ["one", "two"]
    expected = "payload_too_large" if isinstance(thing, str) else "invalid_request"
    assert await failures(cluster) == [expected]


async def test_the_limit_is_that_of_payloads(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(
        agent(ModelCodec(StructBasket)), nodes=1, options=dataclasses.replace(QUICK, max_payload_bytes=1000)
    )
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    for n in range(10):
        await say(cluster, f"{n}" * 200)
    assert set(await failures(cluster)) == {"payload_too_large"}
    assert len(await store_of(cluster).state("c") or b"") <= 1000


# -- the codecs alone


@models
def test_a_new_conversation_has_a_state_of_its_own(model: Any) -> None:
    codec = ModelCodec(model)
    first, second = codec.decode(None), codec.decode(None)
    first.items[1] = {"mine"}
    assert (first.count, second.items) == (0, {})


@models
def test_what_is_written_is_read(model: Any) -> None:
    codec = ModelCodec(model, 7)
    state = codec.decode(None)
    state.count, state.items, state.at = 2**40, {1: {"a", "b"}, -5: set()}, MOMENT
    again = codec.decode(codec.encode(state, 1000))
    assert (again.count, again.items, again.at) == (2**40, {1: {"a", "b"}, -5: set()}, MOMENT)
    with pytest.raises(PayloadTooLarge):
        codec.encode(state, 50)
    others: list[Any] = [{}, None, model, Unserialisable()]
    for other in others:
        with pytest.raises(InvalidRequest, match=model.__name__):
            codec.encode(other, 1000)


def test_a_plain_state_is_an_object() -> None:
    codec = DictCodec()
    assert codec.decode(None) == {}
    assert codec.decode(codec.encode({"a": [1]}, 100)) == {"a": [1]}
    wrong: list[Any] = [None, [], "x", 5]
    for bad in wrong:
        with pytest.raises(InvalidRequest):
            codec.encode(bad, 100)
    for damaged in (b"[]", b"{", b"null"):
        with pytest.raises(msgspec.DecodeError):
            codec.decode(damaged)


class NeedsArguments(msgspec.Struct):
    name: str


class Raises(pydantic.BaseModel):
    def model_post_init(self, context: Any) -> None:
        raise RuntimeError("no default")


@pytest.mark.parametrize("model", [dict, int, object, NeedsArguments, Raises])
def test_what_is_no_model(model: Any) -> None:
    with pytest.raises(ConfigurationError, match=model.__name__):
        ModelCodec(model)


@pytest.mark.parametrize("version", [0, -1, True, "2", 1.5, None])
def test_what_is_no_version(version: Any) -> None:
    with pytest.raises(ConfigurationError, match="version"):
        ModelCodec(StructBasket, version)


async def test_damaged_text_is_a_bad_state(make_cluster: MakeCluster) -> None:
    stepped = Stepped(make_cluster)
    cluster = await stepped.start(agent(ModelCodec(StructBasket)), nodes=1)
    await cluster[0].maybe_start_agent_loop("c", user_id="u")
    await say(cluster, "one")
    await hibernated(cluster, "c")
    real = stepped.stores[0].state
    stepped.stores[0].state = _damaged  # type: ignore[attr-defined]
    await say(cluster, "two")
    assert await failures(cluster) == ["bad_state"]
    await hibernated(cluster, "c")
    stepped.stores[0].state = real  # type: ignore[attr-defined]
    await say(cluster, "three")
    assert await replies_of(cluster, "c") == [1, 2]


async def _damaged(cid: str) -> bytes:
    return b'{"$version":1,"$state":'
