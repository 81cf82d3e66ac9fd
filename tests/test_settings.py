"""Settings: precedence, refusals that name the field, and secrets that stay secret."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from convener.errors import ConfigurationError
from convener.settings import Settings
from convener.settings_checks import is_loopback
from convener.settings_sources import is_service_link

SECRET = "s" * 32


@pytest.fixture(autouse=True)
def _in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refusal(**values: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        Settings(**values)
    return str(caught.value)


def test_defaults_make_a_standalone_node_on_loopback() -> None:
    settings = Settings()
    assert (settings.host, settings.port, settings.redis_url, settings.auth) == (
        "127.0.0.1",
        8000,
        None,
        "none",
    )
    assert settings.max_concurrent_conversations == 3
    assert (settings.lease_ttl, settings.renew_interval, settings.fast_burial) == (10.0, 0.5, True)
    assert (settings.drain_timeout, settings.ready_without_store, settings.hibernate_after) == (30, 30, 300)
    assert (settings.max_pending_messages, settings.max_payload_bytes) == (100, 1024 * 1024)


def test_every_field_is_documented_with_its_unit() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        if field.annotation is float:
            # A part of something has none.
            assert "second" in field.description or field.description.startswith("Part of"), name


def test_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        setattr(Settings(), "port", 1)  # noqa: B010 - a plain assignment is refused by the type checker too


# --- sources ----------------------------------------------------------------------------------------------


def test_flags_beat_environment_beats_file_beats_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "convener.toml").write_text('port = 1111\nnamespace = "file"\nlog_format = "json"\n')
    monkeypatch.setenv("CONVENER_PORT", "2222")
    monkeypatch.setenv("CONVENER_NAMESPACE", "environment")
    settings = Settings(port=3333)
    assert (settings.port, settings.namespace, settings.log_format) == (3333, "environment", "json")
    assert settings.max_pending_messages == 100


@pytest.mark.parametrize(
    ("variable", "field", "expected"),
    [
        ("FAST_BURIAL", "fast_burial", False),
        ("LEASE_TTL", "lease_ttl", 20.0),
        ("MAX_PENDING_MESSAGES", "max_pending_messages", 7),
        ("CORS_ORIGINS", "cors_origins", ("https://a.example", "http://b.example:8080")),
        ("DATA_DIR", "data_dir", Path("data")),
    ],
)
def test_text_from_the_environment_becomes_the_fields_type(
    monkeypatch: pytest.MonkeyPatch, variable: str, field: str, expected: object
) -> None:
    texts = {
        "FAST_BURIAL": "off",
        "LEASE_TTL": "20",
        "MAX_PENDING_MESSAGES": "7",
        "CORS_ORIGINS": "https://a.example, http://b.example:8080",
        "DATA_DIR": "data",
    }
    monkeypatch.setenv(f"CONVENER_{variable}", texts[variable])
    assert getattr(Settings(), field) == expected


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVENER_REDIS_URL", "")
    assert Settings().redis_url is None


def test_tokens_from_json_and_from_a_toml_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "convener.toml").write_text('auth = "token"\n[auth_tokens]\nt1 = "alice"\n')
    assert Settings().auth_tokens == {"t1": "alice"}
    monkeypatch.setenv("CONVENER_AUTH_TOKENS", '{"t2": "bob"}')
    assert Settings().auth_tokens == {"t2": "bob"}


def test_a_table_given_in_python_replaces_that_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "convener.toml").write_text('auth = "token"\n[auth_tokens]\nrevoked = "alice"\n')
    assert Settings(auth_tokens={"new": "alice"}).auth_tokens == {"new": "alice"}


def test_a_secret_may_stand_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_text("hidden\n")
    monkeypatch.setenv("CONVENER_ADMIN_TOKEN_FILE", str(tmp_path / "secret"))
    assert Settings().admin_token == "hidden"


def test_a_secret_given_twice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_text("hidden")
    monkeypatch.setenv("CONVENER_ADMIN_TOKEN_FILE", str(tmp_path / "secret"))
    monkeypatch.setenv("CONVENER_ADMIN_TOKEN", "other")
    assert "admin_token: set twice" in refusal()


def test_a_secret_file_that_cannot_be_read_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVENER_ADMIN_TOKEN_FILE", "missing")
    assert refusal() == "CONVENER_ADMIN_TOKEN_FILE: cannot read missing: No such file or directory"


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (
            "CONVENER_REDIS_ULR",
            "unknown environment variable CONVENER_REDIS_ULR; did you mean CONVENER_REDIS_URL?",
        ),
        ("CONVENER_XYZZY", "unknown environment variable CONVENER_XYZZY"),
        ("CONVENER_PORT_FILE", "unknown environment variable CONVENER_PORT_FILE"),
        ("CONVENER_REDIS_CREDENTIALS", "unknown environment variable CONVENER_REDIS_CREDENTIALS"),
    ],
)
def test_an_unknown_variable_is_refused(monkeypatch: pytest.MonkeyPatch, variable: str, expected: str) -> None:
    monkeypatch.setenv(variable, "x")
    assert refusal().startswith(expected)


def test_the_clients_variables_are_not_the_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVENER_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("CONVENER_TOKEN", "t")
    assert Settings().admin_token is None


def test_kubernetes_service_links_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "CONVENER_SERVICE_HOST": "10.0.0.7",
        "CONVENER_SERVICE_PORT": "8000",
        "CONVENER_SERVICE_PORT_HTTP": "8000",
        "CONVENER_PORT": "tcp://10.0.0.7:8000",
        "CONVENER_PORT_8000_TCP": "tcp://10.0.0.7:8000",
        "CONVENER_PORT_8000_TCP_PROTO": "tcp",
        "CONVENER_PORT_8000_TCP_ADDR": "10.0.0.7",
        "CONVENER_REDIS_PORT": "tcp://10.0.0.8:6379",
        "CONVENER_REDIS_SERVICE_HOST": "10.0.0.8",
        "CONVENER_REDIS_PORT_6379_TCP_PORT": "6379",
    }.items():
        monkeypatch.setenv(name, value)
    assert Settings().port == 8000


@pytest.mark.parametrize(("name", "value"), [("CONVENER_PORT", "9000"), ("CONVENER_HOST", "tcp://10.0.0.7:8000")])
def test_what_looks_like_a_setting_is_no_service_link(name: str, value: str) -> None:
    assert not is_service_link(name, value)


def test_the_file_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "convener.toml"
    file.write_text("prot = 1\n")
    assert refusal() == "convener.toml: unknown setting prot; did you mean port?"
    file.write_text("port = \n")
    assert refusal().startswith("convener.toml: not valid TOML")
    file.unlink()
    file.mkdir()
    assert refusal() == "convener.toml: cannot be read: Is a directory"


# --- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"prot": 1}, "unknown setting prot; did you mean port?"),
        ({"port": "http"}, "port (CONVENER_PORT)"),
        ({"port": 70_000}, "port (CONVENER_PORT)"),
        ({"lease_ttl": float("nan")}, "lease_ttl (CONVENER_LEASE_TTL)"),
        ({"drain_timeout": -1}, "drain_timeout (CONVENER_DRAIN_TIMEOUT)"),
        ({"max_concurrent_conversations": 0}, "max_concurrent_conversations"),
        ({"limit_policy": "wait"}, "limit_policy (CONVENER_LIMIT_POLICY): input should be 'evict_idle'"),
        ({"overlap_policy": "sometimes"}, "overlap_policy"),
        ({"node_name": "a b"}, "node_name"),
        ({"namespace": "a{b}"}, "namespace"),
        ({"redis_url": "localhost:6379"}, "redis_url (CONVENER_REDIS_URL): must look like redis://"),
        ({"redis_url": "http://localhost"}, "redis_url"),
        (
            {"redis_url": "redis+sentinel://h1:26379,h2:26379"},
            "redis_url (CONVENER_REDIS_URL): a Sentinel URL ends with",
        ),
        (
            {"redis_url": "redis+sentinel://h1:26379,h2:26379/main"},
            "redis_url (CONVENER_REDIS_URL): a Sentinel URL ends with",
        ),
        ({"redis_url": "redis+nodes://h1"}, "redis_url"),
        ({"redis_url": "redis+cluster://"}, "redis_url"),
        ({"redis_url": "redis+cluster://h", "redis_ca_file": "ca.pem"}, "redis_ca_file: has no effect"),
        ({"redis_url": "rediss://h", "redis_ca_file": "missing.pem"}, "redis_ca_file"),
        (
            {"redis_url": "redis://h", "redis_ca_file": "ca.pem"},
            "redis_ca_file: has no effect with this redis_url",
        ),
        ({"redis_url": "rediss://h", "redis_cert_file": "ca.pem"}, "redis_cert_file, redis_key_file"),
        ({"redis_ca_file": "ca.pem"}, "redis_ca_file: has no effect without redis_url"),
        ({"durability": "replicated"}, "durability: replicated has no effect without redis_url"),
        ({"durability": "managed", "data_dir": "d"}, "durability: managed has no effect without redis_url"),
        ({"redis_url": "redis://h", "durability": "disk"}, "durability"),
        ({"redis_url": "redis://h", "data_dir": "d"}, "data_dir: only a standalone node keeps files"),
        ({"cors_origins": "example.com"}, "cors_origins"),
        ({"cors_origins": "https://example.com/path"}, "cors_origins"),
        ({"auth": "token"}, "auth: token needs auth_tokens or service_tokens"),
        ({"auth_tokens": {"t": "u"}}, "auth_tokens: has no effect with auth=none"),
        (
            {"auth": "token", "auth_tokens": "t=u"},
            "auth_tokens (CONVENER_AUTH_TOKENS): must be a JSON object",
        ),
        (
            {"auth": "token", "auth_tokens": {"t": "a b"}},
            "auth_tokens (CONVENER_AUTH_TOKENS): 'a b' is no user id",
        ),
        ({"auth": "token", "auth_tokens": {"": "a"}}, "auth_tokens (CONVENER_AUTH_TOKENS): a token is empty"),
        ({"service_tokens": "t"}, "service_tokens: has no effect with auth=none"),
        ({"jwt_leeway": 5}, "jwt_leeway: has no effect with auth=none"),
        ({"auth": "jwt"}, "auth: jwt needs exactly one of"),
        (
            {"auth": "jwt", "jwt_secret": SECRET, "jwt_jwks_url": "https://x/k"},
            "auth: jwt needs exactly one of",
        ),
        ({"auth": "jwt", "jwt_secret": "short"}, "jwt_secret (CONVENER_JWT_SECRET): must have 32 bytes"),
        ({"auth": "jwt", "jwt_jwks_url": "ftp://x"}, "jwt_jwks_url: must be an http or https URL"),
        ({"auth": "jwt", "jwt_secret": SECRET, "jwt_algorithms": "RS256"}, "jwt_algorithms: RS256"),
        ({"auth": "jwt", "jwt_jwks_url": "https://x", "jwt_algorithms": ["HS256"]}, "jwt_algorithms: HS256"),
    ],
)
def test_refusals_name_the_field(tmp_path: Path, values: dict[str, Any], expected: str) -> None:
    (tmp_path / "ca.pem").write_text("certificate")
    assert refusal(**values).startswith(expected)


def test_every_wrong_field_is_named_at_once() -> None:
    message = refusal(port="x", drain_timeout="y")
    assert "port (" in message
    assert "drain_timeout (" in message


def test_the_lease_must_outlive_four_renewals() -> None:
    assert Settings(lease_ttl=4.0, renew_interval=0.5).lease_ttl == 4.0
    assert refusal(lease_ttl=3.9, renew_interval=0.5).startswith("lease_ttl: 3.9 s is too short for renew_interval")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.com"])
def test_no_authentication_only_on_loopback(host: str) -> None:
    message = refusal(host=host)
    assert message.startswith(f"auth: none is refused on {host}")
    assert "auth=token with auth_tokens" in message
    assert Settings(host=host, auth="token", auth_tokens={"t": "u"}).host == host


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("localhost.example", False),
        ("fe80::1%eth0", False),
    ],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_the_algorithms_follow_the_kind_of_key() -> None:
    assert Settings(auth="jwt", jwt_secret=SECRET).accepted_algorithms == ("HS256",)
    assert Settings(auth="jwt", jwt_jwks_url="https://x/k").accepted_algorithms == ("RS256", "ES256")
    assert Settings(auth="jwt", jwt_secret=SECRET, jwt_algorithms=("HS512",)).accepted_algorithms == ("HS512",)


# --- secrets ----------------------------------------------------------------------------------------------


def test_secrets_are_in_no_representation() -> None:
    settings = Settings(
        auth="token",
        auth_tokens={"hidden": "alice"},
        service_tokens=("hidden",),
        admin_token="hidden",
        redis_url="redis://user:hidden@store.example:6379/0?password=hidden",
    )
    assert "hidden" not in repr(settings)
    assert "hidden" not in str(settings)
    assert settings.safe_redis_url == "redis://store.example:6379/0"
    several = Settings(redis_url="rediss+sentinel://u:hidden@h1:1,[::1]:2/0/main?sentinel_password=hidden")
    assert several.safe_redis_url == "rediss+sentinel://h1:1,[::1]:2/0/main"


@pytest.mark.parametrize(
    "url",
    [
        "valkeys://h:1/0",
        "valkey+unix:///path",
        "rediss+cluster://h1,h2:7",
        "valkeys+sentinel://u:p@h1,h2:7/0/main?sentinel_username=x",
    ],
)
def test_stores_of_all_kinds(url: str) -> None:
    assert Settings(redis_url=url).redis_url == url


@pytest.mark.parametrize("values", [{"jwt_secret": "hidden"}, {"redis_url": "hidden"}, {"auth_tokens": "hidden"}])
def test_a_refused_secret_is_not_repeated(values: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(ConfigurationError) as caught:
        Settings(**values)
    assert "hidden" not in str(caught.value)
    assert "hidden" not in str(caught.value.__cause__)
    assert "hidden" not in caplog.text


# --- derived ----------------------------------------------------------------------------------------------


def test_replace_checks_again_and_reads_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(port=1234, auth="jwt", jwt_secret=SECRET)
    monkeypatch.setenv("CONVENER_PORT", "9999")
    assert settings.replace(namespace="other").port == 1234
    assert settings.replace(namespace="other").jwt_secret == SECRET
    with pytest.raises(ConfigurationError, match="lease_ttl"):
        settings.replace(lease_ttl=1)


def test_credentials_are_a_callable_from_python() -> None:
    settings = Settings(redis_url="redis://h", redis_credentials=lambda: ("user", "password"))
    assert settings.redis_credentials is not None
    assert settings.redis_credentials() == ("user", "password")


@pytest.mark.parametrize(
    ("text", "seconds"), [("forever", None), ("1h", 3600), ("36h", 129_600), ("30d", 2_592_000), ("2w", 1_209_600)]
)
def test_retention_is_a_number_with_a_unit(text: str, seconds: float | None) -> None:
    assert Settings(retention=text).retention_seconds == seconds


@pytest.mark.parametrize("text", ["30", "0d", "-1d", "1.5d", "30 d", "30D", "90m", "never", "", "1234567d"])
def test_other_retentions_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"retention.*: must be `forever`, or a number with h, d or w"):
        Settings(retention=text)


@pytest.mark.parametrize("url", ["file:///srv/archive", "s3://bucket/some/prefix", "gs://bucket", "az://account/box"])
def test_archives_of_all_kinds(url: str, tmp_path: Path) -> None:
    assert Settings(archive_url=url, redis_url="redis://h").archive_url == url
    assert Settings(archive_url=url, data_dir=tmp_path).archive_url == url
    with pytest.raises(ConfigurationError, match="archive_url: has no effect on a log that is kept in memory"):
        Settings(archive_url=url)


@pytest.mark.parametrize("url", ["archive", "/srv/archive", "file://", "file://srv/archive", "s3://", "ftp://h/x"])
def test_what_is_no_archive(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"archive_url.*: must look like"):
        Settings(archive_url=url, redis_url="redis://h")
