"""The HTTP API as the commands use it: one answer, or one line that says why not."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, Self, cast
from urllib.parse import urlsplit

import httpx

from convener.cli.failures import CommandFailed
from convener.settings_checks import is_loopback

Parameters = Mapping[str, str | int | list[str] | None]


class NodeUnreachable(CommandFailed):
    """No answer came.

    Args:
        message: one line.
        refused: no connection was made, so the request certainly had no effect; otherwise that is not known.
    """

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


class NodeAnswered(CommandFailed):
    """The node refused the request.

    Args:
        status: HTTP status.
        code: stable code of the problem document, or nothing if the answer was none.
        detail: its sentence.
    """

    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}" if code else detail)
        self.status = status
        self.code = code


class NodeClient:
    """A connection to one node.

    Args:
        url: address of the node, without a path at its end.
        token: sent as a bearer token, if given.
        timeout: seconds for connecting and for each wait for data.
    """

    def __init__(self, url: str, token: str | None, timeout: float) -> None:
        headers = {"User-Agent": "convener-cli"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        # A proxy meant for the world knows nothing of this machine's loopback address.
        trust_env = not is_loopback(urlsplit(url).hostname or "")
        self.url = url
        self._timeout = timeout
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout, trust_env=trust_env)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def get(self, path: str, parameters: Parameters | None = None) -> Any:
        """GET a JSON document.

        Raises:
            NodeUnreachable: no answer.
            NodeAnswered: an answer other than success.
        """
        return self.request("GET", path, parameters=parameters)

    def request(self, method: str, path: str, *, parameters: Parameters | None = None, body: object = None) -> Any:
        """Send a request and return the JSON of the answer (nothing for 204); raises as `get`."""
        with self._failures():
            response = self._http.request(
                method, path, params=_given(parameters), json=body if method != "GET" else None
            )
        _check(response)
        if response.status_code == HTTPStatus.NO_CONTENT:
            return None
        try:
            return response.json()
        except ValueError:
            raise NodeAnswered(
                response.status_code, "", f"{self.url} does not answer like a convener node (no JSON)"
            ) from None

    @contextmanager
    def stream(
        self, path: str, *, parameters: Parameters | None = None, headers: Mapping[str, str], silence: float
    ) -> Generator[httpx.Response]:
        """Open a stream; `silence` is how many seconds may pass without data. Raises as `get`."""
        timeout = httpx.Timeout(self._timeout, read=silence)
        with (
            self._failures(),
            self._http.stream(
                "GET", path, params=_given(parameters), headers=dict(headers), timeout=timeout
            ) as response,
        ):
            if response.is_error:
                response.read()
            _check(response)
            yield response

    @contextmanager
    def _failures(self) -> Generator[None]:
        try:
            yield
        except httpx.TimeoutException as error:
            raise NodeUnreachable(f"{self.url} did not answer in time") from error
        except httpx.TransportError as error:
            raise NodeUnreachable(
                f"cannot reach a node at {self.url}: {_reason(error)} (is it running? --url names another)",
                refused=isinstance(error, httpx.ConnectError),
            ) from error
        except httpx.InvalidURL as error:
            raise CommandFailed(f"{self.url}: {error}", exit_code=2) from error


def _given(parameters: Parameters | None) -> dict[str, str | int | list[str]]:
    return {key: value for key, value in (parameters or {}).items() if value is not None}


def _reason(error: httpx.TransportError) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror.lower()
        cause = cause.__cause__ or cause.__context__
    return str(error) or type(error).__name__


def _check(response: httpx.Response) -> None:
    if response.is_success:
        return
    try:
        document: object = response.json()
    except ValueError:
        document = None
    if isinstance(document, dict):
        problem = cast("dict[str, object]", document)
        code = str(problem.get("code") or "")
        detail = str(problem.get("detail") or problem.get("title") or response.reason_phrase)
    else:
        code, detail = "", f"HTTP {response.status_code} {response.reason_phrase}"
    retry_after = response.headers.get("Retry-After")
    if retry_after:
        detail = f"{detail} (try again in {retry_after} s)"
    raise NodeAnswered(response.status_code, code, detail)
