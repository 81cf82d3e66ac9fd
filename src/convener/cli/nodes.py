"""``convener nodes``."""

from __future__ import annotations

from convener.cli.client import NodeClient
from convener.cli.options import DEFAULT_URL, Json, Timeout, Token, Url
from convener.cli.output import print_json, print_table

_COLUMNS = {
    "name": "NODE",
    "state": "STATE",
    "conversations": "CONVERSATIONS",
    "connections": "CONNECTIONS",
    "lag": "LAG (s)",
    "version": "VERSION",
    "protocol": "PROTOCOL",
    "address": "ADDRESS",
    "incarnation": "INCARNATION",
    "last_renewal": "LAST RENEWAL",
}


def nodes(url: Url = DEFAULT_URL, token: Token = None, timeout: Timeout = 10, json: Json = False) -> None:
    """Show the nodes of the cluster.

    Example: `convener nodes --url http://10.0.0.7:8000 --token $ADMIN_TOKEN`
    """
    with NodeClient(url, token, timeout) as client:
        answer = client.get("/api/nodes")
    if json:
        print_json(answer)
    else:
        print_table(answer["nodes"], _COLUMNS, "no nodes")
