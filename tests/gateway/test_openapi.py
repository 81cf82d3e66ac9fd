"""The description of the API is complete and true."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.gateway.support import Node

ROUTES = {
    "/api/conversations": {"get", "post"},
    "/api/conversations/{conversation_id}": {"get", "patch", "delete"},
    "/api/conversations/{conversation_id}/messages": {"post"},
    "/api/conversations/{conversation_id}/questions": {"get"},
    "/api/conversations/{conversation_id}/why": {"get"},
    "/api/conversations/{conversation_id}/answer": {"post"},
    "/api/conversations/{conversation_id}/events": {"get"},
    "/api/conversations/{conversation_id}/stream": {"get"},
    "/api/conversations/{conversation_id}/stop": {"post"},
    "/api/conversations/{conversation_id}/interrupt": {"post"},
    "/api/conversations/{conversation_id}/resume": {"post"},
    "/api/conversations/{conversation_id}/rpc/{method}": {"post"},
    "/api/conversations/{conversation_id}/move": {"post"},
    "/api/nodes": {"get"},
    "/api/nodes/{name}/drain": {"post"},
    "/api/kick": {"post"},
    "/api/tickets": {"post"},
    "/api/audit": {"get"},
    "/livez": {"get"},
    "/healthz": {"get"},
    "/readyz": {"get"},
    "/metrics": {"get"},
}


@pytest.fixture
async def description(node: Node) -> dict[str, Any]:
    return (await node.http.get("/openapi.json")).json()


async def test_all_routes_and_no_others(description: dict[str, Any]) -> None:
    assert {path: set(operations) for path, operations in description["paths"].items()} == ROUTES


async def test_every_operation_and_parameter_is_described(description: dict[str, Any]) -> None:
    names: list[str] = []
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            assert operation.get("description"), (method, path)
            names.append(operation["operationId"])
            for parameter in operation.get("parameters", []):
                assert parameter.get("description") or parameter["name"] == "limit", (method, path, parameter)
    assert len(names) == len(set(names))


async def test_errors_are_problems(description: dict[str, Any]) -> None:
    assert "HTTPValidationError" not in str(description)
    problem = description["components"]["schemas"]["Problem"]
    assert {"type", "title", "status", "code", "detail"} <= set(problem["properties"])
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            responses = operation["responses"]
            assert "422" not in responses
            for status, response in responses.items():
                if int(status) >= 400 and path.startswith("/api"):
                    content = response["content"]["application/problem+json"]
                    assert content["schema"] == {"$ref": "#/components/schemas/Problem"}, (method, path)
                    assert response["description"].startswith("code: `"), (method, path)
            if path.startswith("/api"):
                assert {"400", "401", "403", "503"} <= set(responses), (method, path)
                assert operation["security"] == [{"HTTPBearer": []}], (method, path)


async def test_all_references_lead_somewhere(description: dict[str, Any]) -> None:
    known = set(description["components"]["schemas"])
    assert set(re.findall(r"#/components/schemas/(\w+)", str(description))) <= known


@pytest.mark.parametrize(
    ("method", "path", "status", "schema"),
    [
        ("post", "/api/conversations", "200", "Created"),
        ("post", "/api/conversations", "201", "Created"),
        ("post", "/api/conversations/{conversation_id}/messages", "202", "Accepted"),
        ("post", "/api/conversations/{conversation_id}/answer", "202", "Accepted"),
        ("get", "/api/conversations/{conversation_id}/questions", "200", "QuestionList"),
        ("get", "/api/conversations/{conversation_id}/why", "200", "WhyAnswer"),
        ("get", "/api/conversations/{conversation_id}", "200", "Conversation"),
        ("get", "/api/conversations/{conversation_id}/events", "200", "EventList"),
        ("get", "/readyz", "503", "Ready"),
    ],
)
async def test_answers_have_a_schema(
    description: dict[str, Any], method: str, path: str, status: str, schema: str
) -> None:
    content = description["paths"][path][method]["responses"][status]["content"]["application/json"]
    assert content["schema"] == {"$ref": f"#/components/schemas/{schema}"}


async def test_answers_fit_their_schemas(node: Node) -> None:
    from convener.gateway import schemas

    made = await node.http.post("/api/conversations", json={"conversation_id": "c1", "message": {"data": 1}})
    schemas.Created.model_validate_json(made.content)
    schemas.Conversation.model_validate_json((await node.http.get("/api/conversations/c1")).content)
    schemas.ConversationList.model_validate_json((await node.http.get("/api/conversations")).content)
    schemas.ConversationList.model_validate_json((await node.http.get("/api/conversations?scope=cluster")).content)
    schemas.EventList.model_validate_json((await node.http.get("/api/conversations/c1/events")).content)
    schemas.NodeList.model_validate_json((await node.http.get("/api/nodes")).content)
    schemas.QuestionList.model_validate_json((await node.http.get("/api/conversations/c1/questions")).content)
    schemas.Audit.model_validate_json((await node.http.get("/api/audit")).content)
    schemas.Ready.model_validate_json((await node.http.get("/readyz?verbose")).content)
    schemas.Problem.model_validate_json((await node.http.get("/nope")).content)
