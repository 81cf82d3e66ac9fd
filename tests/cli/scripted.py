"""An HTTP server that answers from a script: for answers that a healthy node does not give."""

from __future__ import annotations

import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit


@dataclass
class Answer:
    """One answer; `cut` closes the connection without one, `hold` keeps it open until the server ends."""

    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict[str, str])
    cut: bool = False
    hold: bool = False


def problem(status: int, code: str, detail: str, **headers: str) -> Answer:
    """An RFC 9457 answer."""
    document = {"type": "about:blank", "title": "Title", "status": status, "code": code, "detail": detail}
    return Answer(status, json.dumps(document).encode(), {"Content-Type": "application/problem+json"} | headers)


def events(*lines: str) -> Answer:
    """A stream of Server-Sent Events that ends after these lines."""
    body = "".join(line + "\n" for line in lines).encode()
    return Answer(200, body, {"Content-Type": "text/event-stream"})


@dataclass
class Request:
    """What the server was asked."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: Any


class Script:
    """The answers to give, in order, and the requests that came."""

    def __init__(self, answers: list[Answer]) -> None:
        self.answers = answers
        self.requests: list[Request] = []
        self.url = ""
        self.over = threading.Event()


@contextmanager
def scripted_server(*answers: Answer) -> Generator[Script]:
    """A server on a free loopback port; the last answer is repeated."""
    script = Script(list(answers))

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            target = urlsplit(self.path)
            script.requests.append(
                Request(
                    self.command,
                    target.path,
                    parse_qs(target.query),
                    {name.lower(): value for name, value in self.headers.items()},
                    json.loads(body) if body else None,
                )
            )
            answer = script.answers.pop(0) if len(script.answers) > 1 else script.answers[0]
            if answer.cut:
                self.close_connection = True
                return
            if answer.hold:
                script.over.wait(60)
                return
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.body)

        do_GET = do_POST = do_DELETE = _answer  # noqa: N815 - the names that the base class looks for

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
            """Says nothing: the requests are in the script."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    script.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield script
    finally:
        script.over.set()
        server.shutdown()
        server.server_close()
        thread.join(10)
