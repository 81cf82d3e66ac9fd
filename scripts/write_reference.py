"""Write the parts of docs/reference that repeat what the code says: settings, metrics, and the command line.

A page has a block between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``; this fills it and leaves the rest alone.

::

    python -m scripts.write_reference           write
    python -m scripts.write_reference --check   exit with 1 if a page is not as it would be written
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, cast, get_args, get_origin, get_type_hints

from prometheus_client.metrics import MetricWrapperBase
from pydantic.fields import FieldInfo
from typer.models import ArgumentInfo, OptionInfo

from convener.cli.root import app
from convener.settings import Settings
from convener.telemetry.metrics import Metrics

REFERENCE: Final = Path(__file__).parent.parent / "docs" / "reference"

SECTIONS: Final[Mapping[str, str]] = {
    "host": "The node",
    "redis_url": "The store",
    "max_concurrent_conversations": "Conversations",
    "lease_ttl": "Membership",
    "auth": "Access",
}
"""First setting of a section → its heading."""


def row(*cells: str) -> str:
    """One row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


# -- settings ----------------------------------------------------------------------------------------------------------


def settings() -> Iterator[str]:
    """A table per section."""
    for name, field in Settings.model_fields.items():
        if name in SECTIONS:
            yield from ("", f"## {SECTIONS[name]}", "", row("setting", "default", "meaning"), row("---", "---", "---"))
        notes = [str(field.description)]
        values = _values(field)
        if values:
            notes.append(f"One of {values}.")
        if name in Settings.secret_fields:
            notes.append(f"Also from the file that `CONVENER_{name.upper()}_FILE` names.")
        yield row(f"`{name}`", _default(field), " ".join(notes))


def _values(field: FieldInfo) -> str:
    if get_origin(field.annotation) is not Literal:
        return ""
    return ", ".join(f"`{value}`" for value in get_args(field.annotation))


def _default(field: FieldInfo) -> str:
    value: Any = field.get_default(call_default_factory=True, validated_data={})
    if value in (None, (), {}):
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


# -- metrics -----------------------------------------------------------------------------------------------------------


def metrics() -> Iterator[str]:
    """One table."""
    yield from ("", row("metric", "type", "labels", "meaning"), row("---", "---", "---", "---"))
    for collector in vars(Metrics()).values():
        if isinstance(collector, MetricWrapperBase):
            family = next(iter(collector.describe()))
            name = f"{family.name}_total" if family.type == "counter" else family.name
            labels = cast("tuple[str, ...]", getattr(collector, "_labelnames", ()))
            yield row(f"`{name}`", family.type, ", ".join(f"`{label}`" for label in labels), family.documentation)


# -- command line ------------------------------------------------------------------------------------------------------


def commands() -> Iterator[str]:
    """A section per command."""
    for command in app.registered_commands:
        function = command.callback
        if function is None or command.name is None:
            continue
        arguments, options = _parameters(function)
        usage = " ".join(["convener", command.name, *(f"[{m}]" if optional else m for m, optional, _ in arguments)])
        yield from ("", f"## `{usage}`", "", _paragraphs(inspect.getdoc(function) or ""), "")
        yield from (row("argument or option", "meaning"), row("---", "---"))
        for metavar, _, text in arguments:
            yield row(f"`{metavar}`", text)
        for names, text in options:
            yield row(f"`{names}`", text)


def _paragraphs(text: str) -> str:
    """Paragraphs on one line each; what is shown as code in the terminal is code here as well."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def _parameters(function: Callable[..., Any]) -> tuple[list[tuple[str, bool, str]], list[tuple[str, str]]]:
    arguments: list[tuple[str, bool, str]] = []
    options: list[tuple[str, str]] = []
    hints = get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        kind, *extras = get_args(hints[name])
        info = extras[0]
        optional = parameter.default is not inspect.Parameter.empty
        default = parameter.default if optional and parameter.default not in (None, False, True) else None
        text = str(info.help or "")
        if default is not None and "Default" not in text:
            text += f" Default: `{default}`."
        if isinstance(info, ArgumentInfo):
            arguments.append((str(info.metavar or name.upper()).replace("[CID]", "CID"), optional, text))
        elif isinstance(info, OptionInfo):
            if info.envvar:
                text += f" Also from `{info.envvar}`."
            options.append((_option(name, kind, info), text))
    return arguments, options


def _option(name: str, kind: object, info: OptionInfo) -> str:
    # Typer keeps the first name where a default would stand.
    first = [info.default] if isinstance(info.default, str) and info.default.startswith("-") else []
    names = ", ".join([*first, *(info.param_decls or [])]) or f"--{name.replace('_', '-')}"
    if kind is bool:
        return names
    literal = next((a for a in (kind, *get_args(kind)) if get_origin(a) is Literal), None)
    value = "|".join(map(str, get_args(literal))) if literal is not None else info.metavar or name.upper()
    return f"{names} {value}"


# -- pages -------------------------------------------------------------------------------------------------------------

BLOCKS: Final[Mapping[str, tuple[str, Callable[[], Iterator[str]]]]] = {
    "settings": ("settings.md", settings),
    "metrics": ("metrics.md", metrics),
    "commands": ("command-line.md", commands),
}
"""Name of a block → its page, and what is written there."""


def filled(page: str, name: str, lines: Iterator[str]) -> str:
    """The text of a page with a block filled.

    Raises:
        ValueError: the page has no such block.
    """
    block = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->\n)", re.DOTALL)
    if not block.search(page):
        raise ValueError(f"no block {name}")
    return block.sub(lambda match: match[1] + "\n".join(lines).strip("\n") + "\n\n" + match[2], page)


def outdated() -> dict[Path, str]:
    """Pages that are not as they would be written, with what they should be."""
    found: dict[Path, str] = {}
    for name, (file, write) in BLOCKS.items():
        path = REFERENCE / file
        text = path.read_text(encoding="utf-8")
        wanted = filled(text, name, write())
        if wanted != text:
            found[path] = wanted
    return found


def main() -> int:
    """Write or check; returns the exit code."""
    pages = outdated()
    if "--check" in sys.argv[1:]:
        for path in pages:
            sys.stderr.write(f"{path.name} is out of date: python -m scripts.write_reference\n")
        return 1 if pages else 0
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
