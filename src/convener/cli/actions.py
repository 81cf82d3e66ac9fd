"""``convener interrupt``, ``convener stop``, ``convener resume`` and ``convener delete``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from convener.cli.client import NodeClient
from convener.cli.failures import CommandFailed
from convener.cli.options import DEFAULT_URL, Conversation, Json, Timeout, Token, Url
from convener.cli.output import print_json


def _post(cid: str, action: str, url: str, token: str | None, timeout: float, json: bool) -> None:
    with NodeClient(url, token, timeout) as client:
        answer = client.request("POST", f"/api/conversations/{cid}/{action}", body={})
    if json:
        print_json(answer)
    else:
        print(answer.get("outcome") or answer.get("status"))


def interrupt(
    cid: Conversation,
    url: Url = DEFAULT_URL,
    token: Token = None,
    timeout: Timeout = 30,
    json: Json = False,
) -> None:
    """Stop generating: end the turn that runs, keep what it has said, go on with the queue.

    Prints `interrupted`, `interrupting` (recorded, its node is still ending it), `stale` or `idle`.

    Example: `convener interrupt c1`
    """
    _post(cid, "interrupt", url, token, timeout, json)


def stop(
    cid: Conversation,
    url: Url = DEFAULT_URL,
    token: Token = None,
    timeout: Timeout = 30,
    json: Json = False,
) -> None:
    """Stop a conversation on purpose: it takes no messages until `resume`. Its log stays.

    Prints `stopped`, `stopping` (recorded, its node is still finishing) or `already_stopped`.

    Example: `convener stop c1`
    """
    _post(cid, "stop", url, token, timeout, json)


def resume(
    cid: Conversation,
    url: Url = DEFAULT_URL,
    token: Token = None,
    timeout: Timeout = 30,
    json: Json = False,
) -> None:
    """Let a conversation go on: after a stop, after it was given up (`failed`), or where a turn that a crash has cut
    off waits to be repeated (`recovery=wait`).

    Prints `resumed`, or `running` if there was nothing to resume.

    Example: `convener resume c1`
    """
    _post(cid, "resume", url, token, timeout, json)


def delete(
    cid: Conversation,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
    timeout: Timeout = 30,
    json: Json = False,
) -> None:
    """Stop a conversation and erase its log and state, for ever.

    Asks first; where nobody can be asked, `--yes` is needed.

    Example: `convener delete c1 --yes`
    """
    if not yes:
        if not sys.stdin.isatty():
            raise CommandFailed("delete erases the log for ever: confirm with --yes", exit_code=2)
        typer.confirm(f"Erase conversation {cid} for ever?", abort=True, err=True)
    with NodeClient(url, token, timeout) as client:
        answer = client.request("DELETE", f"/api/conversations/{cid}")
    if json:
        print_json(answer if answer is not None else {"conversation_id": cid, "deleted": True})
    else:
        print("deleted")
