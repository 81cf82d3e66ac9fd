"""What `deploy/` has, checked by the tools of those who read it, and against convener's own settings."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from convener.settings import Settings

ROOT: Final = Path(__file__).parent.parent.parent
DEPLOY: Final = ROOT / "deploy"
KUBERNETES: Final = DEPLOY / "kubernetes"
UNIT: Final = DEPLOY / "systemd" / "convener@.service"
PARTING: Final = 10
"""Seconds that a node gets after its drain to part with everybody."""
SECRETS: Final = {
    "redis-url": "redis://store.internal:6379/0",
    "admin-token": "an-admin's-long-random-text",
    "auth-tokens": json.dumps({"a-user's-long-random-text": "alice"}),
}


def run(*command: str | Path) -> str:
    """A tool's output; it must have found nothing."""
    done = subprocess.run(
        [str(word) for word in command], check=False, capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def tool(name: str) -> Path:
    """A program of this environment."""
    return Path(sys.executable).parent / name


@cache
def documents(file: Path) -> list[dict[str, Any]]:
    """A file's YAML documents."""
    return list(yaml.safe_load_all(file.read_text()))


def settings(environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """What a node makes of an environment; it refuses what it does not know."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return Settings()


def seconds(text: str) -> float:
    """Of a duration like ``45s``."""
    return float(text.removesuffix("s"))


# --- Docker and Compose -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not tool("hadolint").exists(), reason="hadolint's package is for Linux on x86-64 only")
def test_the_dockerfile_is_clean() -> None:
    run(tool("hadolint"), DEPLOY / "docker" / "Dockerfile")


def test_everything_that_the_dockerfile_copies_reaches_the_builder() -> None:
    text = (DEPLOY / "docker" / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE) for word in line.split()]
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert copied
    for name in copied:
        assert (ROOT / name).exists(), name
        assert name in allowed, name


def test_the_compose_file_is_one() -> None:
    run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose" / "compose.yaml")


def compose_nodes() -> dict[str, dict[str, Any]]:
    services = documents(DEPLOY / "compose" / "compose.yaml")[0]["services"]
    return {name: service for name, service in services.items() if name.startswith("node-")}


def compose_environment(service: Mapping[str, Any]) -> dict[str, str]:
    given = {"CONVENER_AUTH_TOKENS": SECRETS["auth-tokens"], "CONVENER_ADMIN_TOKEN": SECRETS["admin-token"]}
    return {name: str(given.get(name, value)) for name, value in service["environment"].items()}


@pytest.mark.parametrize("name", ["node-1", "node-2", "node-3"])
def test_composes_nodes_have_good_settings_and_time_to_drain(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    service = compose_nodes()[name]
    monkeypatch.setenv("CONVENER_HOST", "0.0.0.0")  # as the image says
    found = settings(compose_environment(service), monkeypatch)
    assert found.node_name == name
    needed = found.effective_shutdown_delay + found.drain_timeout + PARTING
    assert seconds(service["stop_grace_period"]) >= needed


def test_haproxy_is_told_where_composes_nodes_are() -> None:
    services = documents(DEPLOY / "compose" / "compose.yaml")[0]["services"]
    environment = services["haproxy"]["environment"]
    named = set(re.findall(r'"\$\{(\w+)\}"', (DEPLOY / "compose" / "haproxy.cfg").read_text()))
    assert named == set(environment)
    assert {value.partition(":")[0] for name, value in environment.items() if name != "FRONT"} == set(compose_nodes())


# --- Kubernetes -------------------------------------------------------------------------------------------------------


def manifests() -> list[Path]:
    listed = [KUBERNETES / name for name in documents(KUBERNETES / "kustomization.yaml")[0]["resources"]]
    assert set(listed) == set(KUBERNETES.glob("*.yaml")) - {KUBERNETES / "kustomization.yaml"}
    return listed


def objects(kind: str) -> list[dict[str, Any]]:
    return [each for file in manifests() for each in documents(file) if each["kind"] == kind]


def pod() -> dict[str, Any]:
    return objects("Deployment")[0]["spec"]["template"]["spec"]


def test_the_manifests_are_what_kubernetes_takes() -> None:
    output = run(tool("kubernetes-validate"), "--strict", *manifests())
    assert output.count(" passed for resource ") == sum(len(documents(file)) for file in manifests())


def test_selectors_and_references_meet() -> None:
    deployment = objects("Deployment")[0]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    service = next(each for each in objects("Service") if each["metadata"]["name"] == "convener")
    chosen = [
        deployment["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
        objects("PodDisruptionBudget")[0]["spec"]["selector"]["matchLabels"],
        objects("NetworkPolicy")[0]["spec"]["ingress"][0]["from"][0]["podSelector"]["matchLabels"],
    ]
    assert chosen == [labels] * len(chosen)
    scaled = objects("HorizontalPodAutoscaler")[0]["spec"]["scaleTargetRef"]
    assert (scaled["kind"], scaled["name"]) == ("Deployment", deployment["metadata"]["name"])
    container = pod()["containers"][0]
    ports = {port["name"] for port in container["ports"]}
    assert service["spec"]["ports"][0]["targetPort"] in ports
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["port"] in ports


def test_pods_have_good_settings_and_time_to_drain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    container = pod()["containers"][0]
    secrets = next(mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "secrets")
    for name, text in SECRETS.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    environment = {
        each["name"]: each["value"].replace(secrets, str(tmp_path)) if "value" in each else "convener-abc"
        for each in container["env"]
    }
    found = settings(environment, monkeypatch)
    assert (found.redis_url, found.admin_token) == (SECRETS["redis-url"], SECRETS["admin-token"])
    command = container["lifecycle"]["preStop"]["exec"]["command"]
    needed = float(command[-1]) + found.effective_shutdown_delay + found.drain_timeout + PARTING
    assert pod()["terminationGracePeriodSeconds"] >= needed


def test_the_autoscaler_counts_a_metric_that_nodes_have() -> None:
    metric = objects("HorizontalPodAutoscaler")[0]["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert f"| `{metric}` |" in (ROOT / "docs" / "reference" / "metrics.md").read_text()


# --- systemd ----------------------------------------------------------------------------------------------------------


def unit() -> tuple[configparser.RawConfigParser, dict[str, str]]:
    """The unit, and the environment that it sets by itself."""
    variables = dict(re.findall(r"^Environment=(\w+)=(.*)$", UNIT.read_text(), re.MULTILINE))
    parser = configparser.RawConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign] # names keep their case
    parser.read(UNIT)
    return parser, variables


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not everywhere")
def test_systemd_understands_the_unit_and_finds_it_hardened(tmp_path: Path) -> None:
    # It looks whether the program is there, so this is where it is here.
    here = tmp_path / UNIT.name
    here.write_text(UNIT.read_text().replace("/opt/convener/.venv/bin/convener", str(tool("convener"))))
    assert run("systemd-analyze", "verify", here).strip() == ""
    output = run("systemd-analyze", "security", "--offline=true", "--threshold=25", here)
    assert "Overall exposure level" in output


def test_systemds_nodes_have_good_settings_and_time_to_drain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parser, variables = unit()
    loaded = set(re.findall(r"^LoadCredential=([\w-]+):", UNIT.read_text(), re.MULTILINE))
    for name, text in SECRETS.items():
        assert name in loaded
        (tmp_path / name).write_text(text)
    shared = [
        line.partition("=")
        for line in (UNIT.parent / "convener.env").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    environment = {name: value for name, _, value in shared} | variables
    specifiers = {"%d": str(tmp_path), "%l": "machine", "%i": "8000"}
    for mark, stands_for in specifiers.items():
        environment = {name: value.replace(mark, stands_for) for name, value in environment.items()}
    found = settings(environment, monkeypatch)
    assert found.node_name == "machine-8000"
    needed = found.effective_shutdown_delay + found.drain_timeout + PARTING
    assert float(parser["Service"]["TimeoutStopSec"]) >= needed
