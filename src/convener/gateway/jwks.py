"""The public keys of a token issuer, fetched in a thread and kept for a while."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

import jwt
import structlog
from jwt import PyJWK, PyJWKClient, PyJWKSet

from convener.errors import AuthUnavailable, NotAuthenticated

log = structlog.get_logger(__name__)

LIFESPAN: Final = 300.0
"""Seconds after which keys are fetched again, so that a withdrawn key stops working."""
STALE: Final = 3600.0
"""Seconds for which old keys go on working while the issuer does not answer."""
COOLDOWN: Final = 10.0
"""Seconds between two fetches: otherwise anybody could make us fetch by inventing key ids."""
TIMEOUT: Final = 5.0


class KeySource:
    """Keys by id (`kid`).

    Args:
        url: the issuer's JWKS document.
        now: monotonic clock, in seconds.
    """

    def __init__(self, url: str, now: Callable[[], float] = time.monotonic) -> None:
        # Only its transport is used: its own cache forgets good keys while the issuer is away.
        self._client = PyJWKClient(url, cache_jwk_set=False, timeout=TIMEOUT)
        self._now = now
        self._keys: tuple[PyJWK, ...] = ()
        self._fetched = float("-inf")
        self._tried = float("-inf")
        self._failure = ""
        self._lock = asyncio.Lock()

    async def find(self, kid: str | None) -> PyJWK:
        """The key with this id; without one, the issuer's only key.

        Raises:
            NotAuthenticated: there is none.
            AuthUnavailable: the issuer does not answer, and no key of its was seen lately.
        """
        key = self._match(kid)
        if key is None or self._now() - self._fetched > LIFESPAN:
            await self._refresh(kid)
            key = self._match(kid)
        if key is not None and self._now() - self._fetched <= LIFESPAN + STALE:
            return key
        if self._failure:
            raise AuthUnavailable("the token issuer's keys cannot be fetched", retry_after=COOLDOWN)
        raise NotAuthenticated("the token names a key that its issuer does not publish")

    def _match(self, kid: str | None) -> PyJWK | None:
        if kid is None:
            return self._keys[0] if len(self._keys) == 1 else None
        return next((key for key in self._keys if key.key_id == kid), None)

    async def _refresh(self, kid: str | None) -> None:
        async with self._lock:
            now = self._now()
            fresh = now - self._fetched <= LIFESPAN and self._match(kid) is not None
            if fresh or now - self._tried < COOLDOWN:
                return
            self._tried = now
            try:
                async with asyncio.timeout(2 * TIMEOUT):
                    keys = await asyncio.to_thread(self._fetch)
            except (jwt.PyJWTError, TimeoutError, ValueError) as error:
                self._failure = str(error) or type(error).__name__
                log.warning("cannot fetch the token issuer's keys", error=self._failure)
                return
            self._keys, self._fetched, self._failure = keys, now, ""

    def _fetch(self) -> tuple[PyJWK, ...]:
        document: PyJWKSet = self._client.get_jwk_set(refresh=True)
        return tuple(key for key in document.keys if key.public_key_use in ("sig", None))
