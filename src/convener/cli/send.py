"""``convener send``."""

from __future__ import annotations

import json as json_module
import sys
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import typer

from convener.cli.client import NodeAnswered, NodeClient, NodeUnreachable
from convener.cli.options import DEFAULT_URL, Conversation, Json, MessageId, Timeout, Token, Url, User
from convener.cli.output import print_json
from convener.ids import new_id

# Seconds between attempts. The message keeps its id, so a repetition cannot be accepted twice; it covers a
# node that was just replaced, not a cluster that is down.
_PAUSES = (0.2, 0.5, 1.0, 2.0)


def send(
    cid: Conversation,
    text: Annotated[
        str | None,
        typer.Argument(help="The message; - reads it from standard input.", metavar="TEXT", show_default=False),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="The message as JSON, instead of TEXT.", metavar="JSON"),
    ] = None,
    create: Annotated[bool, typer.Option("--create", help="Create the conversation if it is new.")] = False,
    user: User = None,
    overlap: Annotated[
        Literal["enqueue", "reject", "interrupt"] | None,
        typer.Option(
            "--overlap",
            help="If a message is being answered: wait, be refused, or end everything before it. Default: as the node "
            "is set.",
        ),
    ] = None,
    message_id: MessageId = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    timeout: Timeout = 30,
    json: Json = False,
) -> None:
    """Send one message to a conversation; done when the cluster has accepted it for good.

    `--user` names the owner of a conversation that `--create` makes; it needs a service or admin token,
    or a cluster without authentication.

    Examples: `convener send c1 "how are you?"`, `convener send c1 hello --create --user alice`,
    `convener send c1 "stop, do this first" --overlap interrupt`,
    `convener send c1 --data '{"text": "hi", "colour": "red"}'`
    """
    payload = _payload(text, data)
    if user is not None and not create:
        raise typer.BadParameter("--user goes with --create")
    with NodeClient(url, token, timeout) as client:
        if create:
            post_again(client, "/api/conversations", {"conversation_id": cid} | ({"user_id": user} if user else {}))
        answer = post_message(client, cid, payload, message_id or new_id(), overlap)
    if json:
        print_json(answer)
    else:
        print_accepted(answer)


def post_message(client: NodeClient, cid: str, data: Any, message_id: str, overlap: str | None = None) -> Any:
    """Send a message; the same id again does nothing twice. Raises as `NodeClient.request`."""
    body = {"message_id": message_id, "data": data} | ({"overlap": overlap} if overlap else {})
    return post_again(client, f"/api/conversations/{cid}/messages", body)


def print_accepted(answer: Mapping[str, Any]) -> None:
    """Print what the node says of a message that it has accepted."""
    again = " (again: it was there already)" if answer["duplicate"] else ""
    print(f"{answer['status']} at position {answer['position']} as {answer['message_id']}{again}")


def _payload(text: str | None, data: str | None) -> Any:
    if (text is None) == (data is None):
        raise typer.BadParameter("give either TEXT or --data")
    if data is None:
        return {"text": sys.stdin.read() if text == "-" else text}
    try:
        return json_module.loads(data)
    except json_module.JSONDecodeError as error:
        raise typer.BadParameter(f"--data is no JSON: {error}") from None


def post_again(client: NodeClient, path: str, body: dict[str, Any]) -> Any:
    """POST, and again where an attempt may have failed for want of an owner only. Raises as `NodeClient.request`."""
    for pause in _PAUSES:
        try:
            return client.request("POST", path, body=body)
        except NodeAnswered as error:
            if error.status not in (502, 503, 504):
                raise
        except NodeUnreachable as error:
            if error.refused:
                raise
        time.sleep(pause)
    return client.request("POST", path, body=body)
