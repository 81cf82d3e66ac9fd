"""The log over HTTP: pages, and a stream of Server-Sent Events."""

from __future__ import annotations

from typing import Annotated, Any, Final

from fastapi import APIRouter, Header, Query
from starlette.responses import Response

from convener.core.cursor import Cursor, at, parse
from convener.core.model import Page
from convener.core.view import START, Place
from convener.errors import InvalidRequest, NotAuthorized, NotFound, OwnerUnavailable, StoreUnavailable
from convener.gateway import schemas
from convener.gateway.answers import Json
from convener.gateway.context import Caller, Context
from convener.gateway.conversations import ConversationId
from convener.gateway.problems import documented
from convener.gateway.sse import open_stream
from convener.gateway.strictroute import StrictRoute
from convener.gateway.tickets import TicketCaller
from convener.manager.views import decode

router = APIRouter(
    prefix="/api/conversations/{conversation_id}",
    route_class=StrictRoute,
    tags=["log"],
    responses=documented(NotFound, NotAuthorized, StoreUnavailable),
)

_STREAM: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "`event:` is one of `event`, `joined`, `delta`, `status`, `resync`, `stopped`; `id:` is the "
        "cursor of a log entry.",
        "content": {"text/event-stream": {}},
    }
}


def parse_cursor(value: object, name: str) -> Cursor | None:
    """The cursor or sequence number that a client sent; None for none.

    Raises:
        InvalidRequest: it is neither; names the field `name`.
    """
    if value is None or value == "":
        return None
    cursor = parse(value)
    if cursor is None:
        raise InvalidRequest(f"{name}: neither a cursor nor a sequence number", code="invalid_cursor")
    return cursor


@router.get("/events", response_model=schemas.EventList)
async def events(
    context: Context,
    caller: Caller,
    conversation_id: ConversationId,
    after: Annotated[str | None, Query(description="Cursor or sequence number; default: the beginning.")] = None,
    before: Annotated[int | None, Query(ge=1, lt=10**15, description="Sequence number to stay below.")] = None,
    limit: Annotated[schemas.PageLimit, Query()] = 100,
) -> Response:
    """A page of the log: what follows `after`, or, with `before` alone, what comes right before that."""
    start = parse_cursor(after, "after")
    backwards = before is not None and start is None
    if before is not None and start is None:
        # Sequence numbers are dense, so the page before a number begins at a known one.
        info = await context.access.reach(caller, conversation_id, "read")
        start = Cursor(place=Place(0, max(min(before - 1, info.last_seq) - limit, 0)))
    else:
        await context.access.require(caller, conversation_id, "read")
        start = start or Cursor()
    page = await context.manager.read_log(conversation_id, start, limit)
    shown = _items(page, before)
    following: str | int | None
    if backwards:
        following = shown[0]["seq"] if shown and shown[0]["seq"] > 1 else None
    else:
        following = shown[-1]["cursor"] if shown else _unmoved(start, page)
    # Who pages backwards has no place that could be wrong: the log just begins later.
    return Json({"events": shown, "next": following, "resync": page.resync and not backwards})


def _items(page: Page, before: int | None) -> list[dict[str, Any]]:
    entries = [entry for entry in page.entries if before is None or entry.seq < before]
    return [decode(entry, START, page.generation).payload for entry in entries]


def _unmoved(start: Cursor, page: Page) -> str:
    """Where to read on after an empty page: where it began, exact if that is the end of the log."""
    if page.resync:
        return at(page.generation, 0, 0)
    if start.is_exact:
        return start.encode()
    return at(page.generation, *page.tip) if start.place.seq >= page.tip[1] else str(start.place.seq)


@router.get("/stream", responses=_STREAM | documented(NotFound, OwnerUnavailable))
async def stream(
    context: Context,
    caller: TicketCaller,
    conversation_id: ConversationId,
    after: Annotated[str | None, Query(description="Cursor or sequence number; default: everything.")] = None,
    tail: Annotated[int | None, Query(ge=0, lt=10**15, description="Only the last N entries.")] = None,
    last_event_id: Annotated[
        str | None, Header(description="Where a broken stream goes on; goes before `after`.")
    ] = None,
) -> Response:
    """Follow the log: a replay from `after`, then `joined`, then everything as it happens."""
    info = await context.access.reach(caller.identity, conversation_id, "read")
    place = parse_cursor(last_event_id, "Last-Event-ID") or parse_cursor(after, "after")
    return await open_stream(
        context,
        caller.identity,
        caller.token,
        caller.headers,
        conversation_id,
        user_id=info.user_id or None,
        after=place,
        tail=tail if place is None else None,
    )
