from __future__ import annotations

import dataclasses
import hashlib
import re
from importlib.resources import files

import pytest

from convener.core.membership import BURY_SLACK_MS, PULSE_LIMIT_MS
from convener.core.model import (
    MAX_ALARMS,
    MAX_UNREAD,
    PUBLISH_LIMIT,
    SEEN_WINDOW,
    STRIKE_WINDOW_MS,
    Meta,
)
from convener.store.redis.replies import META_FIELDS
from convener.store.redis.scripts import SCRIPTS
from tests.support.servers import Server

# What a full store must still take: everything that gives something back or ends something.
TAKEN_WHEN_FULL = {
    "append_final", "archived", "bury", "dequeue", "disown", "drop_node", "drop_record", "erase", "expire", "forget",
    "leave", "probe", "reap", "rebury", "release", "renew", "repair", "resolve", "rights", "stop", "supersede",
    "unreserve", "unsend", "waited",
}  # fmt: skip
READERS = {"due", "inbox", "list_user", "members", "read"}


def test_each_script_declares_what_it_may_do() -> None:
    flags = {name: script.source.partition("\n")[0] for name, script in SCRIPTS.items()}
    assert {n for n, first in flags.items() if first == "#!lua flags=allow-oom"} == TAKEN_WHEN_FULL
    assert {n for n, first in flags.items() if first == "#!lua flags=no-writes"} == READERS
    assert {n for n, first in flags.items() if first == "#!lua"} == set(flags) - TAKEN_WHEN_FULL - READERS


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_headers_list_the_slots_that_are_used(name: str) -> None:
    source = SCRIPTS[name].source
    assert "@include" not in source
    header = source.split("\n-- `now`")[0]
    assert re.search(r"^-- [A-Z_]+: ", header, re.MULTILINE), "says what it does"
    assert "-- ->" in header, "says what it answers"
    code = "\n".join(line for line in source.splitlines() if not line.startswith("--"))
    listed = {
        slot: {int(n) for n in re.findall(r"(?:^|  |KEYS |ARGV )(\d+)(?= |…)", "  ".join(_header(source, slot)))}
        for slot in ("KEYS", "ARGV")
    }
    for slot in ("KEYS", "ARGV"):
        used = {int(n) for n in re.findall(rf"{slot}\[(\d+)\]", code)}
        assert used <= listed[slot], f"{slot} {used - listed[slot]} of {name} are not in its header"


def _header(source: str, slot: str) -> list[str]:
    """The header's lines about KEYS or ARGV, with their continuations."""
    lines: list[str] = []
    inside = False
    for line in source.splitlines()[1:]:
        if not line.startswith("--"):
            break
        inside = line.startswith(f"-- {slot}") or (inside and line.startswith("--      "))
        if inside:
            lines.append(line.removeprefix("--").strip())
    return lines


def test_the_final_append_is_the_same_script() -> None:
    first, rest = SCRIPTS["append"].source.split("\n", 1)
    final, same = SCRIPTS["append_final"].source.split("\n", 1)
    assert (rest, first, final) == (same, "#!lua", "#!lua flags=allow-oom")


def test_head_fields_are_those_of_the_core() -> None:
    lua = files("convener.store.redis").joinpath("lua", "lib", "head.lua").read_text()
    listed = re.findall(r"'(\w+)'", lua.split("FIELDS = {")[1].split("}")[0])
    assert tuple(listed) == META_FIELDS
    assert set(META_FIELDS) == {field.name for field in dataclasses.fields(Meta)}
    # The scripts recognise a head by its generation, the 16th field.
    assert META_FIELDS[15] == "generation"


def test_constants_are_those_of_the_core() -> None:
    def number(name: str, constant: str) -> int:
        found = re.search(rf"\b{constant}\b[^=\n]*= (.+)", SCRIPTS[name].source)
        assert found
        return int(re.findall(r"\d+", found[1])[0])

    assert number("append", "LIMIT") == PUBLISH_LIMIT
    assert number("append", "SEEN_WINDOW") == SEEN_WINDOW
    assert number("claim", "STRIKE_WINDOW") == STRIKE_WINDOW_MS
    assert number("answer", "MAX_UNREAD") == number("interrupt", "MAX_UNREAD") == MAX_UNREAD
    assert number("set_alarm", "MAX_ALARMS") == MAX_ALARMS
    assert f"PULSE_LIMIT, BURY_SLACK = {PULSE_LIMIT_MS}, {BURY_SLACK_MS}" in SCRIPTS["bury"].source


def test_the_server_knows_scripts_by_our_names(server: Server) -> None:
    for script in SCRIPTS.values():
        assert script.sha == hashlib.sha1(script.source.encode()).hexdigest()
        assert server.ask("SCRIPT", "LOAD", script.source) == script.sha.encode()
