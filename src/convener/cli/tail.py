"""``convener tail``."""

from __future__ import annotations

import json as json_module
import sys
import time
from datetime import datetime
from typing import Annotated, Any, cast

import typer

from convener.cli.client import NodeAnswered, NodeClient, NodeUnreachable
from convener.cli.live import LiveAnswer, OpenLine
from convener.cli.options import DEFAULT_URL, Conversation, Json, Timeout, Token, Url
from convener.cli.output import cell, print_json, printable
from convener.cli.sse import ServerSentEvent, parse_events
from convener.ids import node_of

# The node writes a comment line every 15 s; twice that without a byte means that the connection is dead.
_SILENCE = 35.0
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 5.0
_KIND_WIDTH = 16


def tail(
    cid: Conversation,
    after: Annotated[
        str | None,
        typer.Option("--after", help="Begin after this sequence number or cursor.", metavar="SEQ|CURSOR"),
    ] = None,
    last: Annotated[
        int | None, typer.Option("--tail", "-n", min=0, help="Begin with the last N entries.", metavar="N")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow/--no-follow", help="Wait for new entries, or end after the last one.")
    ] = True,
    url: Url = DEFAULT_URL,
    token: Token = None,
    timeout: Timeout = 10,
    json: Json = False,
) -> None:
    """Print the log of a conversation and follow it until Ctrl-C.

    An answer is shown while it is written. A lost connection is made again and goes on where it was cut.
    With `--json` each entry is one line, and each piece of an answer that is being written (it has an `offset`).

    Examples: `convener tail c1`, `convener tail c1 -n 20`, `convener tail c1 --no-follow --json`
    """
    if after is not None and last is not None:
        raise typer.BadParameter("--after and --tail exclude each other")
    follower = _Follower(cid, after, last, follow, json)
    with NodeClient(url, token, timeout) as client:
        try:
            follower.run(client)
        except KeyboardInterrupt:
            # The usual way to end it, so neither a failure nor worth a word.
            sys.stdout.flush()
        finally:
            follower.close()


class _Follower:
    """Follows one stream across reconnections."""

    def __init__(self, cid: str, after: str | None, last: int | None, follow: bool, json: bool) -> None:
        self._path = f"/api/conversations/{cid}/stream"
        self._parameters: dict[str, str | int | list[str] | None] = {"after": after, "tail": last}
        self._cursor: str | None = None
        self._follow = follow
        self._json = json
        self._answer = LiveAnswer()
        self._line = OpenLine()

    def close(self) -> None:
        """Leave the screen as it should be found."""
        self._line.end()

    def run(self, client: NodeClient) -> None:
        """Print until the stream ends for good.

        Raises:
            NodeUnreachable: the first connection failed; later ones are tried for ever.
            NodeAnswered: the node refuses, as for an unknown conversation.
        """
        connected = False
        pause = _FIRST_PAUSE
        while True:
            try:
                headers = {"Accept": "text/event-stream"}
                if self._cursor is not None:
                    headers["Last-Event-ID"] = self._cursor
                    self._parameters = {}
                with client.stream(
                    self._path, parameters=self._parameters, headers=headers, silence=_SILENCE
                ) as response:
                    connected, pause = True, _FIRST_PAUSE
                    for event in parse_events(response.iter_lines()):
                        if self._show(event):
                            return
                reason = "the node closed the stream"
            except NodeUnreachable as error:
                if not connected:
                    raise
                reason = str(error)
            except NodeAnswered as error:
                if not connected or error.status < 500:
                    raise
                reason = str(error)
            self._note(f"{reason}; connecting again")
            time.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)

    def _show(self, event: ServerSentEvent) -> bool:
        """Print one event; whether it was the last one to print."""
        if event.last_id is not None:
            self._cursor = event.last_id
        if event.event == "event":
            self._entry(json_module.loads(event.data))
        elif event.event == "delta":
            self._delta(json_module.loads(event.data))
        elif event.event == "joined":
            return not self._follow
        elif event.event == "resync":
            self._cursor = None
            self._answer.forget()
            self._note("the log was rebuilt: everything follows again from its beginning")
        elif event.event == "stopped":
            reason = json_module.loads(event.data).get("reason")
            self._note(f"the conversation was stopped: {reason}")
            return True
        return False

    def _entry(self, entry: dict[str, Any]) -> None:
        rest = self._answer.entry(entry)
        if self._json:
            print_json(entry, compact=True)
            return
        for part, new in (rest or {}).items():
            self._go_on(entry["turn"], part, new)
        self._line.end()
        if rest is None:
            print(describe(entry), flush=True)

    def _delta(self, delta: dict[str, Any]) -> None:
        if self._json:
            print_json(delta, compact=True)
            return
        new = self._answer.take(delta)
        if new:
            self._go_on(delta["turn"], delta["part"], new)

    def _go_on(self, turn: str, part: str, new: Any) -> None:
        """Show more of an answer: text on a line that grows, anything else on a line of its own."""
        head = _head("…", time.time(), "reply") + ("" if part == "text" else f"{cell(part)}: ")
        if isinstance(new, str):
            self._line.write((turn, part), head, printable(new))
        else:
            self._line.end()
            print(head + cell(new), flush=True)

    def _note(self, text: str) -> None:
        self._line.end()
        print(text, file=sys.stderr)


def describe(entry: dict[str, Any]) -> str:
    """One line for a log entry: number, local time, kind, and what is worth reading of its data."""
    kind: str = entry["kind"]
    head = _head(str(entry["seq"]), entry["ts"] / 1000, kind)
    return f"{head}{_gist(kind, entry['data'])}".rstrip()


def _head(number: str, seconds: float, kind: str) -> str:
    moment = datetime.fromtimestamp(seconds).astimezone().strftime("%H:%M:%S")
    return f"{number:>6}  {moment}  {kind:<{_KIND_WIDTH}}  "


def _gist(kind: str, data: object) -> str:
    if not isinstance(data, dict):
        return "" if data is None else cell(data)
    values = cast("dict[str, Any]", data)
    if kind == "input":
        said = _gist("", values.get("data"))
        user = values.get("user_id")
        return f"{cell(user)}: {said}" if user else said
    text = values.get("text")
    if isinstance(text, str):
        return printable(text)
    if kind == "open":
        return f"epoch begins on {node_of(str(values.get('node')))} ({cell(values.get('reason'))})"
    return cell(values) if values else ""
