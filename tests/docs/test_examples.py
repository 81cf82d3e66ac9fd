"""Examples of the README and of the how-to pages run as they stand, but for their ports."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import DOCS, ROOT, blocks, steps
from tests.support.jsclient import missing
from tests.support.processes import RunningProcess, convener, free_port
from tests.support.servers import Server

README = (ROOT / "README.md").read_text(encoding="utf-8")
MANAGERS = (DOCS / "how-to" / "managers.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Generator[int]:
    """The port of a node with the demo agent."""
    port = free_port()
    with convener("serve", "--port", str(port), directory=tmp_path_factory.mktemp("node")) as process:
        process.wait_for_error("listening", 60)
        yield port


def here(text: str, port: int) -> str:
    """The example for a node on this port."""
    return re.sub(r"127\.0\.0\.1:800\d", f"127.0.0.1:{port}", text)


def readme(language: str, part: str) -> str:
    """The one block of the README in this language that contains `part`."""
    (found,) = [block for block in blocks(README, language) if part in block]
    return found


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_readme_with_curl(node: int, tmp_path: Path) -> None:
    commands = here(readme("sh", "curl"), node)
    with RunningProcess(["sh", "-ec", commands], tmp_path) as process:
        process.wait_for_output('"kind":"turn_done"')
        assert '"status":"accepted","message_id":"m1"' in "".join(process.output)


def test_readme_with_python_socketio(node: int, tmp_path: Path) -> None:
    with RunningProcess([sys.executable, "-c", here(readme("python", "AsyncClient"), node)], tmp_path) as process:
        process.wait_for_output("'status': 'accepted', 'message_id': 'm2'")
        process.wait_for_output("reply {'text': 'and from Python'}")
        assert process.wait() == 0


# Without Node.js there is no JavaScript client to test; `make test` installs both.
@pytest.mark.skipif(missing() is not None, reason=missing() or "")
def test_readme_with_socket_io_client(node: int, tmp_path: Path) -> None:
    (tmp_path / "node_modules").symlink_to(ROOT / "tests" / "js" / "node_modules")
    script = tmp_path / "talk.mjs"
    script.write_text(here(readme("js", "socket.io-client"), node), encoding="utf-8")
    with RunningProcess(["node", str(script)], tmp_path) as process:
        process.wait_for_output("message_id: 'm3'")
        process.wait_for_output("reply { text: 'and from JavaScript' }")


def test_first_screen_of_the_readme_is_what_it_has_to_be() -> None:
    title, description, *_ = README.split("\n\n")
    assert title == "# convener"
    assert len(description.splitlines()) == 2
    assert "@app.agent" in blocks(README, "python")[0]
    shown = "\n".join(blocks(README, "console"))
    assert "$ convener up my:app\nready http://127.0.0.1:8000" in shown
    assert "pkill -KILL" in shown
    assert "(takeover)" in shown


def test_managers_with_a_server_of_ones_own(tmp_path: Path) -> None:
    (step,) = steps(MANAGERS, ["file"])
    port = free_port()
    talk = readme("python", "AsyncClient").replace('"message_id": "m2"', '"id": "m2"')
    with Server("valkey") as store:
        source = step.code.replace("redis://localhost:6379/0", store.url)
        (tmp_path / step.argument).write_text(source, encoding="utf-8")
        command = [sys.executable, "-m", "uvicorn", "mine:app", "--port", str(port)]
        with RunningProcess(command, tmp_path) as server:
            server.wait_for_error("Application startup complete", 60)
            with RunningProcess([sys.executable, "-c", here(talk, port)], tmp_path) as client:
                client.wait_for_output("'position': 1, 'duplicate': False")
                client.wait_for_output("""reply {'text': "You said 'and from Python'."}""")
                assert client.wait() == 0
            server.process.terminate()
            assert server.wait() in (0, -15)
            assert "Traceback" not in "\n".join(server.errors)


def test_access_list_of_the_store_is_enough(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "convener", "doctor", "--print-acl"]
    assert " ".join(command[2:]) in (DOCS / "how-to" / "stores.md").read_text(encoding="utf-8")
    rule = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, timeout=60).stdout
    _, name, *rights = rule.replace(">PASSWORD", ">secret").split()
    with Server("valkey") as store:
        admin: Any = store.client()
        admin.execute_command("ACL", "SETUSER", name, *rights)
        url = store.url.replace("redis://", f"redis://{name}:secret@")
        port = free_port()
        with convener("serve", "--port", str(port), "--redis", url, directory=tmp_path) as process:
            process.wait_for_error("listening", 60)
            arguments = ("c1", "hello", "--create", "--url", f"http://127.0.0.1:{port}")
            with convener("send", *arguments, directory=tmp_path) as sender:
                assert sender.wait() == 0, sender.errors
            process.process.terminate()
            assert process.wait() == 0
        # It asks for what it can do without; nothing else is refused.
        assert {entry[b"object"] for entry in admin.execute_command("ACL", "LOG")} <= {b"config|get"}


def test_settings_example_is_accepted(tmp_path: Path) -> None:
    (example,) = blocks((DOCS / "reference" / "settings.md").read_text(encoding="utf-8"), "toml")
    (tmp_path / "convener.toml").write_text(example, encoding="utf-8")
    code = "from convener import Settings; s = Settings(); print(s.limit_policy, s.auth_tokens)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if not k.startswith("CONVENER_")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.strip() == "reject {'a-long-random-token': 'alice'}", done.stderr


@pytest.mark.parametrize("number", [0, 1])
def test_security_examples_are_accepted(number: int, tmp_path: Path) -> None:
    example = blocks((DOCS / "how-to" / "security.md").read_text(encoding="utf-8"), "toml")[number]
    (tmp_path / "convener.toml").write_text(example, encoding="utf-8")
    code = "from convener import Settings; print(Settings().auth)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if not k.startswith("CONVENER_")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.strip() == ("token", "jwt")[number], done.stderr
