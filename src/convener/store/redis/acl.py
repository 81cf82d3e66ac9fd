"""The least rights that a node needs of a server's access list, and which of them a refusal is about.

The commands of the scripts are read from the scripts: the server checks what a script does as if its caller did it.
Everything else that a node sends stands in `DIRECT`; a test compares it with the code.
"""

from __future__ import annotations

import re
from typing import Final

from convener.store.redis.scripts import SCRIPTS

DIRECT: Final = frozenset(
    {
        *("eval", "evalsha", "script|load"),
        *("get", "set", "getdel", "hget", "hset", "hdel", "hgetall", "hmget", "hscan"),
        *("xrange", "zadd", "zrem", "zrange", "zrangebylex", "zscore", "zmscore"),
        *("ssubscribe", "sunsubscribe", "spublish"),
        *("ping", "select", "wait", "info", "role", "client|id", "client|list"),
        *("cluster|slots", "asking"),
    }
)
"""What nodes send themselves, as access lists spell it. HELLO, AUTH and RESET need no right."""

OPTIONAL: Final = frozenset(
    {
        *("info", "role", "wait", "client|id", "client|list", "pubsub|shardnumsub"),
        *("eval", "script|load", "select", "cluster|slots", "asking"),
    }
)
"""What nodes do without, or need in some topologies only: managed stores hide some of it."""

DOCTOR: Final = frozenset({"scan", "config|get"})
"""What `convener doctor` asks beyond that, and does without: no node needs it."""

_CALLED: Final = re.compile(r"redis\.p?call\('([A-Z]+)'(?:, *'([A-Z]+)')?")
_WITH_SUBCOMMANDS: Final = frozenset({"XINFO", "PUBSUB"})


def commands() -> frozenset[str]:
    """All commands that a node's user needs."""
    found = set(DIRECT)
    for script in SCRIPTS.values():
        for command, word in _CALLED.findall(script.source):
            found.add(f"{command}|{word}".lower() if command in _WITH_SUBCOMMANDS else command.lower())
    return frozenset(found)


def rules(namespace: str) -> tuple[str, ...]:
    """The rules of a user that may do what nodes do in a namespace, and nothing else."""
    rights = (f"+{command}" for command in sorted(commands()))
    return ("resetkeys", f"~{{{namespace}:*", "resetchannels", f"&{{{namespace}:*", "-@all", *rights)


def acl_line(namespace: str, user: str) -> str:
    """A line for the server's ACL file; without its first word, for ``ACL SETUSER``. The password has to be set."""
    return f"user {user} reset on >PASSWORD {' '.join(rules(namespace))}"


def advice(refusal: str, namespace: str) -> str:
    """Which rule is missing where the server said `refusal`; "" if that cannot be told from it."""
    words = refusal.lower()
    command = re.search(r"permissions to run the '([\w|]+)' command", words)
    if command is not None:
        rule = f"+{command[1]}"
    elif "channel" in words:
        rule = f"&{{{namespace}:*"
    elif "key" in words:
        rule = f"~{{{namespace}:*"
    else:
        return ""
    return f"; the user's access list lacks {rule} (convener doctor --print-acl prints all that it needs)"
