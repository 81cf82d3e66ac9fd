"""Tickets: a credential for one request, in its address, of clients that cannot send headers (`EventSource`).

An address is logged and remembered by whatever it passes through, so what stands in it must be worth nothing soon. A
ticket is 32 random bytes. One half of what is derived from it (SHA-256) names an entry of the store, which is taken out
when it is used; the other half is the key under which the caller's token is kept in that entry (AES-256-GCM), so who
reads the store learns no token. The request then counts as one that carried that token, now and at every later check.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from typing import Annotated, Final, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from convener.errors import NotAuthenticated, NotAuthorized, StoreFull, StoreUnavailable
from convener.gateway import schemas
from convener.gateway.access import bearer_token
from convener.gateway.answers import Json
from convener.gateway.auth import Identity
from convener.gateway.context import Caller, Context, bearer, get_caller
from convener.gateway.operations import Operations
from convener.gateway.problems import documented
from convener.gateway.strictroute import StrictRoute

TICKET_LIFE: Final = 30
"""Seconds until a ticket that nobody has used is good for nothing."""

_BYTES: Final = 32
_NONCE: Final = bytes(12)  # each key seals one text

router = APIRouter(prefix="/api", route_class=StrictRoute, tags=["access"])


def _derived(ticket: str) -> tuple[str, AESGCM]:
    digest = hashlib.sha256(ticket.encode("utf-8", "surrogatepass")).digest()
    name = hashlib.sha256(b"name" + digest).hexdigest()
    return name, AESGCM(hashlib.sha256(b"key" + digest).digest())


async def issue(operations: Operations, token: str | None) -> str:
    """A new ticket, which stands for a token (None: for none). Raises `StoreFull`, `StoreUnavailable`."""
    ticket = secrets.token_urlsafe(_BYTES)
    name, key = _derived(ticket)
    await operations.keep_ticket(name, key.encrypt(_NONCE, json.dumps(token).encode(), None), TICKET_LIFE * 1000)
    return ticket


async def redeem(operations: Operations, ticket: str) -> str | None:
    """The token that a ticket stands for. The ticket is used up.

    Raises:
        NotAuthenticated: it was used, is too old, or never was.
        StoreUnavailable: nobody can say, and the ticket may be used up.
    """
    name, key = _derived(ticket)
    sealed = await operations.take_ticket(name)
    try:
        if sealed is not None:
            return json.loads(key.decrypt(_NONCE, sealed, None))
    except InvalidTag:
        pass
    raise NotAuthenticated(f"the ticket was used, is older than {TICKET_LIFE} s, or never was")


class Admitted(NamedTuple):
    """A caller, and with what to ask again who that is."""

    identity: Identity
    token: str | None
    headers: Mapping[str, str]


async def get_admitted(
    request: Request,
    context: Context,
    _: Annotated[object, Depends(bearer)],
    ticket: Annotated[
        str | None, Query(description="Instead of the header: from `POST /api/tickets`, for one request.")
    ] = None,
) -> Admitted:
    """Who sent the request, by its header or by a ticket. Raises as `Authenticator.identify`."""
    headers = dict(request.headers)
    if ticket is None or "authorization" in headers or not context.running:
        return Admitted(await get_caller(request, context, None), bearer_token(headers), headers)
    token = await redeem(context.operations, ticket)
    if token is not None:
        headers["authorization"] = f"Bearer {token}"
    return Admitted(await context.access.identify(token, headers), token, headers)


TicketCaller = Annotated[Admitted, Depends(get_admitted)]


@router.post(
    "/tickets",
    response_model=schemas.Ticket,
    status_code=201,
    responses=documented(NotAuthorized, StoreUnavailable, StoreFull),
)
async def make_ticket(request: Request, context: Context, _: Caller) -> Response:
    """A ticket for one request to `GET /api/conversations/{id}/stream?ticket=…` within 30 seconds, as this caller."""
    ticket = await issue(context.operations, bearer_token(dict(request.headers)))
    return Json({"ticket": ticket, "expires_in": TICKET_LIFE}, status_code=201)
