"""Connections to a server as redis-py makes them (TCP, TLS, unix; AUTH, SELECT), and where to make them.

redis-py opens a connection; after that `Attached` takes the transport over, so that commands of one tick
share a write and each reply costs one callback instead of several awaits.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol, Self, cast
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
from convener.store.redis.address import refused

Credentials = Callable[[], tuple[str, str]]
"""(user name, password), asked for at each new connection; also from the heartbeat's thread."""

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
        self.place = ""
        """The server that it goes to."""
        self._connection: aio.AbstractConnection | None = None
        self._transport: asyncio.Transport | None = None
        self._streams: asyncio.Protocol | None = None

    def attach(self, connection: aio.AbstractConnection, place: str) -> None:
        """Take over from redis-py. Its handshake has read every reply, so nothing is left in its buffer."""
        writer = cast("asyncio.StreamWriter", connection._writer)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        transport = cast("asyncio.Transport", writer.transport)
        self._connection, self._transport, self.place = connection, transport, place
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


class Target(Protocol):
    """Where connections go: one server, or whichever has a duty at the time."""

    @property
    def place(self) -> str:
        """The server as far as is known, for messages, and to tell whether it changed."""
        ...

    async def connect(self, attached: Attached, limit: float) -> None:
        """Connect, authenticate, and hand the connection to `attached`.

        Raises:
            StoreUnavailable: no connection within `limit` seconds.
            ConfigurationError: the server refuses the credentials or the database.
        """
        ...

    def connect_sync(self, timeout: float) -> tuple[SyncConnection, str]:
        """A connection for a thread, on which every wait lasts at most `timeout` seconds, and the server that it goes
        to. Raises: as `connect`.
        """
        ...

    def redirect(self, host: str, port: int) -> None:
        """Told from a thread: a server says that this one has the duty."""
        ...


class Check(Protocol):
    """What a server has to say of itself before its connection is used."""

    @property
    def commands(self) -> Sequence[Sequence[Argument]]:
        """What it is asked."""
        ...

    def judge(self, place: str, replies: Sequence[Any]) -> None:
        """Raise `StoreUnavailable` if it will not do. An error reply is an item of `replies`."""
        ...


class Endpoint:
    """One server.

    Args:
        url: as redis-py takes it: ``redis://user:password@host:port/db``, ``rediss://…``, ``unix:///path?db=0``.
            Options ``ssl_*`` as in redis-py.
        credentials: instead of user name and password in the URL.
        tls: further ``ssl_*`` options: ``ssl_ca_certs``, ``ssl_certfile``, ``ssl_keyfile``.

    Raises:
        ConfigurationError: the URL cannot be used.
    """

    def __init__(self, url: str, *, credentials: Credentials | None = None, tls: dict[str, str] | None = None) -> None:
        self.is_unix, self.is_tls = url.startswith("unix:"), url.startswith("rediss:")
        try:
            options: dict[str, Any] = dict(aio.parse_url(url))
            path = urlsplit(url).path.strip("/")
        except ValueError as error:
            raise refused(str(error)) from error
        if not self.is_unix and path and not path.isdecimal():
            raise refused("the path must be the number of a database")
        if self.is_unix and not options.get("path"):
            raise refused("unix:// needs the path of a socket")
        options.pop("connection_class", None)
        for name in options:
            if name not in ("host", "port", "path", "username", "password") and not name.startswith(_QUERY):
                raise refused(f"unknown option {name!r}")
        if credentials is not None:
            if "password" in options or "username" in options:
                raise ConfigurationError("redis_credentials: not together with a password in redis_url")
            options["credential_provider"] = _Provider(credentials)
        if self.is_tls:
            options |= tls or {}
        # Whoever calls decides when to try again, and a reply has no time-out of its own: commands have.
        options |= {"health_check_interval": 0, "protocol": 2, "driver_info": None}
        self.options = options

    def at(self, host: str, port: int) -> Self:
        """Another server with the same credentials and options."""
        sibling = copy.copy(self)
        sibling.options = self.options | {"host": host, "port": port}
        return sibling

    @property
    def place(self) -> str:
        """Host and port, or the path of the socket."""
        if self.is_unix:
            return str(self.options["path"])
        return f"{self.options.get('host', 'localhost')}:{self.options.get('port', 6379)}"

    def __str__(self) -> str:
        return self.place

    def redirect(self, host: str, port: int) -> None:
        """One server cannot be elsewhere."""

    async def connect(self, attached: Attached, limit: float, check: Check | None = None) -> None:
        """See `Target.connect`."""
        connection = await self._open(limit)
        if check is not None:
            try:
                check.judge(self.place, await self._replies(connection, limit, check.commands))
            except BaseException:
                await connection.disconnect(nowait=True)
                raise
        attached.attach(connection, self.place)

    async def ask(self, limit: float, *commands: Sequence[Argument]) -> list[Any]:
        """Replies to some commands over a connection of their own; error replies are items of the list.

        Connecting may last `limit` seconds, and so may the replies. Raises: as `connect`.
        """
        connection = await self._open(limit)
        try:
            return await self._replies(connection, limit, commands)
        finally:
            await connection.disconnect(nowait=True)

    async def _replies(
        self, connection: aio.AbstractConnection, limit: float, commands: Sequence[Sequence[Argument]]
    ) -> list[Any]:
        try:
            async with asyncio.timeout(limit):
                return [await _reply(connection, command) for command in commands]
        except (RedisError, OSError) as error:
            raise self._failure(error) from error

    async def _open(self, limit: float) -> aio.AbstractConnection:
        kind = aio.UnixDomainSocketConnection if self.is_unix else aio.SSLConnection if self.is_tls else aio.Connection
        connection: aio.AbstractConnection | None = None
        try:
            # No time-out of redis-py's own for what is sent: before Python 3.12 its `wait_for` may swallow a
            # cancellation, and whoever closes the store would wait for ever. Every wait has one of ours around it.
            connection = kind(socket_timeout=None, socket_connect_timeout=limit, **self.options)
            async with asyncio.timeout(limit):
                await connection.connect()
        except BaseException as error:
            if connection is not None:
                await connection.disconnect(nowait=True)
            if isinstance(error, Exception):
                raise self._failure(error) from error
            raise
        return connection

    def connect_sync(self, timeout: float, check: Check | None = None) -> tuple[SyncConnection, str]:
        """See `Target.connect_sync`."""
        kind: Any = (
            sync.UnixDomainSocketConnection if self.is_unix else sync.SSLConnection if self.is_tls else sync.Connection
        )
        try:
            connection: SyncConnection = kind(socket_timeout=timeout, socket_connect_timeout=timeout, **self.options)
            connection.connect()
        except Exception as error:
            raise self._failure(error) from error
        if check is not None:
            try:
                check.judge(self.place, self._replies_sync(connection, check.commands))
            except BaseException:
                connection.disconnect()
                raise
        return connection, self.place

    def ask_sync(self, timeout: float, *commands: Sequence[Argument]) -> list[Any]:
        """As `ask`, for a thread; each wait lasts at most `timeout` seconds."""
        connection, _ = self.connect_sync(timeout)
        try:
            return self._replies_sync(connection, commands)
        finally:
            connection.disconnect()

    def _replies_sync(self, connection: SyncConnection, commands: Sequence[Sequence[Argument]]) -> list[Any]:
        try:
            return [_reply_sync(connection, command) for command in commands]
        except (RedisError, OSError) as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> Exception:
        text = str(error) or type(error).__name__
        if isinstance(error, AuthenticationError | AuthorizationError | NoPermissionError):
            return ConfigurationError(f"redis_url: {self} refuses the credentials: {text}")
        if isinstance(error, ResponseError):
            return ConfigurationError(f"redis_url: {self}: {text}")
        if isinstance(error, TimeoutError | OSError | RedisError):
            return StoreUnavailable(f"cannot connect to {self}: {text}")
        return ConfigurationError(f"redis_url: {text}")


async def _reply(connection: aio.AbstractConnection, command: Sequence[Argument]) -> Any:
    try:
        await connection.send_command(*command)
        return cast("Any", await connection.read_response())
    except ResponseError as error:
        return error


def _reply_sync(connection: SyncConnection, command: Sequence[Argument]) -> Any:
    try:
        connection.send_command(*command)
        return connection.read_response()
    except ResponseError as error:
        return error
