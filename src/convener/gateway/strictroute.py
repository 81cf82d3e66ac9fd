"""Routes whose JSON bodies are read strictly (`jsontext`), and whose faults are answered."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from convener.errors import ConvenerError, InvalidRequest
from convener.gateway.jsontext import parse
from convener.gateway.problems import problem_of


class _StrictRequest(Request):
    async def json(self) -> Any:
        """The body; what it raises reaches `problems` as the cause of FastAPI's own exception."""
        return parse(await self.body())


def _has_body(request: Request) -> bool:
    return "transfer-encoding" in request.headers or request.headers.get("content-length", "0") != "0"


def _is_json(media_type: str) -> bool:
    kind = media_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


class StrictRoute(APIRoute):
    """A route that takes JSON and nothing else.

    Forms and plain text are what a foreign page can send without asking, so guessing would be a hole as well.
    """

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """FastAPI's handler, given a request of ours."""
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            if self.body_field is not None and _has_body(request):
                given = request.headers.get("content-type", "")
                if not _is_json(given):
                    raise InvalidRequest(f"the body must be application/json, not {given or 'untyped'}")
            try:
                return await handle(_StrictRequest(request.scope, request.receive))
            except (ConvenerError, HTTPException, RequestValidationError):
                raise
            except Exception as error:
                # Handled here because Starlette answers in its own words and then raises it once more.
                return problem_of(error, path=request.url.path).response()

        return strict
