"""``convener top``."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections.abc import Generator
from dataclasses import replace
from datetime import datetime
from typing import Annotated, Any, Final, Literal, cast, get_args

import typer
from rich.live import Live

from convener.cli.client import NodeAnswered, NodeClient, NodeUnreachable
from convener.cli.options import DEFAULT_URL, Json, Timeout, Token, Url, User
from convener.cli.output import console, print_json
from convener.cli.overview import Overview, Snapshot, order

try:
    import termios
    import tty
except ImportError:  # not on Windows, where Ctrl-C has to do
    termios = tty = None

Order = Literal["status", "id", "user", "node", "connections", "epoch"]
PAGE: Final = 1000
_KEYS: Final = {"id": "conversation_id", "user": "user_id"}


def top(
    user: User = None,
    node: Annotated[str | None, typer.Option("--node", help="Only what this node runs.", metavar="NODE")] = None,
    status: Annotated[
        str | None, typer.Option("--status", help="Only conversations in this state: running, idle, ...")
    ] = None,
    sort: Annotated[str, typer.Option("--sort", help=f"By what: {', '.join(get_args(Order))}.")] = "status",
    interval: Annotated[float, typer.Option("--interval", "-i", min=0.1, help="Seconds between two looks.")] = 2.0,
    count: Annotated[
        int | None,
        typer.Option("--count", "-n", min=1, help="Look so often, then end. In a pipe and with --json: once."),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Ask for at most this many conversations.")] = PAGE,
    all_: Annotated[bool, typer.Option("--all", help="Buried nodes too.")] = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
    timeout: Timeout = 10,
    json: Json = False,
) -> None:
    """Watch nodes and conversations; q or Ctrl-C ends it. Needs the admin token.

    What may need a look comes first, with `--sort status`: recovering, draining, failed, running, … A node that does
    not answer any more is asked again and again; what it said last stays on the screen.
    In a pipe the table is printed once; `--json` prints one document, with `--count` one line for each look.

    Examples: `convener top`, `convener top --node node-2 --status running`, `convener top --json -n 10 -i 1`
    """
    if sort not in get_args(Order):
        raise typer.BadParameter(f"--sort takes one of {', '.join(get_args(Order))}")
    out = console()
    live = count is None and not json and out.is_terminal and not out.is_dumb_terminal
    with NodeClient(url, token, timeout) as client:
        watcher = Watcher(client, {"user_id": user, "node": node, "status": status}, cast("Order", sort), limit, all_)
        with contextlib.suppress(KeyboardInterrupt):
            if live:
                watcher.watch(interval)
            else:
                watcher.print(count or 1, interval, json=json)


class Watcher:
    """Looks at a cluster again and again.

    Args:
        filters: parameters of the request for conversations.
        limit: how many conversations are asked for at most.
        buried: show the buried too.
    """

    def __init__(
        self, client: NodeClient, filters: dict[str, str | None], sort: Order, limit: int, buried: bool
    ) -> None:
        self._client = client
        self._filters = filters
        self._sort: Order = sort
        self._limit = limit
        self._buried = buried

    def look(self) -> Snapshot:
        """The cluster as it is now. Raises as `NodeClient.get`."""
        nodes: list[dict[str, Any]] = self._client.get("/api/nodes")["nodes"]
        chosen = self._filters["node"]
        rows: list[dict[str, Any]] = []
        cursor: str | None = None
        while len(rows) < self._limit:
            page = self._client.get(
                "/api/conversations",
                {"scope": "cluster", **self._filters, "cursor": cursor, "limit": min(PAGE, self._limit - len(rows))},
            )
            rows += page["conversations"]
            cursor = page.get("next")
            if cursor is None:
                break
        shown = [
            row
            for row in nodes
            if (self._buried or row["state"] != "buried") and chosen in (None, row["name"], row["incarnation"])
        ]
        ordered = order(rows, _KEYS.get(self._sort, self._sort))
        return Snapshot(datetime.now().astimezone(), self._client.url, shown, ordered, cursor is not None)

    def watch(self, interval: float) -> None:
        """On the whole screen, until somebody ends it.

        Raises:
            NodeUnreachable: at the first look; later ones are tried again.
            NodeAnswered: the node refuses.
        """
        last = self.look()
        out = console()
        with _keys() as pressed, Live(Overview(last, screen=True), console=out, screen=True) as screen:
            while not pressed(interval):
                last = self._again(last)
                screen.update(Overview(last, screen=True))

    def _again(self, last: Snapshot) -> Snapshot:
        """The next look; if there is none, the last one with the reason."""
        try:
            return self.look()
        except NodeUnreachable as error:
            return replace(last, problem=f"asking again: {error}")
        except NodeAnswered as error:
            if error.status < 500:
                raise
            return replace(last, problem=f"asking again: {error}")

    def print(self, count: int, interval: float, *, json: bool) -> None:
        """As text or JSON, so often. Raises as `watch`; a later look that fails is told on standard error."""
        last: Snapshot | None = None
        for number in range(count):
            if number:
                time.sleep(interval)
            found = self.look() if last is None else self._again(last)
            if found.problem:
                print(f"error: {found.problem}", file=sys.stderr)
            elif json:
                print_json(found.document(), compact=count > 1)
            else:
                out = console()
                out.print(Overview(found, screen=False))
                if number + 1 < count:
                    out.print()
            last = replace(found, problem="")


@contextlib.contextmanager
def _keys() -> Generator[Any]:
    """A function that waits for some seconds and says whether the user has pressed q meanwhile."""
    if termios is None or tty is None or not sys.stdin.isatty():
        yield _wait
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def pressed(seconds: float) -> bool:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            readable, _, _ = select.select([descriptor], [], [], left)
            typed = os.read(descriptor, 64) if readable else None
            # Nothing to read although there is something: the terminal is gone.
            if typed == b"" or (typed and set(typed) & set(b"qQ")):
                return True
        return False

    tty.setcbreak(descriptor)
    try:
        yield pressed
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _wait(seconds: float) -> bool:
    time.sleep(seconds)
    return False
