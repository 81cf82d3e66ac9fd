"""Errors as clients see them: one description for HTTP (RFC 9457) and for Socket.IO.

Every error has a stable `code`; docs/reference/errors.md lists them all. An error that nobody foresaw becomes
``internal``: its details go to the log and to nobody else.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final, cast

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from convener.errors import ConvenerError, InvalidRequest, NotAuthenticated, PayloadTooLarge
from convener.gateway.jsontext import dumps

log = structlog.get_logger(__name__)

MEDIA_TYPE: Final = "application/problem+json"
UNREADABLE: Final = frozenset({InvalidRequest.http_status, PayloadTooLarge.http_status})
"""Statuses of answers to what does not have the documented form."""
_INTERNAL: Final = "internal error; the log of the node has the details"

# Answers that routing gives before any of our code runs.
_ROUTING_CODES: Final[Mapping[int, str]] = {404: "not_found", 405: "method_not_allowed"}


@dataclass(frozen=True, slots=True)
class Problem:
    """An error on its way to a client; `extra` holds further members, `retry_after` is in seconds."""

    status: int
    code: str
    detail: str
    retry_after: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def members(self) -> dict[str, Any]:
        """``{code, detail, retry_after?, …}``, the part that HTTP and Socket.IO share."""
        members: dict[str, Any] = {"code": self.code, "detail": self.detail}
        if self.retry_after is not None:
            members["retry_after"] = self.retry_after
        return members | dict(self.extra)

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        """The HTTP answer."""
        # about:blank says that the title is the status phrase; what sets problems apart is `code`.
        title = HTTPStatus(self.status).phrase
        document = {"type": "about:blank", "title": title, "status": self.status} | self.members()
        answer = Response(dumps(document), self.status, headers, MEDIA_TYPE)
        if self.retry_after is not None:
            answer.headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == HTTPStatus.UNAUTHORIZED:
            answer.headers["WWW-Authenticate"] = "Bearer"
        return answer


def problem_of(error: BaseException, **where: object) -> Problem:
    """The problem to report for an exception. One that nobody foresaw is logged, with `where` it happened."""
    if isinstance(error, ConvenerError):
        return Problem(error.http_status, error.wire_code, error.detail, error.retry_after, error.extra)
    if isinstance(error, (RequestValidationError, ValidationError)):
        return _of_validation(error.errors())
    if isinstance(error, TimeoutError):
        return Problem(503, "owner_unavailable", "no answer in time; ask again, under the same ids", 1.0)
    log.error("unexpected error", exc_info=error, **where)
    return Problem(500, "internal", _INTERNAL)


async def refuse(
    error: BaseException,
    scope: MutableMapping[str, Any],
    receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
    send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
) -> None:
    """Answer an ASGI request, or a WebSocket that is not accepted yet, with a problem."""
    if scope["type"] == "websocket":
        await receive()
        if "websocket.http.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": 1011})
            return
    await problem_of(error, path=scope["path"]).response()(scope, receive, send)


def _of_validation(errors: Sequence[Any]) -> Problem:
    found: list[dict[str, str]] = []
    for item in errors:
        parts = [str(part) for part in item["loc"] if part not in ("body", "query", "path", "header")]
        found.append({"field": ".".join(parts) or str((*item["loc"], "body")[0]), "message": _message(item)})
    detail = "; ".join(f"{each['field']}: {each['message']}" for each in found[:5])
    return Problem(InvalidRequest.http_status, InvalidRequest.code, detail, extra={"errors": found})


def _message(item: Mapping[str, Any]) -> str:
    if item["type"] == "extra_forbidden":
        return "unknown field"
    message = str(item["msg"])
    return message[:1].lower() + message[1:]


def _of_http_exception(error: HTTPException) -> Problem:
    # FastAPI wraps what is raised while it reads the body.
    if isinstance(error.__cause__, ConvenerError):
        return problem_of(error.__cause__)
    code = _ROUTING_CODES.get(error.status_code, InvalidRequest.code)
    detail = str(error.detail)
    if error.status_code in _ROUTING_CODES:
        detail = "there is no such route" if error.status_code == HTTPStatus.NOT_FOUND else detail
    return Problem(error.status_code, code, detail)


def install(app: FastAPI, on_malformed: Callable[[], None]) -> None:
    """Answer every error of `app` with a problem document; `on_malformed` counts what could not be read."""

    def answer(problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
        if problem.status in UNREADABLE:
            on_malformed()
        return problem.response(headers)

    async def on_error(request: Request, error: Exception) -> Response:
        return answer(problem_of(error, path=request.url.path))

    async def on_http_exception(request: Request, error: Exception) -> Response:
        http = cast("HTTPException", error)
        return answer(_of_http_exception(http), http.headers)

    app.add_exception_handler(ConvenerError, on_error)
    app.add_exception_handler(RequestValidationError, on_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    # `Exception` itself is left to `StrictRoute`: Starlette would answer it, and then raise it once more.


def documented(*errors: type[ConvenerError]) -> dict[int | str, dict[str, Any]]:
    """OpenAPI `responses` for a route that may answer with these errors."""
    by_status: dict[int | str, list[str]] = {}
    for error in (InvalidRequest, NotAuthenticated, *errors):
        codes = by_status.setdefault(error.http_status, [])
        if error.code not in codes:
            codes.append(error.code)
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        status: {
            "description": "code: " + ", ".join(f"`{code}`" for code in codes),
            "content": {MEDIA_TYPE: {"schema": schema}},
        }
        for status, codes in by_status.items()
    }
