"""What one attempt of a start holds so far."""

from __future__ import annotations

from dataclasses import dataclass

from convener.core.admission import Slot
from convener.core.model import Meta
from convener.manager.views import View


@dataclass(slots=True)
class Attempt:
    """What a start holds so far, to be given back if it fails.

    Attributes:
        fallbacks: how often the store had fallen back when it began.
        source: the live node that hands the conversation over, "" for none.
        read: the slot as it was before.
    """

    cid: str
    meta: Meta
    nonce: str
    incarnation: str
    fallbacks: int
    source: str = ""
    read: Slot | None = None
    slot: bool = False
    view: View | None = None
