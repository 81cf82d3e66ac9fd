"""Every error that convener raises on purpose, in one tree.

::

    ConvenerError
    ├── ConfigurationError          settings that cannot work; the operator's to mend
    ├── InvalidRequest              malformed input; the caller's to mend
    │   └── PayloadTooLarge
    ├── NotAuthenticated            no identity, or one that does not hold
    ├── AuthUnavailable             who could say who the caller is does not answer
    ├── NotAuthorized               an identity without the right
    ├── NotFound                    no such conversation, method or connection
    ├── LimitExceeded               the user's slots are taken
    ├── InboxFull                   too many unanswered messages
    ├── TooManyRequests             too much under way on one connection
    ├── ConversationBusy            overlap policy `reject`
    ├── ConversationStopped         stopped on purpose; only `resume` opens it again
    │   ├── ConversationFailed      given up after too many takeovers of one turn; so does that
    │   └── ConversationHeld        a turn was cut off and waits for `resume` (recovery mode `wait`)
    ├── AskClosed                   the question is answered, has expired, or was never asked
    ├── AskExpired                  nobody has answered the agent's question in time
    ├── OwnershipLost               this node is not (or no longer) the owner
    │   └── StaleEpoch              a write under an epoch that has ended
    ├── OwnerUnavailable            nobody could be made to answer in time
    │   └── CallTimeout
    ├── RemoteError                 the called method raised
    └── StoreUnavailable            the store is away, slow or refuses
        ├── NotConfirmed            it was done, and no replica has it yet
        ├── StoreFull
        └── ArchiveUnavailable      so is the archive, and what was asked for is there

``code`` is what goes over the wire and never changes; ``http_status`` is the matching status of an HTTP answer;
``retryable`` says whether the same request may succeed later without anybody changing it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

__all__ = [
    "ArchiveUnavailable",
    "AskClosed",
    "AskExpired",
    "AuthUnavailable",
    "CallTimeout",
    "ConfigurationError",
    "ConvenerError",
    "ConversationBusy",
    "ConversationFailed",
    "ConversationHeld",
    "ConversationStopped",
    "InboxFull",
    "InvalidRequest",
    "LimitExceeded",
    "NotAuthenticated",
    "NotAuthorized",
    "NotConfirmed",
    "NotFound",
    "OwnerUnavailable",
    "OwnershipLost",
    "PayloadTooLarge",
    "RemoteError",
    "StaleEpoch",
    "StoreFull",
    "StoreUnavailable",
    "TooManyRequests",
]


class ConvenerError(Exception):
    """Base of all of convener's errors.

    Args:
        detail: one sentence for the person who reads the answer; safe to show to clients.
        code: overrides the class's code where several conditions share a class.
        retry_after: seconds after which a retry is sensible, if that is known.
        extra: members that join the problem document (``limit``, ``running`` and the like).
    """

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    pause: ClassVar[float | None] = None
    """`retry_after`, where whoever raises it does not say."""

    def __init__(
        self,
        detail: str = "",
        *,
        code: str | None = None,
        retry_after: float | None = None,
        extra: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail or self.__class__.__name__
        self.wire_code = code or self.code
        self.retry_after = self.pause if retry_after is None else retry_after
        self.extra: dict[str, object] = dict(extra or {})

    def __str__(self) -> str:
        return self.detail


class ConfigurationError(ConvenerError):
    """Settings are unknown, contradictory or unsafe; names the field."""

    code = "configuration_error"


class InvalidRequest(ConvenerError):
    """The request does not have the documented form."""

    code = "invalid_request"
    http_status = 400


class PayloadTooLarge(InvalidRequest):
    """The payload is above ``max_payload_bytes``."""

    code = "payload_too_large"
    http_status = 413


class NotAuthenticated(ConvenerError):
    """No credentials, or credentials that do not hold."""

    code = "not_authenticated"
    http_status = 401


class AuthUnavailable(ConvenerError):
    """The issuer of keys, or the application's own authentication, does not answer."""

    code = "auth_unavailable"
    http_status = 503
    retryable = True


class NotAuthorized(ConvenerError):
    """The caller is known and may not do this."""

    code = "not_authorized"
    http_status = 403


class NotFound(ConvenerError):
    """The conversation, method or connection does not exist."""

    code = "not_found"
    http_status = 404


class LimitExceeded(ConvenerError):
    """The user already runs as many conversations as allowed.

    Args:
        limit: conversations that the user may run at once.
        current: conversations that hold a slot now.
        running: their ids.
    """

    code = "limit_exceeded"
    http_status = 429
    retryable = True

    def __init__(
        self,
        detail: str = "",
        *,
        limit: int = 0,
        running: Sequence[str] = (),
        retry_after: float | None = None,
    ) -> None:
        self.limit = limit
        self.running = tuple(running)
        self.current = len(self.running)
        extra = {"limit": limit, "current": self.current, "running": list(self.running)}
        super().__init__(
            detail or f"{self.current} of {limit} conversations are running", retry_after=retry_after, extra=extra
        )


class InboxFull(ConvenerError):
    """``max_pending_messages`` accepted messages are still unanswered."""

    code = "inbox_full"
    http_status = 429
    retryable = True


class TooManyRequests(ConvenerError):
    """More events of one connection are under way than it may have."""

    code = "too_many_requests"
    http_status = 429
    retryable = True


class ConversationBusy(ConvenerError):
    """A message is being answered and the overlap policy is ``reject``."""

    code = "conversation_busy"
    http_status = 409
    retryable = True


class ConversationStopped(ConvenerError):
    """The conversation was stopped on purpose."""

    code = "conversation_stopped"
    http_status = 409


class ConversationFailed(ConversationStopped):
    """Too many nodes went down while one turn of the conversation ran; nothing is repeated unasked."""

    code = "conversation_failed"


class ConversationHeld(ConversationStopped):
    """A turn was cut off by a crash and waits for somebody to say ``resume``."""

    code = "conversation_held"


class AskClosed(ConvenerError):
    """The question does not wait for an answer (any more)."""

    code = "ask_closed"
    http_status = 409


class AskExpired(ConvenerError):
    """The agent's question was not answered within its time; raised by ``turn.ask``."""

    code = "ask_expired"


class OwnershipLost(ConvenerError):
    """This node does not own the conversation any more."""

    code = "ownership_lost"
    http_status = 503
    retryable = True


class StaleEpoch(OwnershipLost):
    """A newer epoch has begun; the write was refused."""

    code = "stale_epoch"


class OwnerUnavailable(ConvenerError):
    """No live owner could be found or made in time; nothing was lost."""

    code = "owner_unavailable"
    http_status = 503
    retryable = True


class CallTimeout(OwnerUnavailable):
    """The owner did not answer before the deadline."""

    code = "call_timeout"
    http_status = 504


class RemoteError(ConvenerError):
    """The method that was called raised; carries its type and message."""

    code = "remote_error"
    http_status = 502


class StoreUnavailable(ConvenerError):
    """The store cannot be reached or did not answer in time.

    The outcome of the command may be unknown: repeat it under the same identity, or settle it.
    """

    code = "store_unavailable"
    http_status = 503
    retryable = True
    pause = 1.0


class NotConfirmed(StoreUnavailable):
    """It was done, but no replica has confirmed it in time (`durability` ``replicated``): it may yet be lost.

    Repeat it under the same identity: what was done is then told, after another look for a replica.
    """

    code = "not_confirmed"


class StoreFull(StoreUnavailable):
    """The store refuses writes for want of memory."""

    code = "store_full"
    http_status = 507
    pause = 10.0


class ArchiveUnavailable(StoreUnavailable):
    """The archive cannot be reached, lacks what the store says is there, or this node has none."""

    code = "archive_unavailable"
