"""The conversation manager as its callers see it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from convener.core.cursor import Cursor
from convener.core.directory import LoopStatus
from convener.core.model import Page

InterruptResult = Literal["interrupted", "interrupting", "stale", "idle"]
MoveResult = Literal["moved", "there", "busy"]
"""`there`: it is on that node already; `busy`: a turn is under way, and was not to be cut off."""
StopResult = Literal["stopped", "stopping", "already_stopped"]
ResumeResult = Literal["resumed", "running"]
Overlap = Literal["enqueue", "reject", "interrupt"]
"""What happens to a message that comes while another is being answered: it waits, is refused, or ends all before it."""


@dataclass(frozen=True, slots=True)
class AgentLoopInfo:
    """One conversation as the cluster knows it.

    Attributes:
        status: see `LoopStatus`; busy means that a message is being answered or waits.
        node: name of the node that owns it, "" for none.
        epoch: its latest ownership, 0 before the first.
        last_seq: number of its last log entry.
        connections: clients on all nodes.
        created_at, updated_at: ms since 1970, the store's clock.
        started_here: this call started the loop on this node.
        created: this call created the conversation.
    """

    conversation_id: str
    user_id: str
    status: LoopStatus
    busy: bool
    node: str
    epoch: int
    last_seq: int = 0
    connections: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    created_at: int = 0
    updated_at: int = 0
    started_here: bool = False
    created: bool = False


@dataclass(frozen=True, slots=True)
class SendResult:
    """An accepted message: its id, its number in the conversation's inbox (from 1), whether it was known already."""

    message_id: str
    position: int
    duplicate: bool


@dataclass(frozen=True, slots=True)
class Question:
    """A question of the agent that waits for an answer: `deadline` is in ms since 1970, None for none."""

    ask_id: str
    prompt: Any
    schema: Any = None
    deadline: int | None = None


@dataclass(frozen=True, slots=True)
class ListedConversation:
    """A row of a user's list; `activity` (ms since 1970) and the id make the cursor of the next page."""

    info: AgentLoopInfo
    activity: int


@dataclass(frozen=True, slots=True)
class ConversationHandle:
    """A counted right to read a conversation without being one of its clients."""

    conversation_id: str
    user_id: str
    token: str


class ClientSink(Protocol):
    """Where a client's events go. One instance may serve many connections (a Socket.IO server) or one (SSE)."""

    async def send(self, connection_id: str, event: str, payload: Mapping[str, Any]) -> None:
        """Queue one event for the client, in order; returns at once. An unknown connection is ignored."""
        ...

    async def ready(self, connection_id: str) -> None:
        """Return when the client's queue is short enough for more: this is what bounds a slow client's memory."""
        ...

    async def disconnect(self, connection_id: str) -> None:
        """Disconnect so that the client stays away."""
        ...


class ConversationManager(ABC):
    """Runs conversations. Every method may raise `StoreUnavailable`; ids are checked (`InvalidRequest`)."""

    @abstractmethod
    async def __aenter__(self) -> Self:
        """Start all background work and *await* that it runs."""

    @abstractmethod
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give everything back that this node owns, then await the end of all background work."""

    @abstractmethod
    async def maybe_start_agent_loop(
        self,
        conversation_id: str,
        settings: Any = None,
        user_id: str | None = None,
        initial_user_msg: Any = None,
        *,
        metadata: Mapping[str, Any] | None = None,
        message_id: str | None = None,
    ) -> AgentLoopInfo:
        """Create the conversation if it is unknown and make sure that its loop runs, once in the cluster.

        Args:
            settings: merged into `metadata` under "settings" when the conversation is created.
            initial_user_msg: JSON value, sent as the first message (under `message_id`, if given).

        Returns:
            status, owner and epoch; whether it was started here, created, or found.

        Raises:
            LimitExceeded: the user's slots are taken and the policy found no other way.
            ConversationStopped: it was stopped on purpose.
            NotAuthorized: it belongs to another user.
            OwnerUnavailable: nobody could be made owner in time.
        """

    @abstractmethod
    async def join_conversation(
        self,
        conversation_id: str,
        connection_id: str,
        settings: Any = None,
        user_id: str | None = None,
        after: Cursor | None = None,
        *,
        tail: int | None = None,
        sink: ClientSink | None = None,
        start: bool = True,
    ) -> AgentLoopInfo:
        """Make the connection a client: replay from `after` (default everything) or the last `tail`, then live.

        The loop is started or woken if needed (a stopped conversation is only read). The replay runs in a task of
        its own, after `begin_replay(connection_id)`. Undone on failure. Raises as `maybe_start_agent_loop`.

        Args:
            sink: where this client's events go; default the manager's Socket.IO server.
            start: False to be a reader: unknown conversations are `NotFound`, nothing is started or woken.
        """

    @abstractmethod
    def begin_replay(self, connection_id: str) -> None:
        """Let the replay of a joined connection run (a Socket.IO connect handler has to return first)."""

    @abstractmethod
    async def attach_to_conversation(
        self, conversation_id: str, user_id: str | None = None
    ) -> ConversationHandle | None:
        """A counted handle to read log and state; None if the conversation does not exist."""

    @abstractmethod
    async def detach_from_conversation(self, conversation: ConversationHandle) -> None:
        """Give a handle back; a second time does nothing."""

    @abstractmethod
    async def is_agent_loop_running(self, conversation_id: str) -> bool:
        """Whether it is loaded on some node, by the directory."""

    @abstractmethod
    async def get_running_agent_loops(
        self, user_id: str | None = None, filter_to_sids: Collection[str] | None = None
    ) -> set[str]:
        """Ids of loaded conversations. An empty filter means nothing, None means everything."""

    @abstractmethod
    async def get_connections(
        self, user_id: str | None = None, filter_to_sids: Collection[str] | None = None
    ) -> dict[str, str]:
        """Connection id → conversation id of the cluster's clients. Filters as above."""

    @abstractmethod
    async def get_agent_loop_info(
        self, user_id: str | None = None, filter_to_sids: Collection[str] | None = None
    ) -> list[AgentLoopInfo]:
        """Loaded conversations by the directory (`last_seq` and times are not known there and 0)."""

    @abstractmethod
    async def send_to_event_stream(
        self,
        connection_id: str,
        data: Any,
        *,
        message_id: str | None = None,
        overlap: Overlap | None = None,
    ) -> SendResult:
        """SEND to the conversation that the connection has joined.

        Raises:
            NotFound: unknown connection.
            InboxFull, ConversationBusy, ConversationStopped, PayloadTooLarge, LimitExceeded, OwnerUnavailable.
        """

    @abstractmethod
    async def send_event_to_conversation(
        self,
        conversation_id: str,
        data: Any,
        *,
        user_id: str | None = None,
        message_id: str | None = None,
        overlap: Overlap | None = None,
    ) -> SendResult:
        """SEND: returns when the message is stored and somebody will answer it. The same `message_id` again gives
        the same answer. Raises as `send_to_event_stream`; `NotFound` for an unknown conversation.
        """

    @abstractmethod
    async def call(self, conversation_id: str, method: str, params: Any = None, timeout: float = 30.0) -> Any:
        """Call a method of the owner, wherever it is.

        Raises:
            NotFound: no such conversation or method.
            CallTimeout: no answer in time; the remote work was cancelled.
            OwnerUnavailable: the owner died meanwhile.
            RemoteError: the method raised.
        """

    @abstractmethod
    async def request_llm_completion(
        self, conversation_id: str, service_id: str, messages: Sequence[Mapping[str, Any]], timeout: float = 60.0
    ) -> Any:
        """`call` of the method ``llm_completion`` with ``{service_id, messages}``."""

    @abstractmethod
    async def disconnect_from_session(self, connection_id: str) -> None:
        """Forget the connection at once."""

    @abstractmethod
    async def close_session(self, conversation_id: str, reason: str = "stopped by the user") -> StopResult:
        """STOP, then the outcome awaited: loop stopped, log closed, claim and slot given back, clients told and
        disconnected. Idempotent. Raises `NotFound`.
        """

    @abstractmethod
    def get_agent_session(self, conversation_id: str) -> Any | None:
        """The local loop object, None if it runs elsewhere or nowhere."""

    @classmethod
    @abstractmethod
    def get_instance(
        cls, sio: Any, config: Any = None, file_store: Any = None, server_config: Any = None, **options: Any
    ) -> ConversationManager:
        """Make a manager from what a server has at hand."""

    # -- beyond the table: what the gateway needs ---------------------------------------------------------------

    @abstractmethod
    async def describe(self, conversation_id: str) -> AgentLoopInfo:
        """One conversation, loaded or not, from the store. Raises `NotFound`."""

    @abstractmethod
    async def list_conversations(
        self, user_id: str, before: tuple[int, str] | None, limit: int
    ) -> Sequence[ListedConversation]:
        """The user's conversations, newest activity first, strictly after `before` = (activity, id)."""

    @abstractmethod
    async def follow_list(
        self,
        user_id: str,
        connection_id: str,
        show: Callable[[AgentLoopInfo], Mapping[str, Any]],
        *,
        sink: ClientSink | None = None,
    ) -> None:
        """Tell the connection of all conversations of the user, by `conversation` events, until
        `disconnect_from_session`.

        After `begin_replay(connection_id)` one event for each of the newest 100 and of all that are loaded; then one
        whenever one is created, changes its status, owner or metadata, is stopped or deleted, on whatever node. A
        client that reads slowly gets the latest state of each.

        Args:
            show: makes the payload; `change` is added to it: ``snapshot``, ``created``, ``changed``, ``stopped``,
                ``deleted``.
            sink: where the events go; default the manager's Socket.IO server.
        """

    @abstractmethod
    async def set_metadata(self, conversation_id: str, metadata: Mapping[str, Any]) -> AgentLoopInfo:
        """Replace the metadata. Raises `NotFound`."""

    @abstractmethod
    async def read_log(self, conversation_id: str, after: Cursor, limit: int) -> Page:
        """A page of the log (see `ConversationStore.read`). Raises `NotFound`."""

    @abstractmethod
    async def answer(
        self,
        conversation_id: str,
        ask_id: str,
        data: Any,
        *,
        message_id: str | None = None,
        user_id: str | None = None,
    ) -> SendResult:
        """Answer a question of the agent. The same `message_id` again gives the same answer.

        Raises:
            AskClosed: it is answered, has expired, or was never asked.
            InvalidRequest: the data does not fit the question's schema (code ``invalid_answer``).
            NotFound, ConversationStopped, InboxFull, PayloadTooLarge, OwnerUnavailable.
        """

    @abstractmethod
    async def questions(self, conversation_id: str) -> Sequence[Question]:
        """The questions that wait for an answer, in the order of their ids. Empty for an unknown conversation."""

    @abstractmethod
    async def interrupt(self, conversation_id: str, turn: str | None = None) -> InterruptResult:
        """Stop generating: end the running turn, keep what it has said, go on with the queue.

        The intent is recorded first, so it holds even while the owner is being replaced. `turn` is the turn that is
        meant; a press meant for an earlier one is ``stale``. Raises `NotFound`, `ConversationStopped`, `InboxFull`.
        """

    @abstractmethod
    async def move(self, conversation_id: str, node: str, *, cut: bool = False) -> MoveResult:
        """Let the node of that name own the conversation, from wherever it is; one that is not loaded is loaded there.

        Args:
            cut: whether a turn under way is cut off, to be begun again there; else the answer is ``busy``.

        Raises:
            NotFound: no such conversation or node.
            InvalidRequest: the node is leaving (code ``node_leaving``).
            OwnerUnavailable: it was not done in time; the conversation is owned all the same, here or there.
        """

    @abstractmethod
    async def resume(self, conversation_id: str) -> ResumeResult:
        """Open a conversation again that was stopped or given up, or let a turn go on that waits to be repeated.

        Raises `NotFound`, `OwnerUnavailable` while a stop is under way.
        """

    @abstractmethod
    async def delete(self, conversation_id: str, reason: str = "deleted by the user") -> None:
        """Stop, then erase log, state and index entries. Raises `NotFound`."""
