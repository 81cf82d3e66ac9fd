"""Who is calling: nobody in particular, a static token, a JSON Web Token, or who the application says."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import jwt
import structlog
from jwt import PyJWK

from convener.errors import AuthUnavailable, ConfigurationError, ConvenerError, NotAuthenticated
from convener.gateway.jwks import KeySource
from convener.ids import is_id
from convener.settings import Settings

log = structlog.get_logger(__name__)

HOOK_TIMEOUT: Final = 10.0
"""Seconds that the application's function may take."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A caller.

    Attributes:
        user_id: who it is, or for whom it acts if it names nobody else; "" is the anonymous user of
            auth `none`; None for a service without a user.
        admin: may use the admin API and reach every conversation.
        service: may act for any user.
        expires_at: when this stops being true, in seconds since 1970; None for never.
    """

    user_id: str | None = None
    admin: bool = False
    service: bool = False
    expires_at: float | None = None

    @property
    def privileged(self) -> bool:
        """Whether other users' conversations are open to it."""
        return self.admin or self.service


AuthenticateHook = Callable[[str | None, Mapping[str, str]], Awaitable[Identity | None]]
"""(token, headers with lower-case names) → the caller, or None (or `NotAuthenticated`) to refuse."""


class Authenticator(Protocol):
    """Finds out who is calling."""

    async def identify(self, token: str | None, headers: Mapping[str, str]) -> Identity:
        """The caller.

        Raises:
            NotAuthenticated: the token is missing, unknown, damaged or out of date.
            AuthUnavailable: nobody could say.
        """
        ...

    async def confirm(self, identity: Identity, token: str | None, headers: Mapping[str, str]) -> Identity:
        """The caller of a connection that has been open for a while. Raises as `identify`."""
        ...


def make_authenticator(settings: Settings, hook: AuthenticateHook | None = None) -> Authenticator:
    """What `settings.auth` asks for.

    Raises:
        ConfigurationError: auth=hook without a function, or a function without auth=hook.
    """
    if (settings.auth == "hook") != (hook is not None):
        raise ConfigurationError(
            "auth: hook needs the function under @app.authenticate"
            if hook is None
            else f"auth: {settings.auth} does not use the function under @app.authenticate; set auth=hook"
        )
    fixed = FixedTokens(settings)
    if settings.auth == "none":
        return NoAuthentication(fixed, open_admin=settings.admin_token is None)
    if settings.auth == "jwt":
        return JwtAuthentication(settings, fixed)
    return HookAuthentication(hook, fixed) if hook is not None else fixed


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


class FixedTokens:
    """Tokens that stand in the settings.

    They are looked up by their digest: how long that takes says nothing about the token.
    """

    def __init__(self, settings: Settings) -> None:
        self._known = {_digest(token): Identity(user) for token, user in settings.auth_tokens.items()}
        self._known |= {_digest(token): Identity(service=True) for token in settings.service_tokens}
        if settings.admin_token is not None:
            self._known[_digest(settings.admin_token)] = Identity(admin=True)

    def find(self, token: str | None) -> Identity | None:
        """Whom the token stands for, None if it is not one of these."""
        return None if token is None else self._known.get(_digest(token))

    async def identify(self, token: str | None, headers: Mapping[str, str]) -> Identity:
        """See `Authenticator`."""
        found = self.find(token)
        if found is None:
            raise NotAuthenticated("a token is needed" if token is None else "the token is not known")
        return found

    async def confirm(self, identity: Identity, token: str | None, headers: Mapping[str, str]) -> Identity:
        """See `Authenticator`: the settings do not change while the node runs."""
        return identity


class NoAuthentication:
    """Everybody may act for everybody: settings allow it on loopback addresses only.

    Args:
        open_admin: no admin token is configured, so the admin API needs none.
    """

    def __init__(self, fixed: FixedTokens, *, open_admin: bool) -> None:
        self._fixed = fixed
        self._anybody = Identity("", admin=open_admin, service=True)

    async def identify(self, token: str | None, headers: Mapping[str, str]) -> Identity:
        """See `Authenticator`. Tokens other than the admin's mean nothing here and are not looked at."""
        return self._fixed.find(token) or self._anybody

    async def confirm(self, identity: Identity, token: str | None, headers: Mapping[str, str]) -> Identity:
        """See `Authenticator`."""
        return identity


class JwtAuthentication:
    """Signed tokens of an issuer.

    They must say when they expire: an open connection would outlive them for ever otherwise.
    """

    def __init__(self, settings: Settings, fixed: FixedTokens) -> None:
        self._fixed = fixed
        self._secret = settings.jwt_secret
        self._keys = KeySource(settings.jwt_jwks_url) if settings.jwt_jwks_url is not None else None
        self._algorithms = list(settings.accepted_algorithms)
        self._issuer = settings.jwt_issuer
        self._audience = settings.jwt_audience
        self._user_claim = settings.jwt_user_claim
        self._admin_claim = settings.jwt_admin_claim
        self._leeway = settings.jwt_leeway

    async def identify(self, token: str | None, headers: Mapping[str, str]) -> Identity:
        """See `Authenticator`."""
        if token is None:
            raise NotAuthenticated("a token is needed")
        found = self._fixed.find(token)
        return found if found is not None else self._identity(await self._claims(token))

    async def confirm(self, identity: Identity, token: str | None, headers: Mapping[str, str]) -> Identity:
        """See `Authenticator`: a signature that was good stays good, only time passes."""
        if identity.expires_at is not None and identity.expires_at <= time.time():
            raise NotAuthenticated("the token has expired")
        return identity

    async def _claims(self, token: str) -> dict[str, Any]:
        try:
            return jwt.decode(
                token,
                await self._key(token),
                algorithms=self._algorithms,
                audience=self._audience,
                issuer=self._issuer,
                leeway=self._leeway,
                options={"require": ["exp"], "verify_aud": self._audience is not None},
            )
        except jwt.ExpiredSignatureError:
            raise NotAuthenticated("the token has expired") from None
        except (jwt.PyJWTError, ValueError, RecursionError) as error:
            # The latter two: PyJWT decodes the header's JSON before it knows who wrote it.
            raise NotAuthenticated(f"the token does not hold: {str(error).lower()}") from None

    async def _key(self, token: str) -> PyJWK | str:
        if self._keys is not None:
            return await self._keys.find(_key_id(token))
        return self._secret or ""

    def _identity(self, claims: Mapping[str, Any]) -> Identity:
        user = claims.get(self._user_claim)
        if not isinstance(user, str) or not is_id(user):
            raise NotAuthenticated(f"the token's claim {self._user_claim} is no user id")
        admin = self._admin_claim is not None and claims.get(self._admin_claim) is True
        return Identity(user, admin=admin, expires_at=float(claims["exp"]) + self._leeway)


def _key_id(token: str) -> str | None:
    kid = jwt.get_unverified_header(token).get("kid")
    return kid if isinstance(kid, str) else None


class HookAuthentication:
    """The application's own function, under a deadline."""

    def __init__(self, hook: AuthenticateHook, fixed: FixedTokens) -> None:
        self._hook = hook
        self._fixed = fixed

    async def identify(self, token: str | None, headers: Mapping[str, str]) -> Identity:
        """See `Authenticator`."""
        found = self._fixed.find(token)
        if found is not None:
            return found
        try:
            async with asyncio.timeout(HOOK_TIMEOUT):
                identity = await self._hook(token, headers)
        except ConvenerError:
            raise
        except Exception as error:
            # Its own time-outs and bugs: the caller may be in the right, so this is no refusal.
            log.exception("the authenticate hook failed")
            raise AuthUnavailable("the application's authentication failed", retry_after=1.0) from error
        if identity is None:
            raise NotAuthenticated("the application refused the caller")
        if not identity.privileged and not is_id(identity.user_id):
            log.error("the authenticate hook returned an identity without a valid user id")
            raise NotAuthenticated("the application named no valid user id")
        return identity

    async def confirm(self, identity: Identity, token: str | None, headers: Mapping[str, str]) -> Identity:
        """See `Authenticator`: the application is asked again."""
        return await self.identify(token, headers)
