"""A local server that speaks S3, for tests: moto's, on a free loopback port."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

import httpx

from convener.errors import ArchiveUnavailable
from convener.store.archive import Objects
from tests.support.servers import free_port
from tests.support.waiting import wait_until_sync

BUCKET: Final = "archive"


class ObjectStore:
    """The server's process, with one bucket. `environment` is what obstore needs to find it."""

    def __init__(self) -> None:
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def url(self) -> str:
        """What `archive_url` is set to."""
        return f"s3://{BUCKET}/some/prefix"

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which clients find it."""
        return {
            "AWS_ENDPOINT_URL": self.address,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
        }

    def start(self) -> None:
        """Start it and make the bucket; returns when that is there."""
        arguments = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self._port)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        self._process = subprocess.Popen(
            arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_until_sync(self._make_bucket, "the server has a bucket", 60, retry_on=httpx.HTTPError)

    def _make_bucket(self) -> bool:
        return httpx.put(f"{self.address}/{BUCKET}", timeout=5).status_code == 200

    def stop(self) -> None:
        """End it, and everything that it has."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(10)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class Switched:
    """Objects that are away while `away` is set; nothing is applied then."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self.away = False

    def _look(self) -> None:
        if self.away:
            raise ArchiveUnavailable("the archive is away")

    async def create(self, name: str, data: bytes) -> bool:
        """See `Objects`."""
        self._look()
        return await self._objects.create(name, data)

    async def get(self, name: str) -> bytes | None:
        """See `Objects`."""
        self._look()
        return await self._objects.get(name)

    async def list(self, folder: str) -> list[str]:
        """See `Objects`."""
        self._look()
        return await self._objects.list(folder)

    async def delete(self, names: Sequence[str]) -> None:
        """See `Objects`."""
        self._look()
        await self._objects.delete(names)
