"""What leaves the store: entries that the archive has, and conversations that nobody has used for long.

The archive is an object store, where nothing can be compared and set together with a head. So whatever is put there
has a name of its own and never changes, and one fenced step of the store, ARCHIVED, makes a list of it the one that
counts. What was put there and is in no such list is rubbish, and harms nobody.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from convener.core.model import Conversation, Effect, Erase, SetMeta, TrimLog

Effects = tuple[Effect, ...]
ArchivedOutcome = Literal["OK", "FENCED", "STALE"]
ExpireOutcome = Literal["OK", "KEPT", "NOT_FOUND"]


@dataclass(frozen=True, slots=True)
class ArchivedRequest:
    """What the archive has now.

    Attributes:
        upto: (epoch, seq) of the last entry that is there.
        manifest: name of the object that lists where everything up to it is.
        keep: (epoch, seq) of the first entry that the store is to keep; (0, 0) to keep all.
    """

    owner: str
    epoch: int
    upto: tuple[int, int]
    manifest: str
    keep: tuple[int, int] = (0, 0)


def archived(state: Conversation, request: ArchivedRequest) -> tuple[ArchivedOutcome, Effects]:
    """ARCHIVED: name the list of what the archive has, and trim the log up to there, if its owner says so. What is
    stopped has none: then anybody may, since its log does not change, and `resume` begins another epoch.

    The mark only goes forward, and only to an entry that the log has: after a fail-over that lost entries, the archive
    may have some that never were. The log keeps its last entry always, and what a new owner must read (`base`), unless
    it is stopped: then nothing is unanswered.
    """
    meta = state.meta
    if meta is None or meta.owner != request.owner or meta.epoch != request.epoch:
        return "FENCED", ()
    closed = meta.status == "stopped"
    if not (meta.owner or closed):
        return "FENCED", ()
    epoch, seq = request.upto
    if seq < meta.archived:
        return "STALE", ()
    if (epoch, seq) != (meta.archived_epoch, meta.archived) and request.upto not in state.places:
        return "STALE", ()
    after = SetMeta(replace(meta, archived=seq, archived_epoch=epoch, manifest=request.manifest))
    if request.keep in state.places and request.keep[1] - 1 <= (seq if closed else min(seq, meta.base)):
        return "OK", (after, TrimLog(request.keep[1] - 1))
    return "OK", (after,)


def expire(state: Conversation, before: int) -> tuple[ExpireOutcome, Effects]:
    """EXPIRE: erase a conversation with which nothing has happened since `before` (ms), and for which nothing waits:
    it is closed, or everything in it is answered and no alarm is set.
    """
    meta = state.meta
    if meta is None:
        return "NOT_FOUND", ()
    if meta.owner or meta.updated > before or meta.status == "stopping":
        return "KEPT", ()
    if meta.status == "running" and (meta.position != meta.done or state.alarms):
        return "KEPT", ()
    return "OK", (Erase(),)
