"""One server: what a URL says, and connections to it as redis-py makes them (TCP, TLS, unix; AUTH, SELECT).

redis-py opens a connection; after that `Attached` takes the transport over, so that commands of one tick
share a write and each reply costs one callback instead of several awaits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, Protocol, cast
from urllib.parse import urlsplit

import hiredis
import redis.asyncio.connection as aio
import redis.connection as sync
from redis.credentials import CredentialProvider
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    NoPermissionError,
    RedisError,
    ResponseError,
)

from convener.errors import ConfigurationError, StoreUnavailable

Credentials = Callable[[], tuple[str, str]]
"""(user name, password), asked for at each new connection; also from the heartbeat's thread."""

_SCHEMES: Final = {
    "redis": "redis",
    "valkey": "redis",
    "rediss": "rediss",
    "valkeys": "rediss",
    "unix": "unix",
    "valkey+unix": "unix",
}
_LATER: Final = ("sentinel", "cluster")
_QUERY: Final = ("db", "ssl_")

NOT_YET: Final = object()
"""What a reader returns when it needs more data."""

Argument = str | bytes | int

pack = cast("Callable[[tuple[Argument, ...]], bytes]", hiredis.pack_command)  # pyright: ignore[reportUnknownMemberType]
"""A command as it goes over the wire."""


class SyncConnection(Protocol):
    """What is used of redis-py's blocking connections."""

    def connect(self) -> None: ...

    def send_command(self, *args: Argument) -> None: ...

    def read_response(self) -> Any: ...

    def disconnect(self) -> None: ...


class _Provider(CredentialProvider):
    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    def get_credentials(self) -> tuple[str, str]:
        return self._credentials()

    async def get_credentials_async(self) -> tuple[str, str]:
        return self._credentials()


class Attached(asyncio.Protocol):
    """A connection that redis-py has opened and that this object reads and writes from then on."""

    def __init__(self) -> None:
        self.reader = hiredis.Reader(notEnoughData=NOT_YET)
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._connection: aio.AbstractConnection | None = None
        self._transport: asyncio.Transport | None = None
        self._streams: asyncio.Protocol | None = None

    def attach(self, connection: aio.AbstractConnection) -> None:
        """Take over from redis-py. Its handshake has read every reply, so nothing is left in its buffer."""
        writer = cast("asyncio.StreamWriter", connection._writer)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        transport = cast("asyncio.Transport", writer.transport)
        self._connection, self._transport = connection, transport
        self._streams = cast("asyncio.Protocol", transport.get_protocol())
        transport.set_protocol(self)

    def write(self, data: bytes) -> None:
        """Send; nothing if the connection is gone, which `closed` tells."""
        if self._transport is not None and not self.closed.done():
            self._transport.write(data)

    def abort(self) -> None:
        """Drop the connection at once, whatever is unsent."""
        if self._transport is not None:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the transport, once."""
        if not self.closed.done():
            self.closed.set_result(None)
        if self._streams is not None:
            self._streams.connection_lost(exc)

    async def release(self) -> None:
        """Give everything back."""
        self.abort()
        if self._connection is not None:
            await self._connection.disconnect(nowait=True)
            self._connection = None
            await self.closed


class Endpoint:
    """How to connect.

    Args:
        url: ``redis://user:password@host:port/db``, ``rediss://…`` (TLS), ``unix:///path?db=0``;
            ``valkey://…`` and ``valkeys://…`` are the same. Options ``ssl_*`` as in redis-py.
        credentials: instead of user name and password in the URL.
        tls: further ``ssl_*`` options: ``ssl_ca_certs``, ``ssl_certfile``, ``ssl_keyfile``.

    Raises:
        ConfigurationError: the URL cannot be used.
    """

    def __init__(self, url: str, *, credentials: Credentials | None = None, tls: dict[str, str] | None = None) -> None:
        scheme, rest = url.partition(":")[::2]
        if any(kind in scheme for kind in _LATER):
            raise ConfigurationError(f"redis_url: {scheme}:// is not supported by this version")
        if scheme not in _SCHEMES:
            raise ConfigurationError(
                f"redis_url: unknown scheme {scheme!r}; use redis, rediss, valkey, valkeys or unix"
            )
        self.is_unix, self.is_tls = _SCHEMES[scheme] == "unix", _SCHEMES[scheme] == "rediss"
        try:
            options: dict[str, Any] = dict(aio.parse_url(f"{_SCHEMES[scheme]}:{rest}"))
            path = urlsplit(url).path.strip("/")
        except ValueError as error:
            raise ConfigurationError(f"redis_url: {error}") from error
        if not self.is_unix and path and not path.isdecimal():
            raise ConfigurationError("redis_url: the path must be the number of a database")
        if self.is_unix and not options.get("path"):
            raise ConfigurationError("redis_url: unix:// needs the path of a socket")
        options.pop("connection_class", None)
        for name in options:
            if name not in ("host", "port", "path", "username", "password") and not name.startswith(_QUERY):
                raise ConfigurationError(f"redis_url: unknown option {name!r}")
        if credentials is not None:
            if "password" in options or "username" in options:
                raise ConfigurationError("redis_credentials: not together with a password in redis_url")
            options["credential_provider"] = _Provider(credentials)
        if self.is_tls:
            options |= tls or {}
        # Whoever calls decides when to try again, and a reply has no time-out of its own: commands have.
        options |= {"health_check_interval": 0, "protocol": 2, "driver_info": None}
        self._options = options

    def __str__(self) -> str:
        if self.is_unix:
            return str(self._options["path"])
        return f"{self._options.get('host', 'localhost')}:{self._options.get('port', 6379)}"

    async def connect(self, attached: Attached, limit: float) -> None:
        """Connect, authenticate, and hand the connection to `attached`.

        Raises:
            StoreUnavailable: no connection within `limit` seconds.
            ConfigurationError: the server refuses the credentials or the database.
        """
        kind = aio.UnixDomainSocketConnection if self.is_unix else aio.SSLConnection if self.is_tls else aio.Connection
        connection: aio.AbstractConnection | None = None
        try:
            connection = kind(socket_timeout=limit, socket_connect_timeout=limit, **self._options)
            async with asyncio.timeout(limit):
                await connection.connect()
        except BaseException as error:
            if connection is not None:
                await connection.disconnect(nowait=True)
            if isinstance(error, Exception):
                raise self._failure(error) from error
            raise
        attached.attach(connection)

    def connect_sync(self, timeout: float) -> SyncConnection:
        """A connection for a thread; every wait on it lasts at most `timeout` seconds.

        Raises: as `connect`.
        """
        kind: Any = (
            sync.UnixDomainSocketConnection if self.is_unix else sync.SSLConnection if self.is_tls else sync.Connection
        )
        try:
            connection: SyncConnection = kind(socket_timeout=timeout, socket_connect_timeout=timeout, **self._options)
            connection.connect()
        except Exception as error:
            raise self._failure(error) from error
        return connection

    def _failure(self, error: Exception) -> Exception:
        text = str(error) or type(error).__name__
        if isinstance(error, AuthenticationError | AuthorizationError | NoPermissionError):
            return ConfigurationError(f"redis_url: {self} refuses the credentials: {text}")
        if isinstance(error, ResponseError):
            return ConfigurationError(f"redis_url: {self}: {text}")
        if isinstance(error, TimeoutError | OSError | RedisError):
            return StoreUnavailable(f"cannot connect to {self}: {text}")
        return ConfigurationError(f"redis_url: {text}")
