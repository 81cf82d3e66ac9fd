"""``durability=replicated``: what was written counts when a replica has it.

Commands leave in batches, one per turn of the event loop. Behind a batch that has something to confirm go a
publication that nobody hears and one WAIT; replies of what is to be confirmed are kept until its reply is there. If no
replica confirms in time their callers are told `NotConfirmed`: it was done, and may yet be lost. Whoever repeats it
under the same identity is told what was done, after another WAIT.

The publication is there because WAIT speaks of the last write *of its own connection*, and a repeated command writes
nothing: without it the WAIT of a new connection would confirm what another one has written and no replica has.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from convener.errors import NotConfirmed, StoreUnavailable

if TYPE_CHECKING:
    from convener.store.redis.wire import Call

UNCONFIRMED: Final = frozenset(
    {"append", "append_final", "pieces", "flush", "renew", "archived", "expire", "probe", "rights", "spublish"}
    | {"client", "getdel", "set", "wait"}
)
"""What changes something and does not wait. Log entries are in their owner's memory until a replica has them; a renewal
that is lost is made up for by the grace after a fail-over; the rest is told again, or only found sooner by it.
"""


class Confirmation:
    """What one WAIT confirms: calls that were answered, and what with.

    Args:
        tag: of the group of one of them: the publication has to go where they go.
        seconds: how long a replica may take.
    """

    def __init__(self, tag: str, seconds: float) -> None:
        self.channel = f"{{{tag}}}:waited"
        self.seconds = seconds
        self._kept: list[tuple[Call, Any]] = []

    def keep(self, call: Call, reply: Any) -> None:
        """A call was answered; its caller is told when that is confirmed."""
        self._kept.append((call, reply))

    def settle(self, marker: asyncio.Future[Any], wait: asyncio.Future[Any]) -> None:
        """The replies to the publication and to WAIT are there, or the connection is lost."""
        lost = wait.cancelled() or isinstance(wait.exception(), StoreUnavailable)
        marked = not marker.cancelled() and marker.exception() is None
        confirmed = not lost and marked and isinstance(wait.result(), int) and wait.result() >= 1
        for call, reply in self._kept:
            if confirmed:
                call.deliver(reply)
            else:
                call.fail(NotConfirmed(f"{call.name}: no replica has confirmed it within {self.seconds:g} s"))
        self._kept.clear()
