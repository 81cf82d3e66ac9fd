"""How long a node may act after its last good renewal (I7).

    acts  <=>  boot-time clock < send time of the last good renewal + window

With fast burial a node may be buried two renew intervals and 250 ms after its last renewal arrived, so the
window is two renew intervals, counted from *sending*: the store applied it later, never earlier. Without,
burial needs the whole lease, so the window is the lease less two seconds for clocks that run at different
rates (10 % of a lease) and for the way. Timers are not trusted to have fired: the clock is compared before
each effect.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

RATE_MARGIN_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class LeaseTerms:
    """Durations in seconds."""

    ttl: float
    renew: float
    fast_burial: bool

    def window(self) -> float:
        """Seconds after sending a renewal during which the node may act."""
        return 2 * self.renew if self.fast_burial else self.ttl - RATE_MARGIN_S

    def deadline(self, sent: float) -> float:
        """The instant, on the clock of `sent`, at which a node must stop acting."""
        return sent + self.window()

    def are_sound(self) -> bool:
        """Whether the lease leaves room for four renewals before the margin begins."""
        return self.ttl - RATE_MARGIN_S >= 4 * self.renew
