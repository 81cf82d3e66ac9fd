"""``convener up``: a cluster on this machine."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from convener.cli.failures import CommandFailed
from convener.cli.loading import DEFAULT_APPLICATION
from convener.cli.sockets import bind
from convener.settings import Settings

_STATE = Path(".convener")


def up(
    app: Annotated[
        str, typer.Argument(help="The application, as module:attribute.", metavar="APP")
    ] = DEFAULT_APPLICATION,
    nodes: Annotated[int, typer.Option("--nodes", min=1, max=64, help="How many nodes.")] = 3,
    port: Annotated[
        int, typer.Option("--port", min=1, max=65535, help="Port of the first node; the others follow.")
    ] = 8000,
    redis: Annotated[
        str | None,
        typer.Option("--redis", help="Use this store instead of an embedded Valkey.", metavar="URL"),
    ] = None,
    reload: Annotated[
        bool,
        typer.Option("--reload", help="Restart the nodes, one by one, when Python files here change."),
    ] = False,
) -> None:
    """Start a cluster on this machine, for development: an embedded Valkey and some nodes.

    Prints `ready` and the first node's address when every node is ready. A process that dies is started
    again. Ctrl-C lets the nodes finish and ends everything; a second Ctrl-C ends it at once. What the
    conversations said stays in the directory `.convener/` and is there again at the next start.

    Examples: `convener up`, `convener up main:app --reload`, `convener up --nodes 5 --port 9000`
    """
    if sys.platform == "win32":
        raise CommandFailed("`convener up` needs Linux or macOS; start nodes with `convener serve --redis URL`")
    from convener.cli.up.cluster import Cluster, Plan
    from convener.cli.up.lock import DirectoryLock
    from convener.cli.up.valkey import EmbeddedValkey

    last = port + nodes - 1
    if last > 65535:
        raise typer.BadParameter(f"{nodes} nodes from port {port} on would need port {last}")
    flags: dict[str, Any] = {"port": port} | ({"redis_url": redis} if redis is not None else {})
    settings = Settings(**flags)
    if settings.ops_port is not None:
        raise typer.BadParameter("ops_port: the nodes of `up` cannot share one, and are asked at their own ports")
    _STATE.mkdir(exist_ok=True)
    (_STATE / ".gitignore").write_text("*\n", encoding="utf-8")
    with DirectoryLock(_STATE / "up.lock") as lock:
        for number in range(port, last + 1):
            # A stranger on the port would also answer for a node that cannot start.
            bind(settings.host, number).close()
        valkey = None
        store_url = settings.redis_url
        if store_url is None:
            valkey = EmbeddedValkey.prepare(_STATE / "valkey")
            store_url = valkey.url
        # Checked with all that the nodes will see: a contradiction shows once, and not once per node.
        settings = settings.replace(redis_url=store_url)
        plan = Plan(
            app=app,
            host=settings.host,
            ports=list(range(port, last + 1)),
            store_url=store_url,
            store_shown=settings.safe_redis_url,
            valkey=valkey,
            lock=lock.descriptor,
            drain_timeout=settings.drain_timeout,
            reload=reload,
        )

        async def run() -> None:
            await Cluster(plan).run()

        asyncio.run(run())
