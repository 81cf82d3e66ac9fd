"""Who is calling."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Mapping
from typing import Any

import jwt
import pytest

from convener.errors import AuthUnavailable, ConfigurationError, NotAuthenticated
from convener.gateway import auth
from convener.gateway.auth import Authenticator, Identity, make_authenticator
from convener.settings import Settings
from tests.gateway.issuer import SECRET, ec_key, issuing, published, rsa_key, sign


def authenticator(**settings: Any) -> Authenticator:
    return make_authenticator(Settings(**settings))


def jwt_authenticator(**settings: Any) -> Authenticator:
    return authenticator(auth="jwt", **({} if "jwt_jwks_url" in settings else {"jwt_secret": SECRET}) | settings)


async def identify(made: Authenticator, token: str | None) -> Identity:
    return await made.identify(token, {})


# --- none -------------------------------------------------------------------------------------------------------


async def test_without_authentication_everybody_may_act_for_everybody() -> None:
    caller = await identify(authenticator(), None)
    assert caller == Identity("", admin=True, service=True)
    assert await identify(authenticator(), "whatever") == caller


async def test_without_authentication_an_admin_token_still_guards_the_admin_api() -> None:
    made = authenticator(admin_token="root")
    assert not (await identify(made, None)).admin
    assert not (await identify(made, "guess")).admin
    assert (await identify(made, "root")).admin


# --- token ------------------------------------------------------------------------------------------------------


async def test_static_tokens() -> None:
    made = authenticator(auth="token", auth_tokens={"t1": "alice"}, service_tokens=("s1",), admin_token="root")
    assert await identify(made, "t1") == Identity("alice")
    assert await identify(made, "s1") == Identity(service=True)
    assert await identify(made, "root") == Identity(admin=True)
    for token in (None, "", "t2", "T1", "\ud800"):
        with pytest.raises(NotAuthenticated):
            await identify(made, token)


# --- jwt --------------------------------------------------------------------------------------------------------


async def test_a_signed_token_names_the_user_and_its_end() -> None:
    end = int(time.time()) + 60
    caller = await identify(jwt_authenticator(jwt_leeway=5.0), sign(exp=end))
    assert caller == Identity("alice", expires_at=end + 5.0)


@pytest.mark.parametrize(
    ("token", "detail"),
    [
        (None, "a token is needed"),
        ("", "does not hold"),
        ("no.jwt", "does not hold"),
        ("a.b.c", "does not hold"),
        ("Ä.b.c", "does not hold"),
        ("\ud800.b.c", "does not hold"),
        (sign("another secret that is longer than 32 bytes"), "signature"),
        (sign(algorithm="HS512", key=SECRET * 2), "alg"),
        (sign(exp=int(time.time()) - 3600), "expired"),
        (sign(exp=None), "exp"),
        (sign(nbf=int(time.time()) + 3600), "not yet valid"),
        (sign(sub=None), "claim sub is no user id"),
        (sign(sub="not an id"), "claim sub is no user id"),
        (sign(sub=""), "claim sub is no user id"),
        (sign(sub="x" * 129), "claim sub is no user id"),
    ],
)
async def test_a_token_that_does_not_hold(token: str | None, detail: str) -> None:
    with pytest.raises(NotAuthenticated, match=detail):
        await identify(jwt_authenticator(), token)


async def test_an_unsigned_token_is_refused() -> None:
    with pytest.raises(NotAuthenticated):
        await identify(jwt_authenticator(), jwt.encode({"sub": "alice", "exp": time.time() + 60}, "", "none"))


async def test_a_header_that_nests_without_end_is_refused() -> None:
    header = base64.urlsafe_b64encode(b'{"a":' * 100_000).decode().rstrip("=")
    with pytest.raises(NotAuthenticated):
        await identify(jwt_authenticator(), f"{header}.e30.x")


async def test_issuer_audience_and_claims() -> None:
    made = jwt_authenticator(
        jwt_issuer="https://id.example", jwt_audience="chat", jwt_user_claim="email", jwt_admin_claim="is_admin"
    )
    good: dict[str, Any] = {"iss": "https://id.example", "aud": ["chat", "mail"], "email": "a@example.org"}
    assert (await identify(made, sign(**good))).user_id == "a@example.org"
    for wrong in ({"iss": "https://evil.example"}, {"iss": None}, {"aud": "mail"}, {"aud": None}, {"email": None}):
        with pytest.raises(NotAuthenticated):
            await identify(made, sign(**(good | wrong)))
    assert (await identify(made, sign(**good, is_admin=True))).admin
    for no_admin in (False, "true", 1, None):
        assert not (await identify(made, sign(**good, is_admin=no_admin))).admin


async def test_any_audience_is_fine_if_none_is_configured() -> None:
    assert (await identify(jwt_authenticator(), sign(aud="somebody"))).user_id == "alice"


async def test_services_and_admins_have_static_tokens_beside_jwt() -> None:
    made = jwt_authenticator(service_tokens=("s1",), admin_token="root")
    assert await identify(made, "s1") == Identity(service=True)
    assert await identify(made, "root") == Identity(admin=True)


async def test_an_open_connection_ends_with_its_token() -> None:
    made = jwt_authenticator()
    lasting = Identity("alice", expires_at=time.time() + 60)
    assert await made.confirm(lasting, "gone", {}) is lasting
    with pytest.raises(NotAuthenticated, match="expired"):
        await made.confirm(Identity("alice", expires_at=time.time() - 1), "gone", {})


# --- jwt with the issuer's keys -----------------------------------------------------------------------------------


async def test_keys_of_an_issuer() -> None:
    one, other = rsa_key(), ec_key()
    with issuing() as issuer:
        issuer.keys = [published(one, "r"), published(other, "e")]
        made = jwt_authenticator(jwt_jwks_url=issuer.url)
        assert (await identify(made, sign(one, "RS256", "r"))).user_id == "alice"
        assert (await identify(made, sign(other, "ES256", "e", sub="bob"))).user_id == "bob"
        assert issuer.requests == 1
        # No other key, no key under another's name, and no shared secret in place of a key.
        for token in (sign(rsa_key(), "RS256", "r"), sign(other, "ES256", "r"), sign(kid="r")):
            with pytest.raises(NotAuthenticated):
                await identify(made, token)


async def test_a_token_without_key_id_fits_an_only_key() -> None:
    key = rsa_key()
    with issuing() as issuer:
        issuer.keys = [published(key, None)]
        made = jwt_authenticator(jwt_jwks_url=issuer.url)
        assert (await identify(made, sign(key, "RS256"))).user_id == "alice"


async def test_invented_key_ids_do_not_make_us_fetch() -> None:
    key = rsa_key()
    with issuing() as issuer:
        issuer.keys = [published(key, "k")]
        made = jwt_authenticator(jwt_jwks_url=issuer.url)
        for number in range(20):
            with pytest.raises(NotAuthenticated, match="does not publish"):
                await identify(made, sign(key, "RS256", f"invented-{number}"))
        assert issuer.requests == 1


async def test_callers_at_the_same_time_share_one_fetch() -> None:
    key = rsa_key()
    with issuing() as issuer:
        issuer.keys = [published(key, "k")]
        made = jwt_authenticator(jwt_jwks_url=issuer.url)
        callers = await asyncio.gather(*(identify(made, sign(key, "RS256", "k")) for _ in range(10)))
        assert {caller.user_id for caller in callers} == {"alice"}
        assert issuer.requests == 1


@pytest.mark.parametrize(("status", "body"), [(500, None), (200, b"<html>"), (200, b"[]"), (200, b'{"keys":[]}')])
async def test_an_issuer_that_does_not_answer_well_is_no_fault_of_the_caller(status: int, body: bytes | None) -> None:
    with issuing() as issuer:
        issuer.status, issuer.body = status, body
        made = jwt_authenticator(jwt_jwks_url=issuer.url)
        with pytest.raises(AuthUnavailable) as caught:
            await identify(made, sign(rsa_key(), "RS256", "k"))
        assert caught.value.retry_after is not None


# --- hook -------------------------------------------------------------------------------------------------------


async def test_the_hook_gets_token_and_headers() -> None:
    async def hook(token: str | None, headers: Mapping[str, str]) -> Identity | None:
        return Identity(headers["x-user"]) if token == "t" else None

    made = make_authenticator(Settings(auth="hook"), hook)
    assert await made.identify("t", {"x-user": "alice"}) == Identity("alice")
    with pytest.raises(NotAuthenticated):
        await made.identify("u", {"x-user": "alice"})


@pytest.mark.parametrize("user", [None, "", "no id", "x" * 129])
async def test_the_hook_has_to_name_a_user(user: str | None) -> None:
    async def hook(token: str | None, headers: Mapping[str, str]) -> Identity | None:
        return Identity(user)

    with pytest.raises(NotAuthenticated, match="user id"):
        await identify(make_authenticator(Settings(auth="hook"), hook), "t")


async def test_a_service_needs_no_user() -> None:
    async def hook(token: str | None, headers: Mapping[str, str]) -> Identity | None:
        return Identity(service=True)

    assert (await identify(make_authenticator(Settings(auth="hook"), hook), "t")).service


async def test_a_failing_hook_refuses_nobody_for_good() -> None:
    async def hook(token: str | None, headers: Mapping[str, str]) -> Identity | None:
        raise KeyError("secret")

    with pytest.raises(AuthUnavailable) as caught:
        await identify(make_authenticator(Settings(auth="hook"), hook), "t")
    assert "secret" not in caught.value.detail


async def test_the_hook_may_refuse_in_its_own_words() -> None:
    async def hook(token: str | None, headers: Mapping[str, str]) -> Identity | None:
        raise NotAuthenticated("come back tomorrow")

    with pytest.raises(NotAuthenticated, match="tomorrow"):
        await identify(make_authenticator(Settings(auth="hook"), hook), "t")


async def test_a_hook_that_hangs_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "HOOK_TIMEOUT", 0.01)

    async def hook(token: str | None, headers: Mapping[str, str]) -> Identity | None:
        await asyncio.Event().wait()
        return None

    with pytest.raises(AuthUnavailable):
        await identify(make_authenticator(Settings(auth="hook"), hook), "t")


def test_hook_and_settings_have_to_fit() -> None:
    async def hook(token: str | None, headers: Mapping[str, str]) -> Identity | None:
        return None

    with pytest.raises(ConfigurationError, match="needs the function"):
        make_authenticator(Settings(auth="hook"))
    with pytest.raises(ConfigurationError, match="auth=hook"):
        make_authenticator(Settings(), hook)
