"""``convener move``, ``convener drain`` and ``convener kick``."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from convener.cli.client import NodeClient
from convener.cli.failures import CommandFailed
from convener.cli.options import DEFAULT_URL, Conversation, Json, Timeout, Token, Url
from convener.cli.output import print_json

LOOK_S = 0.5


def move(
    cid: Conversation,
    node: Annotated[str, typer.Argument(help="Name of the node, as `convener nodes` shows it.")],
    cut: Annotated[bool, typer.Option("--cut", help="Cut off a turn under way; it is begun again there.")] = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
    timeout: Timeout = 30,
    json: Json = False,
) -> None:
    """Let another node run a conversation. Its clients stay where they are.

    Prints `moved`, `there` (it runs there already) or `busy` (a turn is under way: see `--cut`).

    Example: `convener move c1 node-2`
    """
    with NodeClient(url, token, timeout) as client:
        answer = client.request("POST", f"/api/conversations/{cid}/move", body={"node": node, "cut": cut})
    if json:
        print_json(answer)
    else:
        print(answer["outcome"])


def drain(
    node: Annotated[str, typer.Argument(help="Name of the node, as `convener nodes` shows it.")],
    within: Annotated[
        float | None, typer.Option(help="Seconds that turns under way may take. Default: its drain_timeout.")
    ] = None,
    wait: Annotated[bool, typer.Option(help="Wait until the node owns nothing.")] = True,
    url: Url = DEFAULT_URL,
    token: Token = None,
    timeout: Timeout = 30,
    json: Json = False,
) -> None:
    """Empty a node before it is stopped: nothing new comes to it, its conversations hibernate or move, and its clients
    are sent to other nodes. The process goes on until somebody ends it; a signal to stop drains by itself.

    A turn under way may end by itself for four fifths of the time, then goes no further than its next step, and is cut
    off at the end; another node goes on with it, and no recorded step is run again. `convener nodes` shows `draining`,
    and `buried` when the node owns nothing any more; whoever asks it is still answered, by way of the others.

    Prints how many conversations are left, until none is.

    Example: `convener drain node-2`
    """
    body = {} if within is None else {"timeout": within}
    with NodeClient(url, token, timeout) as client:
        last: Any = None
        while True:
            answer = client.request("POST", f"/api/nodes/{node}/drain", body=body)
            if json and (answer["state"] == "drained" or not wait):
                print_json(answer)
            elif not json and (answer["state"], answer["remaining"]) != last:
                print(f"{answer['node']} {answer['state']}: {answer['remaining']} conversations left")
            last = (answer["state"], answer["remaining"])
            if answer["state"] == "drained" or not wait:
                return
            time.sleep(LOOK_S)


def kick(
    user: Annotated[str | None, typer.Option("--user", "-u", help="Connections that this user has opened.")] = None,
    conversation: Annotated[str | None, typer.Option(help="Connections that are in this conversation.")] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    timeout: Timeout = 30,
    json: Json = False,
) -> None:
    """Look at once, on all nodes, whether open connections still have their right, and close those that lost it.

    Every node does that by itself every ten seconds; this is for the moment after a right was taken away.

    Example: `convener kick --user alice`
    """
    if user is None and conversation is None:
        raise CommandFailed("say whose connections: --user or --conversation", exit_code=2)
    body = {"user_id": user, "conversation_id": conversation}
    with NodeClient(url, token, timeout) as client:
        answer = client.request("POST", "/api/kick", body={k: v for k, v in body.items() if v is not None})
    if json:
        print_json(answer)
    else:
        print(f"{answer['checked']} connections checked, {answer['closed']} closed")
