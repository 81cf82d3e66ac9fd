"""Routes for operators: health, metrics, nodes, audit."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Final

from fastapi import APIRouter, Path, Query
from starlette.responses import Response

from convener.errors import CallTimeout, NotAuthorized, NotFound, OwnerUnavailable, StoreUnavailable
from convener.gateway import schemas
from convener.gateway.answers import Json
from convener.gateway.context import Admin, Context, GatewayContext
from convener.gateway.problems import documented
from convener.gateway.strictroute import StrictRoute
from convener.ids import check_id
from convener.manager.ops import Readiness
from convener.telemetry.metrics import CONTENT_TYPE

health = APIRouter(route_class=StrictRoute, tags=["health"])
cluster = APIRouter(
    prefix="/api",
    route_class=StrictRoute,
    tags=["cluster"],
    responses=documented(NotAuthorized, StoreUnavailable),
)

_UNREADY: Final[dict[int | str, dict[str, Any]]] = {503: {"model": schemas.Ready, "description": "It may not."}}


def readiness(context: GatewayContext) -> Readiness:
    """Whether this node may receive traffic, its own shutdown counted."""
    if not context.running:
        return Readiness(False, checks={"gateway": "not running"})
    found = context.operations.readiness()
    if context.leaving or context.closing:
        return Readiness(False, checks={**found.checks, "gateway": "shutting down"}, fallbacks=found.fallbacks)
    return found


@health.get("/livez", response_model=schemas.Alive)
@health.get("/healthz", response_model=schemas.Alive)
async def alive() -> Response:
    """The process runs and its event loop turns."""
    return Json({"status": "alive"})


@health.get("/readyz", response_model=schemas.Ready, responses=_UNREADY)
async def ready(
    context: Context,
    verbose: Annotated[str | None, Query(description="Present: show what was looked at.")] = None,
) -> Response:
    """Whether the node may receive traffic; `degraded` still may."""
    found = readiness(context)
    state = ("degraded" if found.degraded else "ready") if found.ready else "unready"
    answer: dict[str, object] = {"status": state}
    if verbose is not None:
        answer["checks"] = dict(found.checks)
        if found.fallbacks:
            answer["fallbacks"] = [asdict(report) for report in found.fallbacks]
    return Json(answer, 200 if found.ready else 503)


@health.get("/metrics", response_class=Response)
async def metrics(context: Context) -> Response:
    """All metrics in Prometheus' text format."""
    context.metrics.node_ready.set(readiness(context).ready)
    return Response(context.metrics.render(), headers={"Content-Type": CONTENT_TYPE})


@cluster.get("/nodes", response_model=schemas.NodeList)
async def nodes(context: Context, _: Admin) -> Response:
    """The cluster's nodes as this one sees them."""
    return Json({"nodes": [schemas.node(info) for info in context.operations.nodes()]})


@cluster.post(
    "/nodes/{name}/drain", response_model=schemas.Drain, responses=documented(NotFound, OwnerUnavailable, CallTimeout)
)
async def drain(
    context: Context,
    _: Admin,
    name: Annotated[str, Path(description="Name of the node.")],
    body: schemas.DrainBody | None = None,
) -> Response:
    """Empty a node: it takes nothing new, its conversations hibernate or move, then its clients are sent away.

    It returns at once; asked again, it says how far that is. The process goes on until somebody ends it.
    """
    return Json(schemas.drain(await context.operations.drain(name, body.timeout if body else None)))


@cluster.post(
    "/conversations/{conversation_id}/move",
    response_model=schemas.Outcome,
    responses=documented(NotFound, OwnerUnavailable, CallTimeout),
)
async def move(
    context: Context,
    _: Admin,
    conversation_id: Annotated[str, Path(description="Id of the conversation.")],
    body: schemas.MoveBody,
) -> Response:
    """Let a node own a conversation: `moved`, `there` (it is already), or `busy` (a turn is under way)."""
    cid = check_id(conversation_id, "conversation_id")
    return Json({"outcome": await context.manager.move(cid, body.node, cut=body.cut)})


@cluster.post("/kick", response_model=schemas.Kicked)
async def kick(context: Context, _: Admin, body: schemas.KickBody | None = None) -> Response:
    """Look at once whether open connections still have their right, on all nodes, and close those that lost it."""
    who = body if body is not None else schemas.KickBody()
    checked, closed = await context.operations.kick(who.user_id, who.conversation_id)
    return Json({"checked": checked, "closed": closed})


@cluster.get("/audit", response_model=schemas.Audit)
async def audit(
    context: Context,
    _: Admin,
    conversation_id: Annotated[list[str] | None, Query(description="Which; default all. Repeatable.")] = None,
) -> Response:
    """Read logs, inboxes, slots and node records, and check the invariants on them."""
    cids = None if not conversation_id else [check_id(cid, "conversation_id") for cid in conversation_id]
    return Json(await context.operations.audit(cids))
