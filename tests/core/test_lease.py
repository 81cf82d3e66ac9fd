"""The clock rule: how long a node may act."""

from __future__ import annotations

from convener.core.lease import LeaseTerms
from convener.core.membership import BURY_SLACK_MS


def test_with_fast_burial_the_window_is_two_intervals() -> None:
    terms = LeaseTerms(ttl=10.0, renew=0.5, fast_burial=True)
    assert terms.window() == 1.0
    assert terms.deadline(100.0) == 101.0


def test_without_it_the_lease_less_the_margin() -> None:
    terms = LeaseTerms(ttl=10.0, renew=0.5, fast_burial=False)
    assert terms.window() == 8.0
    assert terms.deadline(100.0) == 108.0


def test_the_window_ends_before_burial_can_come() -> None:
    """I7, at clocks that differ by 10 %: the acting node's runs slow, the store's fast."""
    fast = LeaseTerms(ttl=10.0, renew=0.5, fast_burial=True)
    assert fast.window() * 1.1 < 2 * fast.renew + BURY_SLACK_MS / 1000
    slow = LeaseTerms(ttl=10.0, renew=0.5, fast_burial=False)
    assert slow.window() * 1.1 < slow.ttl


def test_terms_need_room_for_four_renewals() -> None:
    assert LeaseTerms(10.0, 0.5, fast_burial=True).are_sound()
    assert LeaseTerms(4.0, 0.5, fast_burial=True).are_sound()
    assert not LeaseTerms(3.9, 0.5, fast_burial=True).are_sound()
