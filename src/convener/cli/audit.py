"""``convener audit``."""

from __future__ import annotations

from typing import Annotated

import typer

from convener.cli.client import NodeClient
from convener.cli.options import DEFAULT_URL, Conversations, Json, Timeout, Token, Url
from convener.cli.output import print_json, print_table

_COLUMNS = {"invariant": "INVARIANT", "where": "WHERE", "detail": "DETAIL"}


def audit(
    cids: Conversations = None,
    all_: Annotated[bool, typer.Option("--all", help="Every conversation that the cluster knows.")] = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
    timeout: Timeout = 300,
    json: Json = False,
) -> None:
    """Read logs, inboxes, slots and node records, and prove or refute the invariants on them.

    Ends with exit code 1 if anything is violated; says exactly what and where. Needs the admin token.

    Examples: `convener audit c1 c2`, `convener audit --all --json`
    """
    if bool(cids) == all_:
        raise typer.BadParameter("name conversations, or --all")
    with NodeClient(url, token, timeout) as client:
        report = client.get("/api/audit", {"conversation_id": cids} if cids else None)
    violations = report["violations"]
    if json:
        print_json(report)
    elif violations:
        print_table(violations, _COLUMNS, "")
    if not json:
        plural = "" if len(violations) == 1 else "s"
        verdict = f"{len(violations) or 'no'} violation{plural}"
        print(
            f"{verdict}; {report['checked']} checks on {report['conversations']} conversations "
            f"and {report['nodes']} nodes"
        )
    if violations:
        raise typer.Exit(1)
