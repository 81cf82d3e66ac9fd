"""The settings of a node: one frozen object, checked as a whole before anything starts.

Values come from, highest first: keyword arguments (the command line's flags), ``CONVENER_<FIELD>``
environment variables, ``convener.toml`` in the working directory, the defaults below. Durations are seconds.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    Field,
    FilePath,
    ModelWrapValidatorHandler,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from convener.errors import ConfigurationError
from convener.ids import is_id, is_node_name
from convener.settings_checks import SHORTEST_RETENTION, duration, find_problem
from convener.settings_sources import PREFIX, EnvironmentSource, TomlSource, suggestion

__all__ = ["RedisCredentials", "Settings"]

# A password that is only valid for minutes (IAM, a vault) is asked for at each new connection. The callable
# runs in the event loop and in the heartbeat thread: it must be quick and safe to call from both.
RedisCredentials = Callable[[], tuple[str, str]]

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Texts = tuple[str, ...]


_REDIS_URL: Final = re.compile(r"((redis|rediss|valkey|valkeys)(\+sentinel|\+cluster)?|unix|valkey\+unix)://.+")
_ARCHIVE_URL: Final = re.compile(r"(file://(localhost)?/[^/].*|memory:///|(s3a?|gs|az|adl|azure|abfss?)://[^/].*)")
_SENTINEL_PATH: Final = re.compile(r"[^/]+/\d+/[^/]+")
_NAMESPACE: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Settings(BaseSettings):
    """Everything that can be configured; each field is one flag, variable or TOML key of the same name.

    Raises:
        ConfigurationError: a value is unknown, malformed or at odds with another; names the field.
    """

    model_config = SettingsConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    # May stand in a file named by CONVENER_<FIELD>_FILE.
    secret_fields: ClassVar[tuple[str, ...]] = (
        "redis_url",
        "auth_tokens",
        "service_tokens",
        "jwt_secret",
        "admin_token",
    )
    # A callable: cannot be written in a variable or a file.
    code_only_fields: ClassVar[tuple[str, ...]] = ("redis_credentials",)

    # --- the node ---------------------------------------------------------------------------------
    host: str = Field(default="127.0.0.1", min_length=1, description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="TCP port to listen on; 0 takes a free one.")
    ops_port: int | None = Field(
        default=None,
        ge=1,
        le=65535,
        description="TCP port for health and metrics (/livez, /healthz, /readyz, /metrics), which are then not served "
        "on `port`; on the same address. Default: none, they are.",
    )
    node_name: str | None = Field(
        default=None,
        description="Name of this node, unique in the cluster: 1 to 64 of A-Z a-z 0-9 . _ : @ -. "
        "Default: host name and process id.",
    )
    log_format: Literal["auto", "json", "console"] = Field(
        default="auto",
        description="Form of the log: `console`, `json`, or `auto`: console on a terminal, else JSON.",
    )
    data_dir: Path | None = Field(
        default=None,
        description="Directory in which a standalone node keeps its log (SQLite). Default: memory only. "
        "Not together with `redis_url`.",
    )

    # --- the store --------------------------------------------------------------------------------
    redis_url: str | None = Field(
        default=None,
        repr=False,
        description="Redis or Valkey of the cluster: redis://, rediss:// (TLS), unix://, redis+sentinel://, "
        "redis+cluster://, or the same with valkey. Default: none, a standalone node.",
    )
    redis_credentials: RedisCredentials | None = Field(
        default=None,
        repr=False,
        description="Callable that returns (user name, password), called for each connection. Python only.",
    )
    redis_ca_file: FilePath | None = Field(
        default=None,
        description="PEM file of the authorities that sign the store's certificate. Default: the system's.",
    )
    redis_cert_file: FilePath | None = Field(
        default=None,
        description="PEM file of this node's certificate for the store.",
    )
    redis_key_file: FilePath | None = Field(
        default=None,
        description="PEM file of the key of `redis_cert_file`.",
    )
    durability: Literal["memory", "replicated", "managed"] = Field(
        default="memory",
        description="When what is accepted counts as stored: `memory`, when the store's primary has it; `replicated`, "
        "when a replica has confirmed it (WAIT), so that a fail-over to it loses nothing that was acknowledged; "
        "`managed`, when it is answered, for services that replicate before they answer.",
    )
    namespace: str = Field(
        default="convener",
        description="Prefix of all keys and channels, so that clusters may share a store: A-Z a-z 0-9 . _ -.",
    )

    store_high_watermark: float = Field(
        default=0.8,
        gt=0,
        le=1,
        description="Part of the store's memory limit from which on new conversations are refused (`store_full`), so "
        "that running ones can finish. Without effect if the store has no limit or does not say.",
    )

    # --- conversations ----------------------------------------------------------------------------
    max_concurrent_conversations: int = Field(
        default=3,
        ge=1,
        description="Conversations that one user may have loaded in the cluster at a time.",
    )
    limit_policy: Literal["evict_idle", "reject", "queue"] = Field(
        default="evict_idle",
        description="What a start over the limit does: `evict_idle` releases the user's longest idle "
        "conversation, never a working one; `reject` refuses; `queue` waits for a free slot.",
    )
    overlap_policy: Literal["enqueue", "reject", "interrupt"] = Field(
        default="enqueue",
        description="What a message does that arrives during a turn: `enqueue` waits for the turn to end; "
        "`reject` is refused; `interrupt` ends every turn before it. A message may choose for itself.",
    )
    recovery: Literal["resume", "wait", "fail"] = Field(
        default="resume",
        description="What becomes of a turn whose node went down: `resume` repeats it (finished steps are not run "
        "again); `wait` lets somebody decide (`convener resume`); `fail` gives it up. `@app.on_recover` may choose.",
    )
    max_pending_messages: int = Field(
        default=100,
        ge=1,
        le=10_000,
        description="Accepted and unanswered messages that a conversation may hold.",
    )
    max_payload_bytes: int = Field(
        default=1024 * 1024,
        ge=1024,
        le=64 * 1024 * 1024,
        description="Largest message or log entry, in bytes of JSON.",
    )
    hibernate_after: Seconds = Field(
        default=300.0,
        description="Idle time after which a conversation is unloaded, in seconds; 0 = never.",
    )

    retention: str = Field(
        default="forever",
        description="How long log entries stay in the archive, and conversations with which nothing happens stay at "
        "all: `forever`, or a number with `h`, `d` or `w`, as in `30d`; at least an hour.",
    )
    archive_url: str | None = Field(
        default=None,
        description="Where old log entries go: file:///folder (one that all nodes share), s3://bucket/prefix, gs://, "
        "az://. Default: none, they stay in the store.",
    )
    turn_timeout: PositiveSeconds | None = Field(
        default=None,
        description="Longest time that the agent may take to answer one message, in seconds; none = no limit.",
    )

    # --- membership -------------------------------------------------------------------------------
    placement: Literal["local", "least_loaded", "rendezvous"] = Field(
        default="local",
        description="Where a conversation starts: `local` on the node that was asked, `least_loaded` on the node with "
        "the fewest, `rendezvous` on the node that its id points to.",
    )
    capacity: int = Field(
        default=0,
        ge=0,
        description="Conversations that a node takes before it lets another one start them, if that has fewer; 0 = no "
        "limit.",
    )
    rebalance: bool = Field(
        default=True,
        description="Move idle conversations, a few at a time, from nodes that have far more than the others.",
    )
    lease_ttl: PositiveSeconds = Field(
        default=10.0,
        description="Silence after which a node is declared dead and its conversations move, in seconds.",
    )
    renew_interval: PositiveSeconds = Field(
        default=0.5,
        description="Time between two renewals of the lease, in seconds; at most (lease_ttl - 2) / 4.",
    )
    fast_burial: bool = Field(
        default=True,
        description="Declare a node dead before its lease ends if its process is seen to be gone.",
    )
    drain_timeout: Seconds = Field(
        default=30.0,
        description="Time that running turns get to finish when the node is told to stop, in seconds.",
    )
    shutdown_delay: Seconds | None = Field(
        default=None,
        description="Time between the signal to stop and the first thing that is refused, in seconds: load balancers "
        "notice then that the node is unready. Default 5 under Kubernetes, else 0.",
    )
    ready_without_store: Seconds = Field(
        default=30.0,
        description="Time that /readyz stays positive while only the store is away, in seconds.",
    )

    # --- access -----------------------------------------------------------------------------------
    auth: Literal["none", "token", "jwt", "hook"] = Field(
        default="none",
        description="How callers prove who they are: `none` (loopback addresses only), `token` (static "
        "tokens), `jwt`, `hook` (the function under @app.authenticate).",
    )
    auth_tokens: Mapping[str, str] = Field(
        default_factory=dict[str, str],
        repr=False,
        description="For auth=token: static tokens and the user id that each stands for. A table in TOML, "
        "a JSON object in the environment.",
    )
    service_tokens: Texts = Field(
        default=(),
        repr=False,
        description="Tokens of services that may act for any user. Comma-separated in the environment.",
    )
    admin_token: str | None = Field(
        default=None,
        min_length=1,
        repr=False,
        description="Token of the admin API, the console's actions and the admin commands.",
    )
    jwt_secret: str | None = Field(
        default=None,
        repr=False,
        description="Shared secret of HS256, HS384 and HS512 tokens, 32 bytes or more.",
    )
    jwt_jwks_url: str | None = Field(
        default=None,
        description="Where the issuer publishes its public keys (JWKS).",
    )
    jwt_issuer: str | None = Field(default=None, description="Required `iss` of a token. Default: any.")
    jwt_audience: str | None = Field(default=None, description="Required `aud` of a token. Default: any.")
    jwt_user_claim: str = Field(default="sub", min_length=1, description="Claim that holds the user id.")
    jwt_admin_claim: str | None = Field(
        default=None,
        description="Claim that makes a token an admin's if it is true.",
    )
    jwt_algorithms: Texts = Field(
        default=(),
        description="Signatures that are accepted. Default: HS256 with `jwt_secret`, RS256 and ES256 with "
        "`jwt_jwks_url`. Comma-separated in the environment.",
    )
    jwt_leeway: Seconds = Field(
        default=30.0,
        description="Tolerance for the clocks of issuer and node, in seconds.",
    )
    cors_origins: Texts = Field(
        default=(),
        description="Web origins (scheme://host[:port]) that may use the API and sockets from a browser; "
        "`*` for any. Comma-separated in the environment.",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then the environment, then ``convener.toml``."""
        fields = [name for name in cls.model_fields if name not in cls.code_only_fields]
        return (
            init_settings,
            EnvironmentSource(settings_cls, fields, cls.secret_fields),
            TomlSource(settings_cls, fields),
        )

    @property
    def effective_shutdown_delay(self) -> float:
        """`shutdown_delay`, or what stands for it, in seconds."""
        if self.shutdown_delay is not None:
            return self.shutdown_delay
        return 5.0 if "KUBERNETES_SERVICE_HOST" in os.environ else 0.0

    def replace(self, **changes: Any) -> Self:
        """These settings with some fields changed, checked again; environment and files are not read again.

        Raises:
            ConfigurationError: as for the constructor.
        """
        kept = {name: getattr(self, name) for name in self.model_fields_set}
        return self.model_validate(kept | changes)

    @property
    def retention_seconds(self) -> float | None:
        """`retention` in seconds, None for ever."""
        return duration(self.retention)

    @property
    def safe_redis_url(self) -> str | None:
        """`redis_url` without user name and password, for logs."""
        if self.redis_url is None:
            return None
        scheme, separator, rest = self.redis_url.partition("://")
        return f"{scheme}{separator}{rest.partition('?')[0].rpartition('@')[2]}"

    @property
    def accepted_algorithms(self) -> Texts:
        """`jwt_algorithms`, or their default for the kind of key that is set."""
        if self.jwt_algorithms:
            return self.jwt_algorithms
        return ("HS256",) if self.jwt_secret is not None else ("RS256", "ES256")

    # --- validation -------------------------------------------------------------------------------
    @field_validator("cors_origins", "service_tokens", "jwt_algorithms", mode="before")
    @classmethod
    def _split_commas(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(item.strip() for item in value.split(",") if item.strip())
        return value

    @field_validator("auth_tokens", mode="before")
    @classmethod
    def _parse_tokens(cls, value: object) -> object:
        if isinstance(value, str):
            try:
                return json.loads(value)
            except json.JSONDecodeError:
                raise ValueError('must be a JSON object like {"TOKEN": "user id"}') from None
        return dict(value) if isinstance(value, tuple) else value  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]

    @field_validator("auth_tokens")
    @classmethod
    def _check_tokens(cls, value: Mapping[str, str]) -> Mapping[str, str]:
        for token, user in value.items():
            if not token:
                raise ValueError("a token is empty")
            if not is_id(user):
                raise ValueError(f"{user!r} is no user id: 1 to 128 of A-Z a-z 0-9 . _ ~ : @ -")
        return value

    @field_validator("node_name")
    @classmethod
    def _check_node_name(cls, value: str | None) -> str | None:
        if value is not None and not is_node_name(value):
            raise ValueError("must be 1 to 64 of A-Z a-z 0-9 . _ : @ -")
        return value

    @field_validator("retention")
    @classmethod
    def _check_retention(cls, value: str) -> str:
        seconds = duration(value)
        if seconds is not None and seconds < SHORTEST_RETENTION:
            raise ValueError("must be at least an hour")
        return value

    @field_validator("archive_url")
    @classmethod
    def _check_archive_url(cls, value: str | None) -> str | None:
        if value is not None and not _ARCHIVE_URL.fullmatch(value):
            raise ValueError(
                "must look like file:///folder, s3://bucket/prefix, gs://bucket/prefix or az://account/box"
            )
        return value

    @field_validator("namespace")
    @classmethod
    def _check_namespace(cls, value: str) -> str:
        if not _NAMESPACE.fullmatch(value):
            raise ValueError("must be 1 to 64 of A-Z a-z 0-9 . _ -")
        return value

    @field_validator("redis_url")
    @classmethod
    def _check_redis_url(cls, value: str | None) -> str | None:
        if value is not None:
            if not _REDIS_URL.fullmatch(value):
                raise ValueError(
                    "must look like redis://host:port/0, rediss://host:port/0, valkey://host:port/0, unix:///path, "
                    "redis+sentinel://host:port,host:port/0/name or redis+cluster://host:port,host:port"
                )
            scheme, _, rest = value.partition("://")
            if scheme.endswith("+sentinel") and not _SENTINEL_PATH.fullmatch(rest.partition("?")[0]):
                raise ValueError("a Sentinel URL ends with the database and the name of the primary: /0/name")
        return value

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, value: Texts) -> Texts:
        for origin in value:
            parts = urlsplit(origin)
            is_origin = (
                parts.scheme in ("http", "https") and parts.netloc and origin == f"{parts.scheme}://{parts.netloc}"
            )
            if origin != "*" and not is_origin:
                raise ValueError(f"{origin!r} is no origin: write scheme://host[:port] without a path, or *")
        return value

    @field_validator("jwt_secret")
    @classmethod
    def _check_secret(cls, value: str | None) -> str | None:
        if value is not None and len(value.encode()) < 32:
            raise ValueError("must have 32 bytes or more (RFC 7518, section 3.2)")
        return value

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Turn pydantic's report into one sentence that names each field and never repeats a secret."""
        try:
            settings = handler(data)
        except ValidationError as error:
            raise ConfigurationError(_sentence(error, cls.model_fields)) from error
        problem = find_problem(settings)
        if problem is not None:
            raise ConfigurationError(problem)
        return settings


def _sentence(error: ValidationError, known: Mapping[str, object]) -> str:
    lines: list[str] = []
    for item in error.errors(include_url=False, include_context=False, include_input=False):
        field = str(item["loc"][0]) if item["loc"] else "settings"
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown setting {field}{suggestion(field, known)}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"{field} ({PREFIX}{field.upper()}): {message[:1].lower()}{message[1:]}")
    return "; ".join(lines)
