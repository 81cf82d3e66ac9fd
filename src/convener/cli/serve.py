"""``convener serve``: one node."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeGuard

import typer

from convener.cli.loading import DEFAULT_APPLICATION, load_application
from convener.cli.logs import configure_logging
from convener.cli.server import run_server
from convener.settings import Settings

if TYPE_CHECKING:
    from convener.app import Convener

# How a flag reaches an application that makes its own settings.
_VARIABLES = {
    "host": "CONVENER_HOST",
    "port": "CONVENER_PORT",
    "redis_url": "CONVENER_REDIS_URL",
    "node_name": "CONVENER_NODE_NAME",
    "data_dir": "CONVENER_DATA_DIR",
    "log_format": "CONVENER_LOG_FORMAT",
}


def serve(
    app: Annotated[
        str, typer.Argument(help="The application, as module:attribute.", metavar="APP")
    ] = DEFAULT_APPLICATION,
    host: Annotated[
        str | None, typer.Option("--host", help="Address to listen on. Default: 127.0.0.1", metavar="ADDRESS")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 takes a free one. Default: 8000"),
    ] = None,
    redis: Annotated[
        str | None,
        typer.Option(
            "--redis", help="Redis or Valkey of the cluster. Default: none, a standalone node.", metavar="URL"
        ),
    ] = None,
    node_name: Annotated[
        str | None,
        typer.Option("--node-name", help="Name in the cluster. Default: host name and process id.", metavar="NAME"),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Where a standalone node keeps its log. Default: in memory.", metavar="DIR"),
    ] = None,
    log_format: Annotated[
        Literal["auto", "json", "console"] | None,
        typer.Option("--log-format", help="auto: for people on a terminal, else JSON. Default: auto"),
    ] = None,
) -> None:
    """Run one node until Ctrl-C or SIGTERM.

    Settings come from these flags, then from `CONVENER_*` environment variables, then from
    `convener.toml`. Without `--redis` the node is a cluster of its own. A password in the URL is
    visible in the process list: give it by CONVENER_REDIS_URL or CONVENER_REDIS_URL_FILE instead.

    Examples: `convener serve`, `convener serve main:app --redis redis://10.0.0.5 --node-name node-1`
    """
    flags: dict[str, Any] = {
        "host": host,
        "port": port,
        "redis_url": redis,
        "node_name": node_name,
        "data_dir": data,
        "log_format": log_format,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    for name, value in given.items():
        # For what builds its settings itself: a Convener with settings of its own, or one inside FastAPI.
        os.environ[_VARIABLES[name]] = str(value)
    if redis is not None:
        os.environ.pop("CONVENER_REDIS_URL_FILE", None)
    application = load_application(app)
    if _is_convener(application):
        settings = application.settings.replace(**given)
        application.configure(settings)
    else:
        settings = Settings(**given)
    configure_logging(settings.log_format)
    run_server(application, settings)


def _is_convener(application: object) -> TypeGuard[Convener]:
    """Whether it is one of ours; nothing is imported for that, since whoever made one has imported it."""
    module = sys.modules.get("convener.app")
    return module is not None and isinstance(application, module.Convener)
