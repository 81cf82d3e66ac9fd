"""``durability=replicated``: what was written counts when a replica has it.

Commands leave in batches, one per turn of the event loop. Behind a batch that has something to confirm go a write of a
key that means nothing and one WAIT; replies of what is to be confirmed are kept until its reply is there. If no replica
confirms in time their callers are told `NotConfirmed`: it was done, and may yet be lost. Whoever repeats it under the
same identity is told what was done, after another WAIT.

That write is there because WAIT speaks of the last write *of its own connection*, and a repeated command writes
nothing: without it the WAIT of a new connection would confirm what another one has written and no replica has. A
publication would not do: a primary of a cluster does not hand it on to its replicas.

A server answers nothing on a connection that waits. So there is one WAIT at a time: what is sent meanwhile shares the
next one, and no command stands behind more than one, however long no replica confirms.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from convener.errors import NotConfirmed, StoreUnavailable
from convener.store.redis.keys import waited

if TYPE_CHECKING:
    from convener.store.redis.wire import Call

UNCONFIRMED: Final = frozenset(
    {"append", "append_final", "repair", "pieces", "flush", "renew", "archived", "expire", "probe", "rights"}
    | {"spublish", "client", "getdel", "set", "wait"}
)
"""What changes something and does not wait. Log entries are in their owner's memory until a replica has them; a renewal
that is lost is made up for by the grace after a fail-over; the rest is told again, or only found sooner by it.
"""


class Confirmation:
    """What one WAIT confirms: calls that were answered, and what with.

    Args:
        tag: of the group of one of them: the write has to go where they go.
        seconds: how long a replica may take.
    """

    def __init__(self, tag: str, seconds: float) -> None:
        self.key = waited(tag)
        self.seconds = seconds
        self.expires = 0.0
        """When the last of its calls expires."""
        self._kept: list[tuple[Call, Any]] = []
        self._settled = False

    def keep(self, call: Call, reply: Any) -> None:
        """A call was answered; its caller is told when that is confirmed."""
        if self._settled:
            self._fail(call)
        else:
            self._kept.append((call, reply))

    def settle(self, marker: asyncio.Future[Any], wait: asyncio.Future[Any]) -> None:
        """The replies to the write and to WAIT are there, or the connection is lost."""
        lost = wait.cancelled() or isinstance(wait.exception(), StoreUnavailable)
        marked = not marker.cancelled() and marker.exception() is None
        self.end(confirmed=not lost and marked and isinstance(wait.result(), int) and wait.result() >= 1)

    def end(self, *, confirmed: bool) -> None:
        """Tell the callers. Nothing that is answered from now on is confirmed by this."""
        self._settled = True
        for call, reply in self._kept:
            if confirmed:
                call.deliver(reply)
            else:
                self._fail(call)
        self._kept.clear()

    def _fail(self, call: Call) -> None:
        call.fail(NotConfirmed(f"{call.name}: no replica has confirmed it within {self.seconds:g} s"))
