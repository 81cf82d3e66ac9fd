"""A cluster of real processes: `convener serve`, some times, over a real store; killed, frozen, ended and restarted.

Everything here is synchronous: it starts and signals processes and looks at them from outside. When a test fails,
`Cluster.report` shows the ends of the nodes' logs and the conversations as the store has them.
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import httpx

from tests.support.processes import RunningProcess, convener, free_port
from tests.support.servers import Server
from tests.support.stored import Stored
from tests.support.waiting import NotInTimeError, wait_until_sync

START_LIMIT: Final = 60
_TAIL: Final = 40
_WIDTH: Final = 600


@dataclass(frozen=True)
class Launcher:
    """Another way to run a node than `convener serve`.

    Attributes:
        arguments: of `python -m`, with ``{port}`` where the port belongs; the application is in the modules of `files`.
        prefix: path below which the node is served.
        files: further modules, by name; `agent_under_test` is the test's own.
    """

    arguments: tuple[str, ...]
    prefix: str = ""
    files: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(eq=False)
class Node:
    """One node through all its lives.

    Attributes:
        directory: where it runs.
        code: the directory that `convener` is taken from, if not from this tree.
        ready: this life has been seen to be.
    """

    name: str
    directory: Path
    code: Path | None = None
    process: RunningProcess | None = None
    former: list[RunningProcess] = field(default_factory=list[RunningProcess])
    url: str = ""
    ready: bool = False

    @property
    def running(self) -> bool:
        """Whether its process is there, frozen or not."""
        return self.process is not None and self.process.process.poll() is None

    def log(self) -> list[str]:
        """What it has written in all its lives."""
        lives = [*self.former, *([self.process] if self.process is not None else [])]
        return [line for life in lives for line in (f"--- pid {life.pid}", *life.output, *life.errors)]


def _name(incarnation: str) -> str:
    return incarnation.rpartition("~")[0]


class Cluster:
    """`count` nodes over one store.

    Args:
        server: the store, running; or None: there is no such single one.
        url: of a store that is no single server; None without a server: each node is a standalone one.
        app: text of a module with an `app`, which the nodes run instead of the demo agent.
        settings: as `CONVENER_*` variables, by their names in `convener.settings`.
        detours: node → URL under which that node reaches the store, through a proxy for example.
        launcher: how the nodes are run, if not by `convener serve`.
        code: the directory from which every node takes `convener`, if not from this tree; see `Node.code`.
    """

    def __init__(
        self,
        server: Server | None,
        count: int = 3,
        *,
        app: str | None = None,
        settings: Mapping[str, object] = {},
        detours: Mapping[int, str] = {},
        launcher: Launcher | None = None,
        code: Path | None = None,
        url: str | None = None,
    ) -> None:
        self.server = server
        self._url = server.url if server is not None else url
        self._launcher = launcher
        self._detours = {f"n{index}": url for index, url in detours.items()}
        self.stored = Stored(server) if server is not None else None
        self._app = app
        self._environment = {f"CONVENER_{name.upper()}": str(value) for name, value in settings.items()}
        self._directory = tempfile.TemporaryDirectory(prefix="cluster")
        root = Path(self._directory.name)
        if app is not None:
            (root / "agent_under_test.py").write_text(app)
        if launcher is not None:
            for name, text in launcher.files.items():
                (root / f"{name}.py").write_text(text)
        self.nodes = [Node(f"n{number}", root, code) for number in range(count)]
        # No connection is kept: a node closes it after some seconds, perhaps when it is just used again.
        self.http = httpx.Client(trust_env=False, timeout=30, limits=httpx.Limits(max_keepalive_connections=0))

    # -- life ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            for node in self.nodes:
                self._spawn(node)
            for index in range(len(self.nodes)):
                self.wait_ready(index)
        except BaseException as error:
            error.add_note(self.report(""))
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process, at once."""
        for node in self.nodes:
            self._bury(node)
        self.http.close()
        if self.stored is not None:
            self.stored.close()
        self._directory.cleanup()

    @property
    def prefix(self) -> str:
        """The path below which every node is served."""
        return "" if self._launcher is None else self._launcher.prefix

    def _spawn(self, node: Node) -> None:
        node.ready = False
        if self._launcher is not None:
            node.process = self._launch(node, self._launcher)
            return
        command = ["serve", *(["agent_under_test:app"] if self._app is not None else [])]
        # Later starts take the same port: clients know the address.
        command += ["--port", str(httpx.URL(node.url).port if node.url else free_port()), "--node-name", node.name]
        if self._url is not None:
            command += ["--redis", self._detours.get(node.name, self._url)]
        node.process = convener(
            *command, "--log-format", "json", directory=node.directory, environment=self._environment | self._path(node)
        )

    @staticmethod
    def _path(node: Node) -> dict[str, str]:
        return {} if node.code is None else {"PYTHONPATH": str(node.code)}

    def _launch(self, node: Node, launcher: Launcher) -> RunningProcess:
        assert self._url is not None, "these nodes need a store"
        node.url = node.url or f"http://127.0.0.1:{free_port()}{launcher.prefix}"
        environment = (
            self._environment
            | self._path(node)
            | {
                "CONVENER_NODE_NAME": node.name,
                "CONVENER_REDIS_URL": self._detours.get(node.name, self._url),
            }
        )
        arguments = [word.format(port=httpx.URL(node.url).port) for word in launcher.arguments]
        return RunningProcess([sys.executable, "-m", *arguments], node.directory, environment)

    @staticmethod
    def _bury(node: Node) -> None:
        if node.process is not None:
            node.process.__exit__(None, None, None)
            node.former.append(node.process)
            node.process = None

    def wait_ready(self, index: int) -> None:
        """Return when the node answers `ready` at /readyz."""
        node = self.nodes[index]
        assert node.process is not None, f"{node.name} was not started"
        if not node.url:
            node.url = str(json.loads(node.process.wait_for_error('"listening"', START_LIMIT))["url"])
        process = node.process

        def is_ready() -> bool:
            assert process.process.poll() is None, f"{node.name} ended with {process.process.returncode}"
            answer = self.http.get(f"{node.url}/readyz", timeout=5)
            return answer.status_code == 200 and answer.json()["status"] == "ready"

        wait_until_sync(is_ready, f"{node.name} is ready", START_LIMIT, retry_on=httpx.TransportError)
        node.ready = True

    # -- what is done to nodes -----------------------------------------------------------------------------------

    def url(self, index: int) -> str:
        """The node's address."""
        return self.nodes[index].url

    def _signal(self, index: int, number: signal.Signals) -> None:
        process = self.nodes[index].process
        assert process is not None
        process.signal(number)

    def kill(self, index: int) -> None:
        """SIGKILL, and wait until the process is gone."""
        self._signal(index, signal.SIGKILL)
        self._bury(self.nodes[index])

    def stop(self, index: int) -> None:
        """SIGSTOP: it does nothing any more, its connections stay."""
        self._signal(index, signal.SIGSTOP)

    def cont(self, index: int) -> None:
        """SIGCONT after `stop`."""
        self._signal(index, signal.SIGCONT)

    def term(self, index: int) -> None:
        """SIGTERM; see `wait_ended`."""
        self._signal(index, signal.SIGTERM)

    def wait_ended(self, index: int, limit: float = 60) -> int:
        """The exit code."""
        node = self.nodes[index]
        assert node.process is not None
        code = node.process.wait(limit)
        self._bury(node)
        return code

    def restart(self, index: int) -> None:
        """Start a node whose process is gone, at its address and under its name, and wait until it is ready."""
        assert not self.nodes[index].running
        self._bury(self.nodes[index])
        self._spawn(self.nodes[index])
        self.wait_ready(index)

    def respawn(self) -> None:
        """Let frozen nodes go on, start those whose processes are gone; `heal` waits for them."""
        for index, node in enumerate(self.nodes):
            if node.running:
                self.cont(index)
            else:
                self._bury(node)
                self._spawn(node)

    def heal(self) -> None:
        """Have every node running and ready."""
        self.respawn()
        for index in range(len(self.nodes)):
            self.wait_ready(index)

    def reset(self) -> None:
        """Kill everything, forget everything, start again."""
        for node in self.nodes:
            self._bury(node)
        if self.server is not None:
            self.server.ask("FLUSHALL")
        self.heal()

    # -- what they say -------------------------------------------------------------------------------------------

    def live(self) -> list[int]:
        """Indices of the nodes that were ready and have not been ended since."""
        return [index for index, node in enumerate(self.nodes) if node.running and node.ready]

    def get(self, index: int, path: str, **params: Any) -> Any:
        """The JSON of a successful GET of `/api` + path."""
        answer = self.http.get(f"{self.url(index)}/api{path}", params=params)
        assert answer.status_code == 200, f"GET {path} at {self.nodes[index].name}: {answer.status_code} {answer.text}"
        return answer.json()

    def owner(self, cid: str) -> int | None:
        """Index of the node that owns a conversation, None for nobody; read from the store."""
        assert self.stored is not None
        name = _name(self.stored.head(cid)["owner"])
        return next((index for index, node in enumerate(self.nodes) if node.name == name), None)

    def index_of(self, pid: int) -> int:
        """The node that runs, or once ran, as this process."""
        for index, node in enumerate(self.nodes):
            if pid in [life.pid for life in (node.process, *node.former) if life is not None]:
                return index
        raise LookupError(f"no node ever ran as {pid}")

    def incarnations(self, index: int) -> set[str]:
        """The live incarnations of a node, as the store has them."""
        assert self.stored is not None
        return {i for i in self.stored.members() if i.startswith(f"{self.nodes[index].name}~")}

    # -- what must be true in the end ----------------------------------------------------------------------------

    def settle(self) -> None:
        """Wait until nothing is unanswered, half stopped, or left of a buried node."""
        assert self.stored is not None
        stored = self.stored
        try:
            wait_until_sync(lambda: not stored.unsettled(), "everything is settled", 30)
        except NotInTimeError as error:
            error.add_note("\n".join(stored.unsettled()))
            raise

    def agree(self) -> None:
        """Wait until every node's directory says what the heads in the store say, and all say the same (I14)."""
        try:
            wait_until_sync(lambda: not self.disagreements(), "all nodes list what is owned, and by whom", 20)
        except NotInTimeError as error:
            error.add_note("\n".join(self.disagreements()))
            raise

    def disagreements(self) -> list[str]:
        """Where nodes' directories differ from the store or from each other, in words."""
        assert self.stored is not None
        heads = {cid: self.stored.head(cid) for cid in self.stored.conversations()}
        owned = {cid: (_name(head["owner"]), int(head["epoch"])) for cid, head in heads.items() if head["owner"]}
        found: list[str] = []
        first: dict[str, Any] | None = None
        for index in self.live():
            rows = self.get(index, "/conversations", scope="cluster", limit=1000)["conversations"]
            listed = {row["conversation_id"]: (row["node"], row["epoch"]) for row in rows}
            rest = {row["conversation_id"]: (row["status"], row["connections"]) for row in rows}
            first = rest if first is None else first
            if listed != owned:
                found.append(f"n{index} lists {listed}, but the owners are {owned}")
            elif rest != first:
                found.append(f"n{index} lists {rest}, but another node {first}")
        return found

    def audit(self, index: int | None = None) -> dict[str, Any]:
        """The auditor's report, from one node; it must have found nothing, in everything that the store has."""
        assert self.stored is not None
        report = self.get(self.live()[0] if index is None else index, "/audit")
        assert report["violations"] == []
        assert report["conversations"] == len(self.stored.conversations())
        return report

    def erase_everything(self) -> None:
        """DELETE every conversation, at alternating nodes; then nothing of them may be left in the store."""
        assert self.stored is not None
        stored, live = self.stored, self.live()
        for number, cid in enumerate(sorted(stored.conversations())):
            answer = self.http.delete(f"{self.url(live[number % len(live)])}/api/conversations/{cid}")
            assert answer.status_code == 204, f"DELETE {cid}: {answer.status_code} {answer.text}"
        try:
            wait_until_sync(lambda: not stored.leftovers(), "nothing is left in the store", 30)
        except NotInTimeError as error:
            error.add_note("\n".join(stored.leftovers()))
            raise

    # -- when a test fails ---------------------------------------------------------------------------------------

    def report(self, failure: str) -> str:
        """The ends of all logs, and the conversations: those that `failure` names, else the first few."""
        parts: list[str] = []
        for node in self.nodes:
            code = node.process.process.poll() if node.process is not None else None
            state = "running" if node.running else f"ended with {code}" if node.process is not None else "killed"
            parts.append(f"=== {node.name} {node.url}: {state}")
            parts += [line[:_WIDTH] for line in node.log()[-_TAIL:]]
        if self.stored is not None and self.server is not None and self.server.running:
            parts += self._conversations(failure)
        return "\n".join(parts)

    def _conversations(self, failure: str) -> Sequence[str]:
        assert self.stored is not None
        known = sorted(self.stored.conversations(), key=len, reverse=True)
        named = [cid for cid in known if cid in failure]
        out = [f"=== {len(known)} conversations; not settled: {self.stored.unsettled()}"]
        for cid in (named or sorted(known))[:3]:
            out.append(f"=== conversation {cid}: {self.stored.head(cid)}")
            out += [f"({epoch}, {seq}) {text[:_WIDTH]}" for epoch, seq, text in self.stored.raw_log(cid)]
        return out
