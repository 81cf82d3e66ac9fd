"""The least rights: all that the code asks for, no more; and what is missing is named when a store is opened."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import cast

import pytest

from convener.errors import ConfigurationError
from convener.store.redis import RedisStore, acl
from convener.store.redis.scripts import SCRIPTS
from tests.support.servers import FLAVOURS, Flavour, Server
from tests.support.topologies import tell

SOURCES = Path(str(files("convener.store.redis")))
NOT_IN_SCRIPTS = {"evalsha", "ssubscribe", "sunsubscribe", "ping"}


@pytest.fixture(params=FLAVOURS, scope="module")
def own(request: pytest.FixtureRequest) -> Iterator[Server]:
    with Server(cast("Flavour", request.param)) as server:
        yield server


def _url(own: Server, *more: str) -> str:
    tell(own, "ACL", "SETUSER", "node", "reset", "on", ">pw", *acl.rules("ns"), *more)
    tell(own, "ACL", "LOG", "RESET")
    return f"redis://node:pw@127.0.0.1:{own.port}/0"


def test_every_command_in_the_code_is_allowed() -> None:
    """Commands stand as capital texts in the code of the store."""
    known = {command.partition("|")[0] for command in acl.commands() | acl.DOCTOR}
    sent: set[str] = set()
    for path in SOURCES.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        sent |= set(re.findall(r'(?:execute|each|ask|_each|_ask|send_command|pack)\([^"\n]*\(?"([A-Z]{2,})"', text))
    assert sent > {"HGET", "SPUBLISH", "SCAN", "SCRIPT", "SSUBSCRIBE", "EVALSHA"}
    # HELLO needs no right.
    assert {command.lower() for command in sent} - {"hello"} <= known


def test_all_that_nodes_need_is_tried_when_a_store_is_opened() -> None:
    tried = set(re.findall(r"^try\('([A-Z]+)'", SCRIPTS["rights"].source, re.MULTILINE))
    needed = {command.partition("|")[0] for command in acl.commands() - acl.OPTIONAL} - NOT_IN_SCRIPTS
    assert {command.lower() for command in tried} == needed


async def test_the_rules_are_enough_and_leave_nothing(own: Server) -> None:
    async with RedisStore(_url(own), namespace="ns") as store:
        assert store.capabilities.counts_subscribers
        assert store.capabilities.waits
        assert (await store.create("c", "u", "{}", "g")).created
        assert tell(own, "EXISTS", store.keys.scratch) == 0
    log = tell(own, "ACL", "LOG")
    # Nodes do without them.
    assert {entry[entry.index(b"object") + 1] for entry in log} <= {b"config|get"}
    tell(own, "FLUSHALL")


@pytest.mark.parametrize(
    ("less", "named"),
    [
        (("-hmget",), "+hmget"),
        (("-xadd", "-zadd"), "+zadd +xadd"),
        (("-xinfo|stream",), "+xinfo"),
        (("-spublish",), "+spublish"),
        (("-evalsha",), "+evalsha"),
        (("-ssubscribe",), "+ssubscribe"),
        (("resetchannels",), "&{ns:*"),
        (("resetchannels", "&{ns:m}*"), "&{ns:*"),
        (("resetchannels", "&{ns:m}*", "&{ns:c:*"), "&{ns:*"),
        (("resetkeys",), "~{ns:*"),
        (("resetkeys", "~{other:*"), "~{ns:*"),
    ],
)
async def test_what_is_missing_is_named(own: Server, less: tuple[str, ...], named: str) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        await RedisStore(_url(own, *less), namespace="ns").open()
    assert f"lacks {named} (convener doctor --print-acl" in str(refusal.value)


@pytest.mark.parametrize("less", ["-info", "-role", "-client", "-config", "-script", "-wait", "-pubsub|shardnumsub"])
async def test_what_is_hidden_is_unknown(own: Server, less: str) -> None:
    async with RedisStore(_url(own, less), namespace="ns") as store:
        found = store.capabilities
        assert (found.version is None, found.eviction is None) == (less == "-info", less == "-info")
        assert found.waits == (less != "-wait")
        assert found.counts_subscribers == (less != "-pubsub|shardnumsub")
        info = await store.info()
        assert info.counts_subscribers == found.counts_subscribers
        assert await store.head("c") is None


def test_what_is_not_understood_is_not_explained() -> None:
    assert acl.advice("WRONGPASS invalid username-password pair", "ns") == ""
