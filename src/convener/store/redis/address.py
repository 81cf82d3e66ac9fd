"""What a store's URL says: one server, the Sentinels of one, or some servers of a cluster.

::

    redis://user:password@host:6379/0          rediss://… with TLS; valkey://…, valkeys://… are the same
    unix:///path?db=0                          valkey+unix://…
    redis+sentinel://user:password@h1:26379,h2:26379/0/name?sentinel_username=…&sentinel_password=…
    redis+cluster://user:password@h1:6379,h2:6379

User name and password are those of the servers; Sentinels have their own. TLS (``rediss+…``, ``valkeys+…``) is
towards both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal
from urllib.parse import parse_qsl, urlencode, urlsplit

from convener.errors import ConfigurationError

Kind = Literal["single", "sentinel", "cluster"]
Host = tuple[str, int]

_PLAIN: Final = {
    "redis": "redis",
    "valkey": "redis",
    "rediss": "rediss",
    "valkeys": "rediss",
    "unix": "unix",
    "valkey+unix": "unix",
}
_PORTS: Final[dict[str, int]] = {"sentinel": 26379, "cluster": 6379}
_OWN: Final = ("sentinel_username", "sentinel_password")


def refused(why: str) -> ConfigurationError:
    """The error for a URL that cannot be used."""
    return ConfigurationError(f"redis_url: {why}")


@dataclass(frozen=True, slots=True)
class Address:
    """A store's URL, taken apart.

    Attributes:
        server_url: a URL that redis-py takes: of the server, or of any that has these credentials and options.
        hosts: of the Sentinels, or of servers of the cluster.
        service: the Sentinels' name of the primary.
        sentinel_url: as `server_url`, for a Sentinel.
    """

    kind: Kind
    server_url: str
    hosts: tuple[Host, ...] = ()
    service: str = ""
    sentinel_url: str = ""


def parse(url: str) -> Address:
    """Take a URL apart.

    Raises:
        ConfigurationError: it is no URL of a store. The text repeats neither user name nor password.
    """
    scheme, separator, rest = url.partition(":")
    if scheme in _PLAIN:
        return Address("single", f"{_PLAIN[scheme]}:{rest}")
    base, _, kind = scheme.partition("+")
    if not separator or _PLAIN.get(base) not in ("redis", "rediss") or kind not in _PORTS:
        raise refused(
            f"unknown scheme {scheme!r}; use redis, rediss, valkey, valkeys or unix, or one of the first four with "
            "+sentinel or +cluster"
        )
    netloc, path, query = _split(rest)
    credentials, at, hosts = netloc.rpartition("@")
    taken = tuple(_host(text, _PORTS[kind]) for text in hosts.split(","))
    pairs = parse_qsl(query, keep_blank_values=True)
    theirs = [(name, value) for name, value in pairs if name not in _OWN]
    if kind == "cluster":
        if path.strip("/") not in ("", "0"):
            raise refused("a cluster has one database only: leave the path out")
        return Address("cluster", f"{_PLAIN[base]}://{credentials}{at}server?{urlencode(theirs)}", taken)
    database, _, service = path.strip("/").partition("/")
    if not service or "/" in service or not database.isdecimal():
        raise refused(f"{scheme}:// needs /DB/NAME after the hosts: a number, and the Sentinels' name of the primary")
    own = [(name.removeprefix("sentinel_"), value) for name, value in pairs if name in _OWN]
    return Address(
        "sentinel",
        f"{_PLAIN[base]}://{credentials}{at}server/{database}?{urlencode(theirs)}",
        taken,
        service,
        f"{_PLAIN[base]}://sentinel?{urlencode([*(pair for pair in theirs if pair[0] != 'db'), *own])}",
    )


def _split(rest: str) -> tuple[str, str, str]:
    """(netloc, path, query): `urlsplit` knows one host only."""
    rest, _, query = rest.removeprefix("//").partition("?")
    netloc, slash, path = rest.partition("/")
    return netloc, slash + path, query


def _host(text: str, port: int) -> Host:
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname or "", port if parts.port is None else parts.port
    except ValueError:
        host = ""
    if not host or port == 0:
        # Not which: what stands there may be part of a password.
        raise refused("between user and path stand hosts, or host:port, with commas between them")
    return host, port
