"""One server of each kind for all tests of the contract; every test has a namespace of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import pytest

from convener.testing.harness import HarnessFactory
from tests.contract.harnesses import factory
from tests.support.servers import FLAVOURS, Flavour, Server, binary

KINDS = ("memory", "sqlite", *FLAVOURS)


@pytest.fixture(scope="session")
def server() -> Iterator[Callable[[str], Server]]:
    """Gives the running server of a flavour, started at the first use."""
    with ExitStack() as stack:
        running: dict[str, Server] = {}

        def get(kind: str) -> Server:
            flavour = cast("Flavour", kind)
            if kind not in running:
                if binary(flavour) is None:
                    pytest.skip(f"no {kind} server is installed on this machine")
                running[kind] = stack.enter_context(Server(flavour))
            return running[kind]

        yield get


@pytest.fixture(params=KINDS)
def make_harness(request: pytest.FixtureRequest, server: Callable[[str], Server], tmp_path: Path) -> HarnessFactory:
    """Makes fresh harnesses of one kind of store."""
    kind = str(request.param)
    if kind in FLAVOURS:
        server(kind)
    return factory(kind, server, tmp_path)
