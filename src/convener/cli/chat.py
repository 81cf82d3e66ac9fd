"""``convener chat``: talk to an agent from the terminal."""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import Annotated

import typer

from convener.cli.client import NodeAnswered, NodeClient
from convener.cli.failures import CommandFailed
from convener.cli.options import DEFAULT_URL, Timeout, Token, Url, User, optional_id
from convener.cli.questions import data_of, open_questions, post_answer
from convener.cli.send import post_again, post_message
from convener.cli.talk import Follower, Screen, Talk
from convener.core.wire import turn_id
from convener.ids import new_id

_HELP = ":interrupt ends what is being said, :say TEXT speaks although a question is open, :quit ends this"


def chat(
    cid: Annotated[
        str | None,
        typer.Argument(
            help="Id of the conversation; created if it is new. Default: a fresh one.",
            metavar="[CID]",
            callback=optional_id,
            show_default=False,
        ),
    ] = None,
    user: User = None,
    last: Annotated[int, typer.Option("--tail", "-n", min=0, help="Show the last N log entries.", metavar="N")] = 50,
    url: Url = DEFAULT_URL,
    token: Token = None,
    timeout: Timeout = 30,
) -> None:
    """Talk to an agent: each line is a message, what the agent says is printed as it comes.

    While a question of the agent is open, the next line is the answer: JSON, or plain text. Ctrl-C ends what is being
    said; once nothing is, it ends the chat, as Ctrl-D does. `:interrupt`, `:say TEXT` and `:quit` do the same in words.
    Lines from a pipe are sent one after the other, each when the one before is answered.

    Examples: `convener chat`, `convener chat c1 --user alice`, `echo hello | convener chat c1`
    """
    wanted = cid or new_id()
    with NodeClient(url, token, timeout) as client, NodeClient(url, token, timeout) as listener:
        body = {"conversation_id": wanted} | ({"user_id": user} if user else {})
        status = post_again(client, "/api/conversations", body)["status"]
        _Chat(wanted, client, listener, last).run(status)


class _Chat:
    """One run of the command."""

    def __init__(self, cid: str, client: NodeClient, listener: NodeClient, last: int) -> None:
        self._cid = cid
        self._client = client
        self._live = sys.stdin.isatty()
        self._screen = Screen(live=self._live and sys.stdout.isatty())
        self._talk = Talk()
        self._said = ""
        self._follower = Follower(cid, listener, last, self._talk, self._screen)

    def run(self, status: str) -> None:
        """Read and send until the end of the input, or of the conversation."""
        if self._live:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # pyright: ignore[reportUnusedImport] - it is what edits lines
            print(f"conversation {self._cid} ({status}); {_HELP}", file=sys.stderr)
        for asked in open_questions(self._client, self._cid):
            self._talk.asked(asked["ask_id"], asked)
        threading.Thread(target=self._follower.run, name="follower", daemon=True).start()
        try:
            self._converse()
            self._screen.end()
            if self._talk.error is not None:
                raise self._talk.error
        finally:
            # Its connection is closed now, which is no reason to connect again.
            self._talk.end("over")

    def _converse(self) -> None:
        while True:
            try:
                self._talk.wait_joined()
                while self._talk.reason is None:
                    line = self._read()
                    if line is None:
                        # What was said last may have waited behind a question.
                        self._wait(self._said)
                        return
                    self._obey(line)
                return
            except KeyboardInterrupt:
                if self._talk.reason is not None or not (self._live and self._talk.busy):
                    return
                self._interrupt()

    def _read(self) -> str | None:
        """The next line; None at the end."""
        if not self._live:
            return sys.stdin.readline() or None
        try:
            return self._screen.ask()
        except EOFError:
            return None

    def _obey(self, line: str) -> None:
        text = line.rstrip("\n")
        command, _, rest = text.partition(" ")
        try:
            if command == ":quit":
                self._talk.end("")
            elif command == ":interrupt":
                self._interrupt()
            elif command == ":say":
                self._say(rest)
            elif text.strip():
                self._answer_or_say(text)
        except CommandFailed as error:
            if not self._live:
                raise
            self._screen.note(str(error))

    def _interrupt(self) -> None:
        try:
            answer = self._client.request("POST", f"/api/conversations/{self._cid}/interrupt", body={})
        except CommandFailed as error:
            self._screen.note(str(error))
        else:
            self._screen.note(answer["outcome"])

    def _answer_or_say(self, text: str) -> None:
        ask_id = self._talk.question()
        if ask_id is None:
            self._say(text)
            return
        turn = ask_id.partition(".")[0]
        try:
            post_answer(self._client, self._cid, ask_id, data_of(text), new_id())
        except NodeAnswered as error:
            if error.code == "ask_closed":
                self._talk.answered(ask_id)
            raise
        self._talk.answered(ask_id)
        self._wait(turn)

    def _say(self, text: str) -> None:
        message_id = new_id()
        self._talk.sent(message_id)
        accepted = post_message(self._client, self._cid, {"text": text}, message_id)
        self._said = turn_id(accepted["position"])
        self._wait(self._said)

    def _wait(self, turn: str) -> None:
        if turn and not self._live:
            self._talk.wait_ended(turn)
