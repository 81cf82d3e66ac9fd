"""Agents that act by themselves: one long-running function per loaded conversation (`@app.loop`).

Everything that a loop does for others is a turn, so nothing of the rules for turns changes: messages are turns, and so
is what the loop does on its own account, for which it sends itself a message. A loop that is cut off (a crash, an
interrupt, a suspension) is begun again from its first line, and gets the turn again that was not done.
"""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol

import structlog
from typing_extensions import TypeVar

from convener.core.model import NewMessage
from convener.errors import ConvenerError, InvalidRequest
from convener.ids import check_id, new_id
from convener.manager.jsontext import to_json
from convener.manager.supervisor import cancel_and_wait

if TYPE_CHECKING:
    from convener.manager.base import SendResult
    from convener.manager.context import NodeContext
    from convener.manager.conversation import Conversation
    from convener.manager.turn import Turn

log = structlog.get_logger(__name__)

S = TypeVar("S", default=dict[str, Any])

GRACE_S: Final = 5.0
FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 30.0
TICK: Final = "tick/"
"""Prefix of the message ids of what a loop does on its own account; clients' ids have no slash."""

Post = Callable[[NewMessage, bool], Awaitable["SendResult"]]
"""Sends a message to the loop's own conversation; the second argument says that its id was chosen by the caller."""


class Owner(Protocol):
    """The runner of the conversation."""

    cid: str
    user: str

    def conversation(self) -> Conversation: ...


@dataclass(slots=True)
class _Offer:
    """A turn for the loop, and what became of it."""

    turn: Turn[Any]
    done: asyncio.Future[None]


class Loop(Generic[S]):
    """What a loop gets. `S` is the type of the agent's state."""

    def __init__(self, session: LoopSession, conversation: Conversation) -> None:
        self._session = session
        self.conversation = conversation

    @property
    def state(self) -> S:
        """A copy of the state as the last finished turn left it. It is changed through a turn's `state` only."""
        return self._session.state()

    def turns(self, every: float | datetime.timedelta | None = None) -> AsyncIterator[Turn[S]]:
        """The turns of the conversation, one after another: ``async for turn in loop.turns(): …``. A turn ends, in one
        append, when the next one is asked for (or the loop returns); it fails if the loop raises.

        Args:
            every: seconds without a turn after which the loop gets one without a message (``turn.data`` is None,
                ``turn.reason`` is "alarm"). As long as the loop waits so, the conversation does not hibernate.
        """
        seconds = every.total_seconds() if isinstance(every, datetime.timedelta) else every
        if seconds is not None and not seconds > 0:
            raise InvalidRequest("every must be above 0 seconds")
        return _Turns(self._session, seconds)

    async def send(self, data: Any, message_id: str | None = None) -> SendResult:
        """Send the conversation a message of its own user: how something from outside becomes a turn, once.

        The same `message_id` again gives the same answer. Raises as `ConversationManager.send_event_to_conversation`.
        """
        return await self._session.send(data, message_id)


LoopFunction = Callable[[Loop[Any]], Awaitable[None]]


class _Turns(AsyncIterator["Turn[Any]"]):
    def __init__(self, session: LoopSession, every: float | None) -> None:
        self._session = session
        self._every = every

    async def __anext__(self) -> Turn[Any]:
        return await self._session.next_turn(self._every)


class LoopSession:
    """The loop of one loaded conversation: begun, cut off, begun again.

    Args:
        state: a copy of the present state.
    """

    def __init__(
        self, node: NodeContext, owner: Owner, function: LoopFunction, post: Post, state: Callable[[], Any]
    ) -> None:
        self._node = node
        self._owner = owner
        self._function = function
        self._post = post
        self.state = state
        self._task: asyncio.Task[None] | None = None
        self._offer: _Offer | None = None
        self._offered = asyncio.Event()
        self._taken: _Offer | None = None
        self._allowed = False
        self.armed = False
        """Whether the loop waits for its own time: then it must not be unloaded."""

    # -- for the runner --------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin the loop, unless it runs."""
        self._allowed = True
        if self._task is None:
            self._task = self._node.supervisor.spawn(f"loop {self._owner.cid}", self._run())

    async def stop(self) -> None:
        """Cut the loop off and await its end."""
        self._allowed = False
        await self._cut()

    async def _cut(self) -> None:
        task, self._task = self._task, None
        await cancel_and_wait(task, GRACE_S)
        self.armed = False

    async def run(self, turn: Turn[Any]) -> None:
        """Give the loop a turn; returns when it is done with it. Cancelled, it cuts the loop off."""
        offer = self._offer = _Offer(turn, asyncio.get_running_loop().create_future())
        self._offered.set()
        self.start()
        try:
            await offer.done
        except asyncio.CancelledError:
            await self._cut()
            raise
        finally:
            if self._offer is offer:
                self._offer = None
                self._offered.clear()
            if self._taken is offer:
                self._taken = None
            if self._allowed and self._task is None:
                self.start()

    async def _run(self) -> None:
        pause = FIRST_PAUSE_S
        me = asyncio.current_task()
        try:
            while True:
                failure: BaseException | None = None
                began = asyncio.get_running_loop().time()
                try:
                    await self._function(Loop(self, self._owner.conversation()))
                except Exception as error:
                    failure = error
                self._settle(failure)
                if failure is None and not self._offered.is_set():
                    # It has nothing more to do; a message begins it again.
                    return
                if failure is None:
                    continue
                log.error("a loop failed; it is begun again", conversation_id=self._owner.cid, exc_info=failure)
                self._node.metrics.background_restarts.labels(task="loop").inc()
                if asyncio.get_running_loop().time() - began > LONGEST_PAUSE_S:
                    pause = FIRST_PAUSE_S
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
        finally:
            self.armed = False
            if self._task is me:
                self._task = None

    def _settle(self, failure: BaseException | None) -> None:
        """The turn that the loop has is over."""
        taken, self._taken = self._taken, None
        if taken is None or taken.done.done():
            return
        if failure is None:
            taken.done.set_result(None)
        else:
            taken.done.set_exception(failure)

    # -- for the loop ----------------------------------------------------------------------------------------------

    async def next_turn(self, every: float | None) -> Turn[Any]:
        """End the turn that the loop has, and wait for the next one."""
        self._settle(None)
        self.armed = every is not None
        try:
            while not self._offered.is_set():
                try:
                    async with asyncio.timeout(every):
                        await self._offered.wait()
                except TimeoutError:
                    await self._tick()
        finally:
            self.armed = False
        self._offered.clear()
        offer, self._offer = self._offer, None
        assert offer is not None
        self._taken = offer
        return offer.turn

    async def _tick(self) -> None:
        if not self._node.lease.valid() or self._node.draining:
            return
        try:
            await self._post(NewMessage(f"{TICK}{new_id()}", self._owner.user, "null", "alarm"), False)
        except ConvenerError as error:
            log.info("a loop's own turn is put off", conversation_id=self._owner.cid, error=str(error))

    async def send(self, data: Any, message_id: str | None) -> SendResult:
        """See `Loop.send`."""
        text = to_json(data, self._node.options.max_payload_bytes, "data")
        ident = new_id() if message_id is None else check_id(message_id, "message_id")
        return await self._post(NewMessage(ident, self._owner.user, text), message_id is not None)
