"""An object store, as far as the archive needs one: put what is new, get, list, delete. By obstore, with deadlines.

Credentials and the like come from where obstore finds them: ``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``,
``GOOGLE_SERVICE_ACCOUNT``, ``AZURE_STORAGE_ACCOUNT_KEY``, an instance's role.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import unquote, urlsplit

from convener.errors import ArchiveUnavailable, ConfigurationError

SCHEMES: Final = ("file", "memory", "s3", "s3a", "gs", "az", "adl", "azure", "abfs", "abfss")
CALL_S: Final = 30.0
"""Longest time of one call, its repetitions included."""
DELETE_AT_ONCE: Final = 500
TRIES: Final[Any] = {"max_retries": 3, "retry_timeout": timedelta(seconds=20)}
CLIENT: Final[dict[str, Any]] = {"timeout": timedelta(seconds=20), "connect_timeout": timedelta(seconds=5)}


class Objects(Protocol):
    """What the archive needs of an object store. Names are relative, parts are separated by ``/``.

    Every call has a deadline and raises `ArchiveUnavailable` if the store is away, slow, or refuses.
    """

    async def create(self, name: str, data: bytes) -> bool:
        """Put an object, unless there is one of that name: False then, and it is left as it is."""
        ...

    async def get(self, name: str) -> bytes | None:
        """The content, None if there is none."""
        ...

    async def list(self, folder: str) -> list[str]:
        """Names of all objects below a folder."""
        ...

    async def delete(self, names: Sequence[str]) -> None:
        """Delete objects; those that are not there are no error."""
        ...


class ObstoreObjects:
    """`Objects` in whatever obstore knows."""

    def __init__(self, store: Any, url: str) -> None:
        import obstore
        from obstore import exceptions

        self._obstore: Any = obstore
        self._errors: Any = exceptions
        self._store: Any = store
        self._url = url

    @contextlib.asynccontextmanager
    async def _call(self, what: str) -> AsyncGenerator[None]:
        try:
            async with asyncio.timeout(CALL_S):
                yield
        except TimeoutError:
            raise ArchiveUnavailable(f"the archive did not {what} within {CALL_S:g} s", retry_after=1.0) from None
        except (OSError, self._errors.BaseError) as error:
            if isinstance(error, FileNotFoundError | self._errors.NotFoundError | self._errors.AlreadyExistsError):
                raise
            first, *_ = str(error).strip().splitlines() or [""]
            kind = type(error).__name__
            raise ArchiveUnavailable(f"the archive cannot {what}: {kind}: {first}", retry_after=1.0) from error

    async def create(self, name: str, data: bytes) -> bool:
        """See `Objects`."""
        try:
            async with self._call("take an object"):
                await self._obstore.put_async(self._store, name, data, mode="create")
        except self._errors.AlreadyExistsError:
            return False
        return True

    async def get(self, name: str) -> bytes | None:
        """See `Objects`."""
        try:
            async with self._call("give an object"):
                found = await self._obstore.get_async(self._store, name)
                return bytes(await found.bytes_async())
        except (FileNotFoundError, self._errors.NotFoundError):
            return None

    async def list(self, folder: str) -> list[str]:
        """See `Objects`."""
        names: list[str] = []
        try:
            async with self._call("list objects"):
                async for chunk in self._obstore.list(self._store, prefix=folder):
                    names += [str(found["path"]) for found in chunk]
        except (FileNotFoundError, self._errors.NotFoundError):
            return []
        return names

    async def delete(self, names: Sequence[str]) -> None:
        """See `Objects`."""
        for start in range(0, len(names), DELETE_AT_ONCE):
            chunk = list(names[start : start + DELETE_AT_ONCE])
            try:
                async with self._call("delete objects"):
                    await self._obstore.delete_async(self._store, chunk)
            except (FileNotFoundError, self._errors.NotFoundError):
                # A local folder says so for the first that is not there, and leaves the rest.
                for name in chunk if len(chunk) > 1 else ():
                    await self.delete([name])


def open_objects(url: str) -> Objects:
    """The object store of a URL: ``file:///folder``, ``s3://bucket/prefix``, ``gs://``, ``az://``.

    Raises:
        ConfigurationError: there is no such kind, obstore is not installed, or it lacks what it needs to know.
    """
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        raise ConfigurationError(f"archive_url: must begin with one of {', '.join(f'{s}://' for s in SCHEMES)}")
    try:
        from obstore.store import LocalStore, from_url
    except ImportError as error:
        raise ConfigurationError("archive_url: needs obstore: pip install 'convener[archive]'") from error
    try:
        if parts.scheme == "file":
            if parts.netloc not in ("", "localhost") or not parts.path.strip("/"):
                raise ConfigurationError("archive_url: a folder is named as in file:///var/lib/convener/archive")
            return ObstoreObjects(LocalStore(Path(unquote(parts.path)), mkdir=True), url)
        if parts.scheme == "memory":
            return ObstoreObjects(from_url(url), url)
        # Given options hide what the environment says of them.
        plain = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes", "on")
        client: Any = CLIENT | {"allow_http": plain}
        opened: Any = from_url(url, client_options=client, retry_config=TRIES)
        return ObstoreObjects(opened, url)
    except ConfigurationError:
        raise
    except Exception as error:
        first, *_ = str(error).strip().splitlines() or [""]
        raise ConfigurationError(f"archive_url: cannot be opened: {first}") from error
