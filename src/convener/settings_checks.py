"""Rules that tie settings together; each function returns what is wrong, naming the field, or nothing."""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from convener.settings import Settings

# A suspended node stops acting this long before its lease ends at the store (see `lease_ttl`).
LEASE_RESERVE: Final = 2.0

SHORTEST_RETENTION: Final = 3600.0

_DURATION: Final = re.compile(r"([1-9][0-9]{0,5})([hdw])")
_UNITS: Final = {"h": 3600.0, "d": 86_400.0, "w": 604_800.0}
_TLS_SCHEMES: Final = ("rediss", "valkeys")
_HMAC_ALGORITHMS: Final = frozenset({"HS256", "HS384", "HS512"})
_KEY_ALGORITHMS: Final = frozenset(
    {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"}
)
_JWT_FIELDS: Final = (
    "jwt_secret",
    "jwt_jwks_url",
    "jwt_issuer",
    "jwt_audience",
    "jwt_user_claim",
    "jwt_admin_claim",
    "jwt_algorithms",
    "jwt_leeway",
)


def _port_problem(settings: Settings) -> str | None:
    if settings.ops_port is not None and settings.ops_port == settings.port:
        return f"ops_port: {settings.ops_port} is the port of the API; leave it unset to have both there"
    return None


def find_problem(settings: Settings) -> str | None:
    """The first rule that `settings` break, as a sentence that names the field; none if all hold."""
    for rule in (
        _port_problem,
        _lease_problem,
        _store_problem,
        _archive_problem,
        _auth_problem,
        _jwt_problem,
        _exposure_problem,
    ):
        problem = rule(settings)
        if problem is not None:
            return problem
    return None


def duration(text: str) -> float | None:
    """A duration like ``30d`` in seconds, None for ``forever``. Raises `ValueError` for anything else."""
    if text == "forever":
        return None
    found = _DURATION.fullmatch(text)
    if found is None:
        raise ValueError("must be `forever`, or a number with h, d or w, as in 30d")
    return int(found[1]) * _UNITS[found[2]]


def _lease_problem(settings: Settings) -> str | None:
    # A node must survive three lost renewals in a row; otherwise it suspends at the first hiccup.
    if settings.lease_ttl - LEASE_RESERVE < 4 * settings.renew_interval:
        return (
            f"lease_ttl: {settings.lease_ttl:g} s is too short for renew_interval "
            f"{settings.renew_interval:g} s; lease_ttl - 2 s must be at least 4 x renew_interval"
        )
    return None


def _store_problem(settings: Settings) -> str | None:
    if settings.redis_url is None:
        for field in ("redis_credentials", "redis_ca_file", "redis_cert_file", "redis_key_file"):
            if getattr(settings, field) is not None:
                return f"{field}: has no effect without redis_url"
        if settings.durability != "memory":
            return f"durability: {settings.durability} has no effect without redis_url"
        return None
    if settings.data_dir is not None:
        return "data_dir: only a standalone node keeps files; leave it out, or leave out redis_url"
    if (settings.redis_cert_file is None) != (settings.redis_key_file is None):
        return "redis_cert_file, redis_key_file: a certificate and its key are set together"
    if not settings.redis_url.startswith(_TLS_SCHEMES):
        for field in ("redis_ca_file", "redis_cert_file"):
            if getattr(settings, field) is not None:
                return f"{field}: has no effect with this redis_url; use a rediss:// form"
    return None


def _archive_problem(settings: Settings) -> str | None:
    if settings.archive_url is not None and settings.redis_url is None and settings.data_dir is None:
        return "archive_url: has no effect on a log that is kept in memory alone; set redis_url or data_dir"
    return None


def _auth_problem(settings: Settings) -> str | None:
    given = settings.model_fields_set
    if settings.auth == "token" and not settings.auth_tokens and not settings.service_tokens:
        return "auth: token needs auth_tokens or service_tokens"
    if settings.auth != "token" and settings.auth_tokens:
        return f"auth_tokens: has no effect with auth={settings.auth}; set auth=token"
    if settings.auth == "none" and settings.service_tokens:
        return "service_tokens: has no effect with auth=none"
    if settings.auth != "jwt":
        for field in _JWT_FIELDS:
            if field in given:
                return f"{field}: has no effect with auth={settings.auth}; set auth=jwt"
    return None


def _jwt_problem(settings: Settings) -> str | None:
    if settings.auth != "jwt":
        return None
    # One kind of key only: with both, a public key can be passed off as the shared secret.
    if (settings.jwt_secret is None) == (settings.jwt_jwks_url is None):
        return "auth: jwt needs exactly one of jwt_secret and jwt_jwks_url"
    if settings.jwt_jwks_url is not None and urlsplit(settings.jwt_jwks_url).scheme not in ("http", "https"):
        return "jwt_jwks_url: must be an http or https URL"
    fitting = _HMAC_ALGORITHMS if settings.jwt_secret is not None else _KEY_ALGORITHMS
    for name in settings.jwt_algorithms:
        if name not in fitting:
            key = "jwt_secret" if settings.jwt_secret is not None else "jwt_jwks_url"
            return f"jwt_algorithms: {name} does not work with {key}; use {', '.join(sorted(fitting))}"
    return None


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to `host`; of names only ``localhost`` counts."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]").partition("%")[0]).is_loopback
    except ValueError:
        return False


def is_loopback_or_name(address: str) -> bool:
    """Whether `address` is no IP address (a name, the path of a socket), or one of this machine alone."""
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return True


def _exposure_problem(settings: Settings) -> str | None:
    if settings.auth == "none" and not is_loopback(settings.host):
        return (
            f"auth: none is refused on {settings.host}, which other machines can reach. Set auth=token with "
            "auth_tokens, auth=jwt with jwt_secret or jwt_jwks_url, or auth=hook with @app.authenticate; "
            "or listen on 127.0.0.1"
        )
    return None
