"""Who may reach what: users their own conversations, services and admins all, or as the application says.

A conversation of somebody else looks exactly like one that does not exist.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, Literal

import structlog

from convener.errors import AuthUnavailable, ConvenerError, InvalidRequest, NotAuthorized, NotFound
from convener.gateway.auth import Authenticator, Identity
from convener.ids import check_id
from convener.manager.base import AgentLoopInfo, ConversationManager

log = structlog.get_logger(__name__)

Action = Literal["create", "read", "send", "answer", "call", "update", "interrupt", "stop", "resume", "delete"]

AuthorizeHook = Callable[[Identity, str, str, Action], Awaitable[bool | None]]
"""(caller, conversation id, its user's id, what is to be done) → yes, no, or None for the usual rule."""

HOOK_TIMEOUT: Final = 10.0


def not_found(conversation_id: str) -> NotFound:
    """The one answer for what does not exist and for what is none of the caller's business."""
    return NotFound(f"conversation {conversation_id} does not exist")


def bearer_token(headers: Mapping[str, str]) -> str | None:
    """The token of an ``Authorization: Bearer`` header; `headers` has lower-case names."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


class Access:
    """Authentication and authorisation in one place, for HTTP and sockets alike."""

    def __init__(
        self,
        manager: ConversationManager,
        authenticator: Authenticator,
        authorize: AuthorizeHook | None = None,
    ) -> None:
        self._manager = manager
        self._authorize = authorize
        self.authenticator = authenticator

    async def identify(self, token: str | None, headers: Mapping[str, str]) -> Identity:
        """The caller; raises as `Authenticator.identify`."""
        return await self.authenticator.identify(token, headers)

    def admin(self, identity: Identity) -> None:
        """Let admins pass.

        Raises:
            NotAuthorized: anybody else.
        """
        if not identity.admin:
            raise NotAuthorized("this needs the admin token")

    def user(self, identity: Identity, requested: str | None) -> str | None:
        """For whom the caller acts; None for a service that named nobody.

        Raises:
            InvalidRequest: `requested` is no id.
            NotAuthorized: `requested` is somebody else, and the caller may not act for others.
        """
        if requested is None:
            return identity.user_id
        check_id(requested, "user_id")
        if requested != identity.user_id and not identity.privileged:
            raise NotAuthorized("user_id may name others only with a service or admin token")
        return requested

    def listed_user(self, identity: Identity, requested: str | None) -> str:
        """Whose conversations are to be listed. Raises as `user`; a service must name somebody."""
        user = self.user(identity, requested)
        if user is None:
            raise InvalidRequest("user_id is needed: this token belongs to no user")
        return user

    def follower(self, identity: Identity, requested: str | None) -> str:
        """Whose conversations are to be followed live. Raises as `user`; nobody's cannot be followed."""
        user = self.user(identity, requested)
        if not user:
            raise InvalidRequest("user_id is needed, or a conversation_id: there is no user", code="user_required")
        return user

    async def reach(self, identity: Identity, conversation_id: str, action: Action) -> AgentLoopInfo:
        """The conversation, if the caller may do this to it.

        Raises:
            InvalidRequest: no well-formed id.
            NotFound: it does not exist, or is another user's.
            NotAuthorized: the application forbids it for the caller's own conversation.
        """
        check_id(conversation_id, "conversation_id")
        try:
            info = await self._manager.describe(conversation_id)
        except NotFound:
            raise not_found(conversation_id) from None
        await self._check(identity, conversation_id, info.user_id, action)
        return info

    async def require(self, identity: Identity, conversation_id: str, action: Action) -> None:
        """As `reach`, without reading the conversation where that decides nothing."""
        if self._authorize is None and identity.privileged:
            check_id(conversation_id, "conversation_id")
        else:
            await self.reach(identity, conversation_id, action)

    async def starter(self, identity: Identity, conversation_id: str, requested: str | None) -> str | None:
        """The user under whose name a conversation, known or not, is started or joined.

        The manager refuses it if the conversation turns out to be another user's.

        Raises:
            NotFound, NotAuthorized, InvalidRequest: as `user` and `reach`.
        """
        user = self.user(identity, requested)
        if user and self._authorize is None:
            return user
        try:
            info = await self._manager.describe(conversation_id)
        except NotFound:
            await self._check(identity, conversation_id, user or "", "create", own=True)
            return user or None
        await self._check(identity, conversation_id, info.user_id, "read")
        if requested is not None and identity.privileged and requested != info.user_id:
            raise not_found(conversation_id)
        return info.user_id or None

    async def allowed(self, identity: Identity, conversation_id: str, action: Action) -> None:
        """As `reach`, for the conversation that the caller's connection is in already."""
        if self._authorize is not None:
            await self.reach(identity, conversation_id, action)

    async def still(self, identity: Identity, conversation_id: str) -> None:
        """Whether an open connection may go on reading; "" is a list, which is its user's own. Raises as `reach`."""
        if self._authorize is not None and conversation_id:
            await self.reach(identity, conversation_id, "read")

    async def _check(
        self, identity: Identity, conversation_id: str, owner: str, action: Action, *, own: bool = False
    ) -> None:
        own = own or owner == identity.user_id
        usual = own or identity.privileged
        verdict = await self._ask(identity, conversation_id, owner, action)
        if usual if verdict is None else verdict:
            return
        if own or identity.privileged:
            raise NotAuthorized(f"the application does not allow to {action} conversation {conversation_id}")
        raise not_found(conversation_id)

    async def _ask(self, identity: Identity, cid: str, owner: str, action: Action) -> bool | None:
        if self._authorize is None:
            return None
        try:
            async with asyncio.timeout(HOOK_TIMEOUT):
                return await self._authorize(identity, cid, owner, action)
        except ConvenerError:
            raise
        except Exception as error:
            log.exception("the authorize hook failed")
            raise AuthUnavailable("the application's authorisation failed", retry_after=1.0) from error
