"""Every key and channel in one place, with its type and with who deletes it.

Each group of keys has one hash tag, hence one hash slot of a cluster; no script touches two groups. No key
that says who owns what ever expires: what is over is removed by a step that compares, never by a clock. Ids
hold none of ``{ } # |`` (`convener.ids`), so no id can leave its tag or collide with a field of ours.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from typing import Final

from convener.errors import ConfigurationError

SHARDS: Final = 64
"""Parts of the list of all conversations."""

VERSION_FIELD: Final = "#version"
"""Field of a node's hash of records that holds their version; no conversation can be called that."""

_NAMESPACE: Final = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")


def shard_of(cid: str) -> int:
    """The part of the list of all that holds `cid`; the same in every process."""
    return zlib.crc32(cid.encode()) % SHARDS


class Keys:
    """Names of keys and channels in one namespace.

    Raises:
        ConfigurationError: the namespace is not 1 to 64 of ``A-Z a-z 0-9 . _ -``.
    """

    def __init__(self, namespace: str) -> None:
        if not _NAMESPACE.match(namespace):
            raise ConfigurationError("namespace: must be 1 to 64 characters of A-Z a-z 0-9 . _ -")
        self.namespace = namespace
        # -- {NS:m}: the membership. Written by the scripts of membership; `tests` and operators may delete
        # the whole group when no node runs.
        m = f"{{{namespace}:m}}"
        self.lease = f"{m}:lease"  # zset, incarnation -> deadline in ms. REAP, BURY, SUPERSEDE, LEAVE remove a member.
        self.dead = f"{m}:dead"  # zset, incarnation -> time of burial. FORGET removes, 24 h later.
        self.info = f"{m}:info"  # hash, incarnation -> `ttl|renew|JSON`. Removed with the lease.
        self.version = f"{m}:ver"  # int. Never deleted: it must not go back.
        self.pulse = f"{m}:pulse"  # int, ms. Never deleted: one number.
        self.grace = f"{m}:grace"  # int, ms. Never deleted: one number.
        self.why = f"{m}:why"  # hash, buried incarnation -> `kind|by|ms of silence`. FORGET removes.
        self.scratch = f"{m}:scratch"  # of any type, within RIGHTS only, which removes it.
        self.sync = f"{m}:sync"  # channel: changes of state and membership.
        self.membership = (self.lease, self.dead, self.info, self.version, self.pulse, self.grace, self.why)
        self._live = f"{m}:live:"
        self._conversation = f"{{{namespace}:c:"
        self._user = f"{{{namespace}:u:"
        self._node = f"{{{namespace}:n:"
        self._index = f"{{{namespace}:i:"
        self._timers = f"{{{namespace}:t:"
        self._ticket = f"{{{namespace}:k:"

    def live(self, incarnation: str) -> str:
        """Channel: nobody publishes; that somebody subscribes shows that the process lives."""
        return f"{self._live}{incarnation}"

    # -- {NS:c:C}: one conversation. ERASE and EXPIRE remove the whole group.

    def channel(self, cid: str) -> str:
        """Channel: inbox entries, log entries and status of a conversation."""
        return f"{self._conversation}{cid}}}"

    def meta(self, cid: str) -> str:
        """Hash: the head. Removed by ERASE, EXPIRE."""
        return f"{self._conversation}{cid}}}:meta"

    def log(self, cid: str) -> str:
        """Stream, ids `epoch-seq`, field `e`: the log. Trimmed by ARCHIVED, removed by ERASE, EXPIRE."""
        return f"{self._conversation}{cid}}}:log"

    def inbox(self, cid: str) -> str:
        """Stream, ids `position-0`: what is not taken in. Trimmed by APPEND and STOP, removed by ERASE."""
        return f"{self._conversation}{cid}}}:in"

    def seen(self, cid: str) -> str:
        """Zset, message id -> position (0: repaired, kept). Trimmed by APPEND, removed by ERASE."""
        return f"{self._conversation}{cid}}}:seen"

    def state(self, cid: str) -> str:
        """String: the agent's durable state. Removed by ERASE."""
        return f"{self._conversation}{cid}}}:state"

    def tail(self, cid: str) -> str:
        """Stream, field `p`: pieces of the answer that is being written. Removed by APPEND, STOP and ERASE."""
        return f"{self._conversation}{cid}}}:tail"

    def asks(self, cid: str) -> str:
        """Hash, question -> what answering it needs (JSON). Entries by ANSWER; the rest by APPEND, STOP, ERASE."""
        return f"{self._conversation}{cid}}}:asks"

    def alarms(self, cid: str) -> str:
        """Hash, alarm -> data (JSON). Entries removed by FIRE, the rest by ERASE."""
        return f"{self._conversation}{cid}}}:alarms"

    def whole(self, cid: str) -> tuple[str, ...]:
        """All keys of a conversation, as ERASE and EXPIRE take them."""
        parts = (self.meta, self.log, self.inbox, self.seen, self.state, self.tail, self.asks, self.alarms)
        return tuple(part(cid) for part in parts)

    # -- {NS:t:0..15}: what is to happen when.

    def due(self, shard: int) -> str:
        """Zset, `cid|timer` by time due in ms. Entries removed by whoever has done what was due."""
        return f"{self._timers}{shard}}}:due"

    # -- {NS:k:T}: one ticket.

    def ticket(self, name: str) -> str:
        """String: what a ticket stands for, sealed. Removed when used, and expires: it says who owns nothing."""
        return f"{self._ticket}{name}}}"

    # -- {NS:u:U}: one user.

    def slots(self, user: str) -> str:
        """Hash, cid -> `nonce|incarnation`. Entries removed by UNRESERVE."""
        return f"{self._user}{user}}}:slots"

    def wait(self, user: str) -> str:
        """Zset, `cid|incarnation|reason` by time: queued starts. Entries removed by RESERVE and DEQUEUE."""
        return f"{self._user}{user}}}:wait"

    def conversations(self, user: str) -> str:
        """Zset, cid by last activity in ms. Entries removed when the conversation is erased."""
        return f"{self._user}{user}}}:conversations"

    # -- {NS:n:I}: one incarnation of a node.

    def records(self, incarnation: str) -> str:
        """Hash, cid -> record (JSON), and `VERSION_FIELD`. Entries by DROP_RECORD, the rest by DROP_NODE."""
        return f"{self._node}{incarnation}}}:conversations"

    def connections(self, incarnation: str) -> str:
        """Hash, connection -> cid. Entries removed by FLUSH, the rest by DROP_NODE."""
        return f"{self._node}{incarnation}}}:connections"

    def node_channel(self, incarnation: str) -> str:
        """Channel: requests and replies to one node."""
        return f"{self._node}{incarnation}}}"

    def probe(self, ident: str) -> str:
        """Channel: a subscriber connection's canary."""
        return f"{self._node}{ident}}}:probe"

    # -- {NS:i:0..63}: the list of all conversations.

    def index(self, shard: int) -> str:
        """Zset, cid (score 0: ordered by id). Entries removed when the conversation is erased."""
        return f"{self._index}{shard}}}"


def waited(tag: str) -> str:
    """String, in any group: what is written for WAIT to speak of. Expires: it says nothing."""
    return f"{{{tag}}}:waited"


@dataclass(frozen=True, slots=True)
class KeyKind:
    """What is known of a kind of key, for leak checks and the documentation."""

    pattern: str
    type: str
    deleted_by: str


KINDS: Final = (
    KeyKind("{NS:m}:lease", "zset", "REAP, BURY, SUPERSEDE, LEAVE, by entry"),
    KeyKind("{NS:m}:dead", "zset", "FORGET, by entry"),
    KeyKind("{NS:m}:info", "hash", "REAP, BURY, SUPERSEDE, LEAVE, by entry"),
    KeyKind("{NS:m}:ver", "string", "nobody"),
    KeyKind("{NS:m}:pulse", "string", "nobody"),
    KeyKind("{NS:m}:grace", "string", "nobody"),
    KeyKind("{NS:m}:why", "hash", "FORGET, by entry"),
    KeyKind("{NS:c:*}:meta", "hash", "ERASE, EXPIRE"),
    KeyKind("{NS:c:*}:log", "stream", "ARCHIVED, by entry; ERASE, EXPIRE"),
    KeyKind("{NS:c:*}:in", "stream", "APPEND, STOP, by entry; ERASE, EXPIRE"),
    KeyKind("{NS:c:*}:seen", "zset", "APPEND, by entry; ERASE, EXPIRE"),
    KeyKind("{NS:c:*}:state", "string", "ERASE, EXPIRE"),
    KeyKind("{NS:c:*}:tail", "stream", "APPEND, STOP, ERASE, EXPIRE"),
    KeyKind("{NS:c:*}:asks", "hash", "ANSWER, by entry; APPEND, STOP, ERASE, EXPIRE"),
    KeyKind("{NS:c:*}:alarms", "hash", "FIRE, by entry; ERASE, EXPIRE"),
    KeyKind("{NS:k:*}", "string", "whoever uses the ticket; else it expires"),
    KeyKind("{NS:*}:waited", "string", "expires after a second"),
    KeyKind("{NS:t:*}:due", "zset", "whoever has done what was due, by entry"),
    KeyKind("{NS:u:*}:slots", "hash", "UNRESERVE, by entry"),
    KeyKind("{NS:u:*}:wait", "zset", "RESERVE, DEQUEUE, by entry"),
    KeyKind("{NS:u:*}:conversations", "zset", "the erasure of the conversation, by entry"),
    KeyKind("{NS:n:*}:conversations", "hash", "DROP_RECORD, by entry; DROP_NODE"),
    KeyKind("{NS:n:*}:connections", "hash", "FLUSH, by entry; DROP_NODE"),
    KeyKind("{NS:i:*}", "zset", "the erasure of the conversation, by entry"),
)


def kind_of(key: str, namespace: str) -> KeyKind | None:
    """The kind that `key` belongs to, None if it is not one of ours."""
    for kind in KINDS:
        pattern = re.escape(kind.pattern.replace("NS", namespace)).replace(r"\*", "[^{}]*")
        if re.fullmatch(pattern, key):
            return kind
    return None
