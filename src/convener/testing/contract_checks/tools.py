"""What the checks share: short ways to say what happens to a conversation."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeVar

from convener.core.model import (
    MESSAGES,
    REMEMBERED,
    AppendReply,
    AppendRequest,
    ClaimReply,
    ClaimRequest,
    InboxEntry,
    Meta,
    NewMessage,
    SendReply,
)
from convener.core.wire import answer_event, event, input_event, turn_id
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


async def unread(store: Store, cid: str = "c") -> list[InboxEntry]:
    """What nobody has taken in."""
    read = await store.inbox(cid)
    assert read is not None
    return list(read[1])


async def take_in(store: Store, cid: str = "c") -> AppendReply:
    """Append every unread message as an input, and every unread answer."""
    taken = [e for e in await unread(store, cid) if e.kind in REMEMBERED]
    cursor = max([(await head(store, cid)).cursor, *(e.position for e in taken)])
    events = [input_event(e) if e.kind in MESSAGES else answer_event(e) for e in taken]
    return await append(store, *events, cid=cid, cursor=cursor)


async def answer(store: Store, position: int, cid: str = "c") -> AppendReply:
    """End a turn."""
    ended = event("turn_done", turn_id(position), 1, "{}")
    return await append(store, ended, cid=cid, done=position, ends_turn=True)


async def ask(store: Store, *ask_ids: str, cid: str = "c") -> AppendReply:
    """Ask questions in the open turn."""
    asks = tuple((ask_id, f'{{"prompt":"é {ask_id}"}}') for ask_id in ask_ids)
    events = [event("ask", ask_id.partition(".")[0], 1, f'{{"ask_id":"{ask_id}"}}') for ask_id in ask_ids]
    return await append(store, *events, cid=cid, asks=asks)


async def reply(store: Store, ask_id: str, message_id: str, cid: str = "c", data: str = '"yes"') -> SendReply:
    """Answer a question, as user `u`."""
    body = f'{{"ask_id":"{ask_id}","data":{data}}}'
    return await store.answer(cid, ask_id, NewMessage(message_id, "u", body, "answer"))


async def waiting(store: Store, *ask_ids: str, cid: str = "c") -> Meta:
    """A conversation of `a~1` whose turn `t1` has asked these questions."""
    await owned(store, cid=cid)
    await send(store, "m1", cid)
    await take_in(store, cid)
    assert (await ask(store, *ask_ids, cid=cid)).outcome == "OK"
    return await head(store, cid)


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
