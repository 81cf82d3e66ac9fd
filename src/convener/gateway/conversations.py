"""``/api/conversations``: create, find, list, change, send, answer, call, stop, resume, delete."""

from __future__ import annotations

from typing import Annotated, Any, Final

from fastapi import APIRouter, Path, Query
from starlette.responses import Response

from convener.core.directory import LoopStatus
from convener.errors import (
    AskClosed,
    CallTimeout,
    ConvenerError,
    ConversationBusy,
    ConversationFailed,
    ConversationHeld,
    ConversationStopped,
    InboxFull,
    InvalidRequest,
    LimitExceeded,
    NotAuthorized,
    NotFound,
    OwnerUnavailable,
    PayloadTooLarge,
    RemoteError,
    StoreFull,
    StoreUnavailable,
)
from convener.gateway import schemas
from convener.gateway import why as explanation
from convener.gateway.access import not_found
from convener.gateway.answers import Json
from convener.gateway.auth import Identity
from convener.gateway.context import Caller, Context, GatewayContext
from convener.gateway.problems import documented
from convener.gateway.strictroute import StrictRoute
from convener.ids import check_id, new_id
from convener.manager.base import AgentLoopInfo

MAX_SCANNED: Final = 5000
"""Rows that one request looks at for those with a given status; the rest is for the next page."""

router = APIRouter(
    prefix="/api/conversations",
    route_class=StrictRoute,
    tags=["conversations"],
    responses=documented(NotAuthorized, StoreUnavailable),
)

ConversationId = Annotated[str, Path(description="The conversation.")]
_CLOSED = (ConversationStopped, ConversationFailed, ConversationHeld)
_SEND_ERRORS = (NotFound, PayloadTooLarge, InboxFull, LimitExceeded, ConversationBusy, *_CLOSED)


@router.post(
    "",
    status_code=201,
    response_model=schemas.Created,
    responses={200: {"model": schemas.Created, "description": "It existed already."}}
    | documented(*_SEND_ERRORS, NotAuthorized, OwnerUnavailable, StoreFull),
)
async def create(context: Context, caller: Caller, body: schemas.CreateBody | None = None) -> Response:
    """Create a conversation and start it, or return the one that has this id.

    With `message`, that message is sent at once; with ids of your own the whole request may be repeated.
    """
    wanted = body if body is not None else schemas.CreateBody()
    cid = new_id() if wanted.conversation_id is None else check_id(wanted.conversation_id, "conversation_id")
    info = await _start(context, caller, cid, wanted)
    answer = schemas.created(info)
    if wanted.message is not None:
        answer["message"] = await send_message(context, caller, cid, wanted.message)
    return Json(answer, 201 if info.created else 200)


async def _start(context: GatewayContext, caller: Identity, cid: str, wanted: schemas.CreateBody) -> AgentLoopInfo:
    user = await context.access.starter(caller, cid, wanted.user_id)
    try:
        return await context.manager.maybe_start_agent_loop(cid, user_id=user, metadata=wanted.metadata)
    except NotAuthorized:
        raise not_found(cid) from None
    except ConversationStopped:
        # It exists, which is what was asked; a message sent along will be refused.
        return await context.access.reach(caller, cid, "read")


@router.get("", response_model=schemas.ConversationList)
async def list_conversations(
    context: Context,
    caller: Caller,
    status: Annotated[LoopStatus | None, Query(description="Only those in this state.")] = None,
    cursor: Annotated[str | None, Query(description="`next` of the page before.")] = None,
    limit: Annotated[schemas.PageLimit, Query()] = 100,
    user_id: Annotated[str | None, Query(description="Whose; default the caller's.")] = None,
    scope: Annotated[
        str | None,
        Query(pattern="^cluster$", description="`cluster`: what is loaded anywhere, for admins."),
    ] = None,
    node: Annotated[str | None, Query(description="With scope=cluster: only what this node runs.")] = None,
) -> Response:
    """All conversations of a user, newest activity first, hibernated and stopped ones too.

    With `scope=cluster` those of all users that are loaded on some node, in order of their ids.
    """
    if scope is None and node is not None:
        raise InvalidRequest("node: only with scope=cluster")
    if scope is not None:
        context.access.admin(caller)
        infos, following = await _list_cluster(context, user_id, node, status, cursor, limit)
    else:
        user = context.access.listed_user(caller, user_id)
        infos, following = await _list_user(context, user, status, cursor, limit)
    return Json({"conversations": [schemas.conversation(info) for info in infos], "next": following})


async def _list_user(
    context: GatewayContext, user: str, status: str | None, cursor: str | None, limit: int
) -> tuple[list[AgentLoopInfo], str | None]:
    before = _place(cursor)
    found: list[AgentLoopInfo] = []
    scanned = 0
    while scanned < MAX_SCANNED:
        page = await context.manager.list_conversations(user, before, limit)
        if not page:
            return found, None
        for row in page:
            before = (row.activity, row.info.conversation_id)
            if status is None or row.info.status == status:
                found.append(row.info)
                if len(found) == limit:
                    return found, f"{before[0]}.{before[1]}"
        scanned += len(page)
    return found, None if before is None else f"{before[0]}.{before[1]}"


def _place(cursor: str | None) -> tuple[int, str] | None:
    if cursor is None:
        return None
    activity, _, cid = cursor.partition(".")
    if not (activity.isascii() and activity.isdigit() and len(activity) < 16):
        raise InvalidRequest("cursor: not the `next` of a page")
    return int(activity), check_id(cid, "cursor")


async def _list_cluster(
    context: GatewayContext,
    user: str | None,
    node: str | None,
    status: str | None,
    cursor: str | None,
    limit: int,
) -> tuple[list[AgentLoopInfo], str | None]:
    infos = [
        info
        for info in await context.manager.get_agent_loop_info(user)
        if (node is None or info.node == node)
        and (status is None or info.status == status)
        and (cursor is None or info.conversation_id > cursor)
    ]
    infos.sort(key=lambda info: info.conversation_id)
    page = infos[:limit]
    return page, page[-1].conversation_id if len(infos) > limit else None


@router.get("/{conversation_id}", response_model=schemas.Conversation, responses=documented(NotFound))
async def show(context: Context, caller: Caller, conversation_id: ConversationId) -> Response:
    """One conversation, loaded or not."""
    return Json(schemas.conversation(await context.access.reach(caller, conversation_id, "read")))


@router.patch(
    "/{conversation_id}",
    response_model=schemas.Conversation,
    responses=documented(NotFound, PayloadTooLarge),
)
async def change(
    context: Context, caller: Caller, conversation_id: ConversationId, body: schemas.PatchBody
) -> Response:
    """Replace the metadata."""
    await context.access.require(caller, conversation_id, "update")
    return Json(schemas.conversation(await context.manager.set_metadata(conversation_id, body.metadata)))


@router.delete("/{conversation_id}", status_code=204, responses=documented(NotFound, OwnerUnavailable))
async def delete(context: Context, caller: Caller, conversation_id: ConversationId) -> Response:
    """Stop it, then erase log and state."""
    await context.access.require(caller, conversation_id, "delete")
    await context.manager.delete(conversation_id)
    return Response(status_code=204)


@router.post(
    "/{conversation_id}/messages",
    status_code=202,
    response_model=schemas.Accepted,
    responses=documented(*_SEND_ERRORS, OwnerUnavailable, StoreFull),
)
async def send(
    context: Context, caller: Caller, conversation_id: ConversationId, body: schemas.MessageBody
) -> Response:
    """Send a message. The answer means that it is stored and will be answered, whatever happens to nodes."""
    await context.access.require(caller, conversation_id, "send")
    return Json(await send_message(context, caller, conversation_id, body), 202)


async def send_message(
    context: GatewayContext, caller: Identity, conversation_id: str, body: schemas.MessageBody
) -> dict[str, Any]:
    """SEND to a conversation; refusals are counted by code."""
    try:
        result = await context.manager.send_event_to_conversation(
            conversation_id,
            body.data,
            user_id=caller.user_id or None,
            message_id=body.message_id,
            overlap=body.overlap,
        )
    except ConvenerError as error:
        context.metrics.messages.labels(result=error.wire_code).inc()
        raise
    return schemas.accepted(result)


@router.get("/{conversation_id}/questions", response_model=schemas.QuestionList, responses=documented(NotFound))
async def questions(context: Context, caller: Caller, conversation_id: ConversationId) -> Response:
    """The questions of the agent that wait for an answer."""
    await context.access.reach(caller, conversation_id, "read")
    found = await context.manager.questions(conversation_id)
    return Json({"questions": [schemas.question(asked) for asked in found]})


@router.get("/{conversation_id}/why", response_model=explanation.WhyAnswer, responses=documented(NotFound))
async def why(context: Context, caller: Caller, conversation_id: ConversationId) -> Response:
    """Who owns it and since when, every ownership with the reason why it began, and what it waits for now."""
    await context.access.reach(caller, conversation_id, "read")
    return Json(explanation.answer(await context.operations.why(conversation_id)))


@router.post(
    "/{conversation_id}/answer",
    status_code=202,
    response_model=schemas.Accepted,
    responses=documented(NotFound, AskClosed, *_CLOSED, PayloadTooLarge, InboxFull, OwnerUnavailable, StoreFull),
)
async def answer(
    context: Context, caller: Caller, conversation_id: ConversationId, body: schemas.AnswerBody
) -> Response:
    """Answer a question of the agent; the first answer counts, later ones are refused with `ask_closed`.

    Data that does not fit the question's schema is refused with `invalid_answer`, and the question stays open.
    """
    await context.access.require(caller, conversation_id, "answer")
    result = await context.manager.answer(
        conversation_id, body.ask_id, body.data, message_id=body.message_id, user_id=caller.user_id or None
    )
    return Json(schemas.accepted(result), 202)


@router.post(
    "/{conversation_id}/interrupt",
    response_model=schemas.Outcome,
    responses=documented(NotFound, *_CLOSED, InboxFull),
)
async def interrupt(
    context: Context, caller: Caller, conversation_id: ConversationId, body: schemas.Interrupt | None = None
) -> Response:
    """Stop generating: `interrupted`, `interrupting` (recorded), `stale` (that turn has ended) or `idle`."""
    await context.access.require(caller, conversation_id, "interrupt")
    return Json({"outcome": await context.manager.interrupt(conversation_id, body.turn if body else None)})


@router.post(
    "/{conversation_id}/stop", response_model=schemas.Outcome, responses=documented(NotFound, OwnerUnavailable)
)
async def stop(
    context: Context, caller: Caller, conversation_id: ConversationId, _: schemas.Nothing | None = None
) -> Response:
    """Stop it on purpose: `stopped`, `stopping` (recorded, being finished) or `already_stopped`."""
    await context.access.require(caller, conversation_id, "stop")
    return Json({"outcome": await context.manager.close_session(conversation_id)})


@router.post(
    "/{conversation_id}/resume", response_model=schemas.Outcome, responses=documented(NotFound, OwnerUnavailable)
)
async def resume(
    context: Context, caller: Caller, conversation_id: ConversationId, _: schemas.Nothing | None = None
) -> Response:
    """Let it go on after a stop, after it was given up (`failed`), or where a cut-off turn waits to be repeated.

    `resumed`, or `running` if there was nothing to resume.
    """
    await context.access.require(caller, conversation_id, "resume")
    return Json({"outcome": await context.manager.resume(conversation_id)})


@router.post(
    "/{conversation_id}/rpc/{method}",
    response_model=schemas.CallResult,
    responses=documented(NotFound, PayloadTooLarge, OwnerUnavailable, CallTimeout, RemoteError),
)
async def call(
    context: Context,
    caller: Caller,
    conversation_id: ConversationId,
    method: Annotated[str, Path(description="Name of the method.")],
    body: schemas.CallBody | None = None,
) -> Response:
    """Call a method of the owner, wherever it runs."""
    await context.access.require(caller, conversation_id, "call")
    wanted = body if body is not None else schemas.CallBody()
    return Json({"result": await context.manager.call(conversation_id, method, wanted.params, wanted.timeout)})
