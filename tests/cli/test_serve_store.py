"""`convener serve` and its store: TLS with certificates on both sides, and a store that does not answer."""

from __future__ import annotations

import datetime
import ipaddress
import json
import signal
from collections.abc import Generator
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.support.processes import convener, free_port
from tests.support.servers import Server, binary

needs_redis = pytest.mark.skipif(binary("redis") is None, reason="redis-server, here with TLS, is not installed")


def write_certificate(directory: Path) -> None:
    """``cert.pem`` and ``key.pem`` for 127.0.0.1; the certificate is its own authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "convener test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (directory / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (directory / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


@pytest.fixture(scope="module")
def tls_store(tmp_path_factory: pytest.TempPathFactory) -> Generator[tuple[str, Path]]:
    """URL of a store that demands a certificate, and the directory with one."""
    directory = tmp_path_factory.mktemp("tls")
    write_certificate(directory)
    port = free_port()
    certificate, key = str(directory / "cert.pem"), str(directory / "key.pem")
    options = {
        "tls-port": str(port),
        "tls-cert-file": certificate,
        "tls-key-file": key,
        "tls-ca-cert-file": certificate,
        "tls-auth-clients": "yes",
    }
    with Server("redis", options=options):
        yield f"rediss://127.0.0.1:{port}/0", directory


@needs_redis
def test_a_store_behind_tls(tls_store: tuple[str, Path], tmp_path: Path) -> None:
    url, files = tls_store
    environment = {
        "CONVENER_REDIS_URL": url,
        "CONVENER_REDIS_CA_FILE": str(files / "cert.pem"),
        "CONVENER_REDIS_CERT_FILE": str(files / "cert.pem"),
        "CONVENER_REDIS_KEY_FILE": str(files / "key.pem"),
    }
    command = ["serve", "--port", "0", "--log-format", "json"]
    with convener(*command, directory=tmp_path, environment=environment) as process:
        address = json.loads(process.wait_for_error('"listening"', 60))["url"]
        assert httpx.get(address + "/readyz", trust_env=False).status_code == 200
        process.signal(signal.SIGTERM)
        assert process.wait() == 0


@needs_redis
def test_a_store_with_a_certificate_of_nobody_we_know(tls_store: tuple[str, Path], tmp_path: Path) -> None:
    url, _ = tls_store
    with convener("serve", "--port", "0", directory=tmp_path, environment={"CONVENER_REDIS_URL": url}) as process:
        assert process.wait(60) == 1
        last = process.errors[-1]
        assert last.startswith("error: ")
        assert "certificate" in last
        assert "Traceback" not in "\n".join(process.errors)


def test_a_store_that_is_not_there_is_one_line_without_its_password(tmp_path: Path) -> None:
    url = f"redis://:hidden@127.0.0.1:{free_port()}/0"
    with convener("serve", "--port", "0", directory=tmp_path, environment={"CONVENER_REDIS_URL": url}) as process:
        assert process.wait(60) == 1
        assert process.errors[-1].startswith("error: ")
        assert "127.0.0.1" in process.errors[-1]
        assert "hidden" not in "\n".join(process.errors)
        assert "Traceback" not in "\n".join(process.errors)
