"""A small server that speaks as much of OpenAI's chat API as a streaming client needs, and counts."""

from __future__ import annotations

import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEEP_ALIVE_S = 0.02


@dataclass
class ModelServer:
    """What it answers, and what it was asked.

    Attributes:
        words: of the next answers; "…" in the place of a word makes it wait until it is released.
        requests: bodies of all requests, oldest first.
        keys: values of their Authorization headers.
        abandoned: how many connections clients have closed before the answer's end.
    """

    url: str = ""
    words: list[str] = field(default_factory=list[str])
    requests: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    keys: list[str | None] = field(default_factory=list[str | None])
    abandoned: int = 0
    released: threading.Event = field(default_factory=threading.Event)

    def said(self, number: int) -> list[tuple[str, str]]:
        """The messages of a request, as (role, content)."""
        return [(message["role"], message["content"]) for message in self.requests[number]["messages"]]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """One request."""
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        self.requests.append(json.loads(body))
        self.keys.append(handler.headers["Authorization"])
        handler.send_response(200 if handler.path == "/v1/chat/completions" else 404)
        handler.send_header("Content-Type", "text/event-stream")
        handler.end_headers()
        try:
            for word in self.words:
                if word == "…":
                    self.hold(handler)
                else:
                    self.write(handler, chunk(word))
            self.write(handler, "[DONE]")
        except OSError:
            self.abandoned += 1

    def hold(self, handler: BaseHTTPRequestHandler) -> None:
        """Say nothing until released. Comments notice that the client has gone."""
        while not self.released.wait(KEEP_ALIVE_S):
            handler.wfile.write(b": still thinking\n\n")

    @staticmethod
    def write(handler: BaseHTTPRequestHandler, data: str) -> None:
        """Send one event."""
        handler.wfile.write(f"data: {data}\n\n".encode())


def chunk(text: str) -> str:
    """A piece of an answer."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    return json.dumps(
        {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "small", "choices": [choice]}
    )


@contextmanager
def model_server() -> Generator[ModelServer]:
    """A running server."""
    model = ModelServer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            model.answer(self)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    model.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield model
    finally:
        model.released.set()
        server.shutdown()
        server.server_close()
        thread.join(10)
