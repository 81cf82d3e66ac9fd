"""``convener why``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Final

import typer
from rich.table import Table
from rich.text import Text

from convener.cli.client import NodeClient
from convener.cli.options import DEFAULT_URL, Conversation, Json, Timeout, Token, Url
from convener.cli.output import console, print_json, printable

LAST: Final = 20


def why(
    cid: Conversation,
    last: Annotated[int, typer.Option("--last", min=1, help="Show at most this many ownerships, the latest.")] = LAST,
    url: Url = DEFAULT_URL,
    token: Token = None,
    timeout: Timeout = 10,
    json: Json = False,
) -> None:
    """Say why a conversation is where it is: who owns it since when, what it waits for, and why each ownership began.

    Times are this machine's local ones. A takeover names the node that was buried, how that was noticed, and by whom.

    Examples: `convener why c1`, `convener why c1 --json | jq .ownerships[-1]`
    """
    with NodeClient(url, token, timeout) as client:
        found = client.get(f"/api/conversations/{cid}/why")
    if json:
        print_json(found)
        return
    out, owner = console(), found["owner"]
    out.print(Text(f"{found['conversation_id']} is {found['status']}"), end="")
    if owner is None:
        out.print(Text("; nobody owns it"))
    else:
        since = f" since {_moment(owner['since'])}" if owner["since"] else ""
        out.print(Text(printable(f"; {owner['node']} owns it{since}, in epoch {found['epoch']}")))
        lease = _lease(owner)
        out.print(Text(printable(f"its lease: {owner['text']}{lease}")))
    for wait in found["waits"]:
        since = f" (since {_moment(wait['since'])})" if wait["since"] else ""
        out.print(Text(printable(f"waits for: {wait['text']}{since}")))
    _print_ownerships(found["ownerships"], last, found["first_seq"])


def _lease(owner: Mapping[str, Any]) -> str:
    if not owner["last_renewal"]:
        return ""
    return f"; renewed last at {_clock(owner['last_renewal'])}, good until {_clock(owner['lease_until'])}"


def _print_ownerships(ownerships: Sequence[Mapping[str, Any]], last: int, first_seq: int) -> None:
    if not ownerships:
        print("nobody has owned it yet" if first_seq == 1 else "no ownership began in what is left of its log")
        return
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for ownership in ownerships[-last:]:
        table.add_row(Text(_moment(ownership["since"])), Text(printable(ownership["text"])))
    print()
    console().print(table)
    if len(ownerships) > last:
        print(f"{len(ownerships) - last} earlier ones are not shown; see --last", file=sys.stderr)
    if first_seq > 1:
        print(f"what was before entry {first_seq} of the log was not looked at", file=sys.stderr)


def _moment(text: str) -> str:
    """A time on this machine's clock, with its date."""
    return datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _clock(text: str) -> str:
    return datetime.fromisoformat(text).astimezone().strftime("%H:%M:%S.%f")[:-3]
