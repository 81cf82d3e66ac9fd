"""What a runner asks of its node, and how it may end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

from convener.core.model import NewMessage
from convener.manager.base import SendResult

if TYPE_CHECKING:
    from convener.manager.runner import Runner

EndReason = Literal["released", "moved", "stopped", "failed", "held", "lost", "diverged", "closed"]


class Host(Protocol):
    """The node's side of a runner."""

    def runner_changed(self, runner: Runner) -> None:
        """Status or activity changed."""
        ...

    async def runner_ended(self, runner: Runner, why: EndReason) -> None:
        """It is over: forget it, and give back what the reason leaves to give back."""
        ...

    def fell_back(self, runner: Runner) -> None:
        """The store knows less of the conversation than it has confirmed: verify it."""
        ...

    async def post(self, cid: str, message: NewMessage, known: bool) -> SendResult:
        """Send a message to a conversation."""
        ...
