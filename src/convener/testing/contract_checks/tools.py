"""What the checks share: short ways to say what happens to a conversation."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeVar

from convener.core.model import AppendReply, AppendRequest, ClaimReply, ClaimRequest, Meta, NewMessage, SendReply
from convener.core.wire import event, input_event
from convener.store.base import Store

T = TypeVar("T")

REPLY = event("reply", "t1", 5, '{"text":"hi"}')
GENERATION = "gen_A-1"


async def made(store: Store, cid: str = "c", user: str = "u") -> Meta:
    """Index and create a conversation."""
    await store.index(user, cid)
    return (await store.create(cid, user, "{}", GENERATION)).meta


async def head(store: Store, cid: str = "c") -> Meta:
    """The head of a conversation that must exist."""
    found = await store.head(cid)
    assert found is not None
    return found


async def send(
    store: Store,
    message_id: str,
    cid: str = "c",
    data: str = '"hi"',
    max_pending: int = 100,
    reject_busy: bool = False,
) -> SendReply:
    """Send a message of user `u`."""
    message = NewMessage(message_id, "u", data)
    return await store.send(cid, message, max_pending=max_pending, reject_busy=reject_busy)


async def claim(store: Store, me: str, nonce: str = "n", cid: str = "c", **changes: Any) -> ClaimReply:
    """Claim from whoever the head names now; `changes` are fields of the request."""
    now = await store.head(cid)
    owner, epoch = (now.owner, now.epoch) if now is not None else ("", 0)
    return await store.claim(cid, replace(ClaimRequest(me, nonce, owner, epoch, "start"), **changes))


async def owned(store: Store, me: str = "a~1", cid: str = "c") -> Meta:
    """Make a conversation and claim it."""
    await made(store, cid)
    reply = await claim(store, me, cid=cid)
    assert reply.outcome == "OK"
    assert reply.meta is not None
    return reply.meta


async def append(store: Store, *events: str, cid: str = "c", **changes: Any) -> AppendReply:
    """Append as the owner with nothing else changed but `changes`, fields of the request."""
    m = await head(store, cid)
    request = AppendRequest(m.owner, m.epoch, m.seq, "b", m.cursor, m.done, m.base, events)
    return await store.append(cid, replace(request, **changes))


async def take_in(store: Store, cid: str = "c") -> AppendReply:
    """Append every unread message as an input."""
    read = await store.inbox(cid)
    assert read is not None
    taken = [e for e in read[1] if e.kind == "message"]
    cursor = max([read[0].cursor, *(e.position for e in taken)])
    return await append(store, *(input_event(e) for e in taken), cid=cid, cursor=cursor)


async def answer(store: Store, position: int, cid: str = "c") -> AppendReply:
    """End a turn."""
    return await append(store, event("turn_done", f"t{position}", 1, "{}"), cid=cid, done=position)


async def until(look: Callable[[], Awaitable[T]], good: Callable[[T], bool], what: str, limit: float = 20) -> T:
    """Look again and again, for at most `limit` seconds, until what is seen is good; return it.

    Raises:
        AssertionError: it never was; tells the last value.
    """
    last: object = None
    try:
        async with asyncio.timeout(limit):
            while not good(value := await look()):
                last = value
                await asyncio.sleep(0.01)
            return value
    except TimeoutError:
        raise AssertionError(f"waited {limit:g} s in vain until {what}; last seen: {last!r}") from None
