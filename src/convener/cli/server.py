"""Running an ASGI application under uvicorn, with failures in one line and a clean end on a signal."""

from __future__ import annotations

import signal
import sys
from contextlib import closing
from types import FrameType

import structlog
import uvicorn

from convener.cli.failures import CommandFailed
from convener.cli.loading import Application, Message, Receive, Send
from convener.cli.sockets import bind, url_of
from convener.errors import ConvenerError
from convener.listening import reason
from convener.settings import Settings

# What uvicorn may take to close connections after the application's own drain is done.
_CLOSE_TIMEOUT = 5
# Frames are cut off by the WebSocket layer well above the node's own cap, so that a payload that is too large
# gets an answer instead of a closed connection.
_FRAME_FACTOR = 4
_SMALLEST_FRAME_CAP = 16 * 1024 * 1024


def run_server(application: Application, settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        CommandFailed: cannot listen, or the application did not start.
        ConvenerError: raised by the application's start.
    """
    log = structlog.get_logger("convener.cli")
    with closing(bind(settings.host, settings.port)) as listener:
        address = url_of(listener)
        watched = WatchedLifespan(application)
        server = uvicorn.Server(
            uvicorn.Config(
                watched,
                loop="uvloop" if _has_uvloop() else "asyncio",
                ws="websockets-sansio",
                ws_max_size=max(_SMALLEST_FRAME_CAP, _FRAME_FACTOR * settings.max_payload_bytes),
                lifespan="on",
                timeout_graceful_shutdown=int(settings.drain_timeout) + _CLOSE_TIMEOUT,
                log_config=None,
                access_log=False,
                server_header=False,
            )
        )
        watched.when_started = lambda: log.info("listening", url=address)
        # uvicorn raises the signal again after its shutdown, when nothing is left to be done about it.
        previous = {number: signal.signal(number, _nothing) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            server.run(sockets=[listener])
        except SystemExit:
            pass  # uvicorn's way to say that the start failed; why is known below
        except OSError as error:
            # Two nodes may bind one port at the same moment; only one of them then gets to listen.
            raise CommandFailed(f"cannot listen on {address}: {reason(error)}") from error
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
    if not server.started:
        raise watched.failure()
    log.info("stopped")


def _has_uvloop() -> bool:
    if sys.platform == "win32":
        return False
    try:
        import uvloop  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        return False
    return True


def _nothing(_number: int, _frame: FrameType | None) -> None:
    pass


class WatchedLifespan:
    """Passes everything to the application, and keeps the exception that its start raised.

    Starlette reports a failed start as a formatted traceback, which uvicorn prints. A wrong setting or an
    absent store deserves a sentence instead.
    """

    def __init__(self, application: Application) -> None:
        self._application = application
        self._error: BaseException | None = None
        self._message = ""
        self._started = False
        self.when_started = _do_nothing

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Run the application; the events of its lifespan are looked at in passing."""
        if scope["type"] != "lifespan":
            await self._application(scope, receive, send)
            return

        async def watch(message: Message) -> None:
            if message["type"] == "lifespan.startup.failed":
                self._message = str(message.get("message", ""))
                message = {"type": "lifespan.startup.failed", "message": ""}
            await send(message)
            if message["type"] == "lifespan.startup.complete":
                self._started = True
                self.when_started()

        try:
            await self._application(scope, receive, watch)
        except BaseException as error:
            if self._started:
                raise
            self._error = error
            await send({"type": "lifespan.startup.failed", "message": ""})

    def failure(self) -> Exception:
        """Why the application did not start, as what to raise."""
        error = self._error
        if isinstance(error, ConvenerError):
            return error
        if error is not None:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            return CommandFailed(f"the application did not start: {text}")
        last_line = self._message.strip().rpartition("\n")[2]
        return CommandFailed(f"the application did not start: {last_line or 'it gave no reason'}")


def _do_nothing() -> None:
    pass
