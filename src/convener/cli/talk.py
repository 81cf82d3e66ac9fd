"""What ``convener chat`` hears and shows: the conversation's stream in a thread, what it means, and the terminal."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, Final, cast

from convener.cli.client import NodeAnswered, NodeClient, NodeUnreachable
from convener.cli.live import LiveAnswer
from convener.cli.output import printable
from convener.cli.sse import ServerSentEvent, parse_events
from convener.core.replay import SETTLING

# The node writes a comment line every 15 s; twice that without a byte means that the connection is dead.
_SILENCE: Final = 35.0
_FIRST_PAUSE: Final = 0.5
_LONGEST_PAUSE: Final = 5.0
_PROMPT: Final = "> "
_SPOKEN: Final = "text"
"""The part of an answer that is shown while it is written."""


class Talk:
    """How the conversation stands. Written by the follower's thread, read and waited for by the other."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._questions: dict[str, Any] = {}
        self._closed: set[str] = set()
        self._ended: set[str] = set()
        self._sent: set[str] = set()
        self._joined = False
        self.busy = False
        self.reason: str | None = None
        self.error: Exception | None = None

    def question(self) -> str | None:
        """Id of the question that has been open longest."""
        with self._changed:
            return next(iter(self._questions), None)

    def asked(self, ask_id: str, asked: Any) -> None:
        """A question is open."""
        with self._changed:
            if ask_id not in self._closed:
                self._questions[ask_id] = asked
                self._changed.notify_all()

    def answered(self, ask_id: str) -> None:
        """A question is closed."""
        with self._changed:
            self._closed.add(ask_id)
            self._questions.pop(ask_id, None)
            self._changed.notify_all()

    def ended(self, turn: str) -> None:
        """A turn is over, and its questions with it."""
        with self._changed:
            self._ended.add(turn)
            for ask_id in [each for each in self._questions if each.startswith(f"{turn}.")]:
                del self._questions[ask_id]
            self._changed.notify_all()

    def sent(self, message_id: str) -> None:
        """A message is this chat's own."""
        with self._changed:
            self._sent.add(message_id)

    def is_own(self, message_id: object) -> bool:
        """Whether a message was typed here."""
        with self._changed:
            return message_id in self._sent

    def joined(self) -> None:
        """What was there is shown; the rest is live."""
        with self._changed:
            self._joined = True
            self._changed.notify_all()

    def end(self, reason: str, error: Exception | None = None) -> None:
        """Nothing more will come."""
        with self._changed:
            self.reason, self.error = reason, error
            self._changed.notify_all()

    def wait_joined(self) -> None:
        """Return when what was there is shown."""
        with self._changed:
            self._changed.wait_for(lambda: self._joined or self.reason is not None)

    def wait_ended(self, turn: str) -> None:
        """Return when a turn is over, or somebody has to answer something first."""
        with self._changed:
            self._changed.wait_for(lambda: turn in self._ended or self._questions or self.reason is not None)


class Screen:
    """Where a conversation is shown.

    Args:
        live: somebody types here: what is printed meanwhile must not stand in their line.
    """

    def __init__(self, *, live: bool) -> None:
        self._live = live
        self._asking = False
        self._open = False
        self._lock = threading.Lock()

    def ask(self) -> str:
        """The next line that is typed. Raises `EOFError`, `KeyboardInterrupt`."""
        with self._lock:
            self._end_line()
            self._asking = True
        try:
            return input(_PROMPT if self._live else "")
        finally:
            self._asking = False

    def say(self, who: str, data: Any) -> None:
        """Somebody says something."""
        self._print(f"{printable(who)}: {words(data)}")

    def go_on(self, who: str, text: str) -> None:
        """Somebody is saying something, and this is more of it."""
        with self._lock:
            if not self._open:
                self._clear()
                self._open = True
                sys.stdout.write(f"{printable(who)}: ")
            sys.stdout.write("\n".join(printable(line) for line in text.replace("\r\n", "\n").split("\n")))
            sys.stdout.flush()

    def end_line(self) -> bool:
        """What somebody was saying is said. False if nobody was."""
        with self._lock:
            was_open = self._open
            if was_open:
                self._end_line()
                self._prompt()
            return was_open

    def note(self, text: str) -> None:
        """Something that is not part of the conversation."""
        self._print(f"({printable(text)})", error=True)

    def stop_asking(self) -> None:
        """Nothing that is typed now will be of use: end `ask`, from another thread, by its `KeyboardInterrupt`."""
        with self._lock:
            main = threading.main_thread().ident
            if self._live and self._asking and main is not None and sys.platform != "win32":
                signal.pthread_kill(main, signal.SIGINT)

    def end(self) -> None:
        """Nothing more will be typed."""
        with self._lock:
            self._end_line()
        if self._live:
            print(file=sys.stderr)

    def _print(self, text: str, *, error: bool = False) -> None:
        with self._lock:
            self._end_line()
            self._clear()
            print(text, file=sys.stderr if error else sys.stdout, flush=True)
            self._prompt()

    def _clear(self) -> None:
        """Write over the prompt."""
        if self._live:
            sys.stdout.write("\r\x1b[K")
            sys.stdout.flush()

    def _prompt(self) -> None:
        if self._live and self._asking:
            sys.stdout.write(_PROMPT)
            sys.stdout.flush()

    def _end_line(self) -> None:
        if self._open:
            self._open = False
            sys.stdout.write("\n")
            sys.stdout.flush()


class Follower:
    """Follows the conversation's stream across reconnections, in a thread of its own."""

    def __init__(self, cid: str, client: NodeClient, last: int, talk: Talk, screen: Screen) -> None:
        self._path = f"/api/conversations/{cid}/stream"
        self._client = client
        self._last = last
        self._talk = talk
        self._screen = screen
        self._cursor: str | None = None
        self._answer = LiveAnswer(_SPOKEN)

    def run(self) -> None:
        """Show until the conversation is stopped or the node refuses."""
        try:
            self._follow_on()
        finally:
            self._screen.stop_asking()

    def _follow_on(self) -> None:
        pause = _FIRST_PAUSE
        while self._talk.reason is None:
            try:
                self._follow()
                pause = _FIRST_PAUSE
            except NodeUnreachable as error:
                if self._talk.reason is not None:
                    return
                self._screen.note(f"{error}; connecting again")
            except NodeAnswered as error:
                if error.status < 500:
                    self._talk.end(error.code, error)
                    return
            except Exception as error:
                if self._talk.reason is None:
                    self._talk.end("failed", error)
                return
            time.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)

    def _follow(self) -> None:
        headers = {"Accept": "text/event-stream"}
        if self._cursor is not None:
            headers["Last-Event-ID"] = self._cursor
        parameters = {"tail": self._last} if self._cursor is None else {}
        with self._client.stream(self._path, parameters=parameters, headers=headers, silence=_SILENCE) as response:
            for event in parse_events(response.iter_lines()):
                self._hear(event)
                if self._talk.reason is not None:
                    return

    def _hear(self, event: ServerSentEvent) -> None:
        if event.last_id is not None:
            self._cursor = event.last_id
        data: dict[str, Any] = json.loads(event.data)
        if event.event == "event":
            self._entry(data)
        elif event.event == "delta":
            new = self._answer.take(data)
            if new:
                self._screen.go_on("agent", new)
        elif event.event == "joined":
            self._talk.busy = bool(data["busy"])
            self._talk.joined()
        elif event.event == "resync":
            self._cursor = None
            self._answer.forget()
            self._screen.end_line()
        elif event.event == "stopped":
            self._screen.note(f"the conversation was stopped: {data.get('reason')}")
            self._talk.end("stopped")

    def _entry(self, entry: Mapping[str, Any]) -> None:
        kind, turn, data = entry["kind"], entry["turn"], entry["data"]
        fields = cast("dict[str, Any]", data) if isinstance(data, dict) else {}
        rest = self._answer.entry(entry)
        if kind == "input" and not self._talk.is_own(fields.get("message_id")):
            self._screen.say(str(fields.get("user_id") or "somebody"), fields.get("data"))
        elif kind == "turn_started":
            self._talk.busy = True
            if self._screen.end_line():
                self._screen.note("this was cut off, and begins again")
        elif kind == "reply" and rest is not None:
            if rest:
                self._screen.go_on("agent", rest[_SPOKEN])
            self._screen.end_line()
        elif kind == "reply":
            self._screen.say("agent", data)
        elif kind == "ask":
            self._screen.say("agent asks", fields.get("prompt"))
            if fields.get("schema") is not None:
                self._screen.note(f"the answer must fit {json.dumps(fields['schema'], ensure_ascii=False)}")
            self._talk.asked(str(fields.get("ask_id")), fields)
        elif kind == "answer":
            self._talk.answered(str(fields.get("ask_id")))
        elif kind in SETTLING:
            self._settled(kind, turn, fields)

    def _settled(self, kind: str, turn: str, fields: Mapping[str, Any]) -> None:
        self._talk.busy = False
        self._screen.end_line()
        if kind == "turn_failed":
            self._screen.note(f"this failed: {fields.get('message')}")
        elif kind == "turn_interrupted":
            self._screen.note("interrupted")
        self._talk.ended(turn)


def words(data: Any) -> str:
    """What somebody has said, as lines that are safe to print: its text, or its JSON."""
    value = cast("dict[str, Any]", data).get("text", data) if isinstance(data, dict) else data
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "\n".join(printable(line) for line in text.splitlines()) if text else ""
