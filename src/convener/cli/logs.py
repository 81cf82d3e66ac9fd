"""The log of a node: structlog and the standard library's loggers through one renderer, to standard error."""

from __future__ import annotations

import logging
import os
import sys
from typing import Literal, TextIO

import structlog
from structlog.typing import Processor

LogFormat = Literal["auto", "json", "console"]

# Their INFO lines tell a node's own story a second time, or one line per request.
_QUIET = ("uvicorn", "uvicorn.error", "httpx", "httpcore", "engineio", "socketio", "asyncio")


def use_colours(stream: TextIO) -> bool:
    """Whether `stream` shows colours: a terminal does, or FORCE_COLOR says so, and NO_COLOR is not set."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or stream.isatty()


def configure_logging(log_format: LogFormat, stream: TextIO | None = None) -> None:
    """Send every log line of this process to `stream` (standard error by default).

    Args:
        log_format: `json`, one object per line; `console`, for people; `auto`, `console` on a terminal, else
            `json`.
        stream: where to.
    """
    target: TextIO = stream if stream is not None else sys.stderr
    if log_format == "auto":
        log_format = "console" if target.isatty() else "json"
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True)
        if log_format == "json"
        else structlog.processors.TimeStamper(fmt="%H:%M:%S.%f", utc=False),
        structlog.processors.StackInfoRenderer(),
        structlog.stdlib.ExtraAdder(),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    renderers: list[Processor]
    if log_format == "json":
        # `dict_tracebacks` would print local variables, which hold messages and tokens.
        frames = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        renderers = [
            structlog.processors.ExceptionRenderer(frames),
            structlog.processors.JSONRenderer(ensure_ascii=False),
        ]
    else:
        # Plain tracebacks: rich ones draw boxes, and print local variables too.
        renderers = [
            structlog.dev.ConsoleRenderer(colors=use_colours(target), exception_formatter=structlog.dev.plain_traceback)
        ]
    handler = logging.StreamHandler(target)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
