"""The heartbeat thread's own way to the store: two connections, synchronous, without any retry.

One renews the lease. The other holds the subscription to the incarnation's `live` channel, whose existence
shows that the process lives: it goes when the process goes, even if nobody is left to close it. A forked
child would hold it for its dead parent, so it is closed there.

Both go to the primary that has the membership, whichever that is: BURY counts subscribers there and nowhere else.
What that server refuses because it is not the one any more has not run, and is sent to the right one at once.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from typing import Any, Final

from redis.exceptions import NoScriptError, ReadOnlyError, RedisError, ResponseError

from convener.core.membership import RenewReply
from convener.errors import ConfigurationError, StoreUnavailable
from convener.store.redis.endpoint import Argument, SyncConnection, Target
from convener.store.redis.errors import from_reply, redirect
from convener.store.redis.keys import Keys
from convener.store.redis.replies import renew_reply
from convener.store.redis.scripts import SCRIPTS

_DETOURS: Final = 2
"""Redirections that one call follows."""

_links: weakref.WeakSet[HeartbeatLink] = weakref.WeakSet()


class HeartbeatLink:
    """RENEW and the `live` channel, for use from one thread.

    Every method raises `StoreUnavailable` if it fails or takes too long; what it used is closed then, and the
    next call connects anew.

    Args:
        target: the server that has the membership.
        timeout: seconds that each answer may take, below the renew interval.
    """

    def __init__(self, target: Target, keys: Keys, timeout: float) -> None:
        self._target = target
        self._keys = keys
        self._timeout = timeout
        self._commands: SyncConnection | None = None
        self._commands_at = ""
        self._live: SyncConnection | None = None
        self._live_at = ""
        _links.add(self)

    def renew(self, incarnation: str, info: str | None = None) -> RenewReply:
        """RENEW, one round trip."""
        script, keys = SCRIPTS["renew"], self._keys.membership
        news = ("0", "") if info is None else ("1", info)
        arguments = (len(keys), *keys, incarnation, *news, self._keys.sync)
        error: ResponseError | None = None
        for _ in range(1 + _DETOURS):
            try:
                connection = self._commands_open()
                try:
                    reply = _ask(connection, "EVALSHA", script.sha, *arguments)
                except NoScriptError:
                    reply = _ask(connection, "EVAL", script.source, *arguments)
                self._is_at_home()
                return renew_reply(reply)
            except ResponseError as refusal:
                error = refusal
                if not self._elsewhere(refusal):
                    # An answer, so the connection is good; the next renewal may be accepted.
                    break
                self._commands = _closed(self._commands)
            except (RedisError, OSError) as lost:
                self._commands = _closed(self._commands)
                raise StoreUnavailable(f"renew: {lost}") from lost
        assert error is not None
        raise from_reply(_text(error), "renew") from error

    def hold_live(self, incarnation: str) -> None:
        """Subscribe to the incarnation's `live` channel; returns when that is confirmed."""
        channel = self._keys.live(incarnation).encode()
        error: ResponseError | None = None
        for _ in range(1 + _DETOURS):
            try:
                if self._live is None or self._live_at != self._target.place:
                    self._live = _closed(self._live)
                    self._live, self._live_at = self._connect()
                self._live.send_command("SSUBSCRIBE", channel)
                return self._read_live([b"ssubscribe", channel])
            except ResponseError as refusal:
                error = refusal
                self._live = _closed(self._live)
                if not self._elsewhere(refusal):
                    break
            except (RedisError, OSError) as lost:
                self._live = _closed(self._live)
                raise StoreUnavailable(f"hold_live: {lost}") from lost
        assert error is not None
        raise from_reply(_text(error), "hold_live") from error

    def ping_live(self) -> None:
        """Make sure that the subscription's connection is alive, and where renewals go. After a failure,
        `hold_live` again.
        """
        if self._live is None:
            raise StoreUnavailable("ping_live: nothing is held")
        if self._live_at != self._target.place:
            self._live = _closed(self._live)
            raise StoreUnavailable(f"ping_live: the membership is at {self._target.place} now")
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

    def _commands_open(self) -> SyncConnection:
        if self._commands is None or self._commands_at != self._target.place:
            self._commands = _closed(self._commands)
            self._commands, self._commands_at = self._connect()
        return self._commands

    def _is_at_home(self) -> None:
        """The server did it, so it is the one, whatever was believed."""
        host, _, port = self._commands_at.rpartition(":")
        if port.isdigit() and self._commands_at != self._target.place:
            self._target.redirect(host, int(port))

    def _connect(self) -> tuple[SyncConnection, str]:
        try:
            return self._target.connect_sync(self._timeout)
        except ConfigurationError as error:
            # At start it was right; now it is one more way for the store to be away.
            raise StoreUnavailable(str(error)) from error

    def _elsewhere(self, refusal: ResponseError) -> bool:
        """Whether another server will do what this one refused, before anything ran."""
        # ASK: the slot is on its way, and will be there by the time of the next renewal.
        detour = redirect(_text(refusal), self._commands_at.rpartition(":")[0])
        if detour is not None and not detour.asking:
            self._target.redirect(detour.host, detour.port)
            return True
        return isinstance(refusal, ReadOnlyError)

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
