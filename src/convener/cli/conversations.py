"""``convener conversations`` and ``convener show``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from convener.cli.client import NodeClient
from convener.cli.options import DEFAULT_URL, Conversation, Json, Timeout, Token, Url, User
from convener.cli.output import print_fields, print_json, print_table
from convener.cli.questions import open_questions, print_questions

_COLUMNS = {
    "conversation_id": "CONVERSATION",
    "user_id": "USER",
    "status": "STATUS",
    "busy": "BUSY",
    "node": "NODE",
    "epoch": "EPOCH",
    "connections": "CONNECTIONS",
    "updated_at": "LAST ACTIVITY",
}
# The node's own bound; more are read page by page.
_PAGE = 100


def conversations(
    user: User = None,
    node: Annotated[str | None, typer.Option("--node", help="Only those that this node runs.", metavar="NODE")] = None,
    status: Annotated[
        str | None,
        typer.Option("--status", help="Only those in this state: running, idle, ...", metavar="STATUS"),
    ] = None,
    mine: Annotated[
        bool,
        typer.Option("--mine", help="All conversations of the token's user, hibernated and stopped ones too."),
    ] = False,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Show at most this many.")] = 1000,
    url: Url = DEFAULT_URL,
    token: Token = None,
    timeout: Timeout = 10,
    json: Json = False,
) -> None:
    """Show the conversations that are loaded in the cluster, newest activity first.

    Needs the admin token, except with `--mine`.

    Examples: `convener conversations --user alice`, `convener conversations --json | jq -r .[].node`
    """
    if mine and (user or node):
        raise typer.BadParameter("--mine goes without --user and --node")
    parameters: dict[str, str | int | None] = {"status": status}
    if not mine:
        parameters |= {"scope": "cluster", "user_id": user, "node": node}
    rows: list[dict[str, Any]] = []
    cursor: str | None = None
    with NodeClient(url, token, timeout) as client:
        while len(rows) < limit:
            page = client.get(
                "/api/conversations",
                parameters | {"cursor": cursor, "limit": min(_PAGE, limit - len(rows))},
            )
            rows += page["conversations"]
            cursor = page.get("next")
            if cursor is None:
                break
    if json:
        print_json(rows)
    else:
        print_table(rows, _COLUMNS, "no conversations")


def show(
    cid: Conversation,
    url: Url = DEFAULT_URL,
    token: Token = None,
    timeout: Timeout = 10,
    json: Json = False,
) -> None:
    """Show one conversation: who owns it, its state, how long its log is, and which questions are open.

    Example: `convener show c1`
    """
    with NodeClient(url, token, timeout) as client:
        answer = client.get(f"/api/conversations/{cid}")
        questions = open_questions(client, cid)
    if json:
        print_json({**answer, "questions": questions})
        return
    print_fields(answer)
    if questions:
        print()
        print_questions(questions)
