"""The heartbeat thread's own way to the store: two connections, synchronous, without any retry.

One renews the lease. The other holds the subscription to the incarnation's `live` channel, whose existence
shows that the process lives: it goes when the process goes, even if nobody is left to close it. A forked
child would hold it for its dead parent, so it is closed there.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from typing import Any

from redis.exceptions import NoScriptError, RedisError, ResponseError

from convener.core.membership import RenewReply
from convener.errors import ConfigurationError, StoreUnavailable
from convener.store.redis.endpoint import Argument, Endpoint, SyncConnection
from convener.store.redis.errors import from_reply
from convener.store.redis.keys import Keys
from convener.store.redis.replies import renew_reply
from convener.store.redis.scripts import SCRIPTS

_links: weakref.WeakSet[HeartbeatLink] = weakref.WeakSet()


class HeartbeatLink:
    """RENEW and the `live` channel, for use from one thread.

    Every method raises `StoreUnavailable` if it fails or takes too long; what it used is closed then, and the
    next call connects anew.

    Args:
        timeout: seconds that each answer may take, below the renew interval.
    """

    def __init__(self, endpoint: Endpoint, keys: Keys, timeout: float) -> None:
        self._endpoint = endpoint
        self._keys = keys
        self._timeout = timeout
        self._commands: SyncConnection | None = None
        self._live: SyncConnection | None = None
        _links.add(self)

    def renew(self, incarnation: str, info: str | None = None) -> RenewReply:
        """RENEW, one round trip."""
        script, keys = SCRIPTS["renew"], self._keys.membership
        news = ("0", "") if info is None else ("1", info)
        arguments = (len(keys), *keys, incarnation, *news, self._keys.sync)
        try:
            if self._commands is None:
                self._commands = self._connect()
            try:
                reply = _ask(self._commands, "EVALSHA", script.sha, *arguments)
            except NoScriptError:
                reply = _ask(self._commands, "EVAL", script.source, *arguments)
        except ResponseError as error:
            # An answer, so the connection is good; the next renewal may be accepted.
            raise from_reply(_text(error), "renew") from error
        except (RedisError, OSError) as error:
            self._commands = _closed(self._commands)
            raise StoreUnavailable(f"renew: {error}") from error
        return renew_reply(reply)

    def hold_live(self, incarnation: str) -> None:
        """Subscribe to the incarnation's `live` channel; returns when that is confirmed."""
        try:
            if self._live is None:
                self._live = self._connect()
            channel = self._keys.live(incarnation).encode()
            self._live.send_command("SSUBSCRIBE", channel)
            self._read_live([b"ssubscribe", channel])
        except ResponseError as error:
            self._live = _closed(self._live)
            raise from_reply(_text(error), "hold_live") from error
        except (RedisError, OSError) as error:
            self._live = _closed(self._live)
            raise StoreUnavailable(f"hold_live: {error}") from error

    def ping_live(self) -> None:
        """Make sure that the subscription's connection is alive. After a failure, `hold_live` again."""
        if self._live is None:
            raise StoreUnavailable("ping_live: nothing is held")
        try:
            self._live.send_command("PING")
            self._read_live([b"pong", b""])
        except (RedisError, OSError) as error:
            self._live = _closed(self._live)
            raise StoreUnavailable(f"ping_live: {error}") from error

    def close(self) -> None:
        """Close both connections."""
        self._commands = _closed(self._commands)
        self._live = _closed(self._live)

    def _connect(self) -> SyncConnection:
        try:
            return self._endpoint.connect_sync(self._timeout)
        except ConfigurationError as error:
            # At start it was right; now it is one more way for the store to be away.
            raise StoreUnavailable(str(error)) from error

    def _read_live(self, expected: list[bytes]) -> None:
        assert self._live is not None
        frame: object = self._live.read_response()
        if not isinstance(frame, list) or frame[: len(expected)] != expected:
            self._live = _closed(self._live)
            raise StoreUnavailable(f"the live channel's connection received {frame!r}")


def _ask(connection: SyncConnection, *parts: Argument) -> Any:
    connection.send_command(*parts)
    return connection.read_response()


def _text(error: ResponseError) -> str:
    """The server's words: redis-py takes the code off that it knows."""
    code = getattr(error, "status_code", None)
    return f"{code} {error}" if code else str(error)


def _closed(connection: SyncConnection | None) -> None:
    if connection is not None:
        with contextlib.suppress(OSError, RedisError):
            connection.disconnect()


def _close_in_child() -> None:
    # redis-py closes the descriptor without shutting the connection down when the process is not the one that
    # made it.
    for link in list(_links):
        link.close()


os.register_at_fork(after_in_child=_close_in_child)
