"""Requests and answers of the API, for checking and for OpenAPI."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from convener.manager.base import AgentLoopInfo, Overlap, Question, SendResult
from convener.manager.ops import DrainStatus, NodeInfo

MAX_PAGE: Final = 1000
MAX_CALL_SECONDS: Final = 300.0

Id = Annotated[str, Field(description="1 to 128 characters of A-Z a-z 0-9 . _ ~ : @ -", examples=["c-42"])]
PageLimit = Annotated[int, Field(ge=1, le=MAX_PAGE)]


class Body(BaseModel):
    """A request body: unknown fields and values of another type are refused, nothing is converted."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Nothing(Body):
    """An empty object; no body at all is fine too."""


class MessageBody(Body):
    """A message for a conversation."""

    message_id: Id | None = Field(
        default=None, description="Chosen by the client: the same id again is not accepted twice."
    )
    data: Any = Field(description="Any JSON value; if it is an object with a string `text`, that is the text.")
    overlap: Overlap | None = Field(
        default=None,
        description="What to do if a message is being answered: wait, refuse this one, or end everything before it. "
        "Default: the node's `overlap_policy`.",
    )


class AnswerBody(Body):
    """An answer to a question of the agent."""

    ask_id: Id
    message_id: Id | None = Field(
        default=None, description="Chosen by the client: the same id again gives the same answer."
    )
    data: Any = Field(description="Any JSON value that fits the question's schema.")


class CreateBody(Body):
    """A conversation to create, or to find."""

    conversation_id: Id | None = Field(default=None, description="Default: a fresh one.")
    user_id: Id | None = Field(
        default=None, description="Whose it is; others than the caller only with a service or admin token."
    )
    metadata: dict[str, Any] | None = Field(default=None, description="Kept with it; ignored if it exists already.")
    message: MessageBody | None = Field(default=None, description="Sent at once, whether it was created or found.")


class PatchBody(Body):
    """What can be changed of a conversation."""

    metadata: dict[str, Any] = Field(description="Replaces the metadata.")


class CallBody(Body):
    """Arguments of a method of the owner."""

    params: Any = Field(default=None, description="Any JSON value, given to the method.")
    timeout: float = Field(
        default=30.0, gt=0, le=MAX_CALL_SECONDS, allow_inf_nan=False, description="Seconds to wait for the answer."
    )


class SocketCall(CallBody):
    """`rpc` over a socket."""

    method: str = Field(min_length=1, max_length=128)


# --- answers; built as plain dicts below, described here ---------------------------------------------------


class Accepted(BaseModel):
    """An accepted message."""

    status: Literal["accepted"]
    message_id: str
    position: int = Field(description="Its number in the conversation's inbox, from 1.")
    duplicate: bool = Field(description="It had been accepted before.")


class Created(BaseModel):
    """A conversation that was created (201) or found (200)."""

    conversation_id: str
    user_id: str
    status: str
    node: str = Field(description="Who runs it; empty for nobody.")
    epoch: int
    message: Accepted | None = Field(default=None, description="Present if a message was sent along.")


class Conversation(BaseModel):
    """A conversation."""

    conversation_id: str
    user_id: str
    status: Literal[
        "starting", "running", "idle", "waiting", "hibernated", "recovering", "draining", "stopped", "failed"
    ]
    busy: bool = Field(description="A message is being answered or waits.")
    node: str = Field(description="Who runs it; empty for nobody.")
    epoch: int = Field(description="Number of its latest ownership, 0 before the first.")
    last_seq: int = Field(description="Number of its last log entry.")
    connections: int = Field(description="Clients on all nodes.")
    metadata: dict[str, Any]
    created_at: datetime | None = Field(description="Null in a listing of the cluster, which does not know it.")
    updated_at: datetime | None


class OpenQuestion(BaseModel):
    """A question of the agent that waits for an answer."""

    ask_id: str
    prompt: Any = Field(description="What the agent asks: any JSON value.")
    answer_schema: Any = Field(alias="schema", description="JSON Schema that the answer has to fit, or null.")
    deadline: datetime | None = Field(description="When it expires; null for never.")


class QuestionList(BaseModel):
    """The open questions of a conversation."""

    questions: list[OpenQuestion]


class ConversationList(BaseModel):
    """A page of conversations."""

    conversations: list[Conversation]
    next: str | None = Field(description="`cursor` of the next page, null on the last one.")


class Event(BaseModel):
    """A log entry."""

    seq: int
    cursor: str
    epoch: int
    kind: str
    turn: str
    data: Any
    ts: int = Field(description="Milliseconds since 1970.")


class EventList(BaseModel):
    """A page of the log."""

    events: list[Event]
    next: str | int | None = Field(
        description="What to send as `after` to read on (always there), or, if `before` was sent alone, as "
        "`before` to read further back (null at the beginning)."
    )
    resync: bool = Field(description="`after` could not be continued: this page is the log's beginning.")


class Interrupt(Body):
    """Which turn is to end; default the one that runs."""

    turn: str | None = None


class Outcome(BaseModel):
    """What became of an action."""

    outcome: str


class DrainBody(Body):
    """How a node is to leave."""

    timeout: float | None = Field(
        default=None,
        ge=0,
        le=86_400,
        allow_inf_nan=False,
        description="Seconds that turns under way may take. Default: the node's `drain_timeout`.",
    )


class MoveBody(Body):
    """Where a conversation is to run."""

    node: str = Field(min_length=1, max_length=200, description="Name of the node.")
    cut: bool = Field(
        default=False, description="Cut a turn off that is under way; it is begun again there. Default: `busy`."
    )


class KickBody(Body):
    """Whose connections are to be looked at; both narrow it down."""

    user_id: Id | None = Field(default=None, description="Those that this user has opened.")
    conversation_id: Id | None = Field(default=None, description="Those that are in this conversation.")


class Drain(BaseModel):
    """How far the end of a node's work is."""

    node: str
    state: Literal["idle", "draining", "drained"]
    remaining: int
    deadline: str | None


class Kicked(BaseModel):
    """What became of the connections."""

    checked: int
    closed: int


class Ticket(BaseModel):
    """What stands for the caller's token in one address; `expires_in` seconds."""

    ticket: str
    expires_in: int


class CallResult(BaseModel):
    """What the method returned."""

    result: Any


class Node(BaseModel):
    """A node of the cluster."""

    name: str
    incarnation: str
    state: Literal["live", "draining", "suspended", "buried"]
    version: str
    protocol: int | None
    address: str
    conversations: int
    connections: int
    lag: float | None = Field(description="How late its event loop ran last, in seconds.")
    started_at: datetime | None
    last_renewal: datetime | None


class NodeList(BaseModel):
    """The nodes of the cluster."""

    nodes: list[Node]


class Violation(BaseModel):
    """A broken invariant."""

    invariant: str
    where: str
    detail: str


class Audit(BaseModel):
    """What an audit found."""

    checked: int
    violations: list[Violation]
    conversations: int
    nodes: int


class Fallback(BaseModel):
    """A store that was there again with less than it had confirmed, as this node has found it."""

    at: int = Field(description="When it was noticed, in ms since 1970.")
    store: str = Field(description="The server; empty for the only one.")
    way: Literal["restart", "fail-over", "replaced", "unnoticed"] = Field(
        description="`unnoticed`: nothing but a write has shown it."
    )
    missing_bytes: int | None = Field(description="What the server lacks for certain, at least; null: unknown.")
    conversations: int = Field(description="Conversations that this node owned then.")
    lost: int = Field(description="Their log entries that were confirmed and were missing.")
    repaired: int = Field(description="How many of these this node has written again.")
    unrepaired: int = Field(description="Conversations that lost what this node could not write again.")
    verified: bool = Field(description="Everything that this node owned was looked at since.")


class Ready(BaseModel):
    """Whether the node may receive traffic."""

    status: Literal["ready", "degraded", "unready"]
    checks: dict[str, str] | None = Field(default=None, description="With `?verbose`: what was looked at.")
    fallbacks: list[Fallback] | None = Field(
        default=None, description="With `?verbose`: the last times that the store had lost something, oldest first."
    )


class Alive(BaseModel):
    """The process runs."""

    status: Literal["alive"]


class Problem(BaseModel):
    """An error (RFC 9457); some codes have further members."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    code: str = Field(description="Stable; see the table of errors.")
    detail: str
    retry_after: float | None = Field(default=None, description="Seconds after which a retry is sensible.")


# --- from the manager's types ------------------------------------------------------------------------------


def rfc3339(ms: int | None) -> str | None:
    """A time in ms since 1970 as RFC 3339 in UTC; None for an unknown one."""
    if not ms:
        return None
    moment = datetime.fromtimestamp(ms // 1000, UTC).replace(microsecond=ms % 1000 * 1000)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def conversation(info: AgentLoopInfo) -> dict[str, Any]:
    """`Conversation` of what the manager knows."""
    return {
        "conversation_id": info.conversation_id,
        "user_id": info.user_id,
        "status": info.status,
        "busy": info.busy,
        "node": info.node,
        "epoch": info.epoch,
        "last_seq": info.last_seq,
        "connections": info.connections,
        "metadata": dict(info.metadata),
        "created_at": rfc3339(info.created_at),
        "updated_at": rfc3339(info.updated_at),
    }


def created(info: AgentLoopInfo) -> dict[str, Any]:
    """`Created` of what the manager knows, without the message."""
    return {
        "conversation_id": info.conversation_id,
        "user_id": info.user_id,
        "status": info.status,
        "node": info.node,
        "epoch": info.epoch,
    }


def accepted(result: SendResult) -> dict[str, Any]:
    """`Accepted` of what the manager answered."""
    return {
        "status": "accepted",
        "message_id": result.message_id,
        "position": result.position,
        "duplicate": result.duplicate,
    }


def question(asked: Question) -> dict[str, Any]:
    """`OpenQuestion` of what the manager knows."""
    return {
        "ask_id": asked.ask_id,
        "prompt": asked.prompt,
        "schema": asked.schema,
        "deadline": rfc3339(asked.deadline),
    }


def drain(status: DrainStatus) -> dict[str, Any]:
    """`Drain` of what the manager knows."""
    deadline = None if status.deadline is None else rfc3339(status.deadline)
    return {"node": status.node, "state": status.state, "remaining": status.remaining, "deadline": deadline}


def node(info: NodeInfo) -> dict[str, Any]:
    """`Node` of what the manager knows."""
    return {
        "name": info.name,
        "incarnation": info.incarnation,
        "state": info.state,
        "version": info.version,
        "protocol": info.protocol or None,
        "address": info.address,
        "conversations": info.conversations,
        "connections": info.connections,
        "lag": info.lag,
        "started_at": rfc3339(info.started_at),
        "last_renewal": rfc3339(info.last_renewal),
    }
