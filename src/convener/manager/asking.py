"""Questions of a running turn: what an answer must look like, and who waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import jsonschema
from referencing import Registry

from convener.core.ledger import Answer
from convener.errors import InvalidRequest, OwnershipLost

Schema = Mapping[str, Any] | bool


def check_schema(schema: Schema | None) -> None:
    """Raises `InvalidRequest` if `schema` is not a JSON Schema (draft 2020-12)."""
    try:
        if schema is not None:
            jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise InvalidRequest(f"the schema of the question is not a JSON Schema: {error.message}") from error


def check_answer(schema: Schema | None, data: Any) -> None:
    """Raises `InvalidRequest`, code ``invalid_answer``, if `data` does not fit."""
    if schema is None:
        return
    # An empty registry: a reference must never make this server fetch anything.
    validator: Any = jsonschema.Draft202012Validator(schema, registry=Registry())
    try:
        error = next(iter(validator.iter_errors(data)), None)
    except Exception as failure:
        raise InvalidRequest(f"the answer cannot be checked: {failure}", code="invalid_answer") from failure
    if error is not None:
        place = "".join(f"[{part!r}]" for part in error.absolute_path)
        raise InvalidRequest(f"the answer{place} does not fit: {error.message}", code="invalid_answer")


class Answers:
    """The answers of one turn, as they come.

    Args:
        known: what the log has already; answers that come later are added to it by whoever takes them in.
        changed: called when the turn begins or ends to wait.
    """

    def __init__(self, known: Mapping[str, Answer], changed: Callable[[], None]) -> None:
        self._known = known
        self._changed = changed
        self._futures: dict[str, asyncio.Future[Answer]] = {}
        self._left: float | None = None
        self.limit: asyncio.Timeout | None = None
        """The turn's own limit of time: it stands still while a person thinks."""

    @property
    def waiting(self) -> bool:
        """Whether the turn waits for an answer."""
        return any(not future.done() for future in self._futures.values())

    def has(self, ask_id: str) -> bool:
        """Whether the answer is there."""
        return ask_id in self._known

    async def wait(self, ask_id: str) -> Answer:
        """The answer, as soon as it is there."""
        if ask_id in self._known:
            return self._known[ask_id]
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._futures[ask_id] = future
        try:
            self._pause()
            return await future
        finally:
            del self._futures[ask_id]
            self._go_on()

    def come(self, ask_id: str, answer: Answer) -> None:
        """An answer was taken in."""
        future = self._futures.get(ask_id)
        if future is not None and not future.done():
            future.set_result(answer)

    def close(self) -> None:
        """The turn is over: whoever has not heard by now (a task that the agent has left behind) never will.

        Raised there is `OwnershipLost`.
        """
        for future in self._futures.values():
            if not future.done():
                future.set_exception(OwnershipLost("the turn is over"))

    def changed(self) -> None:
        """Whether the turn does nothing but wait may be another matter now: it does something else as well, or no
        more.
        """
        if self._futures:
            self._changed()

    def _pause(self) -> None:
        limit = self.limit
        # One that has passed cannot be moved any more.
        if limit is not None and not limit.expired():
            when = limit.when()
            if when is not None:
                self._left = when - asyncio.get_running_loop().time()
                limit.reschedule(None)
        self._changed()

    def _go_on(self) -> None:
        limit, left = self.limit, self._left
        if not self._futures and limit is not None and left is not None and not limit.expired():
            limit.reschedule(asyncio.get_running_loop().time() + left)
            self._left = None
        self._changed()
