"""The HTTP API as one FastAPI application."""

from __future__ import annotations

from typing import Any, cast

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.middleware.cors import CORSMiddleware

from convener.gateway import conversations, events, operate, problems, schemas, tickets
from convener.gateway.context import GatewayContext
from convener.version import __version__

_DESCRIPTION = """Conversations between people and AI agents on a cluster of servers.

Errors are `application/problem+json` (RFC 9457) with a stable `code`. Times are RFC 3339; `ts` in events is
milliseconds since 1970. Ids are 1 to 128 of `A-Z a-z 0-9 . _ ~ : @ -`."""


def make_api(context: GatewayContext) -> FastAPI:
    """The application; it has no lifespan of its own (see `asgi.py`)."""
    app = FastAPI(
        title="convener",
        version=__version__,
        description=_DESCRIPTION,
        openapi_url="/openapi.json",
        # Both would load scripts from a foreign server.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.context = context
    problems.install(app, context.metrics.malformed.labels(where="http").inc)
    app.include_router(conversations.router)
    app.include_router(events.router)
    app.include_router(tickets.router)
    app.include_router(operate.cluster)
    if context.settings.ops_port is None:
        app.include_router(operate.health)
    origins = context.settings.cors_origins
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST", "PATCH", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "Last-Event-ID"],
            expose_headers=["Retry-After"],
            max_age=600,
        )
    app.openapi = lambda: _openapi(app)
    return app


def make_health(context: GatewayContext) -> FastAPI:
    """Health and metrics alone, for `ops_port`."""
    app = FastAPI(title="convener", version=__version__, openapi_url=None, docs_url=None, redoc_url=None)
    app.state.context = context
    problems.install(app, context.metrics.malformed.labels(where="http").inc)
    app.include_router(operate.health)
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's description, with our problems in place of its own validation errors."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    description = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    for path in cast("dict[str, dict[str, Any]]", description["paths"]).values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    components = cast("dict[str, Any]", description["components"]["schemas"])
    for name in ("HTTPValidationError", "ValidationError"):
        components.pop(name, None)
    components["Problem"] = schemas.Problem.model_json_schema()
    app.openapi_schema = description
    return description
