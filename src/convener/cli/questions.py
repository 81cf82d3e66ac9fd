"""``convener answer``, and questions of the agent as commands show them."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Annotated, Any, cast

import typer

from convener.cli.client import NodeAnswered, NodeClient
from convener.cli.options import DEFAULT_URL, Conversation, Json, MessageId, Question, Timeout, Token, Url
from convener.cli.output import print_json, print_table
from convener.cli.send import post_again, print_accepted
from convener.ids import new_id

_COLUMNS = {"ask_id": "QUESTION", "prompt": "ASKS", "schema": "ANSWER FITS", "deadline": "UNTIL"}


def answer(
    cid: Conversation,
    ask_id: Question,
    data: Annotated[
        str,
        typer.Argument(
            help="The answer: JSON, or plain text that is taken as a string; - reads it from standard input.",
            metavar="DATA",
        ),
    ],
    message_id: MessageId = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    timeout: Timeout = 30,
    json: Json = False,
) -> None:
    """Answer a question of the agent; `convener show CID` lists those that are open.

    The first answer counts. One that does not fit the question is refused, and the question stays open.

    Examples: `convener answer c1 t5.1 yes`, `convener answer c1 t5.1 '{"colour": "red"}'`
    """
    given = data_of(sys.stdin.read().rstrip("\n") if data == "-" else data)
    with NodeClient(url, token, timeout) as client:
        accepted = post_answer(client, cid, ask_id, given, message_id or new_id())
    if json:
        print_json(accepted)
    else:
        print_accepted(accepted)


def post_answer(client: NodeClient, cid: str, ask_id: str, data: Any, message_id: str) -> Any:
    """Give an answer; the same message id again does nothing twice. Raises as `NodeClient.request`."""
    body = {"ask_id": ask_id, "message_id": message_id, "data": data}
    return post_again(client, f"/api/conversations/{cid}/answer", body)


def data_of(text: str) -> Any:
    """What somebody has typed, as a JSON value: the value if it is JSON, else the text itself."""
    try:
        return json_module.loads(text)
    except (ValueError, RecursionError):
        return text


def open_questions(client: NodeClient, cid: str) -> list[dict[str, Any]]:
    """The questions of a conversation that wait for an answer. Raises as `NodeClient.get`."""
    try:
        return client.get(f"/api/conversations/{cid}/questions").get("questions") or []
    except NodeAnswered as error:
        if error.status != HTTPStatus.NOT_FOUND:
            raise
        # A node of an older version; or the conversation is gone by now.
        return []


def print_questions(questions: Sequence[Mapping[str, Any]]) -> None:
    """A table of open questions."""
    print_table([{**asked, "prompt": _words(asked.get("prompt"))} for asked in questions], _COLUMNS, "")


def _words(prompt: Any) -> Any:
    """The text of a prompt that is an object with one, else all of it."""
    return cast("dict[str, Any]", prompt).get("text", prompt) if isinstance(prompt, dict) else prompt
