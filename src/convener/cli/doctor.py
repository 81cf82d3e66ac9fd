"""``convener doctor``."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.table import Table
from rich.text import Text

from convener.cli.failures import CommandFailed
from convener.cli.options import Json
from convener.cli.output import console, print_json, printable
from convener.settings import Settings

if TYPE_CHECKING:
    from convener.store.diagnosis import Diagnosis

_COLOURS: Final = {"safe": "green", "reduced": "yellow", "refused": "red", "unknown": "dim"}


def doctor(
    print_acl: Annotated[
        bool, typer.Option("--print-acl", help="Print the least rights that nodes need of the store, and nothing else.")
    ] = False,
    redis: Annotated[
        str | None, typer.Option("--redis", help="The store. Default: that of the settings.", metavar="URL")
    ] = None,
    namespace: Annotated[
        str | None, typer.Option("--namespace", help="Prefix of all keys. Default: that of the settings.")
    ] = None,
    store_user: Annotated[
        str, typer.Option("--store-user", help="Name of the user in the line that --print-acl prints.", metavar="NAME")
    ] = "convener",
    watch: Annotated[
        float, typer.Option("--watch", min=0, help="Seconds for which the growth of its memory is watched.")
    ] = 2.0,
    json: Json = False,
) -> None:
    """Examine the store directly, by the settings that `convener serve` would use; no node need run.

    Looks at version, rights, eviction, persistence, replicas, memory, buffers and clock of every server, at the
    protocols of the nodes, and, by SCAN, for keys that nobody will delete; it changes nothing. The verdict is `safe`,
    `reduced` (it works, and says what could be better) or `refused` (data would be lost, or nothing works; exit code
    1). What the store hides is `unknown` and does not count.

    Examples: `convener doctor`, `convener doctor --json`, `convener doctor --print-acl --namespace shop`
    """
    given: dict[str, Any] = {"redis_url": redis, "namespace": namespace}
    settings = Settings(**{name: value for name, value in given.items() if value is not None})
    if print_acl:
        from convener.store.redis.acl import acl_line
        from convener.store.redis.keys import Keys

        print(acl_line(Keys(settings.namespace).namespace, store_user))
        return
    if settings.redis_url is None:
        raise CommandFailed("there is no store to examine: give --redis, or redis_url in the settings", exit_code=2)
    diagnosis = asyncio.run(_examine(settings, watch))
    if json:
        print_json({"verdict": diagnosis.verdict, "findings": [asdict(finding) for finding in diagnosis.findings]})
    else:
        _show(diagnosis)
    if diagnosis.verdict == "refused":
        raise typer.Exit(1)


async def _examine(settings: Settings, watch: float) -> Diagnosis:
    from convener.assembly import make_store
    from convener.store.redis import RedisStore
    from convener.store.redis.doctor import diagnose

    store = make_store(settings)
    assert isinstance(store, RedisStore)
    return await diagnose(store, high_watermark=settings.store_high_watermark, watch=watch)


def _show(diagnosis: Diagnosis) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("CHECK", "VERDICT", "FOUND"):
        table.add_column(title, overflow="fold")
    for finding in diagnosis.findings:
        says = Text(printable(finding.says))
        if finding.advice:
            says.append(f"\n{printable(finding.advice)}", style="italic")
        table.add_row(finding.check, Text(finding.verdict, style=_COLOURS[finding.verdict]), says)
    out = console()
    out.print(table)
    why = ", ".join(dict.fromkeys(f.check for f in diagnosis.findings if f.verdict == diagnosis.verdict))
    verdict = Text(diagnosis.verdict, style=f"bold {_COLOURS[diagnosis.verdict]}")
    out.print(verdict if diagnosis.verdict == "safe" else verdict.append(f": {why}", style="default"))
