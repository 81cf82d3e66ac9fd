"""Errors as documents, and the table of their codes."""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

import convener
from convener import errors
from convener.errors import ConvenerError, InboxFull, InvalidRequest, LimitExceeded, NotAuthenticated, StoreFull
from convener.gateway.problems import problem_of
from convener.gateway.schemas import MessageBody

PACKAGE = Path(convener.__file__).parent
TABLE = PACKAGE.parent.parent / "docs" / "reference" / "errors.md"
# Given by routing alone, in `problems.py`.
ROUTING = {"method_not_allowed": 405}


# Errors that live beside what raises them are errors too.
for module in pkgutil.walk_packages([str(PACKAGE)], "convener."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)


def classes(base: type[ConvenerError] = ConvenerError) -> Iterator[type[ConvenerError]]:
    yield base
    for derived in base.__subclasses__():
        yield from classes(derived)


def raised_codes() -> Iterator[tuple[str, str]]:
    """(class name, code) of every raise in the package that gives a code of its own."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and hasattr(errors, node.func.id):
                for keyword in node.keywords:
                    if keyword.arg == "code" and isinstance(keyword.value, ast.Constant):
                        yield node.func.id, str(keyword.value.value)


def expected() -> dict[str, tuple[int, bool]]:
    """Code → (HTTP status, whether a retry helps), from the code."""
    found = {cls.code: (cls.http_status, cls.retryable) for cls in classes()}
    found |= {code: (status, False) for code, status in ROUTING.items()}
    for name, code in raised_codes():
        cls: type[ConvenerError] = getattr(errors, name)
        found[code] = (cls.http_status, cls.retryable)
    return found


def documented() -> dict[str, tuple[int, bool]]:
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (yes|no) \| .+ \|$", TABLE.read_text(), re.MULTILINE)
    return {code: (int(status), retry == "yes") for code, status, retry in rows}


def test_the_table_of_codes_is_complete_and_true() -> None:
    assert documented() == expected()


def test_the_table_is_in_order() -> None:
    assert list(documented()) == sorted(documented())


def test_codes_of_raises_are_found() -> None:
    assert ("InvalidRequest", "invalid_id") in set(raised_codes())


def test_an_error_becomes_a_document() -> None:
    answer = problem_of(LimitExceeded(limit=2, running=["a", "b"], retry_after=2.2)).response()
    assert answer.status_code == 429
    assert answer.media_type == "application/problem+json"
    assert answer.headers["retry-after"] == "3"
    assert json.loads(bytes(answer.body)) == {
        "type": "about:blank",
        "title": "Too Many Requests",
        "status": 429,
        "code": "limit_exceeded",
        "detail": "2 of 2 conversations are running",
        "retry_after": 2.2,
        "limit": 2,
        "current": 2,
        "running": ["a", "b"],
    }


def test_a_retry_is_never_announced_for_at_once() -> None:
    assert problem_of(InboxFull("full", retry_after=0.01)).response().headers["retry-after"] == "1"


def test_the_titles_of_all_errors_are_status_phrases() -> None:
    for cls in classes():
        document = json.loads(bytes(problem_of(cls("x")).response().body))
        assert document["status"] == cls.http_status
        assert document["code"] == cls.code
        assert document["title"]


def test_who_is_not_authenticated_is_told_how() -> None:
    assert problem_of(NotAuthenticated("no")).response().headers["www-authenticate"] == "Bearer"
    assert "www-authenticate" not in problem_of(StoreFull("no")).response().headers


def test_an_unexpected_error_says_nothing_about_itself() -> None:
    problem = problem_of(RuntimeError("password=secret"))
    assert (problem.status, problem.code) == (500, "internal")
    assert "secret" not in json.dumps(problem.members())


def test_a_timeout_is_worth_a_retry() -> None:
    problem = problem_of(TimeoutError())
    assert (problem.status, problem.code) == (503, "owner_unavailable")
    assert problem.retry_after is not None


def test_validation_errors_name_the_fields() -> None:
    with pytest.raises(ValidationError) as caught:
        MessageBody.model_validate({"overlap": "never", "colour": 1})
    problem = problem_of(caught.value)
    assert (problem.status, problem.code) == (InvalidRequest.http_status, "invalid_request")
    assert "data: field required" in problem.detail
    assert "colour: unknown field" in problem.detail
    assert {each["field"] for each in problem.extra["errors"]} == {"data", "overlap", "colour"}


def test_a_missing_body_is_named() -> None:
    error = RequestValidationError([{"type": "missing", "loc": ("body",), "msg": "Field required", "input": None}])
    assert problem_of(error).detail == "body: field required"
