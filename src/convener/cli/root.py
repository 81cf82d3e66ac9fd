"""The Typer application that all commands hang on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from convener.cli import (
    actions,
    audit,
    chat,
    conversations,
    doctor,
    nodes,
    operate,
    questions,
    send,
    serve,
    tail,
    top,
    why,
)
from convener.cli import up as up_command
from convener.version import __version__


@dataclass
class State:
    """What the options before the command's name say."""

    traceback: bool = False


app = typer.Typer(
    name="convener",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"convener {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    *,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show the Python traceback of an unexpected error.")
    ] = False,
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Long-lived conversations between people and AI agents, on a cluster of Python servers.

    Try it: `convener up` starts a cluster of three nodes with a demo agent on this machine;
    then, in a second terminal, `convener send c1 hello --create` and `convener tail c1`.

    The commands that show or change a cluster talk to any of its nodes over HTTP: `--url` or the
    variable CONVENER_URL says which, `--token` or CONVENER_TOKEN who you are.

    Exit codes: 0 done, 1 failed, 2 wrong usage or settings.
    """
    context.ensure_object(State).traceback = traceback


_RUN = "Run nodes"
_LOOK = "Look at a cluster"
_ACT = "Act on conversations"
_OPERATE = "Operate a cluster"

app.command("serve", rich_help_panel=_RUN)(serve.serve)
app.command("up", rich_help_panel=_RUN)(up_command.up)
app.command("nodes", rich_help_panel=_LOOK)(nodes.nodes)
app.command("conversations", rich_help_panel=_LOOK)(conversations.conversations)
app.command("show", rich_help_panel=_LOOK)(conversations.show)
app.command("top", rich_help_panel=_LOOK)(top.top)
app.command("why", rich_help_panel=_LOOK)(why.why)
app.command("tail", rich_help_panel=_LOOK)(tail.tail)
app.command("audit", rich_help_panel=_LOOK)(audit.audit)
app.command("chat", rich_help_panel=_ACT)(chat.chat)
app.command("send", rich_help_panel=_ACT)(send.send)
app.command("answer", rich_help_panel=_ACT)(questions.answer)
app.command("interrupt", rich_help_panel=_ACT)(actions.interrupt)
app.command("stop", rich_help_panel=_ACT)(actions.stop)
app.command("resume", rich_help_panel=_ACT)(actions.resume)
app.command("delete", rich_help_panel=_ACT)(actions.delete)
app.command("doctor", rich_help_panel=_OPERATE)(doctor.doctor)
app.command("move", rich_help_panel=_OPERATE)(operate.move)
app.command("drain", rich_help_panel=_OPERATE)(operate.drain)
app.command("kick", rich_help_panel=_OPERATE)(operate.kick)
