"""A cluster of real processes for every test that asks for one, inspected when the test is over.

Starting three nodes takes seconds, so tests with the same settings share them; a test that fails, kills or leaves
anything behind does not pass that on, since nodes are healed before and the store is empty after each test.
"""

from __future__ import annotations

import os
import random
import secrets
import subprocess
import sys
from collections.abc import AsyncGenerator, Generator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pytest

from tests.cluster.clients import Clients
from tests.cluster.talking import Api, talking
from tests.support.cluster import Cluster
from tests.support.proxy import ProxyThread
from tests.support.servers import FLAVOURS, Flavour, Server

ON_BOTH: Final = frozenset({"test_fence", "test_limit", "test_stop_delete", "test_takeover"})
_REPORT: Final = pytest.StashKey[dict[str, pytest.TestReport]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "cluster(nodes=3, app=None, proxied=False, rights=None, **settings): the `cluster` fixture's nodes run with it",
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run tests that can share a cluster one after the other."""
    here = Path(__file__).parent
    places = [
        place
        for place, item in enumerate(items)
        if isinstance(item, pytest.Function) and here in item.path.parents and "cluster" in item.fixturenames
    ]
    chosen = sorted((items[place] for place in places), key=_shared)
    for place, item in zip(places, chosen, strict=True):
        items[place] = item


def _shared(item: pytest.Item) -> tuple[str, str]:
    """Equal for tests that can share a cluster."""
    assert isinstance(item, pytest.Function)
    return str(item.callspec.params["flavour"]), repr(sorted(_wanted(item).items()))


def _wanted(item: pytest.Item) -> dict[str, Any]:
    mark = item.get_closest_marker("cluster")
    return dict(mark.kwargs) if mark is not None else {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash.setdefault(_REPORT, {})[report.when] = report
    cluster = getattr(item, "funcargs", {}).get("cluster")
    if report.failed and isinstance(cluster, Cluster):
        try:
            report.sections.append(("cluster", cluster.report(report.longreprtext)))
        except Exception as error:  # whatever it is, the failure itself is what matters
            report.sections.append(("cluster", f"cannot be shown: {error!r}"))
    return report


def least_rights(user: str) -> list[str]:
    """The words of ACL SETUSER for a user that may do what `convener doctor --print-acl` says; its password is pw."""
    command = [sys.executable, "-m", "convener", "doctor", "--print-acl", "--store-user", user]
    line = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return line.replace(">PASSWORD", ">pw").split()[1:]


class Pool:
    """Keeps one cluster at a time: the last one that was asked for."""

    def __init__(self) -> None:
        self._wanted: tuple[object, ...] = ()
        self._cluster: Cluster | None = None
        self._stack = ExitStack()
        self.proxy: ProxyThread | None = None
        """Between the nodes and the store, if that was asked for."""

    def get(
        self,
        flavour: Flavour,
        nodes: int,
        app: str | None,
        proxied: bool,
        rights: tuple[str, ...] | None,
        settings: Mapping[str, object],
    ) -> Cluster:
        """A cluster like this, healthy, over an empty store."""
        wanted = (flavour, nodes, app, proxied, rights, tuple(sorted(settings.items())))
        if self._cluster is None or wanted != self._wanted:
            self.close()
            # Whoever puts a proxy in front of the store does worse things to it too.
            server = self._stack.enter_context(Server(flavour, persistence="aof" if proxied else "none"))
            detours: dict[int, str] = {}
            if proxied:
                self.proxy = self._stack.enter_context(ProxyThread(server.port))
                detours = dict.fromkeys(range(nodes), self.proxy.url)
            if rights is not None:
                server.ask("ACL", "SETUSER", *least_rights("node"), *rights)
                detours = dict.fromkeys(range(nodes), f"redis://node:pw@127.0.0.1:{server.port}/0")
            made = Cluster(server, nodes, app=app, settings=settings, detours=detours)
            self._cluster = self._stack.enter_context(made)
            self._wanted = wanted
        return self._cluster

    def close(self) -> None:
        """End nodes and store."""
        self._stack.close()
        self._cluster = self.proxy = None


@pytest.fixture(scope="session")
def pool() -> Generator[Pool]:
    """The cluster that tests share."""
    made = Pool()
    yield made
    made.close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Valkey 9 and Redis 7 for what depends on the store most; else Valkey, since the managers' and the stores' own
    tests run on both. `make chaos` has them all.
    """
    chosen = any("flavour" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "flavour" in metafunc.fixturenames and not chosen:
        both = bool(os.environ.get("TEST_BOTH_STORES")) or metafunc.definition.path.stem in ON_BOTH
        metafunc.parametrize("flavour", FLAVOURS if both else FLAVOURS[:1], indirect=True, scope="session")


@pytest.fixture(scope="session")
def flavour(request: pytest.FixtureRequest) -> Flavour:
    """The kind of store."""
    return request.param


@pytest.fixture
def cluster(request: pytest.FixtureRequest, pool: Pool, flavour: Flavour) -> Generator[Cluster]:
    """Three nodes, or as the marker `cluster` says.

    After the test everything has to come to rest, all nodes have to agree about who runs what, the auditor has to find
    nothing, and when every conversation is deleted no key of them may be left.
    """
    wanted = _wanted(request.node)
    nodes, app, proxied = wanted.pop("nodes", 3), wanted.pop("app", None), wanted.pop("proxied", False)
    made = pool.get(flavour, nodes, app, proxied, wanted.pop("rights", None), wanted)
    made.heal()
    yield made
    reports = request.node.stash.get(_REPORT, {})
    if "call" not in reports or not reports["call"].passed:
        made.reset()
        return
    try:
        # The next test waits for them.
        made.respawn()
        made.settle()
        made.agree()
        made.audit()
        made.erase_everything()
    except BaseException as error:
        error.add_note(made.report(str(error)))
        made.reset()
        raise


@pytest.fixture
async def clients() -> AsyncGenerator[Clients]:
    """Makes Socket.IO clients; all are gone when the test ends."""
    made = Clients()
    yield made
    await made.aclose()


@pytest.fixture
async def api(cluster: Cluster, rng: random.Random) -> AsyncGenerator[Api]:
    """Talks over HTTP to any node that is there."""
    async with talking(lambda: [cluster.url(index) for index in cluster.live()], rng) as made:
        yield made


@pytest.fixture
def rng() -> random.Random:
    """Randomness from a seed that a failure shows; TEST_SEED repeats it."""
    seed = os.environ.get("TEST_SEED") or secrets.token_hex(4)
    print(f"TEST_SEED={seed}")
    return random.Random(seed)
