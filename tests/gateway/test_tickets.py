"""Tickets: one request of somebody who cannot send headers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import jwt
import pytest

from convener.errors import NotAuthenticated, StoreFull
from convener.gateway.auth import Identity
from convener.gateway.tickets import TICKET_LIFE, issue, redeem
from convener.store.tickets import MAX_TICKETS, LocalTickets
from tests.gateway.support import Node, running, serving
from tests.gateway.test_sse import stream

TOKENS = {"auth": "token", "auth_tokens": {"alice's": "alice", "bob's": "bob"}}
ALICE = {"authorization": "Bearer alice's"}
BOB = {"authorization": "Bearer bob's"}
SECRET = "s" * 32


async def ticket(node: Node, headers: Mapping[str, str] = ALICE) -> str:
    """A new one."""
    answer = await node.http.post("/api/tickets", headers=headers)
    assert answer.status_code == 201, answer.text
    assert answer.json()["expires_in"] == TICKET_LIFE
    return answer.json()["ticket"]


async def test_a_ticket_opens_one_stream_as_the_caller_who_got_it() -> None:
    async with serving(settings=TOKENS) as node:
        await node.http.post("/api/conversations", json={"conversation_id": "c1"}, headers=ALICE)
        one = await ticket(node)
        async with stream(node, ticket=one) as opened:
            assert [event.name for event in await opened.events(2)] == ["event", "joined"]
        again = await node.http.get(f"/api/conversations/c1/stream?ticket={one}")
        assert (again.status_code, again.json()["code"]) == (401, "not_authenticated")


async def test_only_its_owners_rights_come_with_a_ticket() -> None:
    async with running(settings=TOKENS) as node:
        await node.http.post("/api/conversations", json={"conversation_id": "c1"}, headers=ALICE)
        answer = await node.http.get(f"/api/conversations/c1/stream?ticket={await ticket(node, BOB)}")
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


async def test_of_many_requests_with_one_ticket_one_is_let_in() -> None:
    async with running(settings=TOKENS) as node:
        one = await ticket(node)
        answers = await asyncio.gather(
            *(node.http.get(f"/api/conversations/none/stream?ticket={one}") for _ in range(20))
        )
        assert sorted(answer.status_code for answer in answers) == [401] * 19 + [404]


async def test_a_ticket_is_for_streams_only_and_a_header_goes_before_it() -> None:
    async with running(settings=TOKENS) as node:
        one = await ticket(node)
        assert (await node.http.get(f"/api/conversations?ticket={one}")).status_code == 401
        assert (await node.http.get(f"/api/conversations/none/stream?ticket={one}", headers=BOB)).status_code == 404
        # So it is still good.
        assert (await node.http.get(f"/api/conversations/none/stream?ticket={one}")).status_code == 404
        for bad in ("", "x", "ü" * 10, one, "a" * 5000):
            answer = await node.http.get("/api/conversations/none/stream", params={"ticket": bad})
            assert (answer.status_code, answer.json()["code"]) == (401, "not_authenticated")


async def test_nobody_gets_a_ticket_without_a_token() -> None:
    async with running(settings=TOKENS) as node:
        answer = await node.http.post("/api/tickets")
        assert (answer.status_code, answer.json()["code"]) == (401, "not_authenticated")


async def test_a_stream_that_a_ticket_opened_ends_when_its_token_does() -> None:
    settings = {"auth": "jwt", "jwt_secret": SECRET, "jwt_leeway": 0}
    token = jwt.encode({"sub": "alice", "exp": time.time() + 3600}, SECRET, "HS256")
    async with serving(settings=settings) as node:
        headers = {"authorization": f"Bearer {token}"}
        await node.http.post("/api/conversations", json={"conversation_id": "c1"}, headers=headers)
        one = await ticket(node, headers)
        async with stream(node, ticket=one) as opened:
            await opened.events(2)
            (session,) = node.gateway.context.sessions.all()
            assert session.identity.user_id == "alice"
            assert session.identity.expires_at is not None
            session.identity = Identity("alice", expires_at=time.time() - 1)
            await node.gateway.context.sessions.recheck()
            assert await opened.ends()


async def test_the_applications_function_sees_the_token_and_is_asked_again() -> None:
    asked: list[tuple[str | None, str | None]] = []
    welcome = True

    async def who(token: str | None, headers: Mapping[str, str]) -> Identity | None:
        asked.append((token, headers.get("authorization")))
        return Identity("alice") if welcome and token == "secret" else None

    async with serving(settings={"auth": "hook"}, authenticate=who) as node:
        headers = {"authorization": "Bearer secret"}
        await node.http.post("/api/conversations", json={"conversation_id": "c1"}, headers=headers)
        one = await ticket(node, headers)
        async with stream(node, ticket=one) as opened:
            await opened.events(2)
            welcome = False
            await node.gateway.context.sessions.recheck()
            assert await opened.ends()
        assert set(asked) == {("secret", "Bearer secret")}


async def test_without_authentication_tickets_work_as_well(node: Node) -> None:
    assert (await node.http.get(f"/api/conversations/none/stream?ticket={await ticket(node, {})}")).status_code == 404


class Kept:
    """Operations that keep tickets, and show what is kept."""

    def __init__(self) -> None:
        self.entries: dict[str, bytes] = {}

    async def keep_ticket(self, name: str, sealed: bytes, ttl: int) -> None:
        assert ttl == TICKET_LIFE * 1000
        self.entries[name] = sealed

    async def take_ticket(self, name: str) -> bytes | None:
        return self.entries.pop(name, None)


async def test_what_the_store_keeps_shows_neither_ticket_nor_token() -> None:
    kept: Any = Kept()
    one = await issue(kept, "a-secret-token")
    ((name, sealed),) = kept.entries.items()
    assert b"a-secret-token" not in sealed
    assert one.encode() not in sealed
    assert one not in name
    assert await redeem(kept, one) == "a-secret-token"
    # Whoever can write to the store cannot make it say something else.
    kept.entries[name] = sealed[:-1] + bytes([sealed[-1] ^ 1])
    with pytest.raises(NotAuthenticated):
        await redeem(kept, one)


async def test_a_local_ticket_ends_by_itself_and_there_is_a_bound() -> None:
    now = 0
    tickets = LocalTickets(lambda: now)
    await tickets.keep("a", b"1", 1000)
    now = 999_999_999
    assert await tickets.take("a") == b"1"
    assert await tickets.take("a") is None
    await tickets.keep("b", b"2", 1000)
    now += 1_000_000_000
    assert await tickets.take("b") is None
    for number in range(MAX_TICKETS):
        await tickets.keep(str(number), b"", 1000)
    with pytest.raises(StoreFull):
        await tickets.keep("one too many", b"", 1000)
    now += 1_000_000_000
    await tickets.keep("room again", b"3", 1000)
    assert await tickets.take("room again") == b"3"
