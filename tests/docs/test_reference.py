"""The reference is complete: what the code has, a page has, and the other way round."""

from __future__ import annotations

import re
from typing import Any, get_args

import pytest

import convener
from convener.cli.root import app
from convener.core.directory import LoopStatus
from convener.core.model import ClaimReason
from convener.gateway.asgi import Gateway
from convener.gateway.socketio import SocketGateway, make_server
from convener.manager.conversation import Conversation
from convener.manager.standalone import StandaloneConversationManager
from convener.manager.turn import RESERVED, Turn
from convener.settings import Settings
from convener.store.redis.keys import KINDS
from convener.store.redis.scripts import SCRIPTS
from convener.telemetry.metrics import Metrics
from models.catalogue import select
from scripts.write_reference import outdated
from tests.docs.pages import DOCS, ROOT, blocks, code, first_cells, rows

REFERENCE = DOCS / "reference"


def page(name: str) -> str:
    return (REFERENCE / name).read_text(encoding="utf-8")


@pytest.fixture
def gateway() -> Gateway:
    settings = Settings()
    sio = make_server(settings)
    manager = StandaloneConversationManager(sio=sio)
    return Gateway(manager, manager, settings, Metrics(), sio=sio)


def test_generated_tables_are_up_to_date() -> None:
    assert [path.name for path in outdated()] == [], "python -m scripts.write_reference"


def test_every_setting_has_a_row() -> None:
    assert {f"`{name}`" for name in Settings.model_fields} <= set(first_cells(page("settings.md")))


def test_every_metric_has_a_row() -> None:
    families = {family.name for family in Metrics().registry.collect()}
    described = {cell.strip("`").removesuffix("_total") for cell in first_cells(page("metrics.md"))}
    assert families == described & families
    assert {name for name in described if name.startswith("convener_")} == families


def test_every_command_has_a_heading() -> None:
    commands = {str(command.name) for command in app.registered_commands}
    assert commands == set(re.findall(r"^## `convener (\w+)", page("command-line.md"), re.MULTILINE))


def test_every_route_has_a_row_and_every_row_a_route(gateway: Gateway) -> None:
    paths: dict[str, dict[str, Any]] = gateway.api.openapi()["paths"]
    routes = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    cells = " ".join(cell for cell in first_cells(page("http.md")) if cell.startswith("`"))
    assert set(re.findall(r"`((?:GET|POST|PATCH|DELETE) [^`]+)`", cells)) == routes


def test_every_event_of_a_client_has_a_row(gateway: Gateway) -> None:
    sockets = SocketGateway(make_server(gateway.context.settings), gateway.context)
    handlers: dict[str, object] = getattr(sockets, "_handlers")  # noqa: B009 - the table of what it answers
    _, _, sends = page("socketio.md").partition("## What the client sends")
    assert {f"`{name}`" for name in handlers} == set(first_cells(sends)) - {"event", "---"}


def test_every_event_of_the_server_has_a_row() -> None:
    source = (ROOT / "src/convener/manager/feeds.py").read_text(encoding="utf-8")
    sent = set(re.findall(r'_send\(\s*"(\w+)"', source))
    lists = (ROOT / "src/convener/manager/listing.py").read_text(encoding="utf-8")
    sent |= set(re.findall(r'\.send\(self\.connection_id, "(\w+)"', lists))
    farewell = (ROOT / "src/convener/gateway/farewell.py").read_text(encoding="utf-8")
    sent |= set(re.findall(r'connection_id, "(\w+)"', farewell))
    _, _, rest = page("socketio.md").partition("## What the server sends")
    table, _, _ = rest.partition("### Log entries")
    assert {f"`{name}`" for name in sent} == set(first_cells(table)) - {"event", "---"}


def test_every_kind_of_log_entry_is_described() -> None:
    _, _, rest = page("socketio.md").partition("### Log entries")
    section, _, _ = rest.partition("## What the client sends")
    assert set(RESERVED) <= code(section)


def test_every_status_and_reason_that_occurs_is_described() -> None:
    statuses = set(get_args(LoopStatus)) - {"draining"}
    assert statuses <= code(page("http.md"))
    reasons = set(get_args(ClaimReason)) - {"handoff"}
    assert reasons <= code(page("socketio.md"))


def test_every_kind_of_key_has_a_row_that_says_who_deletes_it() -> None:
    described = {row[0].strip("`"): (row[1], row[-1]) for row in rows(page("wire.md")) if len(row) == 4}
    wanted = {kind.pattern: (kind.type, kind.deleted_by) for kind in KINDS}
    assert wanted == {key: value for key, value in described.items() if key.startswith("{NS:")}


def test_every_script_has_a_row() -> None:
    _, _, rest = page("wire.md").partition("## Scripts")
    section, _, _ = rest.partition("## Publications")
    assert set(SCRIPTS) == {name for cell in first_cells(section) for name in re.findall(r"`(\w+)`", cell)}


def test_every_public_name_is_described() -> None:
    text = page("python.md")
    assert [name for name in convener.__all__ if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.parametrize("kind", [Turn, Conversation])
def test_every_member_that_an_agent_gets_is_described(kind: type) -> None:
    members = {name for name in vars(kind) if not name.startswith("_")} - {
        "finish",
        "interrupted",
        "close",
        "waiting",
        "at_step",
        "stop_at_step",
        "stopped",
    }
    described = " ".join(code(page("python.md")))
    assert sorted(name for name in members if not re.search(rf"\b{name}\b", described)) == []


def test_every_invariant_has_a_row() -> None:
    text = (DOCS / "explanation/protocol.md").read_text(encoding="utf-8")
    numbered = [cell for cell in first_cells(text) if re.fullmatch(r"I\d+", cell)]
    assert numbered == [f"I{number}" for number in range(1, 16)]


def test_lengths_of_counterexamples_are_those_of_the_models() -> None:
    text = (DOCS / "explanation/protocol.md").read_text(encoding="utf-8")
    told = {row[2].strip("`"): int(row[1].split()[0]) for row in rows(text) if len(row) == 3 and "/" in row[2]}
    runs = {name: run.length for name, run in select()}
    assert len(told) > 10
    assert told == {name: runs[name] for name in told}


def test_runs_that_other_pages_name_exist() -> None:
    runs = {name for name, _ in select()} | {run.name for _, run in select()}
    for path in (DOCS / "explanation/failure-stories.md", DOCS / "decisions/0015-reserve-adopts-what-was-read.md"):
        text = path.read_text(encoding="utf-8")
        named = re.findall(r"\(run `([\w-]+)`\)", text) + re.findall(r"`((?:ownership|slots)/[\w-]+)`", text)
        assert named
        assert set(named) <= runs


def test_every_decision_is_listed() -> None:
    index = (DOCS / "decisions/index.md").read_text(encoding="utf-8")
    numbers = [path.name for path in sorted((DOCS / "decisions").glob("0*.md"))]
    assert re.findall(r"\((0\d{3}[\w-]+\.md)\)", index) == numbers


def test_python_examples_are_python() -> None:
    for path in [ROOT / "README.md", *DOCS.rglob("*.md")]:
        for block in blocks(path.read_text(encoding="utf-8"), "python"):
            compile(block, str(path), "exec", flags=0x2000, dont_inherit=True)  # top-level await is fine
