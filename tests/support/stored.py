"""The store as it is, without asking any node: keys, heads, logs, slots, members."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import redis
from redis.exceptions import ConnectionError as RedisConnectionError

from tests.support.servers import Server


@dataclass(frozen=True, slots=True)
class Entry:
    """A log entry as it stands in the stream."""

    epoch: int
    seq: int
    kind: str
    turn: str
    data: Any


class Stored:
    """Reads one namespace. `KEYS` is for tests: it is how something that nobody deletes is found."""

    def __init__(self, server: Server, namespace: str = "convener") -> None:
        self._client: redis.Redis = server.client(decode_responses=True)
        self._namespace = namespace

    def close(self) -> None:
        """Give the connection back."""
        self._client.close()

    def _ask(self, *words: str | int) -> Any:
        ask: Any = self._client.execute_command  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        try:
            return ask(*words)
        except RedisConnectionError:
            # A server that was restarted, or was told to close connections, closed this one too.
            return ask(*words)

    def _hash(self, key: str) -> dict[str, str]:
        return dict(self._ask("HGETALL", key))

    def keys(self) -> set[str]:
        """Every key of the server."""
        return set(self._ask("KEYS", "*"))

    # -- conversations -------------------------------------------------------------------------------------------

    def conversations(self) -> set[str]:
        """Ids in the list of all."""
        shards = [key for key in self.keys() if key.startswith(f"{{{self._namespace}:i:")]
        return {cid for shard in shards for cid in self._ask("ZRANGE", shard, 0, -1)}

    def _key(self, cid: str, part: str) -> str:
        return f"{{{self._namespace}:c:{cid}}}:{part}"

    def head(self, cid: str) -> dict[str, str]:
        """The head's fields, empty if there is none."""
        return self._hash(self._key(cid, "meta"))

    def raw_log(self, cid: str) -> list[tuple[int, int, str]]:
        """(epoch, seq, text) of the log."""
        out: list[tuple[int, int, str]] = []
        for identity, fields in self._ask("XRANGE", self._key(cid, "log"), "-", "+"):
            epoch, _, seq = identity.partition("-")
            out.append((int(epoch), int(seq), fields["e"]))
        return out

    def log(self, cid: str) -> list[Entry]:
        """The log, taken apart."""
        out: list[Entry] = []
        for epoch, seq, text in self.raw_log(cid):
            event = json.loads(text)
            out.append(Entry(epoch, seq, event["kind"], event["turn"], event["data"]))
        return out

    def unread(self, cid: str) -> int:
        """Entries in the inbox."""
        return int(self._ask("XLEN", self._key(cid, "in")))

    def state(self, cid: str) -> Any:
        """The agent's durable state, None if there is none."""
        text = self._ask("GET", self._key(cid, "state"))
        return None if text is None else json.loads(text)

    def pieces(self, cid: str) -> list[Any]:
        """The pieces of the answer that is being written."""
        return [json.loads(fields["p"]) for _, fields in self._ask("XRANGE", self._key(cid, "tail"), "-", "+")]

    # -- users and nodes -----------------------------------------------------------------------------------------

    def slots(self, user: str) -> dict[str, str]:
        """Conversation → incarnation of the slots that a user holds."""
        found = self._hash(f"{{{self._namespace}:u:{user}}}:slots")
        return {cid: value.partition("|")[2] for cid, value in found.items()}

    def waiting(self, user: str) -> list[str]:
        """Conversations in a user's queue, oldest first."""
        return [
            str(entry).partition("|")[0] for entry in self._ask("ZRANGE", f"{{{self._namespace}:u:{user}}}:wait", 0, -1)
        ]

    def members(self) -> set[str]:
        """Live incarnations."""
        return set(self._ask("ZRANGE", f"{{{self._namespace}:m}}:lease", 0, -1))

    def buried(self) -> set[str]:
        """Buried incarnations."""
        return set(self._ask("ZRANGE", f"{{{self._namespace}:m}}:dead", 0, -1))

    def shift_membership(self, ms: int) -> None:
        """Have every time of the membership so much later: as if the server's clock had been set back."""
        group = f"{{{self._namespace}:m}}"
        for name in self.members():
            self._ask("ZINCRBY", f"{group}:lease", ms, name)
        self._ask("INCRBY", f"{group}:pulse", ms)
        # A grace period began shortly before.
        self._ask("SET", f"{group}:grace", int(self._ask("GET", f"{group}:pulse")) + 1000)

    def records(self, incarnation: str) -> set[str]:
        """Conversations in a node's hash."""
        return set(self._ask("HKEYS", f"{{{self._namespace}:n:{incarnation}}}:conversations")) - {"#version"}

    # -- what must be true in the end ----------------------------------------------------------------------------

    def unsettled(self) -> list[str]:
        """What somebody still has to do, in words."""
        found: list[str] = []
        members = self.members()
        for cid in sorted(self.conversations()):
            head = self.head(cid)
            if not head:
                found.append(f"{cid} is in the list of all, but does not exist")
            elif head["status"] == "stopping":
                found.append(f"{cid} is still being stopped")
            elif head["status"] == "running" and head["position"] != head["done"]:
                found.append(f"{cid}: {head['done']} of {head['position']} messages are answered")
            if head and head["owner"] and head["owner"] not in members:
                found.append(f"{cid} is owned by {head['owner']}, which is no member")
        prefix = f"{{{self._namespace}:n:"
        of_nodes = {key: key[len(prefix) :].partition("}")[0] for key in self.keys() if key.startswith(prefix)}
        found += [
            f"{name} is no member, but left {key}: {self._hash(key)}"
            for key, name in sorted(of_nodes.items())
            if name not in members
        ]
        return found

    def leftovers(self) -> list[str]:
        """What may not be there without conversations: all but the membership and live nodes' empty hashes."""
        members = self.members()
        own = {f"{{{self._namespace}:n:{name}}}:conversations" for name in members}
        found = [key for key in self.keys() if not key.startswith(f"{{{self._namespace}:m}}:") and key not in own]
        records = [f"{name} has records of {held}" for name in members if (held := self.records(name))]
        return sorted(found) + records
