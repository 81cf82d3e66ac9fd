"""The streaming example with a model that streams: live pieces, history, and an interrupt that reaches the model."""

from __future__ import annotations

import shutil
from collections.abc import AsyncGenerator, Generator

import pytest

from tests.cluster.clients import Client, Clients
from tests.examples.lessons import read
from tests.examples.model_server import ModelServer, model_server
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")

COLOURS = [" Blue", ", of", " course", "."]


@pytest.fixture(scope="module")
def model() -> Generator[ModelServer]:
    with model_server() as made:
        yield made


@pytest.fixture(scope="module")
def url(model: ModelServer, tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """The example, started and asked once as its docstring says."""
    model.words = COLOURS
    given = {"OPENAI_BASE_URL": model.url, "OPENAI_API_KEY": "sk-secret", "MODEL": "small"}
    with read("llm_stream", tmp_path_factory.mktemp("llm"), given) as reader:
        yield f"http://127.0.0.1:{reader.port}"


@pytest.fixture
async def clients() -> AsyncGenerator[Clients]:
    made = Clients()
    yield made
    await made.aclose()


def text_of_deltas(client: Client, turn: str) -> str:
    """What the client has seen of an answer that is being written; each delta goes on where the last one ended."""
    text = ""
    for delta in client.named("delta"):
        if delta["turn"] == turn:
            assert (delta["attempt"], delta["part"], delta["type"], delta["offset"]) == (1, "text", "text", len(text))
            text += delta["data"]
    return text


def test_it_asks_the_model_of_the_environment_with_its_key(url: str, model: ModelServer) -> None:
    assert model.requests[0]["model"] == "small"
    assert model.requests[0]["stream"] is True
    assert model.keys[0] == "Bearer sk-secret"
    assert model.said(0) == [("system", "You are brief."), ("user", "Name a colour.")]


async def test_pieces_come_while_the_model_writes_and_history_is_passed(
    url: str, model: ModelServer, clients: Clients
) -> None:
    client = await clients.join(url, "pieces", user_id="alice")
    model.words = ["It", " is", "…", " green", "."]
    model.released.clear()
    await client.say("Name a colour.")
    await wait_until(lambda: text_of_deltas(client, "t1") == "It is", "the client has seen the first words")
    assert client.of_kind("reply") == [], "nothing of it is in the log yet"
    model.released.set()
    await client.wait_for(1, "turn_done")
    assert [reply["data"] for reply in client.of_kind("reply")] == [{"text": "It is green."}]
    assert "It is green.".startswith(text_of_deltas(client, "t1"))
    await client.say("And another one?")
    await client.wait_for(2, "turn_done")
    assert model.said(-1) == [
        ("system", "You are brief."),
        ("user", "Name a colour."),
        ("assistant", "It is green."),
        ("user", "And another one?"),
    ]


async def test_an_interrupt_stops_the_request_to_the_model_and_keeps_what_was_said(
    url: str, model: ModelServer, clients: Clients
) -> None:
    client = await clients.join(url, "interrupted", user_id="alice")
    model.words = ["Once", " upon", "…", " never"]
    model.released.clear()
    abandoned = model.abandoned
    await client.say("Tell me a story.")
    await wait_until(lambda: text_of_deltas(client, "t1") == "Once upon", "the client has seen the first words")
    assert (await client.call("interrupt", {"turn": "t1"}))["outcome"] in ("interrupted", "interrupting")
    await client.wait_for(1, "turn_interrupted")
    await wait_until(lambda: model.abandoned == abandoned + 1, "the request to the model has ended")
    assert [reply["data"] for reply in client.of_kind("reply")] == [{"text": "Once upon", "partial": True}]
    model.words = COLOURS
    await client.say("Name a colour, then.")
    await client.wait_for(1, "turn_done")
    assert model.said(-1)[1:] == [
        ("user", "Tell me a story."),
        ("assistant", "Once upon"),
        ("user", "Name a colour, then."),
    ]
