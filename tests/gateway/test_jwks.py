"""How long an issuer's keys are believed; the clock is an argument."""

from __future__ import annotations

import pytest

from convener.errors import AuthUnavailable, NotAuthenticated
from convener.gateway.jwks import COOLDOWN, LIFESPAN, STALE, KeySource
from tests.gateway.issuer import issuing, published, rsa_key


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def test_keys_are_kept_and_fetched_again() -> None:
    clock, old, new = Clock(), rsa_key(), rsa_key()
    with issuing() as issuer:
        issuer.keys = [published(old, "old")]
        source = KeySource(issuer.url, clock)
        await source.find("old")
        clock.now += LIFESPAN - 1
        await source.find("old")
        assert issuer.requests == 1
        # A withdrawn key stops working when the document is fetched again.
        issuer.keys = [published(new, "new")]
        clock.now += 2
        with pytest.raises(NotAuthenticated):
            await source.find("old")
        await source.find("new")
        assert issuer.requests == 2


async def test_a_rotated_key_is_found_after_the_pause_between_fetches() -> None:
    clock = Clock()
    with issuing() as issuer:
        issuer.keys = [published(rsa_key(), "old")]
        source = KeySource(issuer.url, clock)
        await source.find("old")
        issuer.keys.append(published(rsa_key(), "new"))
        clock.now += COOLDOWN - 1
        with pytest.raises(NotAuthenticated):
            await source.find("new")
        clock.now += 2
        assert (await source.find("new")).key_id == "new"


async def test_old_keys_survive_an_outage_of_the_issuer_but_not_for_ever() -> None:
    clock = Clock()
    with issuing() as issuer:
        issuer.keys = [published(rsa_key(), "k")]
        source = KeySource(issuer.url, clock)
        await source.find("k")
        issuer.status = 503
        clock.now += LIFESPAN + STALE - 1
        assert (await source.find("k")).key_id == "k"
        clock.now += COOLDOWN
        with pytest.raises(AuthUnavailable):
            await source.find("k")
        issuer.status = 200
        clock.now += COOLDOWN
        assert (await source.find("k")).key_id == "k"


async def test_a_dead_issuer_is_not_asked_by_every_caller() -> None:
    clock = Clock()
    with issuing() as issuer:
        issuer.status = 500
        source = KeySource(issuer.url, clock)
        for _ in range(5):
            with pytest.raises(AuthUnavailable):
                await source.find("k")
        assert issuer.requests == 1


async def test_keys_for_encryption_are_not_for_signatures() -> None:
    with issuing() as issuer:
        issuer.keys = [published(rsa_key(), "enc") | {"use": "enc"}, published(rsa_key(), "sig")]
        source = KeySource(issuer.url, Clock())
        with pytest.raises(NotAuthenticated):
            await source.find("enc")
        assert (await source.find("sig")).key_id == "sig"


async def test_an_address_where_nobody_listens() -> None:
    with issuing() as issuer:
        url = issuer.url
    with pytest.raises(AuthUnavailable):
        await KeySource(url, Clock()).find("k")
