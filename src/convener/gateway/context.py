"""What the doors share, and how a route gets hold of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, cast
from urllib.parse import urlsplit

from fastapi import Depends, Request
from fastapi.security import HTTPBearer

from convener.errors import NotAuthorized, OwnerUnavailable
from convener.gateway.access import Access, bearer_token
from convener.gateway.auth import Identity
from convener.gateway.operations import Operations
from convener.gateway.sessions import Sessions
from convener.manager.base import ConversationManager
from convener.settings import Settings
from convener.telemetry.metrics import Metrics

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


@dataclass(slots=True)
class GatewayContext:
    """One per gateway. `running` is between start-up and shutdown; `leaving` since the node is to end (it is unready
    then), `closing` since it takes no new connections.
    """

    manager: ConversationManager
    operations: Operations
    settings: Settings
    metrics: Metrics
    access: Access
    sessions: Sessions
    running: bool = field(default=False)
    leaving: bool = field(default=False)
    closing: bool = field(default=False)

    @property
    def body_limit(self) -> int:
        """Bytes of an HTTP body or a socket frame that are read at all.

        Above `max_payload_bytes`, so that the refusal of a payload is an answer and not a cut connection, and
        since JSON may write a character of two bytes as an escape of six. The payload itself is measured
        exactly, later.
        """
        return 3 * self.settings.max_payload_bytes + 65_536


def get_context(request: Request) -> GatewayContext:
    """The context of the gateway that serves the request."""
    return cast("GatewayContext", request.app.state.context)


Context = Annotated[GatewayContext, Depends(get_context)]

# For OpenAPI alone: the header is read below, where a missing one may be fine.
bearer = HTTPBearer(auto_error=False, description="Not needed with auth=none.")


def origin_allowed(settings: Settings, origin: str | None, scheme: str, host: str) -> bool:
    """Whether a page of this origin may act here; what is no browser sends none."""
    if not origin or "*" in settings.cors_origins or origin in settings.cors_origins:
        return True
    parts = urlsplit(origin)
    # The scheme may be a proxy's affair; the host is what tells pages apart.
    return parts.netloc.lower() == host.lower() and parts.scheme in (scheme, "https")


async def get_caller(request: Request, context: Context, _: Annotated[object, Depends(bearer)]) -> Identity:
    """Who sent the request. Raises as `Authenticator.identify`."""
    if not context.running:
        raise OwnerUnavailable("this node is not running (any more)", retry_after=1.0)
    headers = dict(request.headers)
    if context.settings.auth == "none" and request.method not in _SAFE_METHODS:
        # Nothing else keeps a page that the user happens to visit from acting on their own machine.
        origin = headers.get("origin")
        if not origin_allowed(context.settings, origin, request.url.scheme, headers.get("host", "")):
            raise NotAuthorized(f"pages of {origin} may not act here; see cors_origins")
    return await context.access.identify(bearer_token(headers), headers)


async def get_admin(caller: Annotated[Identity, Depends(get_caller)], context: Context) -> Identity:
    """The caller, if it is an admin. Raises `NotAuthorized`."""
    context.access.admin(caller)
    return caller


Caller = Annotated[Identity, Depends(get_caller)]
Admin = Annotated[Identity, Depends(get_admin)]
